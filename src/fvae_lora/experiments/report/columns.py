"""What every table shows of a row, and how numbers are written for people."""

from collections.abc import Callable

from fvae_lora.experiments.report.summary import Row

UNKNOWN = "–"


def accuracy(row: Row) -> str:
    """Write mean ± standard deviation in percent."""
    if row.accuracy is None:
        return UNKNOWN
    spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.2f}"
    return f"{100 * row.accuracy:.2f}{spread}"


def seeds(row: Row) -> str:
    """Say how many seeds finished, and of how many where some are missing."""
    n = len(row.seeds)
    return f"{n} of {n + len(row.missing_seeds)}" if row.missing_seeds else str(n)


def quantity(value: float | None) -> str:
    """Write a number with three digits and a unit prefix: 1234567 is 1.23M."""
    if value is None:
        return UNKNOWN
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)}{prefix}"
    return _three_digits(value)


def duration(seconds: float | None) -> str:
    """Write a duration in its two largest units: 3h05m, 1m23s, 4.2s."""
    if seconds is None:
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def memory(megabytes: float | None) -> str:
    """Write a size in MB, or in GB from one gigabyte on."""
    if megabytes is None:
        return UNKNOWN
    return f"{megabytes:.0f}MB" if megabytes < 999.5 else f"{megabytes / 1000:.1f}GB"


def number(value: float) -> str:
    """Write a number of any sign with three digits and a true minus."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def rate(value: float | None) -> str:
    """Write a learning rate."""
    return UNKNOWN if value is None else f"{value:g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "accuracy %": accuracy,
    "seeds": seeds,
    "lr": lambda row: rate(row.learning_rate),
    "trainable params": lambda row: quantity(row.trainable_parameters),
    "inference params": lambda row: quantity(row.inference_parameters),
    "time": lambda row: duration(row.time_s),
    "peak memory": lambda row: memory(row.peak_memory_mb),
}
"""What every table shows of a row, after its method."""


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:.0f}"
