"""Which options of `predict` suit which run."""

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.predict.output import Output
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.schema import Recipe

DETECTOR = "foreign_inputs.json"
"""The file beside an adapter that says that there is a detector of foreign inputs."""

FOREIGN_TASKS = ("image", "text", "phonemes")
"""Those whose model reads what a row holds; the others' read what is written, too."""


def check_foreign(run: RunFolder, recipe: Recipe) -> None:
    """Refuses to tell foreign inputs where nothing can.

    Raises:
        UserError: another method, a task whose model reads what is written, too, or no detector beside the adapter.
    """
    refuse_without_detection(recipe, "--foreign")
    if not (run.adapter / DETECTOR).is_file():
        raise UserError(
            f"{run.path}: no detector of foreign inputs beside its adapter; fvae-lora inspect {run.path} --detector "
            "makes one"
        )


def refuse_without_detection(recipe: Recipe, option: str) -> None:
    """Raises `UserError` if a run of this recipe cannot have a detector; `option` is the one that asks for it."""
    if not METHODS[recipe.method].draws_z1:
        raise UserError(
            f"{option}: method {recipe.method} has no autoencoder that would know; of use for FVAE-LoRA only"
        )
    if recipe.task not in FOREIGN_TASKS:
        raise UserError(
            f"{option}: this run ({recipe.task}) reads what is written beside what it is given; allowed are runs of "
            f"{', '.join(FOREIGN_TASKS)}"
        )


def check_request(recipe: Recipe, output: Output, probabilities: bool, draws: int) -> None:
    """Refuses options that do not suit the run.

    Raises:
        UserError: probabilities of what is no class; draws of a method without a random latent; a table of
            probabilities whose columns would differ from row to row.
    """
    classes = recipe.task == "image" or (recipe.task == "text" and not recipe.text.is_regression)
    if probabilities and recipe.task == "commonsense" and output.is_csv:
        raise UserError("--probabilities: questions differ in their options; give --out FILE.jsonl")
    if probabilities and not classes and recipe.task != "commonsense":
        raise UserError(f"--probabilities: this run ({recipe.task}) does not tell classes apart")
    if draws and not METHODS[recipe.method].draws_z1:
        raise UserError(f"--draws: method {recipe.method} has no z1 to draw; of use for FVAE-LoRA only")
    if draws and not classes:
        raise UserError(f"--draws: the entropy is that of classes; this run ({recipe.task}) does not tell any apart")
