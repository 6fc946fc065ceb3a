"""The processes of one run: `torchrun` and `accelerate launch` start several, each with its own device.

All do the same, each with its share of every batch; only the main process writes.
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
"""How long the others wait while one downloads or generates. If one dies, the launcher ends the others at once."""


def process_count() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a function do nothing except in the main process."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return call


def wait() -> None:
    """Waits until every process has reached this point."""
    _state().wait_for_everyone()


def main_first() -> AbstractContextManager[None]:
    """Lets the main process run a block before the others start it."""
    first: AbstractContextManager[None] = _state().main_process_first()
    return first


def disconnect() -> None:
    """Closes the connection to the other processes at the end of the run."""
    _state().destroy_process_group()


@functools.cache
def first_to_fail() -> bool:
    """Whether this process failed first and has to report why; failures of the others are consequences."""
    if process_count() == 1:
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fvae_lora/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:  # the store's process, the main one, has exited or never started it
        return is_main()


def exit_process(code: int) -> NoReturn:
    """Exits; if this is one of several and it failed, at once: an orderly exit would wait for the others."""
    if code and process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _state() -> PartialState:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
