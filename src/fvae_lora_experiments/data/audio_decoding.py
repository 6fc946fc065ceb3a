"""Sound files to samples at a model's rate."""

import io
from typing import Any

import numpy as np
import soundfile
import soxr
from datasets import Value

from fvae_lora_experiments.data.encoded import encoded_bytes
from fvae_lora_experiments.errors import UserError

SOUND = {"bytes": Value("binary"), "path": Value("string")}
"""The feature of a sound that is not decoded; datasets' own needs torchcodec to be made from paths."""


def read_sound(row: dict[str, Any], rate: int) -> np.ndarray:
    """A row's `audio`, its channels averaged and resampled.

    Args:
        row: has `audio`, a file's path or its bytes, in any format that libsndfile reads (RIFF, NIST sphere, FLAC ...),
            and `where` it is, for messages.
        rate: samples per second to resample to.

    Returns:
        (samples,) of float32, 1 being full scale.

    Raises:
        UserError: a sound that cannot be read, or has no samples.
    """
    samples, found = _decoded(row)
    return soxr.resample(samples.mean(axis=1), found, rate)


def sound_content(row: dict[str, Any]) -> bytes:
    """A row's sound, still encoded, after decoding it once to check it.

    Raises:
        UserError: as `read_sound`.
    """
    _decoded(row)
    return encoded_bytes(row["audio"])


def _decoded(row: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Samples, (samples, channels), and their rate per second."""
    try:
        samples, rate = soundfile.read(io.BytesIO(encoded_bytes(row["audio"])), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        cause = getattr(error, "error_string", None) or getattr(error, "strerror", None) or "no sound in this row"
        raise UserError(f"{row['where']}: not a readable sound file: {cause}") from error
    if not len(samples):
        raise UserError(f"{row['where']}: the sound file has no samples")
    return samples, rate
