"""What a name that nothing has was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


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
