"""Training loops of other people: references, several forwards, calls by name, losses of a subclass, old adapters."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel, LlamaForCausalLM, Trainer

from by_hand import (
    Batch,
    adapted,
    assert_same,
    collated,
    config,
    elbo_by_hand,
    gradients,
    layers_by_hand,
    rows_for,
    trainer_gradients,
)
from fvae_lora import ElboTrainerMixin, FVAELoraTrainer, add_elbo, elbo_loss, elbo_terms
from fvae_lora.layer import FVAELoraLayer
from tiny import batch_for, randomised, tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("without_noise")
DOUBLE = torch.float64
WAYS_OUT = r"add_elbo.*FVAELoraTrainer"


def texts(lengths: list[int]) -> Batch:
    """A batch without labels."""
    return {name: value for name, value in collated(rows_for("bert", lengths)).items() if name != "labels"}


def towers() -> tuple[PeftModel, Batch, Batch]:
    """A model that is both towers, and texts of unequal lengths for each."""
    return adapted(BertModel(tiny_bert().config).to(DOUBLE)), texts([3, 6, 2]), texts([5, 4, 7])


def contrast(query: Tensor, passage: Tensor) -> Tensor:
    return F.cross_entropy(query @ passage.T, torch.arange(len(query)))


def first_states(outputs: list[Any]) -> list[Tensor]:
    return [output.last_hidden_state[:, 0] for output in outputs]


def towers_by_hand(model: nn.Module, batches: list[Batch]) -> Tensor:
    elbo, outputs = elbo_by_hand(model, batches)
    return contrast(*first_states(outputs)[:2]) + elbo


# --- Several forwards, one loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_towers_have_one_mean_in_an_own_loop(use_reentrant: bool | None) -> None:
    model, query, passage = towers()
    expected = gradients(model, lambda: towers_by_hand(model, [query, passage]))
    if use_reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.get_base_model().enable_input_require_grads()

    def found() -> Tensor:
        return contrast(*first_states([model(**query), model(**passage)]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(gradients(model, lambda: add_elbo(found(), model)), expected)
        assert_same(gradients(model, lambda: found() + elbo_loss(model)), expected)


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("how", ["disabled", "without gradients", "in eval mode"])
def test_a_reference_beside_two_towers(how: str, when: str) -> None:
    model, query, passage = towers()
    expected = gradients(model, lambda: towers_by_hand(model, [query, passage]))

    def reference() -> None:
        if how == "disabled":
            with model.disable_adapter():
                model(**query)
        elif how == "without gradients":
            with torch.no_grad():
                model(**query)
        else:
            model.eval()
            model(**query)
            model.train()

    def found() -> Tensor:
        outputs = []
        for place, batch in (("before", query), ("between", passage)):
            if when == place:
                reference()
            outputs.append(model(**batch))
        if when == "after":
            reference()
        return add_elbo(contrast(*first_states(outputs)), model)

    assert_same(gradients(model, found), expected)


def test_triplets_and_pairs_of_one_text() -> None:
    """As R-Drop does: the same text twice, and a term that ties the two outputs."""
    model, query, passage = towers()
    batches = [query, query, passage]

    def by_hand() -> Tensor:
        elbo, outputs = elbo_by_hand(model, batches)
        one, same, other = first_states(outputs)
        return (one - same).square().sum() + one.sub(other).abs().sum() + elbo

    def found() -> Tensor:
        one, same, other = first_states([model(**batch) for batch in batches])
        return add_elbo((one - same).square().sum() + one.sub(other).abs().sum(), model)

    assert_same(gradients(model, found), gradients(model, by_hand))


def test_each_step_of_accumulated_losses_has_its_own_mean() -> None:
    model, query, passage = towers()

    def by_hand() -> Tensor:
        return 2 * towers_by_hand(model, [query, passage]) + towers_by_hand(model, [passage, query])

    def found() -> Tensor:
        one = add_elbo(contrast(*first_states([model(**query), model(**passage)])), model)
        other = add_elbo(contrast(*first_states([model(**passage), model(**query)])), model)
        return 2 * one + other

    assert_same(gradients(model, found), gradients(model, by_hand))


def test_the_terms_are_those_of_all_forwards() -> None:
    model, query, passage = towers()
    outputs = [model(**query), model(**passage)]
    both = elbo_terms(model)
    add_elbo(contrast(*first_states(outputs)), model).backward()
    assert elbo_terms(model) == both
    counts, separate = [], []
    for batch in (query, passage):
        with pytest.MonkeyPatch.context():
            kept = model(**batch)
            separate.append(elbo_terms(model))
            counts.append(batch["attention_mask"].sum().item())
            add_elbo(kept.last_hidden_state.sum(), model).backward()
    for layer, terms in both.items():
        for name, value in terms.items():
            mean = sum(n * one[layer][name] for n, one in zip(counts, separate, strict=True)) / sum(counts)
            assert value == pytest.approx(mean)


def test_forwards_whose_outputs_were_dropped_do_not_count() -> None:
    model, query, passage = towers()
    expected = gradients(model, lambda: towers_by_hand(model, [query, passage]))

    def found() -> Tensor:
        model(**passage, output_hidden_states=True)
        with pytest.warns(UserWarning, match=WAYS_OUT):
            outputs = [model(**query), model(**passage)]
        return add_elbo(contrast(*first_states(outputs)), model)

    assert_same(gradients(model, found), expected)


@pytest.mark.filterwarnings("ignore:the ELBO of a training forward was never used")
def test_memory_does_not_grow_with_forwards_that_nobody_uses() -> None:
    model, query, _ = towers()
    layer = next(module for module in model.modules() if isinstance(module, FVAELoraLayer))
    for _ in range(4):
        model(**query, output_hidden_states=True)
    gc.collect()
    assert len(layer.recorder.forwards) == 1


def test_a_loss_that_leaves_the_elbo_of_one_tower_out() -> None:
    model, query, passage = towers()
    one = model(**query).last_hidden_state
    add_elbo(model(**passage).last_hidden_state.sum() + one.sum(), model).backward()
    one = model(**query).last_hidden_state.sum()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        one.backward()


# --- Called by name -------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """As sentence-transformers runs a model: its forward is called by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        states: Tensor = self.model.forward(**batch).last_hidden_state
        return states[:, 0]


