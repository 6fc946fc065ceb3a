"""From rows to predictions, batch by batch: rows are opened, tokenised and padded as in training."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fvae_lora import predict_with_uncertainty
from fvae_lora_experiments.data.audio_decoding import read_sound
from fvae_lora_experiments.data.image_decoding import open_image
from fvae_lora_experiments.data.image_inputs import process
from fvae_lora_experiments.data.questions import question
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.rows import Row
from fvae_lora_experiments.predict.trained import Trained
from fvae_lora_experiments.tasks.commonsense.answers import log_likelihoods
from fvae_lora_experiments.tasks.commonsense.prompts import encode
from fvae_lora_experiments.tasks.phonemes import collapsed

Predictions = list[dict[str, Any]]


class Predictor(ABC):
    """Predicts for one task.

    Args:
        trained: the run.
        probabilities: whether every class's probability is wanted.
        draws: how often z1 is drawn for the entropy; 0 is no entropy.
    """

    def __init__(self, trained: Trained, probabilities: bool = False, draws: int = 0):
        self.trained, self.probabilities, self.draws = trained, probabilities, draws

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The columns of a table of predictions."""

    @abstractmethod
    def prepare(self, row: Row) -> Any:
        """A row as `predict` needs it.

        Raises:
            UserError: it cannot be used.
        """

    def usable(self, row: Row) -> Any:
        """As `prepare`; the error names the row.

        Raises:
            UserError: the row cannot be used.
        """
        if row.error:
            raise UserError(f"{row.where}: {row.error}")
        try:
            return self.prepare(row)
        except UserError as error:
            if str(error).startswith(row.where):
                raise
            raise UserError(f"{row.where}: {error}") from error

    @abstractmethod
    def predict(self, items: Sequence[Any]) -> Predictions:
        """A batch's predictions, from the results of `prepare` for its rows."""

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the model's device."""
        return {key: value.to(self.trained.device) for key, value in batch.items()}


class Reader(Predictor):
    """What predicts by one forward of what a row holds."""

    @abstractmethod
    def batch(self, items: Sequence[Any]) -> dict[str, Any]:
        """The rows as the model takes them."""


class Classifier(Reader):
    """Classes and their probabilities, or a number."""

    @property
    def columns(self) -> Sequence[str]:
        """The class and its probability, on request all probabilities and the entropies; or a number."""
        if not self.trained.classes:
            return ["value"]
        each = [f"probability_{name}" for name in self.trained.classes] if self.probabilities else []
        return ["label", "probability", *each, *(["entropy", "mutual_information"] if self.draws else [])]

    def predict(self, items: Sequence[Any]) -> Predictions:
        """One forward; one more for each draw."""
        batch, classes = self.on_device(self.batch(items)), self.trained.classes
        logits = self._logits(batch)
        if not classes:
            return [{"value": number(value)} for value in logits.squeeze(-1)]
        found = [named(row, classes, self.probabilities) for row in logits.softmax(-1)]
        if self.draws:
            trained = self.trained
            with trained.task.autocast(trained.device):  # draw by draw: no more memory than a prediction takes
                drawn = predict_with_uncertainty(
                    trained.model, draws=self.draws, seed=trained.recipe.seed, draws_at_once=1, **batch
                )
            assert drawn.entropy is not None
            assert drawn.mutual_information is not None
            for row, entropy, part in zip(found, drawn.entropy, drawn.mutual_information, strict=True):
                row |= {"entropy": number(entropy), "mutual_information": number(part)}
        return found

    def _logits(self, batch: dict[str, Any]) -> Tensor:
        with self.trained.task.autocast(self.trained.device):
            logits: Tensor = self.trained.model(**batch).logits
        return logits.float()


class ImageClassifier(Classifier):
    """Images, opened by the recipe's settings."""

    def __init__(self, trained: Trained, probabilities: bool = False, draws: int = 0):
        super().__init__(trained, probabilities, draws)
        self.mode = "L" if getattr(trained.model.config, "num_channels", 3) == 1 else "RGB"
        process(trained.processor, Image.new(self.mode, (64, 64)))  # threads find a processor that is ready

    def prepare(self, row: Row) -> Tensor:
        """Its pixels, (channels, height, width)."""
        image = open_image(row.values, row.where, self.trained.recipe.image)
        return process(self.trained.processor, image.convert(self.mode))

    def batch(self, items: Sequence[Tensor]) -> dict[str, Any]:
        """`pixel_values` (rows, channels, height, width)."""
        return {"pixel_values": torch.stack(list(items))}


class TextClassifier(Classifier):
    """Texts, or pairs of them, cut at the recipe's length."""

    def prepare(self, row: Row) -> dict[str, str]:
        """Its texts."""
        for what, value in row.values.items():
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{row.where}: {what} is {value!r:.40}; expected some text")
        return row.values

    def batch(self, items: Sequence[dict[str, str]]) -> dict[str, Any]:
        """`input_ids` (rows, tokens) and what else the tokenizer gives."""
        texts = {what: [item[what] for item in items] for what in items[0]}
        length, task = self.trained.recipe.text.max_length, self.trained.task
        encoded = self.trained.processor(**texts, truncation=True, max_length=length, verbose=False)
        return task.collate([{key: values[i] for key, values in encoded.items()} for i in range(len(items))])


