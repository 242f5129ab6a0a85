"""The sizes of files, classes and functions: what is longer is hard to read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY

FILE, CLASS, FUNCTION = 400, 200, 60  # lines


def sources() -> list[Path]:
    folders = ("kernels", "dali_pipelines", "ssd_fast", "tests", "tools", "benchmarks", "docs")
    return [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))]


def too_long(source: str) -> Iterator[str]:
    """Names of definitions that are too long, and "file" for the whole source."""
    if len(source.splitlines()) > FILE:
        yield "file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                yield node.name


def test_nothing_is_too_long_to_read() -> None:
    assert len(sources()) > 100
    found = {str(path.relative_to(REPOSITORY)): [*too_long(path.read_text("utf-8"))] for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x = 1\n" * FILE, []),
        ("x = 1\n" * (FILE + 1), ["file"]),
        ("def f():\n" + "    x = 1\n" * FUNCTION, ["f"]),
        ("class C:\n" + "    x = 1\n" * CLASS, ["C"]),
    ],
)
def test_what_is_too_long_is_noticed(source: str, names: list[str]) -> None:
    assert [*too_long(source)] == names
