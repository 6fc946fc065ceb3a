"""Contrastive training by sentence-transformers: several forwards, one loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from by_hand import Gradients, PlainTrainer, StepGradients, assert_same, config, gradients, plain_elbo
from fvae_lora import ElboTrainerMixin, add_elbo
from tiny import randomised, tiny_bert

if importlib.util.find_spec("sentence_transformers") is None:
    pytest.skip("sentence-transformers is not installed", allow_module_level=True)

from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

pytestmark = [pytest.mark.usefixtures("without_noise"), pytest.mark.filterwarnings("ignore")]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
PAIRS = {"anchor": ["a b", "c", "d e f g h", "h a"], "positive": ["b a c d", "c d", "e", "g f e d c b"]}
SCORED = PAIRS | {"score": [0.9, 0.1, 0.5, 0.3]}
LOSSES: dict[str, tuple[Callable[[SentenceTransformer], nn.Module], dict[str, Any]]] = {
    "contrast": (losses.MultipleNegativesRankingLoss, PAIRS),
    "cosine": (losses.CosineSimilarityLoss, SCORED),
    "nested": (lambda model: losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [16, 8]), SCORED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    BertModel(tiny_bert(vocab_size=len(WORDS)).config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(path)
    return path


def plain(folder: Path) -> SentenceTransformer:
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def adapted(folder: Path, wrapped: bool = False) -> SentenceTransformer:
    """By the library's own ``add_adapter``, or wrapped by peft."""
    torch.manual_seed(0)
    model = plain(folder)
    if wrapped:
        model[0].model = get_peft_model(model[0].model, config("bert"))
    else:
        model.add_adapter(config("bert"))
    return randomised(model).train()


def trained(front: type | None, model: SentenceTransformer, loss: str, folder: Path, **fields: Any) -> Gradients:
    """The gradients of a step over all rows."""
    make, rows = LOSSES[loss]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0}
    settings |= {"max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    seen = StepGradients()
    trainer = SentenceTransformerTrainer
    (trainer if front is None else type("Trained", (front, trainer), {}))(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder), **settings | fields),
        train_dataset=Dataset.from_dict(rows),
        loss=make(model),
        callbacks=[seen],
    ).train()
    (found,) = seen.steps
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_trainer_adds_the_plain_elbo_of_both_towers(wrapped: bool, loss: str, folder: Path, tmp_path: Path) -> None:
    expected = trained(PlainTrainer, adapted(folder, wrapped), loss, tmp_path)
    found = trained(ElboTrainerMixin, adapted(folder, wrapped), loss, tmp_path)
    assert_same(found, expected, 1e-4)


def test_the_elbo_of_accumulated_batches_is_the_mean_over_all_their_tokens(folder: Path, tmp_path: Path) -> None:
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    expected = trained(PlainTrainer, adapted(folder), "cosine", tmp_path)
    found = trained(ElboTrainerMixin, adapted(folder), "cosine", tmp_path, **halves)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_own_loop(wrapped: bool, folder: Path) -> None:
    model = adapted(folder, wrapped)
    loss_function = losses.MultipleNegativesRankingLoss(model)

    def task() -> Tensor:
        loss: Tensor = loss_function([model.preprocess(texts) for texts in PAIRS.values()], None)
        return loss

    def by_hand() -> Tensor:
        with plain_elbo(model) as elbo:
            return task() + elbo()

    expected = gradients(model, by_hand)
    assert_same(gradients(model, lambda: add_elbo(task(), model)), expected, 1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_the_mixin_the_error_names_it(wrapped: bool, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the ELBO .* not in the loss .*ElboTrainerMixin"):
        trained(None, adapted(folder, wrapped), "contrast", tmp_path)


@pytest.mark.parametrize("front", [None, ElboTrainerMixin])
@pytest.mark.parametrize(
    "cached", [losses.CachedMultipleNegativesRankingLoss, losses.CachedMultipleNegativesSymmetricRankingLoss]
)
def test_cached_losses_are_refused_with_the_reason(
    cached: type[nn.Module], front: type | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "cached", (cached, PAIRS))
    with pytest.raises(RuntimeError, match=r"runs the model again inside its backward.*gradient checkpointing"):
        trained(front, adapted(folder), "cached", tmp_path)


@pytest.mark.parametrize("method", ["fvae-lora", "lora"])
def test_a_saved_model_gives_the_same_embeddings(method: str, folder: Path, tmp_path: Path) -> None:
    model = plain(folder)
    before = model.encode(PAIRS["anchor"], convert_to_tensor=True)
    targets = ["query", "value"]
    model.add_adapter(LoraConfig(target_modules=targets) if method == "lora" else config("bert"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    expected = model.encode(PAIRS["anchor"], convert_to_tensor=True)
    assert not torch.allclose(before, expected)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(loaded.encode(PAIRS["anchor"], convert_to_tensor=True), expected)
    loaded.disable_adapters()
    torch.testing.assert_close(loaded.encode(PAIRS["anchor"], convert_to_tensor=True), before)


def test_an_adapter_is_loaded_from_its_folder(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    expected = model.eval().encode(PAIRS["anchor"], convert_to_tensor=True)
    model[0].model.save_pretrained(tmp_path)
    other = plain(folder)
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(other.encode(PAIRS["anchor"], convert_to_tensor=True), expected)


def test_a_cross_encoder_trains_and_comes_back_with_its_head(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_bert(vocab_size=len(WORDS), num_labels=1).config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    steps = []
    for front in (PlainTrainer, ElboTrainerMixin):
        torch.manual_seed(0)
        model = CrossEncoder(str(tmp_path), device="cpu")
        model.add_adapter(config("bert", modules_to_save=["classifier"]))
        randomised(model)
        settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "max_grad_norm": 0.0, "learning_rate": 0.1}
        seen = StepGradients()
        type("Trained", (front, CrossEncoderTrainer), {})(
            model=model,
            args=CrossEncoderTrainingArguments(str(tmp_path / "run"), save_strategy="no", **settings),
            train_dataset=Dataset.from_dict({**PAIRS, "label": [1.0, 0.0, 0.0, 1.0]}),
            loss=BinaryCrossEntropyLoss(model),
            callbacks=[seen],
        ).train()
        steps += seen.steps
    expected, found = steps
    assert any("classifier" in name for name in found)
    assert_same(found, expected, 1e-4)
    pairs = list(zip(*PAIRS.values(), strict=True))
    scores = model.predict(pairs)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert CrossEncoder(str(tmp_path / "adapter"), device="cpu").predict(pairs) == pytest.approx(scores)
