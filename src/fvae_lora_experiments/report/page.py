"""The report as one self-contained HTML page, without scripts or requests."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fvae_lora_experiments.report.aggregate import aggregate
from fvae_lora_experiments.report.charts import Mark
from fvae_lora_experiments.report.comparison import draw_comparison
from fvae_lora_experiments.report.html import fill
from fvae_lora_experiments.report.tables import (
    compared_rows,
    grid_key,
    grid_lines,
    grid_points,
    overview_tables,
    uncounted,
)
from fvae_lora_experiments.run.archive import folder_name, read_runs
from fvae_lora_experiments.run.folder import write_atomically


def write_page(places: Sequence[Path], out: Path) -> Path:
    """Write the page about all runs at or below `places` to the file `out`, and return `out`.

    Raises:
        UserError: as `read_runs`.

    """
    read = read_runs(*places)
    groups = aggregate(read)
    rows = [group.row for group in groups]
    left_out = uncounted(rows)
    counted = [group for group in groups if group.runs]
    labels = {row.label for row in rows if row.state == "complete"}
    for compared in compared_rows(rows):
        points = grid_points(compared.points)
        labels |= grid_lines(points, grid_key(points)).keys()
    marks = {label: Mark(label, i) for i, label in enumerate(sorted(labels))}
    page = fill(
        "page.html",
        folder=", ".join(map(folder_name, places)),
        runs=len(read),
        counted=sum(len(group.runs) for group in counted if group.row.state == "complete"),
        selecting=sum(len(group.runs) for group in counted if group.row.state == "selection"),
        states=Counter(row.state for row in left_out),
        incomplete=sum(bool(row.missing_seeds) for row in rows if row.state == "complete"),
        overviews=overview_tables(rows),
        comparisons=[
            draw_comparison(list(alike), marks)
            for _, alike in groupby(
                (group for group in groups if group.row.state in ("complete", "selection")),
                lambda group: group.row.comparison_key,
            )
        ],
        left_out=left_out,
    )
    write_atomically(out, page)
    return out
