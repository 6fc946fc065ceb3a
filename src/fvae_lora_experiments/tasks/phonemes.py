"""Phoneme recognition on TIMIT, with CTC on wav2vec2 and similar models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, PreTrainedModel

from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.data.audio_decoding import read_sound, sound_content
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.timit import CORE_TEST_SPEAKERS, DEVELOPMENT_SPEAKERS, open_timit
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.heads import draw_new_head
from fvae_lora_experiments.models.pretrained import load, load_model, loading
from fvae_lora_experiments.tasks import Metric, Task
from fvae_lora_experiments.tasks.batches import IGNORED_LABEL

BLANK = 0
"""The id of CTC's blank, which is the model's padding token. The phones follow it."""


class PhonemeTask(Task):
    """Sentences and their phones, 39 in all; judged by the phoneme error rate, a fraction of the spoken phones."""

    metric = Metric("per", greater_is_better=False)

    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """As `data.timit.open_timit`."""
        return open_timit(self.recipe.dataset, notes)

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """The encoded sound; the phones are the row's label."""
        return sound_content(row)

    def split(self, official: dict[str, Dataset]) -> Splits:
        """TIMIT's own splits, and how many of their speakers are present.

        Raises:
            UserError: the protocol is not `clean`.
        """
        if self.recipe.data.protocol != "clean":
            raise UserError(
                f"data.protocol: TIMIT has its own splits by speaker; expected clean, got {self.recipe.data.protocol}"
            )
        found = {name: len(set(rows["speaker"])) for name, rows in official.items()}
        return replace(
            super().split(official),
            validation_from=f"{found['validation']} of the {len(DEVELOPMENT_SPEAKERS)} customary development speakers",
            test_from=f"{found['test']} of the {len(CORE_TEST_SPEAKERS)} speakers of the core test set",
        )

    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The model in float32 with a new head for `classes` and the blank, and its feature extractor.

        Its convolutions are frozen, as is customary even in full fine-tuning. Layer drop is off: a layer that does not
        run has no ELBO.

        Raises:
            UserError: the model does not exist, or does not read samples.
        """
        name = self.recipe.model
        with loading(name, "for phoneme recognition"):
            config = load(AutoConfig, name)
            if not hasattr(config, "conv_stride"):
                raise ValueError(f"{config.model_type} is not of the kind of wav2vec2, HuBERT and WavLM")
            config.update({"vocab_size": len(classes) + 1, "pad_token_id": BLANK})
            config.update({"layerdrop": 0.0, "ctc_loss_reduction": "mean"})
            model, _ = load_model(AutoModelForCTC, name, config=config, dtype=torch.float32)
            extractor = load(AutoFeatureExtractor, name)
        draw_new_head(model)
        model.freeze_feature_encoder()
        # If a head's size differs from the checkpoint's, peft asks for embeddings, which an audio model does not have.
        model.get_input_embeddings = model.get_output_embeddings = lambda: None
        return model, extractor

    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """The three splits as samples at the model's rate.

        Raises:
            UserError: a sentence has more phones than CTC can output in the model's frames, or frozen blocks are to be
                cached.
        """
        if self.recipe.train.cache_frozen:
            raise UserError("train.cache_frozen: not supported for sentences, whose lengths differ")
        return {name: Sentences(rows, model, processor) for name, rows in splits.by_name.items()}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch: `input_values` (batch, samples), padded with zeros, `attention_mask`, `labels` (batch, phones).

        There is always a mask, which tells CTC and the ELBO which frames count. In models whose first convolution is
        normalised over time (`feat_extract_norm` "group") a sentence's frames still depend slightly on its padding.
        """
        sounds = [item["input_values"] for item in items]
        return {
            "input_values": pad_sequence(sounds, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(s, dtype=torch.long) for s in sounds], batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORED_LABEL),
        }

    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: "Sentences") -> dict[str, float]:
        """The phoneme error rate: insertions, deletions and substitutions, over the number of spoken phones.

        Args:
            outputs: the best symbol of each frame, (sentences, frames).
            labels: the phones, (sentences, phones), padded with -100.
            rows: the split, in this order.
        """
        spoken = [_text(phone for phone in sentence if phone != IGNORED_LABEL) for sentence in labels]
        heard = [_text(collapsed(symbols[:n])) for symbols, n in zip(outputs, rows.frames, strict=True)]
        return {self.metric.name: float(jiwer.wer(spoken, heard))}


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A split as a model takes it: `input_values` (samples,) and `labels` (phones,), numbered from 1.

    Args:
        rows: the split, as `data.timit` has it.
        model: the model, which gives the number of frames.
        extractor: the model's feature extractor, which normalises.

    Raises:
        UserError: a sentence has more phones than CTC can output in its frames.
    """

    def __init__(self, rows: Dataset, model: PreTrainedModel, extractor: Any):
        self.rows, self.extractor = rows, extractor
        self.frames = [int(model._get_feat_extract_output_lengths(len(self._sound(i)))) for i in range(len(rows))]
        for row, frames in zip(rows, self.frames, strict=True):
            phones = row["label"]
            needed = len(phones) + sum(a == b for a, b in pairwise(phones))  # a blank separates repeated phones
            if needed > frames:
                problem = f"{len(phones)} phones in {frames} frames, CTC needs {needed}"
                raise UserError(f"{row['where']}: too short for the model: {problem}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sound = self.extractor(self._sound(index), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return {"input_values": sound["input_values"][0], "labels": torch.tensor(self.rows[index]["label"]) + 1}

    def _sound(self, index: int) -> np.ndarray:
        return read_sound(self.rows[index], self.extractor.sampling_rate)


def collapsed(symbols: np.ndarray) -> list[int]:
    """CTC decoding: repeated symbols are merged and blanks removed."""
    return [int(symbol) for symbol, _ in groupby(symbols) if symbol != BLANK]


def _text(symbols: Any) -> str:
    return " ".join(str(symbol) for symbol in symbols)
