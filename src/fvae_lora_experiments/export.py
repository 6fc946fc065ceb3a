"""Conversion of adapters: for inference only, to a plain LoRA, or from the reference implementation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from fvae_lora import (
    ConversionReport,
    adapter_folder,
    convert_to_lora,
    export_for_inference,
    load_reference_adapter,
)
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.heads import saved_head_size
from fvae_lora_experiments.models.pretrained import load, load_adapter, load_model, loading
from fvae_lora_experiments.places import is_local
from fvae_lora_experiments.run.finished import read_finished_run
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import open_base, open_data, scoring_trainer
from fvae_lora_experiments.tasks import load_task

TASK_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "CAUSAL_LM": AutoModelForCausalLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
OPTIONS = {"folder": "--out", "bias": "--bias", "max_error": "--max-error", "calibration": "--rows"}
"""The command line's options for the method's arguments."""


def export_inference(source: Path, out: Path, model: str | None = None) -> None:
    """Writes the adapter for inference: only encoder 1's mean and B.

    Args:
        source: a run's folder, or an adapter's.
        out: the folder to write; must not exist, or be empty.
        model: where the base model is, if not where the run or the adapter says.

    Raises:
        UserError: there is no FVAE-LoRA adapter or no base model for it, or `out` is not empty.
    """
    with _as_user_errors():
        export_for_inference(_load_adapted(source, model), out)


def export_lora(
    source: Path,
    out: Path,
    model: str | None = None,
    dataset: str | None = None,
    bias: Literal["keep", "fold"] = "keep",
    max_error: float = 0.1,
    rows: int = 512,
) -> ConversionReport:
    """Writes the adapter as a plain LoRA; if a fit is needed, it is made on training and scored on validation data.

    Args:
        source: a run's folder; an adapter's is enough if nothing has to be fitted.
        out: the folder to write; must not exist, or be empty.
        model: where the base model is, if not where the run or the adapter says.
        dataset: where the data is, if not where the run says.
        bias: where the encoders' constant goes, see `fvae_lora.to_lora`.
        max_error: the largest relative error of a layer's update that is accepted.
        rows: how many rows of the training split to fit on.

    Returns:
        What was done.

    Raises:
        UserError: as in `export_inference`, and whatever `fvae_lora.convert_to_lora` refuses.
    """
    with _as_user_errors():
        folder = _find_adapter(source)
        linear = adapter_folder.check_json(folder / "adapter_config.json").get("encoder_hidden_dims") == []
        if folder == source and not (linear and bias == "keep"):
            raise UserError(f"{source}: only an adapter; its encoders must be fitted on data, so give its run's folder")
        if linear and bias == "keep":
            return convert_to_lora(_load_adapted(source, model), out, max_error=max_error, bias=bias)
        recipe, record = read_finished_run(source, model, dataset)
        base, processor = open_base(recipe, record)
        as_at_inference = recipe.image.model_copy(update={"augmentation": []})
        plain = recipe.model_copy(update={"image": as_at_inference})
        splits = load_task(plain).datasets(open_data(recipe, record), base, processor)
        generator = torch.Generator().manual_seed(recipe.seed)
        chosen = torch.randperm(len(splits["train"]), generator=generator)[:rows].tolist()
        with scoring_trainer(load_adapter(base, folder), recipe, quiet=True) as trainer:

            def score(_: PeftModel) -> dict[str, float]:
                scores = trainer.score(splits["validation"], "validation")
                return {f"validation_{name}": score for name, score in scores.items()}

            batches = trainer.get_eval_dataloader(Subset(splits["train"], chosen))
            return convert_to_lora(trainer.model, out, batches, max_error=max_error, bias=bias, evaluate=score)


def import_reference(folder: Path, model: str, out: Path) -> None:
    """Writes an adapter of the reference implementation as one of this package.

    Args:
        folder: the reference's adapter.
        model: the base model that it was trained on.
        out: the folder to write; must not exist, or be empty.

    Raises:
        UserError: it is not an adapter of the reference, needs something unsupported or does not fit the model, or
            `out` is not empty.
    """
    if not (folder / "adapter_config.json").is_file():
        what = "holds no adapter_config.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; expected the folder of an adapter that the reference implementation saved")
    with _as_user_errors(), adapter_folder.new_folder(out) as inside:
        load_reference_adapter(_load_base(folder, model), folder).save_pretrained(inside)


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns the method's ValueErrors into user errors that name options instead of arguments."""
    try:
        yield
    except ValueError as error:
        argument, colon, reason = " ".join(str(error).split()).partition(":")
        raise UserError(f"{OPTIONS.get(argument, argument)}{colon}{reason}") from error


def _find_adapter(source: Path) -> Path:
    """The folder of a run's FVAE-LoRA adapter; `source` itself if it is not a run."""
    folder = RunFolder(source).adapter if RunFolder(source).record_file.exists() else source
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{source}: neither a run with an adapter nor an adapter's folder")
    kind = adapter_folder.check_json(folder / "adapter_config.json").get("peft_type")
    if kind != "FVAE_LORA":
        raise UserError(f"{source}: an adapter of type {kind}; only FVAE_LORA can be exported")
    return folder


def _load_adapted(source: Path, model: str | None) -> PeftModel:
    folder = _find_adapter(source)
    if folder == source:
        return load_adapter(_load_base(source, model), folder)
    return load_adapter(open_base(*read_finished_run(source, model, with_data=False))[0], folder)


def _load_base(adapter: Path, model: str | None) -> PreTrainedModel:
    """The base model of an adapter, with a head of the same size as the adapter's."""
    fields = adapter_folder.check_json(adapter / "adapter_config.json")
    name = model or fields.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not name its base model; give --model")
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name}: no such folder; --model says where it is")
    size = saved_head_size(adapter)
    options: dict[str, Any] = {} if size is None else {"num_labels": size}
    with loading(name, "as the adapter's base model"):
        return load_model(_model_class(fields, name), name, **options)[0]


def _model_class(fields: Mapping[str, Any], model: str) -> Any:
    """The class of an adapter's base model, as named by the adapter or else by the model."""
    if (task := TASK_CLASSES.get(fields.get("task_type") or "")) is not None:
        return task
    named = (fields.get("auto_mapping") or {}).get("base_model_class")
    name = named or (load(AutoConfig, model).architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"transformers has no model class {name}")
    return found
