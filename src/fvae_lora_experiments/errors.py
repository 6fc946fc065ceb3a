"""Errors of a request or a run, each told in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The request is wrong: the message says what, where, and what is allowed. Exit code 2."""


class NoClassesError(UserError):
    """The data tell no classes apart, which training needs: no label is known, or all are of one class."""


class NoSuchDataError(UserError):
    """There is no data set of that name or path."""


class RunError(Exception):
    """The run itself failed; its record says why. Exit code 1."""


class DivergenceError(RunError):
    """A number in the run became NaN or infinite: the same recipe would fail the same way again."""


def first_line(error: object) -> str:
    """The first line of what an error, or a program, says."""
    return str(error).strip().partition("\n")[0]


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of a message, `; did you mean train.epochs?`, or nothing where no name is near.

    Args:
        given: what was asked for.
        allowed: names. Of a dotted key or a path its last part alone may be meant: `epochs`, `eurosat`.
    """
    names = list(allowed)
    own = {name.replace("/", ".").rpartition(".")[2]: name for name in reversed(names)}
    near = get_close_matches(given, names, 1, 0.75) or [own[part] for part in get_close_matches(given, own, 1, 0.75)]
    return f"; did you mean {near[0]}?" if near else ""
