"""Real trainers of TRL with the mixin in front: each gradient is the task's and the plain ELBO's."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from by_hand import Gradients, _Gradients, adapted, assert_same, layers_by_hand
from fvae_lora import ElboTrainerMixin
from fvae_lora.layer import FVAELoraLayer
from tiny import tiny_llama

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

pytestmark = [pytest.mark.usefixtures("without_noise"), pytest.mark.filterwarnings("ignore")]
WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]

TEXTS = [{"text": text} for text in ("a b c", "d e f g h a b", "c", "b d")]
PAIRS = [
    {"prompt": "a b", "chosen": " c a d", "rejected": " b"},
    {"prompt": "d", "chosen": " e", "rejected": " a a f g h"},
    {"prompt": "a b c d e", "chosen": " f g", "rejected": " h"},
    {"prompt": "h", "chosen": " g f e d c", "rejected": " b a"},
]
ANSWERS = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in PAIRS
    for kind in ("chosen", "rejected")
][:4]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def policy(**fields: Any) -> PeftModel:
    return adapted(tiny_llama(vocab_size=len(WORDS)), torch.float32, **fields)


def judge() -> PeftModel:
    config = tiny_llama(vocab_size=len(WORDS)).config
    config.num_labels, config.pad_token_id = 1, 0
    return adapted(LlamaForSequenceClassification(config), torch.float32, modules_to_save=["score"])


def many_letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


GENERATING = {"num_generations": 2, "max_completion_length": 5, "beta": 0.5}
# The trainer's name, its rows, the model, and what else it is given.
TRAINERS: dict[str, tuple[str, list[dict[str, Any]], Callable[[], PeftModel], dict[str, Any]]] = {
    "SFT": ("SFT", TEXTS, policy, {}),
    "SFT with packing": ("SFT", TEXTS, policy, {"packing": True, "max_length": 8}),
    "SFT with wrapped packing": (
        "SFT",
        TEXTS,
        policy,
        {"packing": True, "packing_strategy": "wrapped", "max_length": 4},
    ),
    "SFT without padding": ("SFT", TEXTS, policy, {"padding_free": True, "max_length": None}),
    "SFT with label smoothing": ("SFT", TEXTS, policy, {"label_smoothing_factor": 0.2}),
    "DPO": ("DPO", PAIRS, policy, {}),
    "DPO, precomputed": ("DPO", PAIRS, policy, {"precompute_ref_log_probs": True}),
    "KTO": ("KTO", ANSWERS, policy, {}),
    "Reward": ("Reward", PAIRS, judge, {}),
    "GRPO": ("GRPO", PROMPTS, policy, GENERATING),
    "RLOO": ("RLOO", PROMPTS, policy, GENERATING),
}


class Plain:
    """In front of a trainer whose layers compute as written by hand: the task's loss and the ELBO of what was run."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        masks: list[Tensor | None] = []

        def look(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                masks.append(given.get("attention_mask"))

        hook = self.model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
        with layers_by_hand() as found:
            loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        hook.remove()
        return loss + sum(mean_elbo(self.model, *key, runs, masks) for key, runs in found.items())


def mean_elbo(
    model: PeftModel, layer: str, adapter: str, runs: list[Tensor], masks: list[Tensor | None]
) -> Tensor | float:
    """The weighted negative ELBO of a layer, the mean over the tokens of all its runs."""
    weights = [torch.ones_like(run) if mask is None else mask.to(run) for run, mask in zip(runs, masks, strict=True)]
    total = sum((run * weight).sum() for run, weight in zip(runs, weights, strict=True))
    return -model.peft_config[adapter].elbo_weight * total / sum(weight.sum() for weight in weights)


def made(
    name: str, front: type, model: PeftModel, folder: Path, rows: list[dict[str, Any]] | None = None, **fields: Any
) -> Any:
    """A trainer of TRL with a class in front, which takes one step over all its rows."""
    kind, own_rows, _, own_fields = TRAINERS[name]
    rows = own_rows if rows is None else rows
    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **own_fields,
        **fields,
    }
    trainer = type("Trained", (front, getattr(trl, f"{kind}Trainer")), {})
    return trainer(
        model,
        args=getattr(trl, f"{kind}Config")(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **({"reward_funcs": many_letters} if kind in ("GRPO", "RLOO") else {}),
    )


def gradients_of(trainer: Any) -> Gradients:
    """Those of the step."""
    seen = _Gradients()
    trainer.add_callback(seen)
    trainer.train()
    (found,) = seen.steps
    return found


def both(name: str, folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> tuple[Gradients, Gradients]:
    """The gradients with the mixin, and those by hand, of the same model with the same seed."""
    steps = []
    for front, fields in ((ElboTrainerMixin, found), (Plain, expected)):
        torch.manual_seed(0)
        model = TRAINERS[name][2]()
        steps.append(gradients_of(made(name, front, model, folder, **fields)))
    return steps[0], steps[1]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_adds_the_plain_elbo_to_its_own_loss(name: str, tmp_path: Path) -> None:
    """As TRL does it, with gradient checkpointing; by hand without."""
    found, expected = both(name, tmp_path, {}, {"gradient_checkpointing": False})
    assert_same(found, expected, 1e-4)
