"""Templates of self-contained HTML pages, without scripts or requests; what is filled in is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fvae_lora_experiments.report.charts import swatch


def fill(template: str, **values: Any) -> str:
    """The page that a template makes of values."""
    templates = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["swatch"] = swatch
    return templates.get_template(template).render(**values)
