"""Errors of a request or a run, each told in one line."""


class UserError(Exception):
    """The request is wrong: the message says what, where, and what is allowed. Exit code 2."""


class NoClassesError(UserError):
    """The data tell no classes apart, which training needs: no label is known, or all are of one class."""


class RunError(Exception):
    """The run itself failed; its record says why. Exit code 1."""


class DivergenceError(RunError):
    """A number in the run became NaN or infinite: the same recipe would fail the same way again."""


def first_line(error: object) -> str:
    """The first line of what an error, or a program, says."""
    return str(error).strip().partition("\n")[0]
