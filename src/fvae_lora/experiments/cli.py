"""The command line: `fvae-lora`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fvae_lora.experiments.errors import RunError, UserError

app = typer.Typer(
    help="FVAE-LoRA beside LoRA, a linear probe and full fine-tuning: train, compare, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (image/default) or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.epochs=3.")]
Model = Annotated[str | None, typer.Option(help="Pretrained model: a name on the hub or a folder.")]
Dataset = Annotated[str | None, typer.Option(help="Data: a name on the hub, a folder of images, a folder of parquet.")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    model: Model = None,
    dataset: Dataset = None,
    method: Annotated[str | None, typer.Option(help="fvae-lora, lora, linear-probe or full.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/METHOD-seedN).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Trains one run and scores it. A run that was stopped goes on where it was."""
    from fvae_lora.experiments.recipe import load_recipe

    options = {"model": model, "dataset": dataset, "method": method, "seed": seed}
    chosen = load_recipe(recipe, overrides or [], {k: v for k, v in options.items() if v is not None})
    folder = out or Path("runs") / f"{chosen.method}-seed{chosen.seed}"
    _one_device()

    from fvae_lora.experiments.report import print_table, summary_rows
    from fvae_lora.experiments.runner import run

    _hush()
    run(chosen, folder, quiet)
    print_table(summary_rows(folder), console)
    console.print(f"The run is in {folder}", highlight=False)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    model: Model = None,
    dataset: Dataset = None,
) -> None:
    """Scores a finished run again, from its adapter alone."""
    _one_device()

    from fvae_lora.experiments import runner
    from fvae_lora.experiments.record import RunFolder

    _hush()
    scores = runner.evaluate(run, model, dataset)
    recorded = (RunFolder(run).read() or {})["metrics"]["test"]
    for name, value in scores.items():
        console.print(f"{name:<10}{value:.6f}  recorded {recorded[name]:.6f}", highlight=False)


def _one_device() -> None:
    """One run is one process on one device; of several GPUs the Trainer would silently take all, and grow the batch."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def _hush() -> None:
    """A new head and a renamed option are no news to somebody who asked for a run."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main() -> None:
    """Runs the command line: one line and exit code 2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        result: Any = app(standalone_mode=False)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on where it was", 130)
    except (UserError, RunError) as error:
        return _say(str(error), 2 if isinstance(error, UserError) else 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
            return _say(error.format_message(), 2)
        raise
    return result if isinstance(result, int) else 0


def _say(line: str, code: int) -> int:
    print(f"fvae-lora: {line}", file=sys.stderr)
    return code
