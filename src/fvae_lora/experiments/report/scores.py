"""What a score is called and how it is written for people: fractions in percent, everything else as it is."""

NO_FRACTIONS = {"loss", "perplexity", "count", "unparsable"}
"""The last words of names of scores that are no fractions; all others are shares, error rates and correlations."""


def factor(score: str) -> int:
    """Return what the score of that name is multiplied with to be shown: 100 for a fraction."""
    return 1 if score.rpartition("_")[2] in NO_FRACTIONS else 100


def title(score: str) -> str:
    """Write a score's name with its unit: `worst_group_accuracy` is `worst group accuracy %`."""
    return score.replace("_", " ") + (" %" if factor(score) == 100 else "")


def shown(score: str, mean: float, std: float | None = None) -> str:
    """Write a score, with its standard deviation over seeds where there is one."""
    scale = factor(score)
    return f"{scale * mean:.2f}" + ("" if std is None else f" ± {scale * std:.2f}")
