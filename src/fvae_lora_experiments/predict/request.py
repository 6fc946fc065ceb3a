"""Which options of `predict` suit which run."""

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.predict.output import Output
from fvae_lora_experiments.schema import Recipe


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
