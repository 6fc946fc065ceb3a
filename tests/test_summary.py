"""What the autoencoders make of a whole data set: against the scores of each example, and against plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from by_hand import adapted, collated, config, rows_for
from fvae_lora import LayerSummary, export_for_inference, score_inputs, summarise_layers
from fvae_lora.layer import FVAELoraLayer
from tiny import adapted_linear, randomised, tiny_bert

DOUBLE = torch.float64
KINDS = ["bert", "gpt2", "llama", "t5", "vit"]


def close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    found, expected = (torch.as_tensor(value, dtype=DOUBLE) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9)


def same(found: dict[str, LayerSummary], expected: dict[str, LayerSummary], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for layer, summary in found.items():
        for name, value in vars(summary).items():
            if value is not None:
                close(value, getattr(expected[layer], name), rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_all_tokens_that_count(kind: str) -> None:
    model, rows = adapted(kind), rows_for(kind, [3, 6, 1, 4])
    found = summarise_layers(model, [collated(rows[:3]), collated(rows[3:])])
    scores = score_inputs(model, **collated(rows))
    assert found.keys() == scores.keys()
    rtol = 1e-5 if kind == "llama" else 1e-9  # llama rounds positions
    for layer, summary in found.items():
        tokens = scores[layer].tokens
        assert summary.tokens == tokens.sum()
        for name in ("log_likelihood", "kl_z1", "gamma", "z1_variance", "z2_variance"):
            of_rows = getattr(scores[layer], name)
            weights = tokens.reshape(-1, *[1] * (of_rows.dim() - 1))
            close(getattr(summary, name), (weights * of_rows).sum(0) / tokens.sum(), rtol)
        for name in ("z1_mean", "z2_mean"):
            close(getattr(summary, name), getattr(scores[layer], name), rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_how_the_data_are_cut_into_batches_changes_nothing(kind: str) -> None:
    model, rows = adapted(kind), rows_for(kind, [3, 6, 1, 4])
    whole = summarise_layers(model, [collated(rows, length=0 if kind == "vit" else 9)])
    alone = summarise_layers(model, (collated([row]) for row in rows))
    same(alone, whole, 1e-5 if kind == "llama" else 1e-9)


def r2(x: Tensor, decoded: Tensor) -> Tensor:
    return 1 - (x - decoded).square().sum() / (x - x.mean(0)).square().sum()


@pytest.mark.parametrize("conv1d", [False, True])
def test_shares_of_variance_spreads_and_norms(conv1d: bool) -> None:
    model, x = adapted_linear(conv1d=conv1d), 2 + torch.randn(50, 6, dtype=DOUBLE)
    (layer,) = (module for module in model.modules() if isinstance(module, FVAELoraLayer))
    vae = layer.fvae_lora_vae["default"]
    with torch.no_grad():
        z1, z2 = vae.encode_mean("encoder1", x), vae.encode_mean("encoder2", x)
        prior2 = torch.full_like(z2, vae.config.residual_prior_mean)
        pairs = {"r2": (z1, z2), "r2_z1": (z1, prior2), "r2_z2": (0 * z1, z2)}
        expected = {name: r2(x, vae.linear("decoder_output", vae.decode_hidden(*pair))) for name, pair in pairs.items()}
        frozen = layer.base_layer(x)
        update = layer.eval()(x) - frozen
    (found,) = summarise_layers(model, ({"input": part} for part in x.split(8))).values()
    for name, value in expected.items():
        close(getattr(found, name), value)
    close(found.z1_spread, z1.var(0, correction=0))
    close(found.z2_spread, z2.var(0, correction=0))
    close(found.update_norm, update.square().sum(-1).mean().sqrt())
    close(found.output_norm, frozen.square().sum(-1).mean().sqrt())


def test_a_convolutions_frozen_output_is_that_of_its_patches() -> None:
    model = adapted("vit", target_modules=r".*patch_embeddings\.projection")
    batch = collated(rows_for("vit", [1, 1, 1]))
    outputs: list[Tensor] = []
    (layer,) = (module for module in model.modules() if isinstance(module, FVAELoraLayer))
    layer.base_layer.register_forward_hook(lambda _, args, output: outputs.append(output.detach()))
    (found,) = summarise_layers(model, [batch]).values()
    close(found.output_norm, outputs[0].square().sum(1).mean().sqrt())


def test_inputs_that_do_not_vary_have_no_share_of_variance() -> None:
    model = adapted_linear()
    (found,) = summarise_layers(model, [{"input": torch.ones(4, 6, dtype=DOUBLE)}]).values()
    assert found.r2 != found.r2
    assert found.z1_spread.tolist() == [0.0] * len(found.z1_spread)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model, batch = adapted("bert", torch.float32), collated(rows_for("bert", [3, 6]))
    expected = summarise_layers(model, [batch])
    with torch.autocast("cpu", dtype):
        cast = summarise_layers(model, [batch])
    half = summarise_layers(model.to(dtype), [batch])
    for layer, summary in expected.items():
        for found in (cast, half):
            close(found[layer].log_likelihood, summary.log_likelihood, 0.05)
            close(found[layer].output_norm, summary.output_norm, 0.05)


def test_several_adapters_have_summaries_of_their_own() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    model.add_adapter("other", config("bert", r=2))
    randomised(model)
    model.base_model.set_adapter(["default", "other"])
    found = summarise_layers(model, [batch])
    assert {len(s.z1_spread) for key, s in found.items() if key.endswith(".other")} == {2}
    assert len(found) == 8


def test_an_example_of_padding_alone_is_a_row_of_nan_and_nothing_else() -> None:
    model, rows = adapted("bert"), rows_for("bert", [4, 2])
    batch = collated(rows)
    batch["attention_mask"][1] = 0
    found, alone = summarise_layers(model, [batch]), summarise_layers(model, [collated(rows[:1])])
    for layer, summary in found.items():
        assert summary.z1_mean.isnan().all(1).tolist() == [False, True]
        close(summary.log_likelihood, alone[layer].log_likelihood)


def test_without_a_batch_there_is_nothing_to_say() -> None:
    assert summarise_layers(adapted("bert"), []) == {}


def test_adapters_without_a_decoder_are_refused(tmp_path: Any) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    export_for_inference(model, tmp_path / "small")
    small = PeftModel.from_pretrained(tiny_bert(DOUBLE), tmp_path / "small")
    with pytest.raises(ValueError, match="'default' is inference_only"):
        summarise_layers(small, [batch])
    with pytest.raises(ValueError, match="has no FVAE-LoRA adapter"):
        summarise_layers(tiny_bert(), [batch])
