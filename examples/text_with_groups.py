"""Texts in groups, through a recipe: each group is scored by itself, and the worst one selects the epoch.

``python examples/text_with_groups.py TABLE`` does so for a table of your own (CSV, JSON lines or parquet) with the
columns ``text``, ``label`` and ``group``. It needs ``fvae-lora[experiments]``, downloads the pretrained model
(``--model``, 90 MB for the default), and takes minutes for some thousand rows on two cores. ``--tiny`` makes a small
model and its table on the spot instead, without a network. ``fvae-lora report`` reads the runs.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.runner import run_recipe

GROUPED = ["data.group_column=group", "data.select_by=worst_group_accuracy"]
WORDS = {"film": ["film", "plot", "cast"], "phone": ["phone", "screen", "price"]}
ROWS = {("film", "good"): 120, ("film", "bad"): 40, ("phone", "good"): 40, ("phone", "bad"): 120}
COMMON = ["the", "a", "is", "was", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_table(file: Path) -> Path:
    """Reviews of films and of phones; most good ones are of films."""
    draw = random.Random(0)
    with file.open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["text", "label", "group"])
        for about, word, rows in (
            ("film", "good", 60),
            ("film", "bad", 20),
            ("phone", "good", 20),
            ("phone", "bad", 60),
        ):
            for _ in range(rows):
                words = [word, *draw.choices(COMMON + WORDS[about], k=draw.randint(3, 8))]
                draw.shuffle(words)
                table.writerow([" ".join(words), word, about])
    return file


def make_model(folder: Path) -> Path:
    """A small BERT that was never trained, and its tokenizer."""
    vocabulary = [*SPECIAL, "good", "bad", *COMMON, *WORDS["film"], *WORDS["phone"]]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, **sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=40, **names).save_pretrained(folder)
    return folder


def train(table: str, model: str, out: Path, overrides: list[str]) -> None:
    for method in ("fvae-lora", "lora"):
        options = {"method": method, "model": model, "dataset": table}
        recipe = load_recipe("text/default", [*GROUPED, *overrides], options)
        record = run_recipe(recipe, out / method, quiet=True)
        print(f"{method}, epoch {record.metrics.validation['best_epoch']}")
        for score, value in record.metrics.test.items():
            print(f"  {score}: {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", help="rows with text, label and group")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="name on the hub or folder")
    parser.add_argument("--out", type=Path, default=Path("runs/example-groups"))
    parser.add_argument("--tiny", action="store_true", help="a small model and a table made on the spot")
    given = parser.parse_args()
    silence_libraries()
    if given.tiny:
        with tempfile.TemporaryDirectory() as scratch:
            set_seed(0)
            table, model = make_table(Path(scratch, "reviews.csv")), make_model(Path(scratch, "model"))
            tiny = [
                "text.max_length=32",
                "train.epochs=15",
                "train.batch_size=16",
                "train.learning_rate=1e-2",
                "adapter.r=4",
            ]
            train(str(table), str(model), Path(scratch), tiny)
    elif given.table is None:
        parser.error("expected TABLE, or --tiny")
    else:
        train(given.table, given.model, given.out, [])


if __name__ == "__main__":
    main()
