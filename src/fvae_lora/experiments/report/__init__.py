"""A folder of runs, told four ways: a terminal table, CSV, Markdown or LaTeX, and one HTML page.

Everything is derived from the records (`run.json`, `metrics.jsonl`); nothing here trains or scores.
"""

from fvae_lora.experiments.report.page import write_page
from fvae_lora.experiments.report.summary import Row, summary_rows
from fvae_lora.experiments.report.tables import print_table, write_csv, write_latex, write_markdown

__all__ = ["Row", "print_table", "summary_rows", "write_csv", "write_latex", "write_markdown", "write_page"]
