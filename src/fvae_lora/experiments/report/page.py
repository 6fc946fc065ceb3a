"""The report as one HTML page that needs nothing but itself."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fvae_lora.experiments.report.records import read_runs
from fvae_lora.experiments.report.summary import summarise
from fvae_lora.experiments.report.tables import COLUMNS, comparisons, left_out, write_text


def write_page(runs: Path, out: Path) -> Path:
    """Writes the page about all runs at or below `runs` to the file `out`, and returns `out`.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.

    """
    groups = summarise(read_runs(runs))
    rows = [group.row for group in groups]
    templates = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("page.html").render(
        columns=COLUMNS, comparisons=list(comparisons(rows)), left_out=left_out(rows)
    )
    write_text(out, page)
    return out
