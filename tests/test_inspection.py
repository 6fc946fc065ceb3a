"""What the autoencoders say of each input: the formulas, row by row, and a model that is left as it was."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForMultipleChoice

from by_hand import Batch, adapted, assert_same, collated, config, gradients, rows_for
from fvae_lora import LayerScores, add_elbo, elbo_terms, export_for_inference, score_inputs
from fvae_lora.layer import FVAELoraLayer
from tiny import batch_for, randomised, tiny_bert

DOUBLE = torch.float64
KINDS = ["bert", "gpt2", "llama", "t5", "vit"]
TERMS = [name for name in LayerScores.__dataclass_fields__ if name != "expected_log_likelihood"]


def scores_by_hand(layer: FVAELoraLayer, x: Tensor) -> dict[str, Tensor]:
    """The terms of one example, (tokens, d), from the paper's formulas."""
    vae = layer.fvae_lora_vae["default"]
    w, d = dict(vae.named_parameters()), x.shape[-1]

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}_weight"].mT + w[f"{name}_bias"]

    def encoded(name: str) -> tuple[Tensor, Tensor]:
        hidden = linear(f"{name}_hidden0", x).relu()
        return linear(f"{name}_mean", hidden), linear(f"{name}_logvar", hidden).exp()

    def log_p(z1: Tensor, z2: Tensor) -> Tensor:
        decoded = linear("decoder_output", linear("decoder_hidden0", torch.cat([z1, z2], -1)).relu())
        tau = w["log_tau"].exp()
        return (-((x - decoded) ** 2) / (2 * tau**2) - tau.log()).sum(-1) - d / 2 * math.log(2 * math.pi)

    (mean1, variance1), (mean2, variance2) = encoded("encoder1"), encoded("encoder2")
    m, s = vae.config.residual_prior_mean, vae.config.residual_prior_std
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean1, variance1.sqrt()), normal(0.0, 1.0)).sum(-1)
    gamma = (
        -0.5 * ((mean2 - m) ** 2 + variance2).sum(-1) / s**2
        - mean2.shape[-1] * math.log(s)
        + 0.5 * (mean1**2 + variance1).sum(-1)
        + (mean1.shape[-1] - mean2.shape[-1]) / 2 * math.log(2 * math.pi)
    )
    terms = {
        "log_likelihood": log_p(mean1, mean2),
        "log_likelihood_z1": log_p(mean1, torch.full_like(mean2, m)),
        "log_likelihood_z2": log_p(torch.zeros_like(mean1), mean2),
        "kl_z1": kl,
        "gamma": gamma,
        "z1_mean": mean1,
        "z1_variance": variance1,
        "z2_mean": mean2,
        "z2_variance": variance2,
    }
    if mean1.shape == mean2.shape:
        terms["w2"] = ((mean1 - mean2) ** 2 + (variance1.sqrt() - variance2.sqrt()) ** 2).sum(-1)
    return {name: value.mean(0) for name, value in terms.items()} | {"tokens": torch.tensor(len(x))}


