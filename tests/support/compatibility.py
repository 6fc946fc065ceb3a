"""The table of docs/compatibility.md: each yes and no of it is a probe that ``test_compatibility.py`` runs.

``python tests/support/compatibility.py --write`` puts the table between the page's markers.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PveraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from fvae_lora import FVAELoraConfig, add_elbo
from tiny import BUILDERS, TARGETS, batch_for, logits, tiny_bert, tiny_llama, tiny_mixtral

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- compatibility:begin -->", "<!-- compatibility:end -->"
NOT_TESTED = "–"

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "FVAE-LoRA": lambda **fields: FVAELoraConfig(**{"r": 4, "decoder_hidden_dims": [8]} | fields),
    "LoRA": lambda **fields: LoraConfig(**{"r": 4} | fields),
    "PVeRA": lambda **fields: PveraConfig(**{"r": 4} | fields),
}
Method = Callable[..., PeftConfig]


@dataclass(frozen=True)
class Feature:
    """A line of the table."""

    name: str
    probe: Callable[[Method], object]  # raises where the feature does not work
    no: dict[str, str] = field(default_factory=dict)  # by method, why not; all others work
    reference: str = NOT_TESTED
    note: str = ""  # to the yes of FVAE-LoRA

    def cell(self, method: str) -> str:
        if method in self.no:
            return f"no: {self.no[method]}"
        return f"yes{self.note and f', {self.note}'}" if method == "FVAE-LoRA" else "yes"


def adapted(method: Method, kind: str = "bert", **fields: object) -> PeftModel:
    """A tiny model with a trained-looking adapter."""
    model = get_peft_model(BUILDERS[kind](), method(**{"target_modules": TARGETS[kind]} | fields))
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def differ(a: Tensor, b: Tensor) -> None:
    assert not torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def round_trip(method: Method, kind: str = "bert", low_cpu_mem_usage: bool = False, **fields: object) -> PeftModel:
    """Train a step, save, load, compare."""
    torch.manual_seed(0)
    base = BUILDERS[kind]()
    model = get_peft_model(copy.deepcopy(base), method(**{"target_modules": TARGETS[kind]} | fields))
    shaken(model).train()(**batch_for(base)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    differ(logits(model.eval(), kind), logits(base, kind))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    same(logits(loaded.eval(), kind), logits(model, kind))
    return model


def patterns(method: Method) -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert set(adapted(method, target_modules=r".*layer\.[01].*\.query").targeted_module_names) == set(names)
    one = adapted(method, target_modules=["query"], layers_to_transform=0)
    assert set(one.targeted_module_names) == {names[0]}
    everything = adapted(method, target_modules="all-linear")
    assert len(everything.targeted_module_names) > 10


def excluding(method: Method) -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert set(adapted(method, exclude_modules=["value"]).targeted_module_names) == set(names)


def ranks(method: Method) -> None:
    model = adapted(method, rank_pattern={"query": 2})
    sizes = {p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert any(2 in size for size in sizes)
    assert any(4 in size for size in sizes)


def biases(method: Method) -> None:
    model = round_trip(method, bias="all", target_modules=["query"])
    assert any(name.endswith("intermediate.dense.bias") and p.requires_grad for name, p in model.named_parameters())


def tokens(method: Method) -> None:
    round_trip(method, "gpt2", trainable_token_indices=[0, 3])


def tying(method: Method) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(base, method(**fields)).base_model.model
    assert model.model.embed_tokens.modules_to_save["default"].weight is model.lm_head.modules_to_save["default"].weight


def defaults(method: Method) -> None:
    for kind in ("bert", "llama", "t5"):
        assert get_peft_model(BUILDERS[kind](), method()).targeted_module_names


def several(method: Method) -> None:
    model = get_peft_model(tiny_bert(), method(target_modules=["value"]), adapter_name="first")
    first = logits(shaken(model))
    model.add_adapter("second", method(target_modules=["value"]))
    model.set_adapter("second")
    second = logits(shaken(model))
    differ(first, second)
    with model.disable_adapter():
        differ(second, logits(model))
    model.set_adapter("first")
    same(logits(model), first)
    model.delete_adapter("second")
    same(logits(model), first)


def mixed_batch(method: Method) -> None:
    model = adapted(method)
    expected = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__", "default", "__base__"])
    same(mixed[::2], expected[::2])
    differ(mixed[1::2], expected[1::2])


def merging(method: Method) -> None:
    linear = {"encoder_hidden_dims": []} if method is METHODS["FVAE-LoRA"] else {}
    model = adapted(method, **linear)
    expected = logits(model)
    same(logits(model.merge_and_unload(safe_merge=True)), expected)


def weighted(method: Method) -> None:
    model = adapted(method)
    model.add_adapter("second", method(target_modules=TARGETS["bert"]))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="linear")


def conv2d(method: Method) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), method(target_modules=["0"]))
    x = torch.randn(2, 3, 6, 6)
    before = model.eval()(x)
    differ(shaken(model)(x), before)


def of_a_mixture(method: Method) -> None:
    model = get_peft_model(tiny_mixtral(), method(target_modules="all-linear"))
    model(**batch_for(tiny_mixtral())).loss.backward()
    assert {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"} <= set(model.targeted_module_names)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def experts(method: Method) -> None:
    model = get_peft_model(tiny_mixtral(), method(target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    assert any("experts" in name and p.requires_grad for name, p in model.named_parameters())


def embedding(method: Method) -> None:
    get_peft_model(tiny_bert(), method(target_modules=["word_embeddings"]))


def half_precision(method: Method) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = get_peft_model(tiny_bert(dtype), method(target_modules=TARGETS["bert"]))
        output = model(**batch_for(tiny_bert()))
        assert output.logits.dtype == dtype
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def injecting(method: Method) -> None:
    base = nn.Sequential(nn.Linear(5, 5)).train()
    x = torch.randn(2, 5)
    plain = base(x)
    model = shaken(inject_adapter_in_model(method(target_modules=["0"]), base))
    differ(model(x), plain)
    assert get_peft_model_state_dict(model)


def through_transformers(method: Method) -> None:
    base, clean = (tiny_bert() for _ in range(2))
    clean.load_state_dict(base.state_dict())
    base.add_adapter(method(target_modules=TARGETS["bert"]), adapter_name="one")
    expected = logits(shaken(base))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        clean.load_adapter(folder, adapter_name="two")
    same(logits(clean.eval()), expected)
    clean.delete_adapter("two")


def checkpointing(method: Method) -> None:
    for use_reentrant in (True, False):
        model = adapted(method).train()
        batch = batch_for(tiny_bert())
        gradients = []
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            model(**batch).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for first, second in zip(*gradients, strict=True):
            same(first, second)


def own_loss(method: Method) -> None:
    model = adapted(method).train()
    batch = batch_for(tiny_bert())
    labels = batch.pop("labels")
    loss = nn.functional.cross_entropy(model(**batch).logits, labels, label_smoothing=0.1)
    with_elbo(loss, method, model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def with_elbo(loss: Tensor, method: Method, model: nn.Module) -> Tensor:
    return add_elbo(loss, model) if method is METHODS["FVAE-LoRA"] else loss


def preference(method: Method) -> None:
    """As TRL does it: the reference is a copy made by the adapter's name, run without gradients in training mode."""
    fields = {"target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM"}
    model = adapted(method, "llama", **fields)
    model.add_adapter("ref", method(**fields))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    batch = {"input_ids": torch.tensor([[1, 5, 9], [1, 7, 2]])}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        model.train().set_adapter("ref")
        reference = model(**batch).logits
        model.set_adapter("default")
    same(reference, expected)
    chosen, rejected = (model(**batch).logits - reference).log_softmax(-1)[:, -1, 0]
    with_elbo(-nn.functional.logsigmoid(chosen - rejected), method, model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def contrastive(method: Method) -> None:
    model = adapted(method).train()
    batch = {name: value for name, value in batch_for(tiny_bert()).items() if name != "labels"}
    queries, passages = model(**batch).logits, model(**batch).logits
    loss = nn.functional.cross_entropy(queries @ passages.T, torch.arange(len(queries)))
    with_elbo(loss, method, model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def second_order(method: Method) -> None:
    """A penalty on the gradient of the loss has the gradient that finite differences have."""
    base = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = shaken(get_peft_model(base, method(target_modules=["0", "2"]))).double().train()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in trained]

    def penalty() -> Tensor:
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(with_elbo(model(x).square().sum(), method, model), x, create_graph=True)
        return gradient.square().sum()

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(trained, direction, strict=True):
                parameter.add_(step * d)
        return penalty().item()

    found = torch.autograd.grad(penalty(), trained, allow_unused=True)
    along = sum((g * d).sum().item() for g, d in zip(found, direction, strict=True) if g is not None)
    differences = (moved(1e-5) - moved(-2e-5)) / 2e-5
    assert abs(along - differences) < 1e-5 * abs(differences)


def copies(method: Method) -> None:
    model = adapted(method)
    model.train()(**batch_for(tiny_bert()))
    expected = logits(model.eval())
    same(logits(copy.deepcopy(model)), expected)
    same(logits(pickle.loads(pickle.dumps(model))), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    same(logits(model), expected)


def generating(method: Method) -> None:
    model = adapted(method, "llama", task_type="CAUSAL_LM")
    inputs = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, use_cache=True), model.generate(**inputs, use_cache=False))


