"""Commonsense reasoning: a causal language model answers questions with options."""

import importlib.util
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.fingerprint import Identity, identify
from fvae_lora_experiments.data.questions import open_questions
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.pretrained import check_tokens, load_model, load_tokenizer, loading
from fvae_lora_experiments.tasks import Metric, Task
from fvae_lora_experiments.tasks.batches import IGNORED_LABEL, batches_by_length, padded, positions
from fvae_lora_experiments.tasks.commonsense.answers import log_likelihoods, parse, write_answers
from fvae_lora_experiments.tasks.commonsense.prompts import check_template, encode

ROLE = "as a causal language model"

UNPARSABLE = -1
"""Used instead of an option's index."""


class Questions(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as tokens: each item is a question and its right answer; only the answer has labels.

    Args:
        rows: the split, with the columns of `data.questions` and of `prompts.encode`.
        tokenizer: the model's tokenizer.
        is_test: whether it is the test split, on which answers are also generated.
    """

    def __init__(self, rows: Dataset, tokenizer: Any, is_test: bool):
        self.rows, self.tokenizer, self.is_test = rows, tokenizer, is_test

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        prompt, answer = row["prompt_ids"], row["answer_ids"][row["answer"]]
        return {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer}


class CommonsenseTask(Task):
    """Questions with options; judged by the share whose right option is the likeliest to the model."""

    metric = Metric("choice_accuracy")

    @property
    def bytes_per_frozen_weight(self) -> float:  # type: ignore[override]
        """Half a byte in nf4, two in bfloat16; see `load_model`."""
        if self.recipe.commonsense.load_in_4bit:
            return 0.5
        return 2 if self.recipe.train.precision == "bf16" else 4

    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """As `data.questions.open_questions`."""
        return open_questions(self.recipe.dataset, self.recipe.data.config, self.recipe.commonsense.test_sets, notes)

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """The question, its options and the index of the right one."""
        return json.dumps({key: value for key, value in row.items() if key != "where"}, sort_keys=True).encode()

    def identify(self, official: dict[str, Dataset]) -> Identity:
        """As usual, but a question is the same in whatever split and set it is."""
        return identify(official, self.content, lambda row, where: self.content(row | {"set": ""}, where))

    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The causal language model and its tokenizer.

        In float32, except for frozen weights: with `train.precision: bf16` they are loaded in bfloat16, and with
        `commonsense.load_in_4bit` in 4 bits (nf4).

        Raises:
            UserError: the model does not exist, does not generate text, or has no positions and key-value cache, which
                scoring options needs; or the tokenizer lacks what the recipe needs.
        """
        name, settings = self.recipe.model, self.recipe.commonsense
        frozen = METHODS[self.recipe.method].config is not None
        dtype = torch.bfloat16 if frozen and self.recipe.train.precision == "bf16" else torch.float32
        options: dict[str, Any] = {"dtype": dtype}
        if settings.load_in_4bit:
            options["quantization_config"] = _four_bits(dtype, frozen)
        with loading(name, ROLE):
            model, _ = load_model(AutoModelForCausalLM, name, **options)
        tokenizer = load_tokenizer(name, ROLE)
        takes = inspect.signature(type(model).forward).parameters
        if model._is_stateful or not {"position_ids", "logits_to_keep"} <= takes.keys():
            need = "`position_ids`, `logits_to_keep` and a cache of keys and values alone"
            raise UserError(f"model {name}: answers are scored with {need}; {type(model).__name__} is of another kind")
        if tokenizer.eos_token_id is None:
            raise UserError(f"model {name}: its tokenizer has no token for the end of a text, which ends every answer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        check_template(settings.template, tokenizer)
        model.generation_config = GenerationConfig(  # greedy, in place of the model's own
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return model, tokenizer

    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """The three splits as tokens.

        Raises:
            UserError: a question is longer than the model can read, or the tokenizer does not know the words.
        """
        longest = getattr(model.config, "max_position_embeddings", math.inf)  # some models have no such limit
        parts = {}
        for name in ("train", "validation", "test"):
            rows = getattr(splits, name).map(
                encode, batched=True, fn_kwargs={"template": self.recipe.commonsense.template, "tokenizer": processor}
            )
            for row in rows:
                length = len(row["prompt_ids"]) + max(map(len, row["answer_ids"]))
                if length > longest:
                    raise UserError(f"{row['where']}: {length} tokens; the model reads {longest} at most")
            parts[name] = Questions(rows, processor, is_test=name == "test")
        check_tokens(self.recipe.model, processor, parts["train"].rows["prompt_ids"])
        return parts

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch, padded on the left to its longest item, so that all answers are at the end.

        The model computes logits only there: those of the questions' tokens would cost more than some blocks.

        Returns:
            `input_ids`, `attention_mask` and `position_ids` (rows, length); `labels` (rows, end) for the
            last positions, which are in `logits_to_keep`: the longest answer and the token before it.
        """
        ids, mask = padded([item["input_ids"] for item in items], 0, "left")
        labels, _ = padded([item["labels"] for item in items], IGNORED_LABEL, "left")
        end = int((labels != IGNORED_LABEL).sum(-1).max()) + 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask),
            "labels": labels[:, -end:],
            "logits_to_keep": torch.arange(-end, 0),
        }

    def outputs(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Nothing: `generated_scores` computes the scores."""
        return labels.new_empty(len(labels))

    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """None; see `generated_scores`."""
        return {}

    def generated_scores(self, model: PreTrainedModel, rows: Questions, items: Any, progress: bool) -> dict[str, float]:
        """Shares of questions that are answered correctly, and how many answers cannot be parsed.

        - `choice_accuracy`: by the likelihood of each option.
        - `generated_accuracy`, test split only: by what the model generates, greedily; no option named counts as wrong.
        - `unparsable`, test split only: the number of generated answers that name no option.

        With several test sets these are means over the sets (`unparsable`: the sum), and each set also has its own,
        such as `piqa_choice_accuracy`.
        """
        columns = {name: rows.rows[name][:] for name in ("set", "prompt_ids", "answer_ids", "options", "answer")}
        batches = batches_by_length([len(ids) for ids in columns["prompt_ids"]], self.recipe.train.batch_size)
        truth = np.array(columns["answer"])
        likeliest, written = np.empty_like(truth), np.full_like(truth, UNPARSABLE)
        for batch in tqdm(batches, desc="likelihood of options", disable=None if progress else True, leave=False):
            prompts, answers = ([columns[name][i] for i in batch] for name in ("prompt_ids", "answer_ids"))
            likeliest[batch] = log_likelihoods(model, prompts, answers).argmax(-1).cpu()
        judged: dict[str, tuple[np.ndarray, Any]] = {self.metric.name: (likeliest == truth, np.mean)}
        if rows.is_test:
            for batch in tqdm(batches, desc="writing answers", disable=None if progress else True, leave=False):
                with self.autocast(next(model.parameters()).device):
                    texts = write_answers(model, rows.tokenizer, [columns["prompt_ids"][i] for i in batch])
                for i, text in zip(batch, texts, strict=True):
                    found = parse(text, columns["options"][i])
                    written[i] = UNPARSABLE if found is None else found
            judged["generated_accuracy"] = (written == truth, np.mean)
            judged["unparsable"] = (written == UNPARSABLE, np.sum)
        return _by_set(np.array(columns["set"]), judged)


def _by_set(sets: np.ndarray, judged: Mapping[str, tuple[np.ndarray, Any]]) -> dict[str, float]:
    """Each score, combined within each set and then over the sets, and the scores of each set."""
    names = list(dict.fromkeys(sets.tolist()))
    scores = {}
    for score, (of_rows, together) in judged.items():
        each = {name: float(together(of_rows[sets == name])) for name in names}
        scores[score] = float(together(list(each.values())))
        if len(names) > 1:
            scores |= {f"{name}_{score}": value for name, value in each.items()}
    return scores


def _four_bits(dtype: torch.dtype, frozen: bool) -> BitsAndBytesConfig:
    if not frozen:
        raise UserError("commonsense.load_in_4bit: 4-bit weights cannot be trained; choose an adapter method")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("commonsense.load_in_4bit: bitsandbytes is not installed; run pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
