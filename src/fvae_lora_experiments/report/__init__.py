"""The report on stored runs: a table in the terminal, CSV, Markdown, LaTeX, and an HTML page.

Everything is derived from the records (`run.json`, `metrics.jsonl`); nothing here trains or scores.
"""

from fvae_lora_experiments.report.aggregate import summary_rows
from fvae_lora_experiments.report.formats import write_csv, write_latex, write_markdown
from fvae_lora_experiments.report.page import write_page
from fvae_lora_experiments.report.rows import Row
from fvae_lora_experiments.report.terminal import print_table

__all__ = ["Row", "print_table", "summary_rows", "write_csv", "write_latex", "write_markdown", "write_page"]
