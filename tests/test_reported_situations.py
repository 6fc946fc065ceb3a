"""What users of peft and its neighbours reported of LoRA, with FVAE-LoRA in its place."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainingArguments, pipeline

from by_hand import Batch, adapted, assert_same, collated, config, elbo_by_hand, gradients, rows_for
from fvae_lora import FVAELoraTrainer, add_elbo
from fvae_lora.layer import FVAELoraLayer
from tiny import randomised, tiny_bert

WITHOUT_NOISE = pytest.mark.usefixtures("without_noise")


def texts() -> Batch:
    batch = collated(rows_for("bert", [5, 2, 4, 3]))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**texts()).logits
    return found


# --- Names ----------------------------------------------------------------------------------------------------------


def test_an_adapter_whose_name_begins_like_anothers_is_saved_alone(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), config("bert"), adapter_name="one")
    model.add_adapter("one_more", config("bert"))
    randomised(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "one_more")]
    assert files[0].keys() == files[1].keys()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "one")), expected)


@pytest.mark.parametrize("names", [("default", "attention"), ("attention", "default")])
@pytest.mark.parametrize("injected", [False, True])
def test_an_adapter_that_peft_would_save_without_weights_is_refused(names: tuple[str, str], injected: bool) -> None:
    """peft leaves what has the name of another adapter in its own out of an adapter's folder, and says nothing."""
    base = tiny_bert()
    if injected:
        base.add_adapter(config("bert"), adapter_name=names[0])
    model = base if injected else get_peft_model(base, config("bert"), adapter_name=names[0])
    before = logits(model)
    arguments = (config("bert"), names[1]) if injected else (names[1], config("bert"))
    with pytest.raises(ValueError, match=r"'attention' is part of the name of bert\.encoder\.layer.*another name"):
        model.add_adapter(*arguments)
    assert torch.equal(logits(model), before)


def test_a_single_adapter_may_have_the_name_of_a_module(tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_bert(), config("bert"), adapter_name="attention"))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model.unload(), tmp_path / "attention")), expected)


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 5)
        self.fvae_lora_head = nn.Linear(5, 3)
        self.inner = nn.ModuleDict({"fvae_lora_gate": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        found: Tensor = self.fvae_lora_head(hidden) + self.inner["fvae_lora_gate"](hidden)
        return found


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="peft 0.20 saves such a module by other names")
def test_a_trained_module_may_have_a_name_like_the_adapters(tmp_path: Path) -> None:
    base, x = _Heads(), torch.randn(2, 5)
    fields = {"target_modules": ["body"], "modules_to_save": ["fvae_lora_head", "fvae_lora_gate"]}
    model = get_peft_model(copy.deepcopy(base), config("bert", **fields)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(x), model(x))
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(loaded(x), model(x))


# --- Adapters that are switched -------------------------------------------------------------------------------------


@WITHOUT_NOISE
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_another_adapter_set_before_a_checkpointed_backward_is_an_error(use_reentrant: bool) -> None:
    """With LoRA the gradients are wrong in silence."""
    model = adapted("bert")
    model.add_adapter("other", config("bert"))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = add_elbo(model(**texts()).logits.square().sum(), model)
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"again with adapter 'other'.*call backward before another adapter is set"):
        loss.backward()


def test_disabling_nests(tmp_path: Path) -> None:
    model = adapted("bert", torch.float32)
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, base)


# --- Forwards that fail ---------------------------------------------------------------------------------------------


@WITHOUT_NOISE
def test_a_forward_that_ran_out_of_memory_counts_for_nothing() -> None:
    """While its error is being handled, all that it computed is still there."""
    model, batch = adapted("bert"), texts()
    half = {name: value[:2] for name, value in batch.items()}

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [half])
        return output.logits.square().sum() + elbo

    def too_large(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    expected = gradients(model, by_hand)
    model.get_base_model().bert.encoder.layer[1].register_forward_pre_hook(too_large)
    layer = next(module for module in model.modules() if isinstance(module, FVAELoraLayer))

    def found() -> Tensor:
        try:
            return add_elbo(model(**batch).logits.square().sum(), model)
        except torch.OutOfMemoryError:
            assert not layer.recorder.forwards
            return add_elbo(model(**half).logits.square().sum(), model)

    assert_same(gradients(model, found), expected)


@pytest.mark.slow
def test_a_trainer_finds_the_batch_size_that_fits(tmp_path: Path) -> None:
    model = adapted("bert", torch.float32)

    def too_large(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise RuntimeError("CUDA out of memory.")

    model.get_base_model().bert.encoder.layer[1].register_forward_pre_hook(too_large)
    settings = {"auto_find_batch_size": True, "max_steps": 2, "use_cpu": True, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, save_strategy="no", **settings)
    trainer = FVAELoraTrainer(model, arguments, train_dataset=rows_for("bert", [4, 4, 4, 4]))
    trainer.train()
    assert trainer.state.train_batch_size <= 2


# --- Copies, and what is loaded -------------------------------------------------------------------------------------


def test_an_average_of_the_weights_trains_and_runs() -> None:
    model = adapted("bert", torch.float32)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    assert torch.equal(logits(average), logits(model))
    add_elbo(average.train()(**texts()).logits.sum(), average).backward()
    assert all(p.grad is not None for p in average.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers 5.17 leaves it at random")
def test_a_trained_head_comes_back_with_an_adapter_loaded_by_transformers(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(config("bert", modules_to_save=["classifier"]))
    randomised(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model))


@pytest.mark.parametrize("cast", [True, False])
def test_a_half_precision_base_may_keep_its_adapter_in_half_precision(cast: bool) -> None:
    model = get_peft_model(tiny_bert(torch.bfloat16), config("bert"), autocast_adapter_dtype=cast).train()
    ours = [parameter for name, parameter in model.named_parameters() if "fvae_lora_" in name]
    assert {parameter.dtype for parameter in ours} == {torch.float32 if cast else torch.bfloat16}
    optimizer = torch.optim.SGD(ours, lr=1e-2)
    add_elbo(model(**texts()).logits.float().square().sum(), model).backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours)
    optimizer.step()
    assert logits(model).isfinite().all()


# --- Left in training mode ------------------------------------------------------------------------------------------


def test_a_pipeline_over_a_model_in_training_mode_takes_the_mean() -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *"abcdef"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    model = adapted("bert", torch.float32)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    expected = classify(["a b c", "d e"])
    model.train()
    assert classify(["a b c", "d e"]) == expected
    assert classify.model.training
    with torch.no_grad():
        inputs = tokenizer(["a b c", "d e f"], return_tensors="pt")
        found = model(**inputs).logits
    torch.testing.assert_close(found, model.eval()(**inputs).logits)


def test_generation_in_training_mode_takes_the_mean() -> None:
    model = adapted("llama", torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[3, 5, 9]])
    in_training = model.generate(input_ids=prompt, **settings)
    assert model.training
    assert torch.equal(in_training, model.eval().generate(input_ids=prompt, **settings))
