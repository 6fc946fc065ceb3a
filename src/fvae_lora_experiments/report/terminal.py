"""The report in a terminal of any width."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from fvae_lora_experiments.report.rows import Row
from fvae_lora_experiments.report.tables import Table, compared_rows, overview_tables, tables, uncounted


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the tables of each comparison (task, data, protocol, model), an overview, and the runs not counted."""
    said: dict[str, None] = {}
    for compared in compared_rows(rows):
        console.print(Text(compared.name, style="bold"))
        for table in tables(compared):
            print_grid(table, console)
            said |= dict.fromkeys(table.notes)
    for table in overview_tables(rows):
        print_grid(table, console)
        said |= dict.fromkeys(table.notes)
    for note in said:
        console.print(Text(note, style="yellow" if note.startswith(("Warning", "incomplete")) else "dim"))
    if rest := uncounted(rows):
        console.print(f"Not counted: {len(rest)}", style="bold")
    for row in rest:
        console.print(Text.assemble((f"{row.state:<10}", "red"), f" {row.run}  {row.reason}"))


def print_grid(table: Table, console: Console) -> None:
    """Print a table, in as many parts as the terminal's width needs."""
    console.print(Text(table.title, style="italic"))
    for columns in _fitting(table, console.width):
        grid = Grid(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column(table.headings[0], overflow="fold")
        for column in columns:
            grid.add_column(Text(table.headings[column]), justify="right", width=_width(table, column))
        for first, *cells in table.rows:
            method, _, settings = first.partition(" ")
            label = Text.assemble(method, (f"\n{settings}" if settings else "", "dim"))
            grid.add_row(label, *(Text(_broken(cells[column - 1])) for column in columns))
        console.print(grid)
        console.print()


def _fitting(table: Table, width: int) -> Iterator[list[int]]:
    """Yield column numbers in portions that fit into `width` together with the first column."""
    first = 1 + max(len(word) for line, *_ in table.rows for word in line.split(" "))
    portion: list[int] = []
    used = first
    for column in range(1, len(table.headings)):
        needed = 1 + _width(table, column)
        if portion and used + needed > width:
            yield portion
            portion, used = [], first
        portion.append(column)
        used += needed
    yield portion


def _width(table: Table, column: int) -> int:
    """Return the width at which no cell and no word of the heading has to be broken."""
    lines = (line for row in table.rows for line in _broken(row[column]).split("\n"))
    return max(map(len, (*table.headings[column].split(), *lines)))


def _broken(cell: str) -> str:
    return cell.replace(", ", ",\n").replace(" (", "\n(")
