"""What does runs: processes of this machine here, a job of a cluster in `sweep.slurm`."""

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
"""How long the others of a run's processes may take to say why they fail, once one has failed."""


def do_run(folder: str, recipe: str, count: int) -> NoReturn:
    """Does a run and ends this process with its exit code: see `process.exit_code`.

    Args:
        folder: the run's folder.
        recipe: as JSON.
        count: how many processes do the run: this one, or several of its own.
    """
    if count == 1:
        _run(folder, recipe)
    code = _supervise(folder, recipe, count)
    sys.exit(code if code >= 0 else 128 - code)  # as a shell tells of a signal


def _run(folder: str, recipe: str) -> NoReturn:
    distributed.exit_process(exit_code(lambda: _train(Recipe.model_validate_json(recipe), Path(folder))))


def _train(recipe: Recipe, folder: Path) -> None:
    use_one_gpu()

    from fvae_lora_experiments.run.runner import run_recipe

    silence_libraries()
    run_recipe(recipe, folder, quiet=True)
    distributed.disconnect()


def serve(channel: Connection) -> None:
    """Does the runs that `channel` asks for, and answers each with its exit code.

    To import everything takes longer than a small run: that is done once, and the processes of each run are forks of
    this one. Where that cannot be, the first run of a single process is this process, and its end.
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
    """Does a run in `count` new processes, in the surroundings that torchrun would give them.

    When one fails the others are ended; they would wait for it.

    Args:
        folder: the run's folder.
        recipe: as JSON.
        count: how many processes.
        asking: when there is something to read here, nobody waits for the run any more: this process ends.

    Returns:
        0, or the exit code that tells most of what went wrong: of a signal, of a refusal, of a failure.
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
    """Whether a fork can do a run: what a GPU or macOS has in a process does not survive one."""
    return sys.platform.startswith("linux") and not torch.cuda.is_available()


def _rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """A process's place among those of its run, in torchrun's environment variables."""
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
    """Ends this process when `end` returns: however a sweep dies, no run outlives it and blocks the next one."""

    def die() -> None:
        end()
        os._exit(1)

    threading.Thread(target=die, daemon=True).start()


if __name__ == "__main__":
    serve(Connection(0))
