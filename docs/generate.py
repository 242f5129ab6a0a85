"""Write the pages and drawings that follow from the code: docs/configuration.md, docs/cli.md, the list of files in
docs/architecture.md, and the SVG files in docs/images.

    python docs/generate.py             write them
    python docs/generate.py --check     exit with status 1 if one of them is stale
"""

import ast
import enum
import inspect
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

import typer
from drawings import draw_data_flow, draw_rooms

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
FILES_BEGIN, FILES_END = "<!-- files: written by docs/generate.py -->", "<!-- end of files -->"
REQUIRED = "required"
FOLDERS = ("ssd_fast", "dali_pipelines", "kernels")

CONFIGURATION = """\
# Configuration

A recipe is a TOML file. It states only the keys that differ from the defaults below, which are the SSD300 recipe of
MLPerf Training. Every section and every key may be left out.

- `base = "other.toml"` at the top of a recipe starts from another recipe, whose path is relative to the file.
- `--set section.key=value` on the command line changes one more key. The option may be repeated.
- An unknown key or a wrong value is rejected before anything starts. The message names the file, the key, its value and
  what was expected.
- The folder of a run holds `config.toml`, the complete configuration that the run used.

<!-- This page is written by docs/generate.py from ssd_fast/config/sections.py. -->
"""

RECIPES = """\
## Recipes of this repository

The learning rate is that after warm-up. It follows from `optimizer.learning_rate` and the global batch. Where a recipe
names no machines, the row is that of a single rank. `ssd1200` is for inference.
"""

CLI = """\
# Command line

`ssd-fast VERB` and `python -m ssd_fast VERB` are the same. An error is one line on stderr and exit status 1;
`ssd-fast --traceback VERB …` shows where in the code it arose.

<!-- This page is written by docs/generate.py from ssd_fast/__main__.py and ssd_fast/inference_verbs.py. -->
"""

sys.path.insert(0, str(REPOSITORY))


def generate() -> dict[Path, str]:
    """Path and content of every generated file."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "configuration.md": configuration_page(),
        DOCS / "cli.md": cli_page(),
        architecture: with_files(architecture.read_text(encoding="utf-8")),
        DOCS / "images" / "data_flow.svg": draw_data_flow(),
        DOCS / "images" / "rooms.svg": draw_rooms(),
    }


def configuration_page() -> str:
    """A table of keys for each section of a recipe."""
    from ssd_fast.config.sections import Config

    schema = Config.model_json_schema()
    page = [CONFIGURATION, RECIPES, _recipe_table()]
    for name in schema["properties"]:
        annotation = Config.model_fields[name].annotation
        assert annotation is not None
        section = schema["$defs"][annotation.__name__]
        rows = [
            (f"`{key}`", _type_text(value), _default_text(value), _cell(value.get("description", "")))
            for key, value in section["properties"].items()
        ]
        page += [f"## [{name}]\n", section["description"] + "\n", _table(("key", "type", "default", "meaning"), rows)]
    return "\n".join(page)


def _recipe_table() -> str:
    """A row for each recipe in configs/, with what follows from its keys."""
    from ssd_fast.config.recipe import load_config

    rows = []
    for file in sorted((REPOSITORY / "configs").glob("*.toml"), key=lambda file: _natural(file.stem)):
        config = load_config(file)
        nodes, per_node = config.system.nodes, config.system.gpus_per_node
        ranks = nodes * per_node if nodes and per_node else 1
        global_batch = ranks * config.training.batch_size
        rows.append(
            (
                f"[`{file.stem}`](../configs/{file.name})",
                f"{nodes} x {per_node}" if nodes and per_node else "any",
                str(config.model.image_size),
                str(config.training.batch_size),
                f"{global_batch:,}",
                f"{config.optimizer.effective_learning_rate(global_batch):.4g}",
                str(config.optimizer.warmup_steps),
                f"{config.optimizer.weight_decay:g}",
            )
        )
    header = ("recipe", "nodes x GPUs", "image size", "batch per rank", "global batch")
    return _table((*header, "learning rate", "warm-up steps", "weight decay"), rows)


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts 2x before 16x."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text) if part]


def cli_page() -> str:
    """A table of options for each verb."""
    from ssd_fast.__main__ import app

    groups = [app, *(group.typer_instance for group in app.registered_groups if group.typer_instance)]
    commands = [command.callback for group in groups for command in group.registered_commands]
    verbs = {callback.__name__: callback for callback in commands if callback}
    rows = [(f"[`{name}`](#{name})", _cell(verb.__doc__ or "")) for name, verb in verbs.items()]
    page = [CLI, _table(("verb", "result"), rows)]
    for name, verb in verbs.items():
        options = [_read_option(parameter) for parameter in inspect.signature(verb, eval_str=True).parameters.values()]
        required = "".join(f" {option.usage}" for option in options if option.default == REQUIRED)
        page += [
            f"## {name}\n",
            f"{' '.join((verb.__doc__ or '').split())}\n",
            f"```\nssd-fast {name}{required} [OPTION]...\n```\n",
            _table(("option", "default", "meaning"), [option.row for option in options]),
        ]
    return "\n".join(page)


def with_files(page: str) -> str:
    """The page with a table of files between its two marks: each module and the first sentence of its docstring."""
    before, _, rest = page.partition(FILES_BEGIN)
    _, end, after = rest.partition(FILES_END)
    if not end:
        raise ValueError(f"docs/architecture.md: expected the lines {FILES_BEGIN!r} and {FILES_END!r}")
    tables = []
    for folder in _packages():
        name = folder.relative_to(REPOSITORY).as_posix()
        rows = [
            (f"[`{file.name}`](../{name}/{file.name})", _cell(_first_sentence(file)))
            for file in sorted(folder.glob("*.py"))
            if file.name != "__init__.py"
        ]
        room = _first_sentence(folder / "__init__.py")
        tables += [f"### {name}/\n", room + "\n" if room else "", _table(("file", "holds"), rows)]
    return f"{before}{FILES_BEGIN}\n\n" + "\n".join(filter(None, tables)) + f"\n{FILES_END}{after}"


def _packages() -> Iterable[Path]:
    for folder in FOLDERS:
        yield REPOSITORY / folder
        yield from sorted(file.parent for file in (REPOSITORY / folder).glob("*/__init__.py"))


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def _type_text(schema: dict[str, Any]) -> str:
    """A value's type in words: `number from 0 to 1`."""
    match schema:
        case {"anyOf": choices}:
            return _type_text(next(choice for choice in choices if choice.get("type") != "null"))
        case {"enum": values}:
            return ", ".join(f"`{json.dumps(value)}`" for value in values)
        case {"const": value}:
            return f"`{json.dumps(value)}`"
        case {"type": "array", "prefixItems": items}:
            return "[" + ", ".join(_type_text(item) for item in items) + "]"
        case {"type": "array", "items": item}:
            return f"[{_type_text(item)}, ...]"
    noun = {"integer": "whole number", "number": "number", "string": "string", "boolean": "true or false"}
    text = noun[schema["type"]]
    if "minimum" in schema and "maximum" in schema:
        return f"{text} from {schema['minimum']} to {schema['maximum']}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]}" for bound, sign in signs.items() if bound in schema]
    return " ".join([text, " and ".join(bounds)]).strip()


