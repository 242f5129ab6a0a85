"""Recipes: TOML files that state what a run changes of the defaults in `sections.py`."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from ssd_fast.config.sections import Config


class ConfigError(ValueError):
    """An invalid recipe. The message names the file, the key, its value and what was expected."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a recipe.

    path: TOML file, or the name of one that comes with the program, such as "ssd300". Its top-level key `base` may name
    another one, relative to it, whose values it changes; that one may not have a `base` itself.
    overrides: "section.key=value" each, with the value in TOML's notation; a bare word is a string.
    Raises ConfigError, which lists every key that is unknown, has the wrong type or contradicts another.
    """
    path = _named(path)
    values = _read_toml(path)
    base = values.pop("base", None)
    if base is not None:
        base_path = path.parent / str(base)
        if not base_path.is_file():
            base_path = _named(Path(str(base)), base_path)
        base_values = _read_toml(base_path)
        if "base" in base_values:
            raise ConfigError(
                f"{base_path}: base = {base_values['base']!r}: the base of {path} may not have a base itself"
            )
        values = _merge(base_values, values)
    return validate_config(values, source=str(path), overrides=overrides)


def recipe_folder() -> Path:
    """The folder of the recipes that come with the program: within the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def _named(path: Path, otherwise: Path | None = None) -> Path:
    """The path of a recipe that comes with the program, if path is its name and no file; else the path itself.

    otherwise: in place of that.
    """
    if path.suffix or len(path.parts) != 1 or path.is_file():
        return otherwise or path
    known = _own_recipes()
    if path.name not in known:
        raise ConfigError(f"{path}: no such recipe: expected a file, or one of {', '.join(known)}")
    return known[path.name]


def _own_recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted(recipe_folder().glob("*.toml"))}


def override_config(config: Config, overrides: Sequence[str], *, source: str) -> Config:
    """A copy of the configuration with overrides as in `load_config`. source: its name in errors."""
    return validate_config(config.model_dump(exclude_none=True), source=source, overrides=overrides)


def validate_config(values: dict[str, Any], *, source: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a plain dictionary, with overrides. source: its name in errors."""
    values = _merge({}, values)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from None


def dump_toml(config: Config) -> str:
    """The configuration as a complete recipe, from which `load_config` makes an equal configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def is_dumped(path: Path) -> bool:
    """Whether a file holds what dump_toml gives, so that nothing is lost with it."""
    try:
        return path.read_text(encoding="utf-8") == dump_toml(load_config(path))
    except (OSError, ValueError):
        return False


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = f": the program's own is --config {path.stem}" if path.stem in _own_recipes() else ""
        raise ConfigError(f"{path}: no such recipe{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not separator or not dot or not section or not name or "." in name:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = values.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: {section} is not a section")
    values[section] = table | {name: value}


def _tuples(value: Any) -> Any:
    """TOML's arrays as tuples, which strict validation wants."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} = {problem['input']!r}: unknown key"
        case "value_error":  # of a whole section: the message begins with the key
            return f"{key}.{message}" if key else message
        case _:
            return f"{key} = {problem['input']!r}: expected {message}"
