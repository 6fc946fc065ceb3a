"""Pretrained models, tokenizers and processors: none of their code is run, and nothing is unpickled."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, find_adapter_config_file, has_file

from fvae_lora_experiments.errors import UserError, first_line
from fvae_lora_experiments.models.heads import draw_new_head, head_modules
from fvae_lora_experiments.places import is_local

os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks the hub to convert a pickle

TO_SAFETENSORS = """\
import pathlib, torch; from safetensors.torch import save_file; folder = pathlib.Path({folder}); \
files = sorted(folder.glob("pytorch_model*.bin")); \
state = {{k: v for f in files for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}}; \
save_file({{k: v.contiguous().clone() for k, v in state.items()}}, folder / "model.safetensors", {{"format": "pt"}})"""
"""A program that writes the weights in a folder as safetensors, beside the pickles that hold them."""

NEARLY_ALL = 0.9
"""A tokenizer is refused if at least this share of the training split's tokens is unknown to it."""


@contextmanager
def loading(name: str, role: str) -> Iterator[None]:
    """Turns whatever goes wrong when a model or a part of it is loaded into an error about its files.

    Raises:
        UserError: one line that names the model and its `role`, such as "for transcription".
    """
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name}: no such folder")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {name}: {_reason(error, role)}") from error


def _reason(error: Exception, role: str) -> str:
    if isinstance(error, OSError) and "couldn't connect to" in str(error):
        return "no such folder, no such name in the cache, and the hub cannot be reached"
    return f"cannot be loaded {role}: {in_one_line(error)}"


def in_one_line(error: Exception) -> str:
    """The first line of an error's message, preceded by the error's type if the line is not a sentence."""
    line = first_line(error).rstrip(":")
    is_sentence = isinstance(error, ImportError | OSError | ValueError | RuntimeError) and " " in line
    return line if is_sentence else ": ".join(filter(None, (type(error).__name__, line)))


def load(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)` for a configuration, a tokenizer or a processor; code that comes with it is refused.

    Raises:
        Exception: whatever transformers raises, see `loading`.
    """
    return kind.from_pretrained(name, trust_remote_code=False, **options)


_weightless = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Lets `load_model` make models from their configuration alone, on the meta device."""
    before = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(before)


def _from_configuration(kind: Any, config: Any, name: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = load(GenerationConfig, name)
    return model


def load_model(kind: Any, name: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """A model from safetensors.

    Args:
        kind: the transformers class that loads it, such as `AutoModelForCausalLM`.
        name: a folder or a name on the hub.
        options: those of `from_pretrained`.

    Returns:
        The model, and the names of its parameters that are missing in `name`. A head of another size is new.

    Raises:
        UserError: it is an adapter, or its weights are only there as a pickle or do not have the shapes of its
            configuration.
        Exception: whatever else transformers raises, see `loading`.
    """
    if find_adapter_config_file(name):
        raise UserError(f"model {name}: holds an adapter (adapter_config.json); expected a whole model")
    config = options.get("config") or load(AutoConfig, name)
    if not str(getattr(config, "transformers_weights", None) or ".safetensors").endswith((".safetensors", ".json")):
        raise UserError(f"model {name}: its config.json names weights that are not safetensors, which are not read")
    if _weightless.get():
        head = {key: value for key, value in options.items() if key in ("id2label", "label2id", "problem_type")}
        head |= {"num_labels": options["num_labels"]} if "num_labels" in options else {}
        config = config if "config" in options else load(AutoConfig, name, **head)
        return _from_configuration(kind, config, name), set()
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = load(kind, name, **options)
    except OSError as error:
        if _is_pickled(name):
            raise UserError(_how_to_convert(name)) from error
        raise
    if wrong := [key for key, *_ in info["mismatched_keys"] if not key.startswith(_heads(model))]:
        raise UserError(f"model {name}: its weights do not fit its config.json: {', '.join(sorted(wrong)[:3])}")
    return model, set(info["missing_keys"])


def _heads(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(f"{head}." for head in head_modules(model))


def _is_pickled(name: str) -> bool:
    if Path(name).is_dir():
        return any(Path(name).glob("pytorch_model*.bin"))
    with suppress(OSError):
        return any(has_file(name, file) for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    return False


def _how_to_convert(name: str) -> str:
    here = Path(name).is_dir()
    folder = name if here else Path(name).name
    program = shlex.quote(TO_SAFETENSORS.format(folder=json.dumps(folder)))
    fetch, use = ("", "") if here else (f"hf download {name} --local-dir {folder} && ", f" and give --model ./{folder}")
    return (
        f"model {name}: its weights are only there as a pickle, which is not read; if you trust it, "
        f"run {fetch}python -c {program}{use}"
    )


def load_classifier(source: str, kind: Any, classes: list[str]) -> tuple[PreTrainedModel, set[str]]:
    """A model in float32 that classifies into `classes`, or predicts one number if there are none.

    Unless the model was trained on exactly these classes, it gets a new head, drawn from torch's global generator.

    Args:
        source: a folder or a name on the hub.
        kind: the transformers class that loads it, such as `AutoModelForImageClassification`.
        classes: names, in the order of their numbers.

    Returns:
        The model, and the names of its parameters that are missing in `source`.

    Raises:
        UserError, Exception: as `load_model`.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
        head = labels | {"problem_type": "single_label_classification"}
    trained_on = list(load(AutoConfig, source).id2label.values())
    model, missing = load_model(kind, source, **head, dtype=torch.float32)
    if trained_on != classes:
        draw_new_head(model)
    return model, missing


def load_adapter(base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> PeftModel:
    """`base` with the adapter in `folder`.

    Raises:
        UserError: it cannot be loaded, or is not a safetensors file.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder}: holds no {ADAPTER_WEIGHTS}")
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded as an adapter: {in_one_line(error)}") from error


def load_tokenizer(name: str, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none; transformers would make one up from a few special tokens.
    """
    with loading(name, role):
        if Path(name).is_dir() and not any(map(_may_be_vocabulary, Path(name).iterdir())):
            raise UserError(_no_tokenizer(name))
        tokenizer: PreTrainedTokenizerBase = load(AutoTokenizer, name)
        check_vocabulary(name, tokenizer)
    return tokenizer


def _may_be_vocabulary(file: Path) -> bool:
    return file.name.startswith(("tokenizer", "vocab", "tekken")) or file.suffix in (".model", ".tiktoken", ".spm")


def _no_tokenizer(name: str) -> str:
    return f"model {name}: no tokenizer there; put the files of the one that it was trained with beside it"


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a `UserError` if the vocabulary of a model's tokenizer only has special tokens."""
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, "▁"}:
        raise UserError(_no_tokenizer(name))


def check_tokens(name: str, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[int]]) -> None:
    """Refuses a tokenizer that does not fit the texts.

    Args:
        name: the model's.
        tokenizer: the model's.
        texts: tokens of the training split's texts.

    Raises:
        UserError: nearly all tokens are unknown, or all are special.
    """
    special, unknown_id = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    known = unknown = 0
    for ids in texts:
        ordinary = sum(token not in special for token in ids)
        known, unknown = known + ordinary, unknown + sum(token == unknown_id for token in ids)
    if known <= (1 - NEARLY_ALL) * (known + unknown):
        share = f"{unknown / (known + unknown):.0%} of the training split's tokens" if unknown else "its texts"
        raise UserError(f"model {name}: {share} are unknown to its tokenizer; does it belong to the model?")
