"""Ctrl-C and SIGTERM: one line, and the exit code that a shell gives a process which they end, 130 and 143.

While libraries are imported there is nothing to clean up, and what would be raised there might be swallowed: the
process ends at once. After that an exception is raised, so that files are whole and no process is left over, and a
second signal ends the process at once.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOPPED_MESSAGE = "stopped; the same command goes on where it was"

Handler = Callable[[int, FrameType | None], NoReturn]


class Terminated(BaseException):
    """SIGTERM, raised where the main thread is, as KeyboardInterrupt is for SIGINT."""


def exit_on_signal() -> None:
    """Lets a signal end this process where it is."""
    _install(_exit)


def raise_on_signal() -> None:
    """Lets the first signal raise KeyboardInterrupt or `Terminated`. Only for a process whose signals are handled."""
    if signal.getsignal(signal.SIGINT) is _exit or signal.getsignal(signal.SIGTERM) is _exit:
        _install(_raise_exception)


def _install(handler: Handler) -> None:
    numbers = [signal.SIGINT]
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # one of several may hang in a call for the others, deaf to Python
        numbers.append(signal.SIGTERM)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs, and nohup
            signal.signal(number, handler)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, f"fvae-lora: {STOPPED_MESSAGE}\n".encode())
    os._exit(128 + number)


def _raise_exception(number: int, _: FrameType | None) -> NoReturn:
    exit_on_signal()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
