"""Progress: whether bars are visible, how often a line is printed, and when something will end."""

import sys
from datetime import datetime, timedelta

REPORT_INTERVAL_S = 60.0
"""Seconds between two lines, unless something ends in between."""


def is_terminal() -> bool:
    """Whether progress bars are visible."""
    return sys.stderr.isatty()


def eta(left: timedelta) -> str:
    """`ends 14:05, in 0:12:03`."""
    then = datetime.now() + left
    return f"ends {then:%a %d %b %H:%M}" if left > timedelta(days=1) else f"ends {then:%H:%M}, in {left}"