class Writer(Predictor):
    """Transcribes recordings."""

    columns = ("text",)

    def prepare(self, row: Row) -> dict[str, Tensor]:
        """Its spectrogram."""
        extractor = self.trained.processor.feature_extractor
        sound = read_sound(row.values | {"where": row.where}, extractor.sampling_rate)
        if len(sound) > extractor.n_samples:
            seconds = len(sound) / extractor.sampling_rate
            raise UserError(f"{row.where}: {seconds:.1f} s long; the model hears {extractor.chunk_length} s at most")
        heard = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_features": heard["input_features"][0]}

    def predict(self, items: Sequence[dict[str, Tensor]]) -> Predictions:
        """The text, by greedy decoding."""
        batch = self.on_device({key: torch.stack([item[key] for item in items]) for key in items[0]})
        with self.trained.task.autocast(self.trained.device):
            model: Any = self.trained.model
            tokens = model.generate(encoder_outputs=model.get_encoder()(**batch))
        texts = self.trained.processor.batch_decode(tokens, skip_special_tokens=True)
        return [{"text": text.strip()} for text in texts]


class Listener(Reader):
    """Recognises the phonemes of recordings."""

    columns = ("phonemes",)

    def prepare(self, row: Row) -> dict[str, Tensor]:
        """Its samples."""
        extractor = self.trained.processor
        sound = read_sound(row.values | {"where": row.where}, extractor.sampling_rate)
        heard = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {"input_values": heard["input_values"][0], "labels": torch.zeros(1, dtype=torch.long)}

    def batch(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """`input_values` (rows, samples) and `attention_mask`."""
        return {key: value for key, value in self.trained.task.collate(items).items() if key != "labels"}

    def predict(self, items: Sequence[dict[str, Tensor]]) -> Predictions:
        """The best symbol of each frame, repetitions collapsed."""
        batch = self.on_device(self.batch(items))
        with self.trained.task.autocast(self.trained.device):
            best = self.trained.model(**batch).logits.argmax(-1).cpu().numpy()
        frames: Any = self.trained.model._get_feat_extract_output_lengths
        names, found = self.trained.classes, []
        for symbols, item in zip(best, items, strict=True):
            heard = collapsed(symbols[: int(frames(len(item["input_values"])))])
            found.append({"phonemes": " ".join(names[symbol - 1] for symbol in heard)})
        return found


class Answerer(Predictor):
    """Answers questions with options by the likeliest option."""

    columns = ("label", "probability")

    def prepare(self, row: Row) -> dict[str, Any]:
        """The question; its answer need not be known."""
        asked = question(_with_some_answer(row.values), row.where)
        settings = self.trained.recipe.commonsense
        columns = {key: [asked[key]] for key in ("instruction", "input", "answers")}
        encoded = encode(columns, settings.template, self.trained.processor)
        return asked | {key: value[0] for key, value in encoded.items()}

    def predict(self, items: Sequence[dict[str, Any]]) -> Predictions:
        """The likelihoods of the options, normalised over them."""
        prompts, answers = ([item[key] for item in items] for key in ("prompt_ids", "answer_ids"))
        likely = log_likelihoods(self.trained.model, prompts, answers).softmax(-1)
        options = [item["options"] for item in items]
        return [named(row[: len(own)], own, self.probabilities) for row, own in zip(likely, options, strict=True)]


def _with_some_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A question with some answer if it has none: the reader of training data requires one."""
    if "choices" in row:
        return {"answer": 0} | {key: value for key, value in row.items() if value is not None}
    instruction = row.get("instruction")
    named_format = instruction.rpartition("Answer format:") if isinstance(instruction, str) else ("", "", "")
    first = named_format[2].strip().partition("/")[0]
    if row.get("answer") and row.get("output"):
        return row
    return row | {"answer": first, "output": f"the correct answer is {first}"}


def number(value: Tensor) -> float:
    """The value with six significant digits."""
    return float(f"{value.item():.6g}")


def named(probabilities: Tensor, classes: Sequence[str], every: bool) -> dict[str, Any]:
    """The likeliest class of (classes,), and on request every class's probability."""
    best = int(probabilities.argmax())
    found: dict[str, Any] = {"label": classes[best], "probability": number(probabilities[best])}
    if every:
        found["probabilities"] = dict(zip(classes, map(number, probabilities), strict=True))
    return found


PREDICTORS: dict[str, type[Predictor]] = {
    "image": ImageClassifier,
    "text": TextClassifier,
    "transcription": Writer,
    "phonemes": Listener,
    "commonsense": Answerer,
}
"""The predictor of each task."""
