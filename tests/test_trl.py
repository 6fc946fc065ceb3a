"""Real trainers of TRL with the mixin in front: each gradient is the task's and the plain ELBO's."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn

from by_hand import Gradients, PlainTrainer, StepGradients, adapted, assert_same
from fvae_lora import ElboTrainerMixin
from fvae_lora.layer import FVAELoraLayer
from tiny import tiny_llama

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

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


def made(name: str, front: type | None, model: PeftModel, folder: Path, **fields: Any) -> Any:
    """A trainer of TRL with a class in front, which takes one step over all its rows."""
    kind, rows, _, own_fields = TRAINERS[name]
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
    trainer = getattr(trl, f"{kind}Trainer")
    return (trainer if front is None else type("Trained", (front, trainer), {}))(
        model,
        args=getattr(trl, f"{kind}Config")(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **({"reward_funcs": many_letters} if kind in ("GRPO", "RLOO") else {}),
    )


def gradients_of(trainer: Any) -> Gradients:
    """Those of the step."""
    seen = StepGradients()
    trainer.add_callback(seen)
    trainer.train()
    (found,) = seen.steps
    return found


def both(name: str, folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> tuple[Gradients, Gradients]:
    """The gradients with the mixin and, as TRL has it, checkpointing; and those by hand, of the same model and seed."""
    steps = []
    for front, fields in ((ElboTrainerMixin, found), (PlainTrainer, {"gradient_checkpointing": False, **expected})):
        torch.manual_seed(0)
        model = TRAINERS[name][2]()
        steps.append(gradients_of(made(name, front, model, folder, **fields)))
    return steps[0], steps[1]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_adds_the_plain_elbo_to_its_own_loss(name: str, tmp_path: Path) -> None:
    found, expected = both(name, tmp_path, {}, {})
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward"])
def test_the_elbo_of_accumulated_batches_is_the_mean_over_all_their_tokens(name: str, tmp_path: Path) -> None:
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found, expected = both(name, tmp_path, halves, {})
    assert_same(found, expected, 1e-4)


def test_the_elbo_of_accumulated_batches_of_kto_leaves_the_rows_for_kl_out(tmp_path: Path) -> None:
    """Its own loss has an estimate that depends on the batch; the decoder learns from the ELBO alone."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found, expected = (decoders(step) for step in both("KTO", tmp_path, halves, {}))
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_elbo_of_tokens_that_a_step_generates_is_the_mean_over_its_batches(name: str, tmp_path: Path) -> None:
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found, expected = both(name, tmp_path, halves, halves)
    assert_same(found, expected, 1e-4)


def decoders(gradients: Gradients) -> Gradients:
    return {name: gradient for name, gradient in gradients.items() if "decoder" in name}


# --- References -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_the_reference_is_a_copy_of_the_policy(name: str, tmp_path: Path) -> None:
    model = policy(modules_to_save=["lm_head"] if name == "GRPO" else None)
    made(name, ElboTrainerMixin, model, tmp_path)
    ours = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert any("fvae_lora_B" in key for key in ours)
    for key, value in ours.items():
        reference = model.get_parameter(key.replace(".default.", ".ref."))
        assert torch.equal(reference, value)
        assert not reference.requires_grad


@pytest.mark.parametrize("precomputed", [False, True])
def test_before_the_first_step_of_dpo_its_loss_is_log_2(
    precomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with noise, which the reference has none of
    trainer = made("DPO", ElboTrainerMixin, policy(), tmp_path, precompute_ref_log_probs=precomputed)
    assert trainer.evaluate(Dataset.from_list(PAIRS))["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_fresh_adapter_starts_at_its_base_in_evaluation(tmp_path: Path) -> None:
    """TRL takes the base for the reference then; in training z1 is noise, and the policy is away from it."""
    base = tiny_llama(vocab_size=len(WORDS))
    trainer = trl.DPOTrainer(
        base,
        args=trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
        peft_config=policy().peft_config["default"],
    )
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.evaluate(Dataset.from_list(PAIRS))["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_disable_dropout_switches_ours_off(name: str, tmp_path: Path) -> None:
    model = policy(lora_dropout=0.5, encoder_dropout=0.5, decoder_dropout=0.5)
    ours = [
        module
        for layer in model.modules()
        if isinstance(layer, FVAELoraLayer)
        for module in layer.modules()
        if isinstance(module, nn.Dropout)
    ]
    assert ours
    assert all(module.p == 0.5 for module in ours)
    made(name, ElboTrainerMixin, model, tmp_path, disable_dropout=True)
    assert all(module.p == 0 for module in ours)


# --- Without the mixin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_without_the_mixin_names_it(name: str, tmp_path: Path) -> None:
    trainer = made(name, None, TRAINERS[name][2](), tmp_path)
    with pytest.raises(RuntimeError, match=r"the ELBO .* not in the loss .*ElboTrainerMixin"):
        trainer.train()


# --- A quantised base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_adapters_that_are_cast_to_bf16_beside_a_quantised_base_train_in_every_parameter(
    name: str, tmp_path: Path
) -> None:
    """TRL casts all that is trained beside four bits."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(vocab_size=len(WORDS), hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, device_map="cpu")
    model = adapted(prepare_model_for_kbit_training(base), torch.float32)
    trainer = made(name, ElboTrainerMixin, model, tmp_path / "run", bf16=True, learning_rate=0.01, max_steps=2)
    trained = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}
    trainer.train()
    for key, before in trained.items():
        assert model.get_parameter(key).isfinite().all()
        assert not torch.equal(model.get_parameter(key), before), key
