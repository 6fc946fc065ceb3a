"""An adapter's README as a model card, made from the run's record: what it is, its scores, how to use it."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.report.formats import escape_markdown
from fvae_lora_experiments.report.numbers import factor, quantity, title
from fvae_lora_experiments.run.distributed import main_only
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.run.record import Record, printable

MARKER = "<!-- made by fvae-lora from the run's record -->"
HERE = 'adapter = "."  # this folder'
"""The line of the example that names the adapter; `push` replaces it by one with the repository's name."""

PIPELINES = {
    "image": "image-classification",
    "text": "text-classification",
    "commonsense": "text-generation",
    "phonemes": "automatic-speech-recognition",
    "transcription": "automatic-speech-recognition",
}
METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
"""Scores that have other names on the hub."""
FACTS = (
    "seed", "train.epochs", "train.max_steps", "train.batch_size", "train.learning_rate", "train.sampling",
    "train.class_weights", "adapter.r", "adapter.alpha", "adapter.target_modules",
)  # fmt: skip


@main_only
def write_card(folder: RunFolder, record: Record) -> None:
    """Writes the card as the README of the run's adapter folder."""
    write_atomically(folder.adapter / "README.md", card(record, folder.adapter))


def card(record: Record, adapter: Path) -> str:
    """The card of the adapter in the folder `adapter`, trained by the run of `record`."""
    model, dataset = record.model.name, record.dataset.name
    data = _metadata(record, (adapter / "adapter_config.json").exists())
    name, on = escape_markdown(model), escape_markdown(dataset)
    scores = [
        f"| {escape_markdown(title(score))} | {_shown(score, record.metrics.validation)} | "
        f"{_shown(score, record.metrics.test)} |"
        for score in dict.fromkeys((*record.metrics.test, *record.metrics.validation))
        if score != "best_epoch"
    ]
    counts = record.parameters
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n{MARKER}\n",
            f"# {escape_markdown(record.method)} of {name} on {on}\n",
            f"{METHODS[record.method].summary}, trained by "
            "[fvae-lora](https://pypi.org/project/fvae-lora) for the task "
            f"{escape_markdown(record.task)}: {quantity(counts.trainable)} trained parameters, of which "
            f"{quantity(counts.inference)} are needed at inference; the base model has {quantity(counts.total)}.\n",
            "## Results\n",
            "| score | validation | test |",
            "|---|---:|---:|",
            *scores,
            f"\nThe epoch was selected by validation {escape_markdown(record.metric.name)}. Validation: "
            f"{escape_markdown(record.dataset.validation_from)}. Test: {escape_markdown(record.dataset.test_from)}.\n",
            "## How to use it\n",
            f"```python\n{_example(record, adapter)}\n```\n",
            "## How it was trained\n",
            *_facts(record),
            "",
        ]
    )


