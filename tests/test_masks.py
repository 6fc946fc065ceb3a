"""Padding does not count: a layer goes by the mask of the sequence that it reads, whatever its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from by_hand import (
    Batch,
    adapted,
    assert_same,
    collated,
    elbo_by_hand,
    gradients,
    loss_by_hand,
    rows_for,
    trainer_gradients,
)
from fvae_lora import FVAELoraTrainer, elbo_loss

pytestmark = pytest.mark.usefixtures("without_noise")
DOUBLE = torch.float64
SMALL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def elbo_of(model: PeftModel, batch: Batch) -> Tensor:
    model(**batch)
    with torch.no_grad():
        return elbo_loss(model)


def assert_counts(model: PeftModel, batch: Batch, valid: Callable[[str, Batch, torch.Size], Tensor]) -> None:
    """The ELBO is the mean over the tokens that `valid` names, and that is not the mean over all."""
    with torch.no_grad():
        expected = elbo_by_hand(model, [batch], valid)[0]
        over_all = elbo_by_hand(model, [batch], lambda layer, batch, tokens: torch.ones(tokens))[0]
    torch.testing.assert_close(elbo_of(model, batch), expected, rtol=1e-9, atol=0)
    assert abs(over_all - expected) > 1e-6 * abs(expected)


# --- One sequence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "side"), [("bert", "right"), ("gpt2", "right"), ("llama", "right"), ("llama", "left")]
)
def test_padding_does_not_matter(kind: str, side: str) -> None:
    model, rows = adapted(kind), rows_for("llama" if kind != "bert" else kind, [3, 6, 1])
    short, long = (elbo_of(model, collated(rows, side, length)) for length in (0, 9))
    tolerance = 1e-5 if kind == "llama" else 1e-10  # llama rounds positions to fp32
    torch.testing.assert_close(short, long, rtol=tolerance, atol=0)
    alone = [elbo_of(model, collated([row], side)) for row in rows]
    torch.testing.assert_close(short, (3 * alone[0] + 6 * alone[1] + alone[2]) / 10, rtol=tolerance, atol=0)


def test_gradients_do_not_see_padding() -> None:
    model, rows = adapted("bert"), rows_for("bert", [3, 6, 1])
    short, long = (
        gradients(model, lambda length=length: model(**collated(rows, length=length)).loss) for length in (0, 9)
    )
    assert_same(long, short)


def test_without_a_mask_every_token_counts() -> None:
    model = adapted("bert")
    ids = rows_for("bert", [5, 5])
    with_mask, without = collated(ids), {"input_ids": collated(ids)["input_ids"]}
    torch.testing.assert_close(elbo_of(model, with_mask), elbo_of(model, without), rtol=1e-12, atol=0)


def test_a_batch_of_nothing_but_padding() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [4, 2]))
    assert elbo_of(model, batch | {"attention_mask": torch.zeros(2, 4, dtype=torch.long)}) == 0


def test_flattened_tokens() -> None:
    """As OPT hands them to its last layers: (batch * length, d)."""
    small = {"vocab_size": 60, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"word_embed_proj_dim": 16, "dropout": 0.0, "max_position_embeddings": 32}
    model = adapted(OPTForCausalLM(OPTConfig(**small)).to(DOUBLE), target_modules=["q_proj", "fc1", "fc2"])
    shapes = set()

    def valid(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
        shapes.add(tuple(tokens))
        return batch["attention_mask"].reshape(tokens)

    assert_counts(model, collated(rows_for("llama", [3, 6, 1])), valid)
    assert shapes == {(3, 6), (18,)}


# --- Encoder and decoder --------------------------------------------------------------------------------------------


def of_both_sequences(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
    """Masks by the names that transformers gives: the memory of cross-attention is the encoder's sequence."""
    memory = any(part in layer for part in ("EncDecAttention", "encoder_attn", "crossattention")) and layer.split(".")[
        -1
    ] in ("k", "v", "k_proj", "v_proj", "key", "value")
    if layer.split(".")[0 if "block" in layer else 1] == "encoder" or memory:
        return batch["attention_mask"]
    return batch.get("decoder_attention_mask", batch["labels"] != -100)


