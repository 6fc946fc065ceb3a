"""Ctrl-C and SIGTERM: one line, and the exit code that a shell would report, 130 and 143.

While libraries are being imported there is nothing to clean up, and an exception might be swallowed there: the process
exits at once. After that the first signal raises an exception, so that files are complete and no process is left
behind; a second signal exits at once.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOPPED_MESSAGE = "stopped; the same command resumes where it was"
_message = STOPPED_MESSAGE

Handler = Callable[[int, FrameType | None], NoReturn]


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM, as KeyboardInterrupt is by SIGINT."""


def exit_on_signal() -> None:
    """Makes a signal end this process at once."""
    _install(_exit)


def raise_on_signal(message: str = STOPPED_MESSAGE) -> None:
    """Makes the first signal raise KeyboardInterrupt or `Terminated`, if `exit_on_signal` was called before.

    Args:
        message: what the command says when it was stopped.
    """
    global _message
    _message = message
    if signal.getsignal(signal.SIGINT) is _exit or signal.getsignal(signal.SIGTERM) is _exit:
        _install(_raise_exception)


def stopped_message() -> str:
    """What the command that runs says when it was stopped."""
    return _message


def _install(handler: Handler) -> None:
    numbers = [signal.SIGINT]
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # several: one may hang in a collective call, deaf to signals
        numbers.append(signal.SIGTERM)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in background jobs of a shell, and under nohup
            signal.signal(number, handler)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, f"fvae-lora: {_message}\n".encode())
    os._exit(128 + number)


def _raise_exception(number: int, _: FrameType | None) -> NoReturn:
    exit_on_signal()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
