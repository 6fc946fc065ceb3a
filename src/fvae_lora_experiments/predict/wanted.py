"""What each task reads from a row."""

from collections.abc import Sequence

from fvae_lora_experiments.data.image_decoding import readable_suffixes
from fvae_lora_experiments.data.images import IMAGE_COLUMNS
from fvae_lora_experiments.data.recordings import SOUNDS
from fvae_lora_experiments.data.texts import COLUMNS
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.rows import Wanted
from fvae_lora_experiments.schema import Recipe


def wanted_by(recipe: Recipe, columns: Sequence[str] = ()) -> Wanted:
    """What a recipe's run reads from a row; columns have the names that they had in training.

    Args:
        recipe: the run's.
        columns: other names for the columns, in the same order.

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
        inputs = ", ".join(wanted.columns)
        expected = f"expected one for each of {inputs}, got {len(columns)}" if inputs else "this run reads whole rows"
        raise UserError(f"--column: {expected}")
    given = {what: [name] for what, name in zip(wanted.columns, columns, strict=False)}
    return Wanted(wanted.columns | given, wanted.files)