def on_hub(name: Any) -> bool:
    """Whether a model or data set in a record's recipe is named as on the hub, from which others can fetch it."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)))


def _shown(score: str, scores: dict[str, float]) -> str:
    return f"{factor(score) * scores[score]:.2f}" if score in scores else ""


def _metadata(record: Record, is_adapter: bool) -> ModelCardData:
    model, dataset, task = record.recipe.get("model"), record.recipe.get("dataset"), PIPELINES.get(record.task)
    tags = ["fvae-lora", record.method] + ([f"base_model:adapter:{model}"] if is_adapter and on_hub(model) else [])
    results = [
        EvalResult(
            task_type=task or record.task,
            dataset_type=str(dataset) if on_hub(dataset) else record.dataset.name,
            dataset_name=record.dataset.name,
            dataset_split="test",
            metric_type=METRICS.get(score, score),
            metric_name=score.replace("_", " "),
            metric_value=value,
        )
        for score, value in record.metrics.test.items()
        if score != "loss"
    ]
    return ModelCardData(
        base_model=str(model) if on_hub(model) else None,
        datasets=[str(dataset)] if on_hub(dataset) else None,
        metrics=[METRICS.get(record.metric.name, record.metric.name)],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(tags)),
        model_name=f"{record.method}-{short_name(record.dataset.name).rpartition('/')[2]}",
        eval_results=results or None,
    )


def _facts(record: Record) -> list[str]:
    given = record.recipe
    flat = {f"{section}.{key}": v for section in ("train", "adapter") for key, v in given.get(section, {}).items()}
    values = {key: v for key in FACTS if (v := ({"seed": record.seed} | flat).get(key)) is not None}
    versions = ", ".join(f"{name} {record.versions[name]}" for name in ("fvae-lora", "peft") if name in record.versions)
    lines = [f"- `{key}`: {escape_markdown(printable(value))}" for key, value in values.items()]
    return [*lines, f"- versions: {escape_markdown(versions)}"]


def _example(record: Record, adapter: Path) -> str:
    """Example code that loads the adapter and, for images and texts, predicts with it."""
    config = adapter / "adapter_config.json"
    kind = json.loads(config.read_text(encoding="utf-8"))["peft_type"] if config.exists() else None
    task, labels = record.task, [str(name) for name in record.dataset.classes]
    auto, processor, end = EXAMPLES.get(task, EXAMPLES["commonsense"])
    recipe = record.recipe
    base = recipe.get("model") if on_hub(recipe.get("model")) else record.model.name
    options = {
        "image": "num_labels=len(labels), ignore_mismatched_sizes=True",
        "text": "num_labels=max(1, len(labels)), ignore_mismatched_sizes=True",
        "phonemes": "vocab_size=len(labels) + 1, pad_token_id=0, ignore_mismatched_sizes=True",
    }.get(task)
    if side := recipe.get("image", {}).get("size"):
        size = f', size={{"height": {side}, "width": {side}}}, do_center_crop=False'
        end = end.replace("(**inputs)", "(**inputs, interpolate_pos_encoding=True)").replace("(base)", f"(base{size})")
    if task == "text" and len(recipe.get("text", {}).get("columns") or ()) == 2:
        end = end.replace('"Your text."', '"Your text.", "Its other half."')
    if task == "text" and not labels:
        end = end.partition("print")[0].replace("logits.softmax(-1)[0]", "logits[0]") + "print(scores.item())\n"
    where = "" if on_hub(recipe.get("model")) else "  # the base model's folder"
    loads = (
        f"model = {auto}.from_pretrained(base, {f'{options}, ' if options else ''}dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(model, adapter).eval()\n"
        if kind
        else f"model = {auto}.from_pretrained(adapter, dtype=torch.float32).eval()\n"
    )
    imports = [
        "import fvae_lora  # registers FVAE-LoRA with peft" if kind == "FVAE_LORA" else "",
        "import torch",
        "from peft import PeftModel" if kind else "",
        "from PIL import Image" if task == "image" else "",
        f"from transformers import {', '.join(sorted(filter(None, (auto, processor))))}",
    ]
    names = [f"base = {json.dumps(base)}{where}", HERE, f"labels = {json.dumps(labels)}" if labels else ""]
    return "\n".join([*filter(None, imports), "", *filter(None, names), "", f"{loads}{end}".rstrip()])


EXAMPLES = {
    "image": (
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        """\
processor = AutoImageProcessor.from_pretrained(base)
image = Image.new("RGB", (224, 224))  # Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits.softmax(-1)[0]
print(labels[scores.argmax()], f"{scores.max():.3f}")
""",
    ),
    "text": (
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        """\
tokenizer = AutoTokenizer.from_pretrained(base)
inputs = tokenizer("Your text.", return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits.softmax(-1)[0]
print(labels[scores.argmax()], f"{scores.max():.3f}")
""",
    ),
    "commonsense": ("AutoModelForCausalLM", "", ""),
    "phonemes": ("AutoModelForCTC", "", ""),
    "transcription": ("AutoModelForSpeechSeq2Seq", "", ""),
}
"""For each task the classes of transformers that load the model and prepare its inputs, and code that predicts."""
