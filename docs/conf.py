"""Sphinx's settings: Markdown pages by MyST, the theme furo, and the API reference from the docstrings."""

import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
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

# Docstrings are plain text with entries `name: text`, `name, name: text`, and `Returns …`, `Raises …`, `Source …`.
NAMES = r"\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*"
ENTRY = re.compile(rf"(?:(?P<names>{NAMES}): (?P<text>.*)|(?:Returns|Raises|Source)\b)")
NEXT_ENTRY = re.compile(rf"(?<=[.;]) (?={NAMES}: )")


def setup(app: Any) -> None:
    """Connect the docstrings' conversion."""
    app.connect("autodoc-process-docstring", convert_docstring)


def convert_docstring(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring of plain text into reStructuredText, in place: entries become a list, the rest paragraphs.

    Lines after an entry belong to it. Indented paragraphs stay as they are written.
    """
    converted: list[str] = []
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        rows = paragraph.split("\n")
        if all(row.startswith("  ") for row in rows):
            converted += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            converted += [*_convert_paragraph(rows), ""]
    lines[:] = converted


def _convert_paragraph(rows: list[str]) -> Iterator[str]:
    in_list = False
    for row in itertools.chain.from_iterable(map(NEXT_ENTRY.split, rows)):
        entry = ENTRY.match(row)
        if entry is None:
            yield ("  " if in_list else "") + _escape(row.strip())
            continue
        if not in_list:
            yield ""
        in_list = True
        yield f"- **{_escape(entry['names'])}**: {_escape(entry['text'])}" if entry["names"] else f"- {_escape(row)}"


def _escape(text: str) -> str:
    """Plain text as reStructuredText; what stands in backticks is set as code."""
    pieces = text.split("`")
    escaped = [re.sub(r"([\\*_|<>])", r"\\\1", piece) for piece in pieces[::2]]
    for number, code in enumerate(pieces[1::2]):
        escaped.insert(2 * number + 1, f"``{code}``")
    return "".join(escaped)
