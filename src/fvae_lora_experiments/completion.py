"""What a shell offers for a word that has been begun: names of recipes, methods and keys."""

from collections.abc import Iterator

from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import recipe_keys, shipped_recipes, shipped_studies


def recipes(incomplete: str) -> Iterator[str]:
    """The shipped recipes; the shell itself offers files."""
    return (name for name in shipped_recipes() if name.startswith(incomplete))


def recipes_and_studies(incomplete: str) -> Iterator[str]:
    """The shipped recipes and studies."""
    return (name for name in (*shipped_recipes(), *shipped_studies()) if name.startswith(incomplete))


def methods(incomplete: str) -> Iterator[tuple[str, str]]:
    """The methods, and what each is."""
    return ((name, method.summary) for name, method in METHODS.items() if name.startswith(incomplete))


def methods_in_a_list(incomplete: str) -> Iterator[str]:
    """The methods that may come next in `lora,dora,...`."""
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return (f"{before}{comma}{name}" for name in METHODS if name.startswith(last) and name not in taken)


def keys(incomplete: str) -> Iterator[tuple[str, str]]:
    """The keys of recipes with what each means, the value still to be given."""
    return ((f"{key.name}=", key.meaning) for key in recipe_keys() if key.name.startswith(incomplete))
