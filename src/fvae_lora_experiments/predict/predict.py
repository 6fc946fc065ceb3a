"""The loop of predictions: rows in, predictions out, batch by batch, in constant memory."""

import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from fvae_lora import ForeignInputDetector
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.foreign import COLUMNS, foreign
from fvae_lora_experiments.predict.output import Output
from fvae_lora_experiments.predict.predictors import PREDICTORS, Predictor, Reader
from fvae_lora_experiments.predict.rows import Row
from fvae_lora_experiments.predict.trained import Trained
from fvae_lora_experiments.run.timing import is_terminal


@torch.no_grad()
def predict(
    trained: Trained,
    rows: Iterator[Row],
    output: Output,
    probabilities: bool = False,
    draws: int = 0,
    detector: ForeignInputDetector | None = None,
    batch_size: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> tuple[int, int]:
    """Predicts every row that is not in the output already.

    Args:
        trained: the run.
        rows: what to predict.
        output: where to write.
        probabilities: whether to give every class's probability.
        draws: number of draws of z1 for the entropy; 0 for no entropy.
        detector: gives each row a score of how foreign it is, and a p-value; None gives none.
        batch_size: rows of a batch; None takes the recipe's.
        on_error: whether to stop at a row that cannot be used, or to report it on standard error and leave it out.

    Returns:
        How many rows were predicted, and how many left out.

    Raises:
        UserError: a row that cannot be used; the rows before it have been written.
    """
    torch.manual_seed(trained.recipe.seed)
    predictor = PREDICTORS[trained.recipe.task](trained, probabilities, draws)
    output.open([*predictor.columns, *(COLUMNS if detector else ())])
    done = left_out = 0
    bar = tqdm(unit="row", desc="predicting", disable=not is_terminal(), leave=False)
    try:
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch in _batches(output.not_done(rows), batch_size or trained.recipe.train.batch_size):
                prepared = list(pool.map(_prepared, itertools.repeat(predictor), batch))
                stops = [item for item in prepared if isinstance(item, UserError)]
                if stops and on_error == "stop":
                    prepared = prepared[: prepared.index(stops[0])]
                pairs = zip(batch, prepared, strict=False)
                usable = [(row, item) for row, item in pairs if not isinstance(item, UserError)]
                if usable:
                    items = [item for _, item in usable]
                    found = predictor.predict(items)
                    if detector is not None and isinstance(predictor, Reader):
                        batch_of_rows = predictor.on_device(predictor.batch(items))
                        for prediction, more in zip(found, foreign(detector, trained, batch_of_rows), strict=True):
                            prediction |= more
                    for (row, _), prediction in zip(usable, found, strict=True):
                        output.write(row, prediction)
                    output.flush()
                if stops and on_error == "stop":
                    raise stops[0]
                for problem in stops:
                    bar.write(f"fvae-lora: left out: {problem}", file=sys.stderr)
                done, left_out = done + len(usable), left_out + len(stops)
                bar.update(len(batch))
    finally:
        output.close()
    return done, left_out


def _prepared(predictor: Predictor, row: Row) -> Any:
    """What the predictor takes, or why the row cannot be used."""
    try:
        return predictor.usable(row)
    except UserError as error:
        return error


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Rows in batches; those before an error are a batch, too."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