def mixed_model(method: Method) -> None:
    assert isinstance(get_peft_model(tiny_bert(), method(target_modules=["query"]), mixed=True), PeftMixedModel)


def hotswapping(method: Method) -> None:
    model = adapted(method)
    with tempfile.TemporaryDirectory() as folder:
        adapted(method).save_pretrained(folder)
        hotswap_adapter(model, folder, adapter_name="default")


NO_OPTION = "has no such option"
FEATURES = (
    Feature(
        "patterns: names, regular expressions, `all-linear`, `layers_to_transform`",
        patterns,
    ),
    Feature("`exclude_modules`", excluding, {"PVeRA": NO_OPTION}),
    Feature("`target_modules` left out", defaults),
    Feature("`rank_pattern`", ranks, {"PVeRA": NO_OPTION}),
    Feature("`bias`, trained and saved", biases, note="with peft 0.21"),
    Feature("`modules_to_save`", lambda method: round_trip(method, modules_to_save=["classifier"])),
    Feature("`trainable_token_indices`", tokens, {"PVeRA": NO_OPTION}),
    Feature("`ensure_weight_tying`", tying, {"PVeRA": NO_OPTION}),
    Feature("`Conv1D` (GPT-2)", lambda method: round_trip(method, "gpt2")),
    Feature("`Conv2d`", conv2d, {"PVeRA": "linear layers only"}, "no: its layers refuse it", "without groups"),
    Feature(
        "`Embedding`",
        embedding,
        {"FVAE-LoRA": "a token's index is no input that can be encoded", "PVeRA": "linear layers only"},
    ),
    Feature("mixtures of experts: their linear layers, `all-linear`", of_a_mixture),
    Feature(
        "experts stacked in a parameter (`target_parameters`)",
        experts,
        {"FVAE-LoRA": "a parameter has no input; `all-linear` warns of those", "PVeRA": NO_OPTION},
    ),
    Feature("fp16 and bf16 base models", half_precision),
    Feature(
        "low_cpu_mem_usage",
        lambda method: round_trip(method, low_cpu_mem_usage=True),
    ),
    Feature("several adapters: add, switch, disable, delete", several, reference="no: `AttributeError`"),
    Feature("one adapter per row of a batch (`adapter_names`)", mixed_batch, {"PVeRA": "the names are ignored"}),
    Feature("merging", merging, reference="no: `TypeError`", note="with a linear encoder"),
    Feature(
        "weighted sums of adapters",
        weighted,
        {"FVAE-LoRA": "the update is not linear in its parameters", "PVeRA": NO_OPTION},
    ),
    Feature(
        "`inject_adapter_in_model`",
        injecting,
        {"PVeRA": "its layers share a state"},
    ),
    Feature(
        "transformers' `add_adapter`, `load_adapter`, `delete_adapter`",
        through_transformers,
        {"PVeRA": "its layers share a state"},
    ),
    Feature(
        "gradient checkpointing, `use_reentrant` true and false",
        checkpointing,
        reference="no: reentrant loses the ELBO",
    ),
    Feature(
        "a loss that the loop computes itself",
        own_loss,
        reference="no: `TypeError` without labels",
        note="through `add_elbo`",
    ),
    Feature(
        "preference training, with a frozen copy of the adapter as the reference",
        preference,
        {"PVeRA": "its reference is noisy"},
        note="[how](preference-training.md)",
    ),
    Feature("contrastive training: several forwards, one loss", contrastive, note="without a gradient cache"),
    Feature("derivatives of second order", second_order),
    Feature("deepcopy, pickle, `torch.save` of the state", copies),
    Feature("generation with a cache", generating),
    Feature("`PeftMixedModel`", mixed_model, dict.fromkeys(("FVAE-LoRA", "PVeRA"), "peft's list of methods is fixed")),
    Feature("hotswapping", hotswapping, dict.fromkeys(("FVAE-LoRA", "PVeRA"), "peft does it for LoRA alone")),
)


def table() -> str:
    """The table in Markdown."""
    columns = [*METHODS, "the authors' fork"]
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[feature.name, *map(feature.cell, METHODS), feature.reference] for feature in FEATURES]
    legend = f"Each yes and no is run by the tests, the fork's column apart; {NOT_TESTED}: not tested."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{legend}"


def block(text: str) -> re.Match[str] | None:
    """Where the table stands in the page."""
    return re.search(rf"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", text, re.DOTALL)


def main() -> int:
    """Print the table, or write it into the page."""
    if "--write" not in sys.argv[1:]:
        print(table())
        return 0
    text = PAGE.read_text(encoding="utf-8")
    if (found := block(text)) is None:
        print(f"{PAGE.name} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    PAGE.write_text(f"{text[: found.start()]}{table()}\n{text[found.end() :]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
