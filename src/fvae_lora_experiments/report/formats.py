"""The report as CSV, Markdown and LaTeX files."""

import csv
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fvae_lora_experiments.report.rows import Row
from fvae_lora_experiments.report.tables import Table, compared_rows, overview_tables, tables, uncounted
from fvae_lora_experiments.run.folder import write_atomically

HEADING_WIDTH = 10
"""The width at which LaTeX headings are wrapped, in characters."""


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every field of every row, unrounded: scores as recorded, the paper's in percent, seconds, MB.

    Further test scores have their own columns: mean, standard deviation, and the paper's figure. Empty means unknown.
    """
    plain = [field.name for field in fields(Row) if field.name != "extra_scores"]
    lines = [{name: _csv(getattr(row, name)) for name in plain} | _extra_scores(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, out.getvalue())


def _extra_scores(row: Row) -> dict[str, float | None]:
    scores = row.extra_scores
    return {
        f"{name}{s.name}{end}": value
        for s in scores
        for name, end, value in (("test_", "", s.mean), ("test_", "_std", s.std), ("paper_", "", s.paper))
    }


def _csv(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join("=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return value


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write the tables of `print_table` as Markdown."""
    lines = []
    for compared in compared_rows(rows):
        lines += [f"**{escape_markdown(compared.name)}**", ""]
        for table in tables(compared):
            lines += _markdown_table(table)
    for table in overview_tables(rows):
        lines += _markdown_table(table)
    if rest := uncounted(rows):
        lines += ["Not counted:", ""]
        lines += [f"- {row.state}: {escape_markdown(row.run)}: {escape_markdown(row.reason)}" for row in rest] + [""]
    write_atomically(path, "\n".join(lines))


def _markdown_table(table: Table) -> list[str]:
    cells = [table.headings, *table.rows]
    head, *body = (f"| {' | '.join(map(escape_markdown, row))} |" for row in cells)
    notes = [line for note in table.notes for line in (escape_markdown(note), "")]
    return [
        f"{escape_markdown(table.title)}:",
        "",
        head,
        "|---|" + "---:|" * (len(table.headings) - 1),
        *body,
        "",
        *notes,
    ]


def write_latex(rows: Sequence[Row], path: Path) -> None:
    """Write the tables of `print_table` as LaTeX: booktabs, each a float whose caption says what was measured."""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}, which makes wide tables fit"]
    for compared in compared_rows(rows):
        seeds = sorted({seed for row in compared.rows for seed in row.seeds})
        where = (
            f"{compared.any.dataset}, model {compared.any.model}, protocol {compared.any.protocol or 'not recorded'}"
        )
        over = f", seeds {', '.join(map(str, seeds))}" if seeds else ""
        for table in tables(compared):
            lines += _latex_table(table, f"{where}{over}")
    for table in overview_tables(rows):
        lines += _latex_table(table)
    lines += [f"% not counted: {row.state}: {row.run}: {row.reason}" for row in uncounted(rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def _latex_table(table: Table, where: str = "") -> list[str]:
    caption = " ".join([f"{table.title}{where and ': '}{where}.", *table.notes])
    cells = [map(_latex_heading, table.headings), *(map(_latex, row) for row in table.rows)]
    head, *body = (" & ".join(row) + r" \\" for row in cells)
    columns = "l" + "r" * (len(table.headings) - 1)
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(caption)}}}",
        r"\medskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
        r"\end{tabular}}",
        r"\end{table}",
        "",
    ]


def _latex_heading(text: str) -> str:
    lines = textwrap.wrap(text, HEADING_WIDTH, break_long_words=False, break_on_hyphens=False)
    stacked = r" \\ ".join(map(_latex, lines))
    return rf"\shortstack[r]{{{stacked}}}" if len(lines) > 1 else stacked


def escape_markdown(text: str) -> str:
    """Write text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", text)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "–": "--", "↓": r"$\downarrow$"}
    | {"\N{MINUS SIGN}": "$-$", "·": r"$\cdot$"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