def seq2seq_batch(**padding: int) -> Batch:
    rows = rows_for("t5", [7, 3, 5])
    inputs = collated([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows], **padding)
    return inputs | collated([{"labels": row["labels"]} for row in rows], **padding)


@pytest.mark.parametrize("length", [0, 9])
def test_encoder_decoder_and_what_lies_between(length: int) -> None:
    """With lengths that differ, and that do not: then the shape of a mask does not tell which one is meant."""
    model = adapted("t5", target_modules=["q", "k", "v", "o", "wi"])
    assert_counts(model, seq2seq_batch(length=length), of_both_sequences)


def test_a_mask_of_the_decoder() -> None:
    model, batch = adapted("t5", target_modules=["q", "k", "v"]), seq2seq_batch()
    mask = (torch.arange(batch["labels"].shape[1]) < torch.tensor([[2], [3], [1]])).long()
    batch |= {"decoder_attention_mask": mask}
    assert_counts(model, batch, of_both_sequences)


def test_seq2seq_does_not_see_padding() -> None:
    model = adapted("t5")
    short, long = (elbo_of(model, seq2seq_batch(length=length)) for length in (0, 10))
    torch.testing.assert_close(short, long, rtol=1e-6, atol=0)


def test_the_head_behind_a_decoder_reads_its_sequence() -> None:
    model = adapted("t5", target_modules=["lm_head"])
    batch = seq2seq_batch(length=9)
    assert_counts(model, batch, lambda layer, batch, tokens: batch["labels"] != -100)


def test_a_decoder_that_reads_the_input() -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    }
    base = BartForSequenceClassification(BartConfig(**small, dropout=0.0, num_labels=3, eos_token_id=59)).to(DOUBLE)
    model = adapted(base, target_modules=["q_proj", "k_proj", "v_proj"])
    rows = rows_for("bert", [7, 3, 5])
    for row in rows:
        row["input_ids"] = torch.cat([row["input_ids"][:-1] % 58 + 1, torch.tensor([59])])
    batch = collated(rows)
    assert_counts(model, batch, lambda layer, batch, tokens: batch["attention_mask"])
    assert_same(gradients(model, lambda: model(**batch).loss), gradients(model, lambda: loss_by_hand(model, [batch])))


def test_two_models_as_encoder_and_decoder() -> None:
    """The decoder is a model with an encoder of its own name."""
    part = BertConfig(**SMALL, vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    both = EncoderDecoderConfig.from_encoder_decoder_configs(part, part, decoder_start_token_id=1, pad_token_id=0)
    model = adapted(EncoderDecoderModel(both).to(DOUBLE), target_modules=["query", "key", "value"])

    def valid(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
        memory = "crossattention" in layer and layer.split(".")[-1] in ("key", "value")
        return batch["attention_mask"] if layer.startswith("encoder.") or memory else batch["labels"] != -100

    assert_counts(model, seq2seq_batch(length=9), valid)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(6, 1), (2, 3)])
def test_seq2seq_in_the_trainer(settings: Batch, batch_size: int, accumulation: int, tmp_path: Path) -> None:
    """Each sequence has a share of its own; and with label smoothing the labels never reach the model."""
    model, rows = adapted("t5", target_modules=["q", "k", "v"]), rows_for("t5", [7, 3, 5, 8, 2, 6])
    base = model.get_base_model()

    def batched(rows: list[Batch]) -> Batch:
        inputs = collated([{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows])
        labels = collated([{"labels": row["labels"]} for row in rows])["labels"]
        # As transformers' collator does, for a model that is not to see the labels.
        return inputs | {"labels": labels, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels)}

    def by_hand() -> Tensor:
        batch = batched(rows)
        elbo, (output,) = elbo_by_hand(model, [batch], of_both_sequences)
        smoothing = settings.get("label_smoothing_factor", 0.0)
        task = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=smoothing
        )
        return task + elbo

    (found,) = trainer_gradients(FVAELoraTrainer, model, rows, batch_size, accumulation, tmp_path, batched, **settings)
    assert_same(found, gradients(model, by_hand), 1e-5)


