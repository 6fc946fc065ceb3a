"""Text files that describe images, one on each line."""

from collections.abc import Sequence
from pathlib import Path

from fvae_lora_experiments.errors import UserError


def table_lines(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        UserError: if it cannot be read as text.
    """
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as text: {error}") from error


def integer(text: str | None, allowed: Sequence[int], where: str, what: str) -> int:
    """`text` as one of the integers `allowed`.

    Raises:
        UserError: it is another; names `where` it stands and `what` it is.
    """
    if text is None or text.strip() not in map(str, allowed):
        raise UserError(f"{where}: {what} is {text!r}; allowed are {', '.join(map(str, allowed))}")
    return int(text)
