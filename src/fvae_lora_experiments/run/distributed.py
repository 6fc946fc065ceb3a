"""The processes of one run: `torchrun` and `accelerate launch` start several, each with a device of its own.

All of them do the same, each with its share of every batch; the main one alone writes.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, ParamSpec

if TYPE_CHECKING:
    from accelerate import PartialState

P = ParamSpec("P")

TIMEOUT = timedelta(days=1)
"""How long the others wait while one downloads or generates. If one dies, their launcher ends them at once."""


def process_count() -> int:
    """How many processes do this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a function do nothing in all processes but the main one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return call


def wait() -> None:
    """Waits until every process is here."""
    _state().wait_for_everyone()


def main_first() -> AbstractContextManager[None]:
    """Lets the main process go through a block before the others begin it."""
    first: AbstractContextManager[None] = _state().main_process_first()
    return first


def disconnect() -> None:
    """Ends the connection to the others, when the run is done."""
    _state().destroy_process_group()


@functools.cache
def first_to_fail() -> bool:
    """Whether no other process of the run failed before this one, which so has to say why: their failures follow."""
    if process_count() == 1:
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fvae_lora/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # the main process held the store, and is gone or was never that far
        return is_main()


def exit_process(code: int) -> NoReturn:
    """Ends this process; of several, one that failed at once: an orderly end would wait for the others."""
    if code and process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _state() -> PartialState:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
