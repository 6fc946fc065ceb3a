"""Detection of inputs unlike those of training by finished runs: one record for each run, kind of input and detector.

    python benchmarks/detection.py runs/uncertainty --lab lab --out studies/uncertainty/detection.jsonl.gz
    python benchmarks/detection.py --sets lab    # makes the data sets openclipart-15 and elpv-mono in lab

What a run gives is kept in its folder, so that the command may be repeated while further runs are trained. Detectors
are fitted on the training rows; the test's rows are compared with foreign ones; the validation rows (which chose the
epoch as well) calibrate p-values. Distances between rows are shrunk as in `fvae_lora.ForeignInputDetector`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from scipy.linalg import solve_triangular
from scipy.ndimage import gaussian_filter
from scipy.special import logsumexp, softmax
from sklearn.covariance import oas
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler, normalize

from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.recipe import change_recipe
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.tasks import load_task
from readings import Run, finished_runs, joined, open_run, read, rounded, token_gaussians
from records import write_lines

Item = dict[str, Any]
Change = Callable[[Item, np.random.Generator], Item]
Scores = dict[str, np.ndarray]
"""How foreign each row is, by the name of its set; higher is more foreign."""

KEPT = "detection.json"
MOST = 300
"""Rows of each foreign set at most."""
MOST_TESTED = 500
STRENGTHS = {"weak": 1, "medium": 2, "strong": 4}
NOISE = 0.1
"""The weak noise's standard deviation, of the range of the pixels."""
BLUR = 0.02
"""The weak blur's standard deviation, of the image's side."""
NEIGHBOURS = 10


@dataclass(frozen=True)
class Other:
    """Rows of another data set of the lab: all, or those of which a column has one of the values."""

    kind: str
    dataset: str
    column: str | None = None
    values: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)


UNSEEN = ("mammals", "desserts", "music", "flags", "roadsigns")
"""The classes of openclipart-20 that openclipart-15 is without: every fourth."""

EVERY_SPLIT = ("train", "validation", "test")
OTHERS = {
    "sklearn-digits": [Other("drawings (openclipart-20)", "openclipart-20")],
    "hutto-sentiment": [
        Other("product reviews", "hutto-domains", "domain", ("amazon",), EVERY_SPLIT),
        Other("mail (spam-assassin)", "spam-assassin"),
    ],
    "spam-assassin": [Other("film reviews (hutto-sentiment)", "hutto-sentiment")],
    "openclipart-20": [Other("solar cells (elpv)", "elpv")],
    "openclipart-15": [
        Other("unseen classes", "openclipart-20", "label", UNSEEN, EVERY_SPLIT),
        Other("solar cells (elpv)", "elpv"),
    ],
    "elpv": [Other("drawings (openclipart-20)", "openclipart-20")],
    "elpv-mono": [
        Other("poly cells", "elpv", "cell", ("poly",), EVERY_SPLIT),
        Other("drawings (openclipart-20)", "openclipart-20"),
    ],
}
"""The foreign sets of each data set that come from another one, near ones first."""


class Changed(torch.utils.data.Dataset[dict[str, Any]]):
    """Items, each changed with a generator of its own."""

    def __init__(self, items: Any, change: Change):
        self.items, self.change = items, change

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.change(self.items[index], np.random.default_rng(index))


def noisy(item: Item, generator: np.random.Generator, share: float) -> Item:
    """An image with normal noise, within its range."""
    pixels = item["pixel_values"]
    low, high = pixels.min(), pixels.max()
    noise = torch.from_numpy(generator.standard_normal(pixels.shape, dtype=np.float32))
    return item | {"pixel_values": (pixels + share * (high - low) * noise).clamp(low, high)}


def blurred(item: Item, _: np.random.Generator, share: float) -> Item:
    """An image, blurred."""
    pixels = item["pixel_values"]
    sigma = share * pixels.shape[-1]
    return item | {"pixel_values": torch.from_numpy(gaussian_filter(pixels.numpy(), (0, sigma, sigma)))}


def with_pixels_shuffled(item: Item, generator: np.random.Generator) -> Item:
    """An image with its pixels in another order."""
    pixels = item["pixel_values"].flatten(1)
    order = torch.from_numpy(generator.permutation(pixels.shape[-1]))
    return item | {"pixel_values": pixels[:, order].reshape(item["pixel_values"].shape)}


def with_words_shuffled(item: Item, generator: np.random.Generator, tokenizer: Any) -> Item:
    """A text with its words in another order, between its first and its last token."""
    first, *inner, last = item["input_ids"]
    words: list[list[int]] = []
    for number, token in zip(inner, tokenizer.convert_ids_to_tokens(inner), strict=True):
        if words and token.startswith("##"):
            words[-1].append(number)
        else:
            words.append([number])
    order = generator.permutation(len(words))
    return item | {"input_ids": [first, *(number for place in order for number in words[place]), last]}


