"""Transcription of speech with Whisper."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.data.audio_decoding import read_sound
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.recordings import open_recordings, recording_content
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.pretrained import check_tokens, check_vocabulary, load, load_model, loading
from fvae_lora_experiments.run.state_cache import STATES, collate
from fvae_lora_experiments.tasks import Metric, Task
from fvae_lora_experiments.tasks.batches import IGNORED_LABEL, batches_by_length


class TranscriptionTask(Task):
    """Recordings and their texts; judged by the word error rate of what the model writes, greedily.

    It is also measured on validation after each epoch. Both texts are normalised first, as is customary for Whisper: in
    English by `EnglishTextNormalizer` (case, punctuation, numbers, contractions, and spelling if the model comes with a
    table), in other languages by `BasicTextNormalizer` (case and punctuation).
    """

    metric = Metric("wer", greater_is_better=False)

    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """As `data.recordings.open_recordings`."""
        return open_recordings(self.recipe.dataset, self.recipe.data, notes)

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """The encoded sound and the text."""
        return recording_content(row)

    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The model in float32 and its processor, set to the recipe's language if it is multilingual.

        Raises:
            UserError: the model does not exist or is not Whisper, or does not support the language or the length.
        """
        name, speech = self.recipe.model, self.recipe.speech
        with loading(name, "for transcription"):
            model, _ = load_model(AutoModelForSpeechSeq2Seq, name, dtype=torch.float32)
            if model.config.model_type != "whisper":
                raise ValueError(f"{model.config.model_type} is not Whisper")
            processor = load(AutoProcessor, name)
            check_vocabulary(name, processor.tokenizer)
            if model.generation_config.is_multilingual:
                processor.tokenizer.set_prefix_tokens(language=speech.language, task="transcribe")
                model.generation_config.language, model.generation_config.task = speech.language, "transcribe"
            prefix = len(processor.tokenizer.prefix_tokens)
        if prefix + speech.max_new_tokens > model.config.max_target_positions:
            limit = model.config.max_target_positions - prefix
            raise UserError(f"speech.max_new_tokens: model {name} writes {limit} at most, got {speech.max_new_tokens}")
        model.generation_config.max_length = None
        model.generation_config.max_new_tokens = speech.max_new_tokens
        return model, processor

    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """The three splits as spectrograms and tokens.

        Raises:
            UserError: a recording or a text is too long for the model, the normaliser leaves nothing of a text, or the
                tokenizer does not know the words.
        """
        is_english = not model.generation_config.is_multilingual or self.recipe.speech.language in ("en", "english")
        spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None) or {}
        normalise = EnglishTextNormalizer(spelling) if is_english else BasicTextNormalizer()
        parts = {name: Recordings(rows, model, processor, normalise) for name, rows in splits.by_name.items()}
        check_tokens(self.recipe.model, processor.tokenizer, parts["train"].texts())
        return parts

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch: `input_features` (batch, bands, frames), `attention_mask` (batch, frames), `labels` (batch, tokens).

        Whisper always reads and attends to 30 seconds, however short a recording is. The mask excludes the added
        silence from the ELBO only.
        """
        labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORED_LABEL)
        together = {key: torch.stack([item[key] for item in items]) for key in ("input_features", "attention_mask")}
        return together | {"labels": labels}

    def outputs(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Nothing: `generated_scores` computes the score."""
        return labels.new_empty(len(labels))

    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """None; see `generated_scores`."""
        return {}

    @torch.no_grad()
    def generated_scores(
        self, model: PreTrainedModel, rows: "Recordings", items: Any, progress: bool
    ) -> dict[str, float]:
        """The word error rate: insertions, deletions and substitutions, over the number of spoken words.

        An encoder with cached states is not run again.
        """
        model.eval()
        device = next(model.parameters()).device
        written = [""] * len(rows)
        batches = batches_by_length(
            [len(text) for text in rows.rows["text"]], self.recipe.train.batch_size
        )  # end together
        for numbers in tqdm(batches, desc="transcribing", disable=None if progress else True, leave=False):
            batch = collate(self, [items[i] for i in numbers])
            heard = {key: batch[key].to(device) for key in ("input_features", STATES) if key in batch}
            with self.autocast(device):
                tokens = model.generate(encoder_outputs=model.get_encoder()(**heard))
            for i, text in zip(numbers, rows.processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                written[i] = text
        return {self.metric.name: word_error_rate(rows.rows["text"], written, rows.normalise)}


def word_error_rate(spoken: Sequence[str], written: Sequence[str], normalise: Callable[[str], str]) -> float:
    """Wrong words over spoken words, after normalising both."""
    return float(jiwer.wer([normalise(text) for text in spoken], [normalise(text) for text in written]))


class Recordings(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A split as Whisper takes it: `input_features` (bands, frames), `attention_mask` (frames,), `labels` (tokens,).

    Args:
        rows: the split, as `data.recordings` has it.
        model: the model, which limits the length.
        processor: the model's processor.
        normalise: applied to a text before it is scored.

    Raises:
        UserError: a recording or a text is too long, or `normalise` leaves nothing of a text.
    """

    def __init__(self, rows: Dataset, model: PreTrainedModel, processor: Any, normalise: Callable[[str], str]):
        self.rows, self.processor, self.normalise = rows, processor, normalise
        extractor, limit = processor.feature_extractor, model.config.max_target_positions
        for i, row in enumerate(rows):
            where = row["where"]
            if not normalise(row["text"]):
                raise UserError(f"{where}: nothing is left of its text {row['text']!r} once it is normalised")
            if (tokens := len(self._labels(row))) > limit:
                raise UserError(f"{where}: its text has {tokens} tokens; the model reads {limit} at most")
            if (samples := len(self._sound(i))) > extractor.n_samples:
                seconds = samples / extractor.sampling_rate
                raise UserError(f"{where}: {seconds:.1f} s long; the model hears {extractor.chunk_length} s at most")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        heard = extractor(self._sound(index), sampling_rate=rate, return_attention_mask=True, return_tensors="pt")
        item = {key: heard[key][0] for key in ("input_features", "attention_mask")}
        return item | {"labels": torch.tensor(self._labels(self.rows[index]))}

    def texts(self) -> Iterator[list[int]]:
        """The tokens of each text."""
        return map(self._labels, self.rows)

    def _labels(self, row: dict[str, Any]) -> list[int]:
        """The text's tokens without the first, which the model itself prepends to the labels."""
        ids: list[int] = self.processor.tokenizer(row["text"]).input_ids
        return ids[1:]

    def _sound(self, index: int) -> np.ndarray:
        return read_sound(self.rows[index], self.processor.feature_extractor.sampling_rate)
