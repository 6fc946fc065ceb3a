"""What each task reads of a row."""

from collections.abc import Sequence

from fvae_lora_experiments.data.image_decoding import readable_suffixes
from fvae_lora_experiments.data.images import IMAGE_COLUMNS
from fvae_lora_experiments.data.recordings import SOUNDS
from fvae_lora_experiments.data.texts import COLUMNS
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.rows import Wanted
from fvae_lora_experiments.schema import Recipe


def wanted_by(recipe: Recipe, columns: Sequence[str] = ()) -> Wanted:
    """What predictions of a recipe's run are made from: columns of the names that they had in training.

    Args:
        recipe: the run's.
        columns: names that they have instead, in their order.

    Raises:
        UserError: more or fewer columns than the task reads.
    """
    if recipe.task == "image":
        own = [recipe.data.image_column] if recipe.data.image_column else IMAGE_COLUMNS
        wanted = Wanted({"image": own}, readable_suffixes())
    elif recipe.task == "text":
        names = [[column] for column in recipe.text.columns or []] or [["sentence", "text"]]
        wanted = Wanted(dict(zip(COLUMNS, names, strict=False)))
    elif recipe.task == "commonsense":
        wanted = Wanted({})
    else:
        wanted = Wanted({"audio": ["audio"]}, SOUNDS)
    if columns and len(columns) != len(wanted.columns):
        reads = ", ".join(wanted.columns) or "whole rows"
        raise UserError(f"--column: given {len(columns)} times; this run reads {reads}")
    given = {what: [name] for what, name in zip(wanted.columns, columns, strict=False)}
    return Wanted(wanted.columns | given, wanted.files)