CHANGES: dict[str, Change] = {
    **{f"noise, {name}": partial(noisy, share=NOISE * factor) for name, factor in STRENGTHS.items()},
    **{f"blur, {name}": partial(blurred, share=BLUR * factor) for name, factor in STRENGTHS.items()},
    "pixels shuffled": with_pixels_shuffled,
}
"""What is done to images; to texts `with_words_shuffled`."""


def drawn(rows: Dataset, most: int) -> Dataset:
    """At most so many rows, in their order."""
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.select(sorted(order[:most].tolist()))


def other_rows(run: Run, other: Other, lab: Path) -> Dataset:
    """Rows of another data set, as the run's task opens them."""
    group = [] if other.column in (None, "label") else [f"data.group_column={other.column}"]
    recipe = change_recipe(run.recipe, [f"dataset={lab / other.dataset}", *group])
    official = load_task(recipe).open_source()
    rows = datasets.concatenate_datasets([official[split] for split in other.splits])
    if other.column is not None:
        column = "group" if group else "label"
        feature = rows.features[column]
        wanted = [feature.str2int(value) for value in other.values]
        rows = rows.select(np.flatnonzero(np.isin(rows[column][:], wanted)))
    return drawn(rows, MOST)


def sets_of(run: Run, lab: Path) -> dict[str, Any]:
    """Items by the name of their set: training, validation, test, and each foreign kind."""
    tested = drawn(run.splits.test, MOST_TESTED)
    parts = run.items(Splits(run.splits.train, run.splits.validation, tested, "", ""))
    found = {"training": parts["train"], "held out": parts["validation"], "tested": parts["test"]}

    def prepared(rows: Dataset) -> Any:
        return run.items(Splits(rows, rows, rows, "", ""))["test"]

    for other in OTHERS[run.record.dataset.name]:
        found[other.kind] = prepared(other_rows(run, other, lab))
    reordered = partial(with_words_shuffled, tokenizer=run.processor)
    changes = {"words shuffled": reordered} if run.recipe.task == "text" else CHANGES
    clean = prepared(drawn(run.splits.test, MOST))
    return found | {kind: Changed(clean, change) for kind, change in changes.items()}


def distances(features: Mapping[str, np.ndarray]) -> Scores:
    """Squared Mahalanobis distances from the training rows, with their correlations shrunk towards none."""
    scaler = StandardScaler().fit(features["training"].astype(np.float64))
    scaled = {name: scaler.transform(of_set.astype(np.float64)) for name, of_set in features.items()}
    covariance, _ = oas(scaled["training"], assume_centered=True)
    factor = np.linalg.cholesky(covariance)
    return {name: np.square(solve_triangular(factor, x.T, lower=True)).sum(0) for name, x in scaled.items()}


def to_neighbours(features: Mapping[str, np.ndarray]) -> Scores:
    """Distances to the 10th nearest training row, of normalised features (Sun et al. 2022)."""
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(normalize(features["training"]))
    return {name: nearest.kneighbors(normalize(of_set))[0][:, -1] for name, of_set in features.items()}


