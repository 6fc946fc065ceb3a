"""The processes that do runs on this machine; a job of `sweep.slurm` does its run the same way."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

import torch

from fvae_lora_experiments.process import exit_code, silence_libraries, use_one_gpu
from fvae_lora_experiments.run import distributed
from fvae_lora_experiments.schema import Recipe

HOST = "127.0.0.1"
GRACE_S = 2.0
"""Once a process of a run has failed, how long the others get to report why they fail."""


def do_run(folder: str, recipe: str, count: int) -> NoReturn:
    """Does a run and exits with its exit code, see `process.exit_code`.

    Args:
        folder: the run's folder.
        recipe: as JSON.
        count: the number of processes of the run: 1 is this process, more are started.
    """
    if count == 1:
        _run(folder, recipe)
    code = _supervise(folder, recipe, count)
    sys.exit(code if code >= 0 else 128 - code)  # like a shell after a signal


def _run(folder: str, recipe: str) -> NoReturn:
    distributed.exit_process(exit_code(lambda: _train(Recipe.model_validate_json(recipe), Path(folder))))


def _train(recipe: Recipe, folder: Path) -> None:
    use_one_gpu()

    from fvae_lora_experiments.run.runner import run_recipe

    silence_libraries()
    run_recipe(recipe, folder, quiet=True)
    distributed.disconnect()


def serve(channel: Connection) -> None:
    """Does the runs requested through `channel`, and answers each with its exit code.

    Importing everything takes longer than a small run, so it is done once, and the processes of each run are forked
    from this one. Where forking is impossible, this process does its first single-process run itself, and exits.
    """
    from fvae_lora_experiments.run import runner  # noqa: F401

    while True:
        try:
            folder, recipe, count = channel.recv()
        except (EOFError, ConnectionError):
            return
        if count == 1 and not _can_fork():
            _exit_with_parent(lambda: wait([channel]))
            _run(folder, recipe)
        channel.send(_supervise(folder, recipe, count, [channel]))


def _supervise(folder: str, recipe: str, count: int, asking: Sequence[Connection] = ()) -> int:
    """Does a run in `count` new processes, in the environment that torchrun would give them.

    If one fails, the others are killed, because they would wait for it.

    Args:
        folder: the run's folder.
        recipe: as JSON.
        count: the number of processes.
        asking: if one of these becomes readable, nobody waits for the run any more, and this process exits.

    Returns:
        0, or the most informative exit code: of a signal before a refusal before a failure.
    """
    store = torch.distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False) if count > 1 else None
    process = get_context("fork").Process if _can_fork() else get_context("spawn").Process
    group = [
        process(
            target=_rank_process, args=(folder, recipe, _rank_environment(rank, count, store.port) if store else {})
        )
        for rank in range(count)
    ]
    for member in group:
        member.start()
    while (alive := [member for member in group if member.exitcode is None]) and not any(m.exitcode for m in group):
        if set(asking) & set(wait([*asking, *(member.sentinel for member in alive)])):
            os._exit(1)
    last_word = time.monotonic() + GRACE_S
    for member in alive:
        member.join(max(0.0, last_word - time.monotonic()))
    codes = [member.exitcode for member in group if member.exitcode is not None]
    for member in alive:
        member.kill()
        member.join()
    return min(codes, key=lambda code: (code >= 0, -code))


def _can_fork() -> bool:
    """Whether a forked process can do a run: not with CUDA, nor on macOS."""
    return sys.platform.startswith("linux") and not torch.cuda.is_available()


def _rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """A process's rank in its run, as torchrun's environment variables."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _rank_process(folder: str, recipe: str, place: dict[str, str]) -> None:
    parent = parent_process()
    assert parent is not None
    _exit_with_parent(parent.join)
    os.environ |= place
    _run(folder, recipe)


def _exit_with_parent(end: Callable[[], object]) -> None:
    """Exits when `end` returns: however a sweep dies, no run may outlive it and block the next one."""

    def die() -> None:
        end()
        os._exit(1)

    threading.Thread(target=die, daemon=True).start()


if __name__ == "__main__":
    serve(Connection(0))
