"""Command lines of tests, put together from what most of them have and what one wants otherwise; how one is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

SEVERAL = ("--vary", "--grid")
FLAGS = ("--dry-run", "--quiet", "--quick", "--all", "--help")


def later_wins(arguments: Sequence[object]) -> list[str]:
    """The arguments without an option or a key that comes again further on: twice is refused."""
    texts = [str(argument) for argument in arguments]
    kept: dict[str, list[str]] = {}
    while texts:
        first = texts.pop(0)
        if first.startswith("--") and first not in FLAGS:
            key, part = first, [first, *texts[:1]]
            texts = texts[1:]
        else:
            key, part = (first.partition("=")[0] if re.match(r"[\w.]+=", first) else f"{len(kept)} {first}"), [first]
        if key in SEVERAL:
            key = f"{len(kept)} {key}"
        kept.pop(key, None)
        kept[key] = part
    return [text for part in kept.values() for text in part]


def assert_refused(result: tuple[int, str, str], *says: str) -> None:
    """The command line's result is one line, in which all this stands, and exit code 2."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("fvae-lora: ")
    assert err.count("\n") == 1, err
    for part in says:
        assert part in err