def _default_text(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return REQUIRED
    if schema["default"] is None:
        return "unset"
    return f"`{json.dumps(schema['default'])}`"


class _Option(NamedTuple):
    """An option or argument of a verb, as its documentation shows it."""

    usage: str
    default: str
    meaning: str

    @property
    def row(self) -> tuple[str, str, str]:
        return f"`{self.usage}`", self.default, self.meaning


def _read_option(parameter: inspect.Parameter) -> _Option:
    annotation, info = get_args(parameter.annotation)[:2]
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    kind = (get_args(kinds[0]) or kinds)[0]  # of list[Path] | None: Path
    value = info.metavar or _value_name(kind)
    if isinstance(info, typer.models.ArgumentInfo):
        usage = f"{(info.metavar or parameter.name).upper()}{'...' if get_origin(annotation) is list else ''}"
    else:
        declared = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("--")]
        name = declared[0] if declared else f"--{parameter.name.replace('_', '-')}"
        usage = name if kind is bool else f"{name} {value}"
    if parameter.default is parameter.empty:
        default = REQUIRED
    elif parameter.default is None or parameter.default is False:
        default = ""
    else:
        default = f"`{parameter.default}`"
    meaning = _cell(info.help or "")
    if isinstance(kind, enum.EnumMeta):
        meaning += " One of " + ", ".join(f"`{choice.value}`" for choice in list[enum.Enum](kind)) + "."
    return _Option(usage, default, meaning)


def _value_name(kind: type) -> str:
    if isinstance(kind, enum.EnumMeta):
        return kind.__name__.upper()
    return {Path: "PATH", int: "N", float: "NUMBER", str: "TEXT"}.get(kind, "")


def _cell(text: str) -> str:
    """A text as one line of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the files, or with --check compare them with those that are there."""
    stale = [path for path, content in generate().items() if not path.exists() or path.read_text("utf-8") != content]
    names = ", ".join(str(path.relative_to(REPOSITORY)) for path in stale)
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {names}: run `python docs/generate.py`" if stale else 0)
    for path, content in generate().items():
        path.write_text(content, encoding="utf-8")
    print(f"written: {names or 'nothing has changed'}")


if __name__ == "__main__":
    main()
