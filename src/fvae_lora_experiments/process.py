"""What a process of the command needs: its exit code, its one device, and quiet libraries."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fvae_lora_experiments import signals
from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.run import distributed

INTERRUPTED, TERMINATED = 130, 143
"""The exit codes after Ctrl-C and SIGTERM."""


def use_one_gpu() -> None:
    """Limits a single process to one GPU; the Trainer would silently use all of them and enlarge the batch."""
    if distributed.process_count() == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def silence_libraries() -> None:
    """Silences warnings that are expected in a run, such as that of a new head or a renamed option."""
    silence_datasets()
    _silence_models()


@contextmanager
def quiet_models() -> Iterator[None]:
    """Silences only what loads models, and only for a while: in a program of somebody's own it then speaks again."""
    import transformers

    verbosity, has_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        _silence_models()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            if has_bars:
                transformers.logging.enable_progress_bar()


def _silence_models() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # CTC heads; AdaLoRA's pattern; a base model that has moved
    of_peft = "Setting `save_embedding_layers`|The following rank_pattern keys|Could not find a config file"
    warnings.filterwarnings("ignore", message=of_peft, module="peft")


def silence_datasets() -> None:
    """What it cannot read is an error of ours, too."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def exit_code(command: Callable[[], Any]) -> int:
    """Runs `command` and returns its exit code; errors and signals are reported in one line."""
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
        if hasattr(error, "format_message"):  # from typer: an unknown option, a value of the wrong type
            return _print_error(error.format_message(), 2)
        if distributed.first_to_fail():
            traceback.print_exc()
        return 1
    if result in (INTERRUPTED, TERMINATED):  # typer also returns 130 for Ctrl-C
        return _print_error(signals.stopped_message(), result)
    return result if isinstance(result, int) else 0


def _print_error(line: str, code: int) -> int:
    if distributed.first_to_fail():
        print(f"fvae-lora: {line}", file=sys.stderr)
    return code