def standardised(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features in standard deviations from the training rows' mean."""
    scaler = StandardScaler().fit(features["training"])
    return {name: scaler.transform(of_set) for name, of_set in features.items()}


def both(first: Scores, second: Scores) -> Scores:
    """The sum of two distances' logarithms, each in standard deviations of the held-out rows."""
    total = {name: np.zeros(len(scores)) for name, scores in first.items()}
    for scores in (first, second):
        known = np.log(scores["held out"])
        for name in total:
            total[name] = total[name] + (np.log(scores[name]) - known.mean()) / known.std()
    return total


def plain(items: Any, tokenizer: Any) -> np.ndarray:
    """What needs no model, (rows, features).

    Of texts: tokens, pieces within words as a share of the tokens, and unknown tokens as a share. Of images: the
    pixels' mean and standard deviation, and the mean difference of neighbours.
    """
    return np.array([_plain_text(item, tokenizer) if tokenizer else _plain_image(item) for item in items])


def _plain_text(item: Mapping[str, Any], tokenizer: Any) -> list[float]:
    tokens = tokenizer.convert_ids_to_tokens(item["input_ids"])
    within = sum(token.startswith("##") for token in tokens)
    return [len(tokens), within / len(tokens), tokens.count(tokenizer.unk_token) / len(tokens)]


def _plain_image(item: Mapping[str, Any]) -> list[float]:
    pixels = item["pixel_values"]
    return [pixels.mean().item(), pixels.std().item(), pixels.diff(dim=-1).abs().mean().item()]


def detectors(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Scores]:
    """Every detector's scores of what `read` found in each set."""

    def of(*terms: str) -> dict[str, np.ndarray]:
        return {name: joined([of_set[term] for term in terms]) for name, of_set in found.items()}

    logits, inputs = of("logits"), distances(of("inputs"))
    scores = {
        "1 - confidence": {name: 1 - softmax(x, -1).max(-1) for name, x in logits.items()},
        "energy": {name: -logsumexp(x, axis=-1) for name, x in logits.items()},
        "last state: neighbours": to_neighbours(of("state")),
        "last state: Mahalanobis": distances(of("state")),
        "layers' inputs: Mahalanobis": inputs,
        "layers' tokens: Mahalanobis": {name: x.mean(-1) for name, x in standardised(of("tokens")).items()},
    }
    if "log_likelihood" not in found["tested"]:
        return scores
    latents = ("z1_mean", "z2_mean")
    ratio = {name: of_set["log_likelihood"] - of_set["log_likelihood_z2"] for name, of_set in found.items()}
    z = standardised(of("log_likelihood"))
    two_sided = standardised(of("log_likelihood", "kl_z1"))
    shipped = {
        "detector: likelihood": distances(of("log_likelihood")),
        "detector: latents": distances(of(*latents)),
        "detector: both": distances(of("log_likelihood", *latents)),
    }
    leads = {
        "lead: likelihood, one-sided": {name: -x.mean(-1) for name, x in z.items()},
        "lead: likelihood and KL, two-sided": {name: np.abs(x).mean(-1) for name, x in two_sided.items()},
        "lead: each row's least likely token": distances(of("least")),
        "lead: likelihood's ratio to z2 alone": distances(ratio),
        "lead: all terms": distances(
            of("log_likelihood", "least", "log_likelihood_z1", "log_likelihood_z2", "kl_z1", "gamma", "w2", *latents)
        ),
        "lead: detector and layers' inputs": both(shipped["detector: both"], inputs),
    }
    return scores | shipped | leads


def judged(scores: Scores) -> Iterator[dict[str, Any]]:
    """How well scores tell the test's rows from each foreign kind."""
    tested, held_out = scores["tested"], np.sort(scores["held out"])
    limit = np.quantile(tested, 0.95, method="higher")
    p_values = (1 + len(held_out) - np.searchsorted(held_out, tested)) / (1 + len(held_out))
    for kind, foreign in scores.items():
        if kind in ("training", "held out", "tested"):
            continue
        truth = [0] * len(tested) + [1] * len(foreign)
        yield {
            "foreign": kind,
            "auroc": rounded(roc_auc_score(truth, np.concatenate([tested, foreign]))),
            "fpr95": rounded(float((foreign <= limit).mean())),
            "alarms": rounded(float((p_values <= 0.05).mean())),
        }


def measure(path: Path, lab: Path, known: dict[str, Scores]) -> list[dict[str, Any]]:
    """A run's records; `known` keeps the scores without a model of its data set for further runs."""
    run = open_run(path)
    data, sets = run.record.dataset.name, sets_of(run, lab)
    if data not in known:
        tokenizer = run.processor if run.recipe.task == "text" else None
        known[data] = distances({name: plain(items, tokenizer) for name, items in sets.items()})
    ready = run.ready(sets)
    gaussians = token_gaussians(run, ready["training"])
    scores = detectors({name: read(run, items, gaussians) for name, items in ready.items()})
    about = {"data": data, "method": run.method, "seed": run.recipe.seed}
    return [
        about | {"detector": name} | record
        for name, of_sets in ({"without a model": known[data]} | scores).items()
        for record in judged(of_sets)
    ]


def kept(path: Path, lab: Path, known: dict[str, Scores]) -> list[dict[str, Any]]:
    """A run's records, made once."""
    file = path / KEPT
    if not file.exists():
        write_atomically(file, json.dumps(measure(path, lab, known)))
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def make_sets(lab: Path) -> None:
    """Makes the data sets of which a part is held out in training."""
    _make_set(lab / "openclipart-20", lab / "openclipart-15", "label", without=UNSEEN)
    _make_set(lab / "elpv", lab / "elpv-mono", "cell", without=("poly",))


def _make_set(source: Path, target: Path, column: str, without: Sequence[str]) -> None:
    (target / "data").mkdir(parents=True)
    for split, rows in datasets.load_dataset(str(source)).items():
        names = rows.features[column].names
        left = [name for name in names if name not in without]
        if len(left) + len(without) != len(names):
            raise SystemExit(f"{source}: {column} must be one of {', '.join(names)}")
        kept_rows = rows.select(np.flatnonzero(np.isin(rows[column], [names.index(name) for name in left])))
        if column == "label":
            labels = [left.index(names[number]) for number in kept_rows["label"]]
            kept_rows = kept_rows.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=left))
        kept_rows.to_parquet(target / "data" / f"{split}-00000-of-00001.parquet")


def main() -> None:
    """Write the records, or make the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="a folder with finished runs at any depth")
    parser.add_argument("--lab", type=Path, default=Path("lab"), help="the folder of the lab's data sets")
    parser.add_argument("--sets", type=Path, help="make the data sets with a part held out in this folder")
    parser.add_argument("--out", type=Path, help="the file of records; without it they are only made and kept")
    arguments = parser.parse_args()
    silence_libraries()
    if arguments.sets is not None:
        make_sets(arguments.sets)
        return
    known: dict[str, Scores] = {}
    found = [record for path in finished_runs(arguments.runs) for record in kept(path, arguments.lab, known)]
    if arguments.out is not None:
        write_lines(arguments.out, found)


if __name__ == "__main__":
    main()
