"""Tables of text: for what a verb prints and for the page of a profile."""

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


class Row(NamedTuple):
    """One line of a table.

    cells: one for each column of the table, empty where there is no value.
    depth: 1 for a part of the row above, which is indented.
    share: 0 to 1, the length of the bar that a page draws behind the cell of the column "share".
    """

    cells: Sequence[str]
    depth: int = 0
    share: float | None = None


class Table(NamedTuple):
    """A table. Its first column is text; the others are figures, aligned to the right.

    columns: heads.
    note: how to read the table. As text it stands in the first head where that is empty, else above the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


def format_table(table: Table) -> str:
    """Return a table as plain text. An empty line precedes each row that follows parts of another."""
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, head in enumerate(table.columns):
        title = Text(head or (table.note if number == 0 else ""))
        grid.add_column(title, justify="right" if number else "left", no_wrap=True)
    for number, row in enumerate(table.rows):
        if number and table.rows[number - 1].depth and not row.depth:
            grid.add_row()
        first, *others = row.cells
        grid.add_row(Text("  " * row.depth + first), *map(Text, others))
    text = _to_text(grid)
    return f"{table.note}\n{text}" if table.note and table.columns[0] else text


def format_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values as two aligned columns of plain text."""
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, value in pairs:
        grid.add_row(Text(name), Text(value, overflow="fold"))
    return _to_text(grid)


def _to_text(grid: RichTable) -> str:
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))
