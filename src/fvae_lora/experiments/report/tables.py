"""The rows as a terminal table, CSV, Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.report.columns import COLUMNS
from fvae_lora.experiments.report.summary import Row


def comparisons(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield (what was measured, its rows) for each comparison among the finished rows."""
    finished = (row for row in rows if row.state == "complete")
    for what, compared in groupby(finished, key=lambda row: row.comparison):
        yield " · ".join(filter(None, what)), list(compared)


def left_out(rows: Sequence[Row]) -> list[Row]:
    """Pick the runs that no number contains: failed, unfinished, unreadable, or there twice."""
    return [row for row in rows if row.state != "complete"]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each comparison (task, data, protocol, model), then the runs not counted."""
    for what, compared in comparisons(rows):
        console.print(Text(what, style="bold"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("method", overflow="fold")
        for heading in COLUMNS:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in compared:
            method = Text(row.method)
            if row.settings:
                method.append(f"\n{row.settings}", style="dim")
            table.add_row(method, *(Text(cell(row)) for cell in COLUMNS.values()))
        console.print(table)
        console.print()
    if any(row.missing_seeds for row in rows):
        console.print("A row with seeds `n of m` lacks seeds that others have.", style="yellow")
    if rest := left_out(rows):
        console.print(f"Not counted: {len(rest)}", style="bold")
    for row in rest:
        console.print(Text.assemble((f"{row.state:<10}", "red"), f" {row.run}  {row.reason}"))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every field of every row, unrounded: accuracies as fractions, seconds, MB; empty is unknown."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = asdict(row).items()
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in cells})
    write_atomically(path, out.getvalue())


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write the tables of `print_table` as Markdown."""
    lines = []
    for what, compared in comparisons(rows):
        lines += [f"**{_markdown(what)}**", "", f"| method | {' | '.join(COLUMNS)} |"]
        lines += ["|---|" + "---:|" * len(COLUMNS)]
        lines += [f"| {' | '.join(map(_markdown, _cells(row)))} |" for row in compared] + [""]
    if rest := left_out(rows):
        lines += ["Not counted:", ""]
        lines += [f"- {row.state}: {_markdown(row.run)}: {_markdown(row.reason)}" for row in rest] + [""]
    write_atomically(path, "\n".join(lines))


def write_latex(rows: Sequence[Row], path: Path) -> None:
    """Write the tables of `print_table` as LaTeX, a booktabs tabular for each comparison."""
    lines = [r"% needs \usepackage{booktabs}"]
    for what, compared in comparisons(rows):
        lines += [f"% {what}", rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, ("method", *COLUMNS))) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_latex, _cells(row))) + r" \\" for row in compared]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    lines += [f"% not counted: {row.state}: {row.run}: {row.reason}" for row in left_out(rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def _cells(row: Row) -> list[str]:
    return [row.label, *(cell(row) for cell in COLUMNS.values())]


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", text)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "–": "--"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
