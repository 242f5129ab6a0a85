"""Sphinx's settings: Markdown pages by MyST, the theme furo, and the API reference from the docstrings."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

project = "ssd_fast"
release = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["requirements.lock"]

html_theme = "furo"
html_title = "ssd_fast"
html_show_copyright = False
smartquotes = False  # they would turn --option into one dash
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 3  # headings down to this level can be linked to: page.md#heading

# The reference needs signatures and docstrings only: nothing that wants a GPU or a launcher is imported.
autodoc_mock_imports = ["nvidia", "horovod", "apex", "mlperf_loadgen", "hotcoco"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True


def setup(app: Any) -> None:
    """Connect the docstrings' conversion."""
    app.connect("autodoc-process-docstring", convert_docstring)


def convert_docstring(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring of plain text into reStructuredText, in place.

    A line `name: text` or `name, name: text` becomes a list entry, as does a line that begins with Returns, Raises or
    Source; the lines after it belong to it. Indented paragraphs stay as they are written.
    """
    converted: list[str] = []
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        rows = paragraph.split("\n")
        if all(row.startswith("  ") for row in rows):
            converted += ["::", "", *(f"    {row}" for row in rows), ""]
            continue
        in_list = False
        for row in rows:
            entry = re.match(
                r"(?:(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): |(?=(?:Returns|Raises|Source)\b))(?P<text>.*)", row
            )
            if entry:
                names = entry["names"]
                head = f"**{_escape(names)}**: " if names else ""
                converted += ([] if in_list else [""]) + [f"- {head}{_escape(entry['text'])}"]
                in_list = True
            else:
                converted.append(("  " if in_list else "") + _escape(row.strip()))
        converted.append("")
    lines[:] = converted


def _escape(text: str) -> str:
    """Plain text as reStructuredText; what stands in backticks is set as code."""
    pieces = text.split("`")
    escaped = [re.sub(r"([\\*_|<>])", r"\\\1", piece) for piece in pieces[::2]]
    for number, code in enumerate(pieces[1::2]):
        escaped.insert(2 * number + 1, f"``{code}``")
    return "".join(escaped)
