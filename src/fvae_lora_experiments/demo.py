"""The demo: FVAE-LoRA, LoRA and a linear probe on handwritten digits, without downloads."""

import os
from pathlib import Path

from rich.console import Console

from fvae_lora_experiments.check import inspect_each
from fvae_lora_experiments.data.summary import print_summary
from fvae_lora_experiments.report import print_table, summary_rows, write_page
from fvae_lora_experiments.sweep.local import LocalLauncher
from fvae_lora_experiments.sweep.plan import contenders, runs_of
from fvae_lora_experiments.sweep.run_sweep import run_sweep

RECIPE = "image/demo"
METHODS = ("fvae-lora", "lora", "linear-probe")
SEEDS = (1, 2, 42)


def run_demo(out: Path, quick: bool, console: Console) -> list[str]:
    """Trains and compares; ends with a table and an HTML page in `out`.

    Args:
        out: the folder of the runs. Runs that are complete there are not repeated.
        quick: one seed and two epochs, to check that everything works; the numbers mean nothing.
        console: where to show progress and the table.

    Returns:
        A line for each run that failed.
    """
    overrides = ["train.epochs=2"] if quick else []
    runs = runs_of(contenders(RECIPE, out, METHODS, overrides), SEEDS[:1] if quick else SEEDS)
    console.print(
        "A small ViT that was pre-trained on clothes (Fashion-MNIST) learns to read handwritten digits, "
        f"{len(METHODS)} methods, {len(runs)} runs.\nEach method has the learning rate that was best for it on "
        "validation, from one common grid.",
        highlight=False,
    )
    for summary in inspect_each(runs, set()):
        print_summary(summary, console)
    failures = run_sweep(runs, LocalLauncher(min(2, os.cpu_count() or 1)), console)
    print_table(summary_rows(out), console)
    page = write_page([out], out / "report.html")
    console.print(f"Learning curves, costs and each layer's ELBO terms: {page}", highlight=False)
    return failures
