"""The report as one HTML page that needs nothing but itself: no script, no request."""

from collections import Counter
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.report.charts import Mark, swatch
from fvae_lora.experiments.report.columns import COLUMNS, accuracy
from fvae_lora.experiments.report.comparison import comparison
from fvae_lora.experiments.report.records import printable, read_runs
from fvae_lora.experiments.report.summary import summarise
from fvae_lora.experiments.report.tables import left_out


def write_page(runs: Path, out: Path) -> Path:
    """Write the page about all runs at or below `runs` to the file `out`, and return `out`.

    Raises:
        UserError: there is no such folder, or no run in it.

    """
    read = read_runs(runs)
    groups = summarise(read)
    finished = [group for group in groups if group.row.state == "complete"]
    uncounted = left_out([group.row for group in groups])
    marks = {label: Mark(label, i) for i, label in enumerate(sorted({group.row.label for group in finished}))}
    templates = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html").render(
        folder=printable(runs.resolve().name),
        runs=len(read),
        counted=sum(len(group.runs) for group in finished),
        states=Counter(row.state for row in uncounted),
        incomplete=sum(bool(group.row.missing_seeds) for group in finished),
        labels=list(marks),
        accuracy=accuracy,
        columns=COLUMNS,
        swatch=swatch,
        comparisons=[
            comparison(list(compared), marks) for _, compared in groupby(finished, lambda group: group.row.comparison)
        ],
        left_out=uncounted,
    )
    write_atomically(out, page)
    return out
