"""What can be wrong with a request or with a run, in one line."""


class UserError(Exception):
    """The request cannot be served: what was wrong, where, and what is allowed. Exit code 2."""


class RunError(Exception):
    """The run itself failed; its record says why. Exit code 1."""


class DivergenceError(RunError):
    """A number of the run was none any more: the same recipe would end there again."""


def first_line(error: object) -> str:
    """The first line of what an error, or a program, says."""
    return str(error).strip().partition("\n")[0]
