"""From encoded sound to samples at a model's rate."""

import io
from typing import Any

import numpy as np
import soundfile
import soxr
from datasets import Value

from fvae_lora_experiments.data.encoded import encoded_bytes
from fvae_lora_experiments.errors import UserError

SOUND = {"bytes": Value("binary"), "path": Value("string")}
"""The feature of a sound that is not decoded; datasets' own cannot be made of paths without torchcodec."""


def read_sound(row: dict[str, Any], rate: int) -> np.ndarray:
    """A row's `audio`, its channels averaged and resampled.

    Args:
        row: has `audio`, a file's path or its bytes, in any format that libsndfile reads (RIFF, NIST sphere, FLAC ...),
            and `where` it is, for messages.
        rate: samples per second that are wanted.

    Returns:
        (samples,) of float32, 1 being full scale.

    Raises:
        UserError: not readable, or without a single sample.
    """
    samples, found = _decoded(row)
    return soxr.resample(samples.mean(axis=1), found, rate)


def sound_content(row: dict[str, Any]) -> bytes:
    """A row's sound, encoded, after decoding it once.

    Raises:
        UserError: as `read_sound`.
    """
    _decoded(row)
    return encoded_bytes(row["audio"])


def _decoded(row: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Samples, (samples, channels), and how many there are in a second."""
    try:
        samples, rate = soundfile.read(io.BytesIO(encoded_bytes(row["audio"])), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        cause = getattr(error, "error_string", None) or getattr(error, "strerror", None) or "no sound in this row"
        raise UserError(f"{row['where']}: not a readable sound file: {cause}") from error
    if not len(samples):
        raise UserError(f"{row['where']}: a sound file without a single sample")
    return samples, rate
