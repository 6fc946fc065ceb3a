"""What a process of the command needs: its exit code, its one device, and libraries that keep quiet."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from fvae_lora_experiments import signals
from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.run import distributed

INTERRUPTED, TERMINATED = 130, 143
"""The exit codes after Ctrl-C and SIGTERM."""


def use_one_gpu() -> None:
    """A process has one device; the Trainer would silently give all GPUs to a lone process, and grow the batch."""
    if distributed.process_count() == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def silence_libraries() -> None:
    """A new head and a renamed option are no news to somebody who asked for a run."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read is an error of ours, too
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    of_peft = "Setting `save_embedding_layers`|The following rank_pattern keys"  # a head for CTC; AdaLoRA's own pattern
    warnings.filterwarnings("ignore", message=of_peft, module="peft")


def exit_code(command: Callable[[], Any]) -> int:
    """Runs `command`; says in one line what a user has to know of its end."""
    try:
        result = command()
    except KeyboardInterrupt:
        result = INTERRUPTED
    except signals.Terminated:
        result = TERMINATED
    except (UserError, RunError) as error:
        return _print_error(str(error), 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        return _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong type
            return _print_error(error.format_message(), 2)
        if distributed.first_to_fail():
            traceback.print_exc()
        return 1
    if result in (INTERRUPTED, TERMINATED):  # typer, too, makes the first of Ctrl-C
        return _print_error(signals.STOPPED_MESSAGE, result)
    return result if isinstance(result, int) else 0


def _print_error(line: str, code: int) -> int:
    if distributed.first_to_fail():
        print(f"fvae-lora: {line}", file=sys.stderr)
    return code
