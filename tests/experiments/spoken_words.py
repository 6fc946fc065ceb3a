"""A tiny Whisper, and recordings with what is said in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Dataset
from timit_corpus import RATE, hum
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

WORDS = [
    "yes",
    "no",
    "two times",
    "Mister Mars, stir!",
    "roses",
    "a meteor",
    "sit",
    "tours",
    "must it rain?",
    "some ants",
]


def whisper(folder: Path, multilingual: bool = False) -> Path:
    """A tiny one that hears two seconds and writes letter by letter."""
    torch.manual_seed(0)
    tokenizer = WhisperTokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    names = ["startoftranscript", "en", "zh", "de", "translate", "transcribe", "notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    number = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in [*names, "endoftext"]}
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    size |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_mel_bins": 8,
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), number["endoftext"])
    ends |= {"decoder_start_token_id": number["startoftranscript"]}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            **size, **ends, vocab_size=len(tokenizer), max_source_positions=100, max_target_positions=32, init_std=0.2
        )
    )
    languages = {"lang_to_id": {"<|en|>": number["en"], "<|de|>": number["de"]}}
    languages |= {"task_to_id": {task: number[task] for task in ("translate", "transcribe")}}
    model.generation_config = GenerationConfig(
        **ends,
        is_multilingual=multilingual,
        no_timestamps_token_id=number["notimestamps"],
        max_length=32,
        **(languages if multilingual else {}),
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer).save_pretrained(folder)
    return folder


def recorded(text: str, seconds: float = 0.0) -> dict[str, Any]:
    samples, _ = hum(text, "FAKS0")
    buffer = io.BytesIO()
    longer = np.pad(samples, (0, max(0, int(seconds * RATE) - len(samples))))
    soundfile.write(buffer, longer, RATE, format="WAV", subtype="PCM_16")
    return {"bytes": buffer.getvalue(), "path": None}


def write_recordings(folder: Path, rows: dict[str, list[tuple[dict[str, Any], str | None]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in rows.items():
        table = {"audio": [audio for audio, _ in pairs], "text": [text for _, text in pairs]}
        Dataset.from_dict(table).to_parquet(folder / f"{split}.parquet")
    return folder


def said(*texts: str) -> list[tuple[dict[str, Any], str | None]]:
    return [(recorded(text), text) for text in texts]