def injected() -> BertModel:
    model = BertModel(tiny_bert().config).to(DOUBLE)
    model.add_adapter(config("bert"))
    return randomised(model).train()


@pytest.mark.parametrize("clone", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("wrapped", [False, True])
def test_forward_called_by_name(wrapped: bool, clone: Callable[[nn.Module], nn.Module] | None) -> None:
    """The ELBO is there and padding does not count, in a copy of the model, too."""
    model = towers()[0] if wrapped else injected()
    model = clone(model) if clone is not None else model
    _, query, passage = towers()
    encoder = _Encoder(model)
    expected = gradients(model, lambda: towers_by_hand(model, [query, passage]))
    assert_same(gradients(model, lambda: add_elbo(contrast(encoder(query), encoder(passage)), encoder)), expected)


def test_forward_keeps_its_signature_and_goes_back() -> None:
    import inspect

    model = injected()
    assert inspect.signature(model.forward) == inspect.signature(BertModel.forward.__get__(model))
    model.delete_adapter("default")
    restored = get_peft_model(BertModel(tiny_bert().config), config("bert")).unload()
    assert "forward" not in vars(restored)


def test_a_trainer_whose_model_is_called_by_name(tmp_path: Path) -> None:
    class Contrastive(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            return contrast(model(inputs["query"]), model(inputs["passage"]))

    class WithElbo(ElboTrainerMixin, Contrastive):
        pass

    model = injected()
    _, query, passage = towers()
    pairs = [
        {
            name: {key: value[i] for key, value in batch.items()}
            for name, batch in (("query", query), ("passage", passage))
        }
        for i in range(3)
    ]

    def stacked(rows: list[dict[str, Batch]]) -> dict[str, Batch]:
        return {name: {key: torch.stack([row[name][key] for row in rows]) for key in rows[0][name]} for name in rows[0]}

    in_trainer = trainer_gradients(WithElbo, _Encoder(model), pairs, 3, 1, tmp_path, stacked)
    (found,) = [{name.removeprefix("model."): value for name, value in step.items()} for step in in_trainer]

    def by_hand() -> Tensor:
        order = stacked(pairs)
        return towers_by_hand(model, [order["query"], order["passage"]])

    # The rows come in an order of the Trainer's, which neither the loss nor the ELBO depends on.
    assert_same(found, gradients(model, by_hand))


# --- A loss of the subclass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", [False, True])
def test_a_subclass_with_a_loss_of_its_own(instance: bool, tmp_path: Path) -> None:
    """The example of transformers' documentation, derived from our Trainer instead of theirs."""
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)

    def weighted(model: nn.Module, inputs: Batch, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        labels = inputs.pop("labels")
        loss = F.cross_entropy(model(**inputs).logits, labels, weight, reduction="sum")
        return loss / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    class Weighted(FVAELoraTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if instance:
                self.compute_loss = weighted

        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **kwargs: Any) -> Tensor:
            return weighted(model, inputs, **kwargs)

    model, rows = adapted("bert"), rows_for("bert", [5, 2, 4, 3])
    batch = collated(rows)

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
        return F.cross_entropy(output.logits, batch["labels"], weight, reduction="sum") / 4 + elbo

    for batch_size, accumulation in [(4, 1), (1, 4)]:
        (found,) = trainer_gradients(Weighted, model, rows, batch_size, accumulation, tmp_path)
        assert_same(found, gradients(model, by_hand))


# --- A frozen reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_reference_adapter_inside_a_step(use_reentrant: bool | None, tmp_path: Path) -> None:
    """What DPO, KTO and RLOO do: the policy with gradients, a copy of it under another name without."""

    class Preference(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            policy = model(**given).logits.log_softmax(-1)
            with torch.no_grad():
                model.set_adapter("ref")
                reference = model(**given).logits.log_softmax(-1)
                model.set_adapter("default")
            return 100 * (policy - reference).square().mean()

    class WithElbo(ElboTrainerMixin, Preference):
        pass

    model, rows = adapted("llama"), rows_for("llama", [4, 7, 3])
    model.add_adapter("ref", config("llama"))
    randomised(model)
    batch = {name: value for name, value in collated(rows).items() if name != "labels"}

    def by_hand() -> Tensor:
        with torch.no_grad(), layers_by_hand():
            model.set_adapter("ref")
            reference = model(**batch).logits.log_softmax(-1)
            model.set_adapter("default")
        elbo, (output,) = elbo_by_hand(model, [batch])
        return 100 * (output.logits.log_softmax(-1) - reference).square().mean() + elbo

    expected = gradients(model, by_hand)
    arguments: dict[str, Any] = {}
    if use_reentrant is not None:
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    (found,) = trainer_gradients(WithElbo, model, rows, 3, 1, tmp_path, **arguments)
    assert_same(found, expected, 1e-6)


def test_a_copy_made_by_the_adapters_name_is_whole() -> None:
    """TRL copies what has the name between two dots."""
    model = adapted("llama", lora_dropout=0.5, encoder_dropout=0.5, decoder_dropout=0.5, modules_to_save=["lm_head"])
    model.add_adapter("ref", config("llama", modules_to_save=["lm_head"]))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    ours = {name: value for name, value in model.named_parameters() if "default" in name}
    assert any("fvae_lora_B" in name for name in ours)
    for name, value in ours.items():
        assert torch.equal(model.get_parameter(name.replace("default", "ref")), value)


def test_dropout_is_found_where_others_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", lora_dropout=0.5, encoder_dropout=0.5, decoder_dropout=0.5)
    batch = batch_for(model.get_base_model())
    assert model(**batch).loss != model(**batch).loss
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert model(**batch).loss == model(**batch).loss


def test_without_gradients_z1_is_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    batch = batch_for(model.get_base_model())
    monkeypatch.undo()  # with noise, for once
    with torch.no_grad():
        in_training = model(**batch).logits
        torch.testing.assert_close(in_training, model.eval()(**batch).logits, rtol=0, atol=0)
    model.train()
    assert not torch.equal(in_training, model(**batch).logits)


# --- A loss that runs the model again inside its backward -----------------------------------------------------------


def test_a_cached_loss_is_refused_with_the_reason() -> None:
    model, query, _ = towers()
    with torch.no_grad():
        states = model(**query).last_hidden_state[:, 0]
    states.requires_grad_()
    loss = states.square().sum()
    loss.backward(retain_graph=True)

    def again(_: Tensor) -> None:
        with torch.enable_grad():
            (model(**query).last_hidden_state[:, 0] * states.grad).sum().backward()

    loss.register_hook(again)
    with pytest.raises(RuntimeError, match=r"inside its backward.*gradient checkpointing"):
        loss.backward()


# --- Adapters saved earlier -----------------------------------------------------------------------------------------

SAVED = Path(__file__).parent / "data" / "adapter-0.1"


def waves() -> LlamaForCausalLM:
    """The base of the saved adapter, the same whatever transformers draws."""
    model = tiny_llama()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(0.3 * torch.sin(torch.arange(parameter.numel()) + i).reshape(parameter.shape))
    return model


def in_peft() -> nn.Module:
    return PeftModel.from_pretrained(waves(), SAVED)


def in_peft_on_the_meta_device() -> nn.Module:
    return PeftModel.from_pretrained(waves(), SAVED, low_cpu_mem_usage=True)


def in_transformers() -> nn.Module:
    model = waves()
    model.load_adapter(str(SAVED))
    return model


def from_a_state() -> nn.Module:
    from peft import PeftConfig

    model = get_peft_model(waves(), PeftConfig.from_pretrained(SAVED))
    result = set_peft_model_state_dict(model, load_file(SAVED / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("load", [in_peft, in_peft_on_the_meta_device, in_transformers, from_a_state])
def test_an_adapter_saved_by_version_0_1_gives_the_same_outputs(load: Callable[[], nn.Module]) -> None:
    expected = load_file(SAVED / "expected.safetensors")
    with torch.no_grad():
        found = load().eval()(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(found, expected["logits"], rtol=1e-5, atol=1e-6)
