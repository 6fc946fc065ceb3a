"""The rows as a terminal table, CSV, Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fvae_lora.experiments.report.summary import Row

UNKNOWN = "–"


def accuracy(row: Row) -> str:
    """Mean ± standard deviation in percent."""
    if row.accuracy is None:
        return UNKNOWN
    spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.2f}"
    return f"{100 * row.accuracy:.2f}{spread}"


def seeds(row: Row) -> str:
    """How many seeds finished, and of how many where some are missing."""
    n = len(row.seeds)
    return f"{n} of {n + len(row.missing_seeds)}" if row.missing_seeds else str(n)


def quantity(value: float | None) -> str:
    """Three digits and a unit prefix: 1234567 is 1.23M."""
    if value is None:
        return UNKNOWN
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{prefix}"
    return _three_digits(value)


def duration(seconds: float | None) -> str:
    """The two largest units: 3h05m, 1m23s, 4.2s."""
    if seconds is None:
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def memory(megabytes: float | None) -> str:
    """MB below a gigabyte, GB above."""
    if megabytes is None:
        return UNKNOWN
    return f"{megabytes:.0f}MB" if megabytes < 999.5 else f"{megabytes / 1000:.1f}GB"


def rate(value: float | None) -> str:
    """A learning rate, short."""
    return UNKNOWN if value is None else f"{value:g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "accuracy %": accuracy,
    "seeds": seeds,
    "lr": lambda row: rate(row.learning_rate),
    "trainable params": lambda row: quantity(row.trainable_parameters),
    "inference params": lambda row: quantity(row.inference_parameters),
    "time": lambda row: duration(row.time_s),
    "peak memory": lambda row: memory(row.peak_memory_mb),
}
"""What every table shows of a row, after its method."""


def comparisons(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(what was measured, its rows) for each comparison among the finished rows."""
    finished = (row for row in rows if row.state == "complete")
    for what, compared in groupby(finished, key=lambda row: row.comparison):
        yield " · ".join(filter(None, what)), list(compared)


def left_out(rows: Sequence[Row]) -> list[Row]:
    """The runs that no number contains: failed, unfinished, unreadable, or there twice."""
    return [row for row in rows if row.state != "complete"]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Prints a table for each comparison (task, data, protocol, model), then the runs not counted."""
    for what, compared in comparisons(rows):
        console.print(Text(what, style="bold"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
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
        console.print(
            "Seeds are missing where it says `n of m`: those rows are not comparable yet.", style="yellow"
        )
    if rest := left_out(rows):
        console.print(f"Not counted: {len(rest)}", style="bold")
    for row in rest:
        console.print(Text.assemble((f"{row.state:<10}", "red"), f" {row.run}  {row.reason}"))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every field of every row, unrounded: accuracies as fractions, seconds, MB. Empty means unknown."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        seeds = {
            "seeds": " ".join(map(str, row.seeds)),
            "missing_seeds": " ".join(map(str, row.missing_seeds)),
        }
        writer.writerow(asdict(row) | seeds)
    write_text(path, out.getvalue())


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """The tables of `print_table` as Markdown."""
    lines = []
    for what, compared in comparisons(rows):
        lines += [f"**{_markdown(what)}**", "", f"| method | {' | '.join(COLUMNS)} |"]
        lines += ["|---|" + "---:|" * len(COLUMNS)]
        lines += [f"| {' | '.join(map(_markdown, _cells(row)))} |" for row in compared] + [""]
    if rest := left_out(rows):
        lines += ["Not counted:", ""]
        lines += [f"- {row.state}: {_markdown(row.run)}: {_markdown(row.reason)}" for row in rest] + [""]
    write_text(path, "\n".join(lines))


def write_latex(rows: Sequence[Row], path: Path) -> None:
    """The tables of `print_table` as LaTeX, one booktabs tabular for each comparison."""
    lines = [r"% needs \usepackage{booktabs}"]
    for what, compared in comparisons(rows):
        lines += [f"% {what}", rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, ("method", *COLUMNS))) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_latex, _cells(row))) + r" \\" for row in compared]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    lines += [f"% not counted: {row.state}: {row.run}: {row.reason}" for row in left_out(rows)]
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


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


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"