@contextmanager
def layers_inputs(model: nn.Module) -> Iterator[dict[FVAELoraLayer, list[Tensor]]]:
    """What each adapted layer reads in a forward."""
    seen: dict[FVAELoraLayer, list[Tensor]] = defaultdict(list)
    layers = [module for module in model.modules() if isinstance(module, FVAELoraLayer)]
    handles = [layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0])) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def rows_by_hand(model: nn.Module, rows: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """The scores of rows, each run by itself, so that there is no padding; several runs are put together."""
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    model.eval()
    for row in rows:
        with layers_inputs(model) as seen:
            model(**collated([row]))
        for layer, inputs in seen.items():
            tokens = torch.cat([layer.tokens(x).flatten(0, -2) for x in inputs])
            for name, value in scores_by_hand(layer, tokens).items():
                found[layer.name][name].append(value)
    return {layer: {name: torch.stack(v) for name, v in terms.items()} for layer, terms in found.items()}


def assert_scores(found: dict[str, LayerScores], expected: dict[str, dict[str, Tensor]], rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for layer, terms in expected.items():
        for name, value in terms.items():
            torch.testing.assert_close(getattr(found[layer], name), value, rtol=rtol, atol=1e-9, msg=f"{layer} {name}")


def assert_same_scores(found: dict[str, LayerScores], expected: dict[str, LayerScores], rtol: float = 1e-9) -> None:
    terms = {k: {n: v for n, v in vars(scores).items() if v is not None} for k, scores in expected.items()}
    assert_scores(found, terms, rtol)


# --- The numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_dim", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_rows_scores_are_those_of_the_formulas(kind: str, residual_dim: int) -> None:
    model, rows = adapted(kind, residual_dim=residual_dim, residual_prior_std=1.5), rows_for(kind, [3, 6, 1, 4])
    found = score_inputs(model, **collated(rows, side="left" if kind == "llama" else "right"))
    assert_scores(found, rows_by_hand(model, rows), 1e-5 if kind == "llama" else 1e-9)  # llama rounds positions
    for scores in found.values():
        assert scores.log_likelihood.dtype == DOUBLE
        assert (scores.w2 is None) == (residual_dim == 2)
        assert scores.expected_log_likelihood is None  # no draws


def test_a_layer_that_runs_several_times_is_one() -> None:
    small = {"vocab_size": 60, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = adapted(AlbertForSequenceClassification(AlbertConfig(**small)).to(DOUBLE), target_modules=["query"])
    rows = rows_for("bert", [3, 6, 1])
    found = score_inputs(model, **{name: value for name, value in collated(rows).items() if name != "labels"})
    (scores,) = found.values()
    assert scores.tokens.tolist() == [9, 18, 3]
    assert_scores(found, rows_by_hand(model, [{n: v for n, v in row.items() if n != "labels"} for row in rows]))


def test_a_convolutions_tokens_are_its_patches() -> None:
    target = r".*patch_embeddings\.projection"
    model, rows = adapted("vit", target_modules=target), rows_for("vit", [1, 1, 1])
    found = score_inputs(model, **collated(rows))
    assert [scores.tokens.tolist() for scores in found.values()] == [[4, 4, 4]]
    assert_scores(found, rows_by_hand(model, rows))


def test_draws_average_to_the_reconstruction_of_the_elbo(without_noise: None) -> None:
    """Its expectation over draws, known in closed form where the decoder is linear."""
    model = adapted("bert", decoder_hidden_dims=[], residual_dim=3)
    batch = collated(rows_for("bert", [3, 6, 1]))
    found = score_inputs(model, **batch, draws=1000, seed=3)
    for layer, scores in found.items():
        vae = model.get_submodule(f"base_model.model.{layer}").fvae_lora_vae["default"]
        scaled = (vae.decoder_output_weight * torch.exp(-vae.log_tau)[:, None]).square().sum(0)
        variances = torch.cat([scores.z1_variance, scores.z2_variance], -1)
        expected = scores.log_likelihood - 0.5 * variances @ scaled
        torch.testing.assert_close(scores.expected_log_likelihood, expected, rtol=0.03, atol=0)
    assert_same_scores(score_inputs(model, **batch, draws=5, seed=3), score_inputs(model, **batch, draws=5, seed=3))


def test_the_terms_agree_with_those_of_training(without_noise: None) -> None:
    model, batch = adapted("bert", residual_dim=3), collated(rows_for("bert", [3, 6, 1]))
    model(**batch)
    trained = elbo_terms(model)
    for layer, scores in score_inputs(model, **batch).items():
        for name, term in {"reconstruction": "log_likelihood", "kl_z1": "kl_z1", "gamma": "gamma", "w2": "w2"}.items():
            mean = (getattr(scores, term) * scores.tokens).sum() / scores.tokens.sum()
            assert trained[layer][name] == pytest.approx(mean.item(), rel=1e-9)


# --- A batch's composition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_in_the_batch_changes_nothing(kind: str) -> None:
    model, rows = adapted(kind), rows_for(kind, [3, 6, 1, 4])
    order = [2, 0, 3, 1]
    together = score_inputs(model, **collated(rows), draws=2)
    rtol = 1e-5 if kind == "llama" else 1e-9
    shuffled = score_inputs(model, **collated([rows[i] for i in order], length=0 if kind == "vit" else 9), draws=2)
    alone = [score_inputs(model, **collated([row]), draws=2) for row in rows]
    for layer, scores in together.items():
        for name, value in vars(scores).items():
            if value is not None:
                torch.testing.assert_close(getattr(shuffled[layer], name), value[order], rtol=rtol, atol=1e-9)
                of_rows = torch.cat([getattr(one[layer], name) for one in alone])
                torch.testing.assert_close(of_rows, value, rtol=rtol, atol=1e-9)


KEPT = torch.arange(6) < torch.tensor([4, 6, 1])[:, None]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "length first": lambda x: x.transpose(0, 1),
    "flattened": lambda x: x.flatten(0, 1),
    "windows": lambda x: x.unflatten(1, (3, 2)),
    "windows beside each other": lambda x: x.unflatten(1, (3, 2)).flatten(0, 1),
    "heads behind": lambda x: x[:, :, None].expand(-1, -1, 4, -1),
    "heads before": lambda x: x[:, None].expand(-1, 4, -1, -1),
    "padding taken out": lambda x: x[KEPT],
}


class Own(nn.Module):
    """A model that reads its input in another layout."""

    def __init__(self, change: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(width, 5), change

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.linear(self.change(x)),)


def own(change: Callable[[Tensor], Tensor]) -> PeftModel:
    return randomised(get_peft_model(Own(change).to(DOUBLE), config("own", target_modules=["linear"])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_find_their_rows_in_any_layout(layout: str) -> None:
    model, x = own(LAYOUTS[layout]), torch.randn(3, 6, 8, dtype=DOUBLE)
    x[~KEPT] = math.nan  # padding does not even have to be a number
    (found,) = score_inputs(model, x=x, attention_mask=KEPT).values()
    heads = 4 if "heads" in layout else 1
    assert found.tokens.tolist() == [4 * heads, 6 * heads, heads]
    layer = next(module for module in model.modules() if isinstance(module, FVAELoraLayer))
    for i, kept in enumerate(KEPT):
        expected = scores_by_hand(layer, x[i, kept])["log_likelihood"]
        torch.testing.assert_close(found.log_likelihood[i], expected, rtol=1e-9, atol=0)


def test_windows_of_images_without_a_mask() -> None:
    model, x = own(lambda x: x.unflatten(1, (3, 4)).flatten(0, 1)), torch.randn(2, 12, 8, dtype=DOUBLE)
    (both,) = score_inputs(model, x).values()
    (second,) = score_inputs(model, x[1:]).values()
    assert both.tokens.tolist() == [12, 12]
    torch.testing.assert_close(both.z2_mean[1:], second.z2_mean)


def test_what_all_rows_share_is_each_rows() -> None:
    """As relative positions, which a layer reads once for the whole batch."""
    model, x = own(lambda x: torch.ones(1, 5, 8, dtype=DOUBLE)), torch.randn(3, 6, 8, dtype=DOUBLE)
    for rows in (3, 1):
        (found,) = score_inputs(model, x=x[:rows], attention_mask=torch.ones(rows, 6)).values()
        assert found.tokens.tolist() == [5] * rows
        assert found.kl_z1.unique().numel() == 1


def test_tokens_that_belong_to_no_row_are_left_out_by_name() -> None:
    """As an expert's, which gets tokens of any row."""
    model, x = own(lambda x: x.flatten(0, 1)[3:8]), torch.randn(3, 6, 8, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="linear left out: their tokens cannot be assigned to examples"):
        assert score_inputs(model, x=x, attention_mask=KEPT) == {}


def test_several_texts_of_an_example_are_one() -> None:
    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = adapted(BertForMultipleChoice(BertConfig(**small, intermediate_size=16)).to(DOUBLE))
    ids = torch.randint(1, 60, (3, 2, 6))
    mask = torch.ones_like(ids)
    mask[0, 1, 2:] = 0
    for scores in score_inputs(model, input_ids=ids, attention_mask=mask).values():
        assert scores.tokens.tolist() == [8, 12, 12]


def test_an_example_of_padding_alone_has_no_scores() -> None:
    batch = collated(rows_for("bert", [4, 2]))
    batch["attention_mask"][1] = 0
    for scores in score_inputs(adapted("bert"), **batch).values():
        assert scores.tokens.tolist() == [4, 0]
        assert scores.log_likelihood.isnan().tolist() == [False, True]


# --- Any model, left as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_full(dtype: torch.dtype) -> None:
    model, batch = adapted("bert", torch.float32), collated(rows_for("bert", [3, 6]))
    full, half = score_inputs(model, **batch), score_inputs(model.to(dtype), **batch)
    for layer, scores in half.items():
        assert scores.log_likelihood.dtype == torch.float32
        torch.testing.assert_close(scores.log_likelihood, full[layer].log_likelihood, rtol=0.05, atol=0.5)


def test_autocast_changes_no_term() -> None:
    model, x = own(lambda x: x).float(), torch.randn(2, 3, 8)
    (plain,) = score_inputs(model, x).values()
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = score_inputs(model, x).values()
    torch.testing.assert_close(cast.log_likelihood, plain.log_likelihood)


def test_several_active_adapters_have_scores_of_their_own() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    model.add_adapter("other", config("bert", r=2))
    randomised(model)
    model.base_model.set_adapter(["default", "other"])
    found = score_inputs(model, **batch)
    assert len(found) == 8
    assert {scores.z1_mean.shape for key, scores in found.items() if key.endswith(".other")} == {(2, 2)}
    model.base_model.set_adapter(["default"])
    alone = score_inputs(model, **batch)
    first = "bert.encoder.layer.0.attention.self.query"
    assert_same_scores({first: found[f"{first}.default"]}, {first: alone[first]})


def test_tuples_injected_and_compiled_models() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    expected = score_inputs(model, **batch)
    assert_same_scores(score_inputs(model, **batch, return_dict=False), expected)
    assert_same_scores(score_inputs(torch.compile(model), **batch), expected)
    assert_same_scores(score_inputs(nn.ModuleDict({"inside": model})["inside"], **batch), expected)
    injected = inject_adapter_in_model(config("bert"), tiny_bert(DOUBLE))
    weights = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    injected.load_state_dict(weights)
    assert_same_scores(score_inputs(injected, **batch), expected)


def test_sampling_at_inference_is_off_meanwhile() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    expected = score_inputs(model, **batch)
    model.peft_config["default"].sample_at_inference = True
    assert_same_scores(score_inputs(model, **batch), expected)
    assert model.peft_config["default"].sample_at_inference


def state(model: nn.Module) -> Any:
    layers = [module for module in model.modules() if isinstance(module, FVAELoraLayer)]
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    recorded = vars(layers[0].recorder).copy()
    sampling = [config.sample_at_inference for config in model.peft_config.values()]
    return (
        hooks,
        modes,
        recorded,
        sampling,
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        layers[0].active_adapters,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    model.get_submodule("base_model.model.bert.encoder.layer.1").eval()
    model(**batch)
    before = state(model)
    if fails:
        with pytest.raises(IndexError):
            score_inputs(model, **batch | {"input_ids": batch["input_ids"] + 1000})
    else:
        score_inputs(model, **batch, draws=3)
    assert state(model) == before


def test_a_training_step_goes_on_around_it(without_noise: None) -> None:
    model, batch = adapted("bert"), batch_for(tiny_bert())
    del batch["labels"]

    def step(look: bool) -> Tensor:
        logits = model(**batch).logits
        if look:
            score_inputs(model, **batch)
        return add_elbo(logits.square().mean(), model)

    assert_same(gradients(model, lambda: step(True)), gradients(model, lambda: step(False)))
    model = adapted("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_inputs(model, **batch)
    assert add_elbo(torch.zeros(()), model) == 0  # of what was scored there is nothing to add


# --- What cannot be scored ------------------------------------------------------------------------------------------


def test_adapters_without_a_decoder_are_refused(tmp_path: Any) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    export_for_inference(model, tmp_path / "small")
    small = PeftModel.from_pretrained(tiny_bert(DOUBLE), tmp_path / "small")
    with pytest.raises(ValueError, match="'default' is inference_only: it has encoder 1's mean and B alone"):
        score_inputs(small, **batch)
    with pytest.raises(ValueError, match="'default' was made with elbo_weight=0: it has neither encoder 2"):
        score_inputs(adapted("bert", elbo_weight=0.0), **batch)


def test_models_in_which_no_adapter_runs_are_refused() -> None:
    model, batch = adapted("bert", encoder_hidden_dims=[]), collated(rows_for("bert", [3, 6]))
    with pytest.raises(ValueError, match="BertForSequenceClassification has no FVAE-LoRA adapter"):
        score_inputs(tiny_bert(), **batch)
    with model.disable_adapter(), pytest.raises(ValueError, match="no FVAE-LoRA adapter of PeftModel is active"):
        score_inputs(model, **batch)
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged and their encoders do not run"):
        score_inputs(model, **batch)


def test_mixed_batches_and_negative_draws_are_refused() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    with pytest.raises(ValueError, match="adapter_names: score the rows of each adapter"):
        score_inputs(model, **batch, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="draws must be an integer, at least 0, not -1"):
        score_inputs(model, **batch, draws=-1)