# --- Sound ----------------------------------------------------------------------------------------------------------


def wav2vec2(head: type[PreTrainedModel] = Wav2Vec2ForSequenceClassification, **fields: Any) -> PeftModel:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    small |= {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    small |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "num_labels": 3}
    small |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "activation_dropout": 0.0}
    small |= {"final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0, "apply_spec_augment": False}
    config = Wav2Vec2Config(**small | {"feat_extract_norm": "layer", "classifier_proj_size": 8} | fields)
    return adapted(head(config).to(DOUBLE), target_modules=["q_proj", "v_proj", "projection"])


def sounds(samples: list[int], length: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(2)
    batch = {"input_values": torch.zeros(len(samples), max(length, *samples), dtype=DOUBLE)}
    batch["attention_mask"] = torch.zeros(batch["input_values"].shape, dtype=torch.long)
    for i, n in enumerate(samples):
        batch["input_values"][i, :n] = torch.randn(n, generator=generator, dtype=DOUBLE)
        batch["attention_mask"][i, :n] = 1
    return batch | {"labels": torch.arange(len(samples)) % 3}


def frames(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
    """Two convolutions: kernel 10, stride 5, and kernel 3, stride 2."""
    samples = batch["attention_mask"].sum(-1)
    return torch.arange(tokens[1]) < (((samples - 10) // 5 + 1 - 3) // 2 + 1)[:, None]


@pytest.mark.parametrize("adapter_behind", [False, True])
def test_frames_after_convolutions(adapter_behind: bool) -> None:
    model = wav2vec2(Wav2Vec2ForCTC, add_adapter=adapter_behind, output_hidden_size=16, num_adapter_layers=1)
    batch = {name: value for name, value in sounds([300, 120, 211]).items() if name != "labels"}
    assert_counts(model, batch, frames)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_sounds_of_unequal_lengths_in_the_trainer(
    masked: bool, batch_size: int, accumulation: int, tmp_path: Path
) -> None:
    """Without a mask too: the frames of a batch are not in proportion to its samples."""
    if not masked and batch_size == 4:
        pytest.skip("without a mask, padding is sound")
    model = wav2vec2()
    rows = [sounds([n]) for n in (300, 120, 211, 64)]
    if not masked:
        rows = [{name: value for name, value in row.items() if name != "attention_mask"} for row in rows]
    whole = rows if accumulation == 4 else [together(rows)]
    valid = frames if masked else (lambda layer, batch, tokens: torch.ones(tokens))
    expected = gradients(model, lambda: loss_by_hand(model, whole, valid))
    (found,) = trainer_gradients(FVAELoraTrainer, model, rows, batch_size, accumulation, tmp_path, together)
    assert_same(found, expected, 1e-9)


def together(rows: list[Batch]) -> Batch:
    longest = max(row["input_values"].shape[1] for row in rows)
    pad = {name: longest if name != "labels" else 1 for name in rows[0]}
    padded = {
        name: [torch.nn.functional.pad(row[name], (0, pad[name] - row[name].shape[-1])) for row in rows] for name in pad
    }
    return {name: torch.cat(values) for name, values in padded.items()}


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 0.25)])
def test_a_summed_task_loss_is_left_alone(reduction: str, scale: float, tmp_path: Path) -> None:
    """Sums over micro-batches add up by themselves; means get the micro-batch's share."""
    model = wav2vec2(Wav2Vec2ForCTC, ctc_loss_reduction=reduction)
    rows = [sounds([300]) | {"labels": torch.tensor([[1 + i, 2, 3]])} for i in range(4)]
    elbo, outputs = elbo_by_hand(model, rows, frames)
    expected = gradients(model, lambda: scale * sum(output.loss for output in outputs) + elbo)
    (found,) = trainer_gradients(FVAELoraTrainer, model, rows, 1, 4, tmp_path, lambda rows: rows[0])
    assert_same(found, expected, 1e-9)


def test_frames_of_a_spectrogram() -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 4}
    small |= {"max_source_positions": 10, "max_target_positions": 16, "dropout": 0.0, "pad_token_id": 0}
    config = WhisperConfig(**small, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    model = adapted(WhisperForConditionalGeneration(config).to(DOUBLE), target_modules=["q_proj", "v_proj"])
    lengths = torch.tensor([[20], [9]])
    batch = {
        "input_features": torch.randn(2, 4, 20, dtype=DOUBLE),
        "attention_mask": (torch.arange(20) < lengths).long(),
        "labels": torch.tensor([[3, 4, 5, 6], [3, 4, -100, -100]]),
    }

    def valid(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
        if ".encoder." in layer or layer.endswith("encoder_attn.v_proj"):
            return torch.arange(10) < (lengths + 1) // 2
        return batch["labels"] != -100

    assert_counts(model, batch, valid)


# --- Two towers -----------------------------------------------------------------------------------------------------


def clip() -> PeftModel:
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = part | {"vocab_size": 60, "max_position_embeddings": 32, "eos_token_id": 59, "bos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=part | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    return adapted(CLIPModel(config).to(DOUBLE), target_modules=["q_proj", "v_proj"])


def pairs(lengths: list[int]) -> list[Batch]:
    texts, images = rows_for("bert", lengths), rows_for("vit", lengths)
    return [{"pixel_values": b["pixel_values"], **a, "labels": a["labels"]} for a, b in zip(texts, images, strict=True)]


def of_pairs(rows: list[Batch]) -> Batch:
    return {name: value for name, value in collated(rows).items() if name != "labels"} | {"return_loss": True}


def test_a_vision_tower_has_no_padding() -> None:
    """Five tokens for each image, and a text mask of the same shape."""
    model = clip()
    batch = {name: value for name, value in collated(pairs([5, 2, 3])).items() if name != "labels"} | {
        "return_loss": True
    }

    def valid(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
        return torch.ones(tokens) if "vision" in layer else batch["attention_mask"]

    assert_counts(model, batch, valid)
    expected = gradients(model, lambda: loss_of_pairs(model, batch, valid))
    assert_same(gradients(model, lambda: model(**batch).loss), expected, 1e-9)


def loss_of_pairs(model: PeftModel, batch: Batch, valid: Callable[[str, Batch, torch.Size], Tensor]) -> Tensor:
    elbo, (output,) = elbo_by_hand(model, [batch], valid)
    return output.loss + elbo


def test_images_and_texts_have_shares_of_their_own(tmp_path: Path) -> None:
    model, rows = clip(), pairs([7, 2, 3, 9])

    def by_hand() -> Tensor:
        micro_batches = [of_pairs(rows[:2]), of_pairs(rows[2:])]
        elbo, outputs = elbo_by_hand(
            model,
            micro_batches,
            lambda layer, batch, tokens: torch.ones(tokens) if "vision" in layer else batch["attention_mask"],
        )
        return sum(output.loss for output in outputs) / 2 + elbo

    with pytest.MonkeyPatch.context() as patch:
        sampler = torch.utils.data.SequentialSampler
        patch.setattr(FVAELoraTrainer, "_get_train_sampler", lambda trainer, *_: sampler(trainer.train_dataset))
        (found,) = trainer_gradients(FVAELoraTrainer, model, rows, 2, 2, tmp_path, of_pairs)
    assert_same(found, gradients(model, by_hand), 1e-9)
