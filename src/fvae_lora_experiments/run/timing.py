"""Who sees how far something is, how often that is said, and when it will have ended."""

import sys
from datetime import datetime, timedelta

PAUSE_S = 60.0
"""How long nothing is said for, unless something has come to its end."""


def on_terminal() -> bool:
    """Whether somebody sees bars."""
    return sys.stderr.isatty()


def ends(left: timedelta) -> str:
    """`ends 14:05, in 0:12:03`."""
    then = datetime.now() + left
    return f"ends {then:%a %d %b %H:%M}" if left > timedelta(days=1) else f"ends {then:%H:%M}, in {left}"
