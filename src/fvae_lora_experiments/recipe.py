"""Recipes: YAML that is checked against a schema before anything starts; loading, extending, overriding, listing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml
from pydantic import ValidationError

from fvae_lora_experiments.errors import UserError, did_you_mean
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.schema import Recipe, Section

RECIPES_FOLDER = Path(str(files("fvae_lora_experiments"))) / "recipes"
STUDIES_FOLDER = RECIPES_FOLDER.with_name("studies")


@cache
def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: name (`image/default`) to text, which begins with the comment above it.

    A family is a file that maps names to recipes.
    """
    return _families(RECIPES_FOLDER)


@cache
def shipped_studies() -> dict[str, str]:
    """The studies that come with the package (`paper/images`, see `study`), named and written like recipes."""
    return _families(STUDIES_FOLDER)


def _families(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        family = yaml.compose(text, _Loader)
        assert isinstance(family, yaml.MappingNode)
        keys = [key for key, _ in family.value]
        comments = [_start_of_comment(lines, key.start_mark.line) for key in keys]
        for key, comment, end in zip(keys, comments, [*comments[1:], None], strict=True):
            line = key.start_mark.line
            body = dedent("".join(lines[line + 1 : end])).rstrip()
            found[f"{file.stem}/{key.value}"] = f"{''.join(lines[comment:line])}{body}\n"
    return found


def _start_of_comment(lines: Sequence[str], line: int) -> int:
    """The line on which the comment directly above a line begins; without a comment the line itself."""
    while line > 0 and lines[line - 1].startswith("#"):
        line -= 1
    return line


@dataclass(frozen=True)
class RecipeKey:
    """A dotted key of recipes: its default as YAML (None if it is required), what is allowed, what it means."""

    name: str
    default: str | None
    allowed: str
    meaning: str


def recipe_keys(section: type[Section] = Recipe, prefix: str = "") -> list[RecipeKey]:
    """Every key that a recipe may have, in the schema's order."""
    schema = section.model_json_schema()
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += recipe_keys(field.annotation, f"{prefix}{name}.")
        else:
            default = None if field.is_required() else as_yaml(field.default)
            meaning = re.sub(r"\b(None|True|False)\b", _yaml_constant, " ".join((field.description or "").split()))
            allowed = ", ".join(METHODS) if name == "method" else _allowed(schema["properties"][name])
            found.append(RecipeKey(f"{prefix}{name}", default, allowed, meaning))
    return found


def _yaml_constant(constant: re.Match[str]) -> str:
    return {"None": "null"}.get(constant[0], constant[0].lower())


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    kind = {"string": "text", "boolean": "true or false", "number": "number", "integer": "integer", "null": "null"}
    if schema["type"] == "array":
        count = f"{schema['minItems']} or more " if "minItems" in schema else ""
        count = f"{schema['minItems']} to {schema['maxItems']} " if "maxItems" in schema else count
        if "prefixItems" in schema:  # a tuple of fixed length
            return f"list of ({', '.join(map(_allowed, schema['prefixItems']))})"
        return f"list of {count}({_allowed(schema['items'])})"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema]
    return " ".join(filter(None, (kind[schema["type"]], " and ".join(limits))))


def as_yaml(value: Any) -> str:
    """A value as written in a recipe and on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def recipe_tree(name: str) -> dict[str, Any]:
    """The dotted keys and values of a recipe and those that it extends.

    Raises:
        UserError: there is no such recipe, or it is not YAML.
    """
    return flatten(_read(name))


def recipe_text(name: str) -> str:
    """The text of a shipped recipe, or of the file at that path.

    Raises:
        UserError: there is neither, or the file is not readable; the name is a study's.
    """
    if name in shipped_studies():
        raise UserError(
            f"recipe {name}: a study of several runs; expected one recipe; fvae-lora compare {name} runs it"
        )
    if name in shipped_recipes():
        return shipped_recipes()[name]
    if not Path(name).is_file():
        shipped = ", ".join(shipped_recipes()) + did_you_mean(name, shipped_recipes())
        raise UserError(f"recipe {name}: no such file, and no shipped recipe; shipped are {shipped}")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name}: not readable: {' '.join(str(error).split())}") from error


def load_recipe(name: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name or path, changed by `key=value` strings and by dotted `options`.

    With `extends:` a recipe names another (a shipped one, or a path relative to its own folder) and only holds what
    differs. A method's own defaults win over the recipe's sections. A recipe's `per_method` maps methods to dotted keys
    and wins over both; overrides win over all.

    Raises:
        UserError: an unknown key, a bad value, a key given twice, a recipe that does not exist or is not YAML.
    """
    tree = _read(name)
    per_method = tree.pop("per_method", None) or {}
    changes = _changes(overrides, options or {})
    method = changes.get("method", tree.get("method", Recipe.model_fields["method"].default))
    for known, settings in per_method.items():
        if known not in METHODS or not isinstance(settings, dict):
            allowed = ", ".join(METHODS)
            raise UserError(f"recipe {name}: per_method.{known}: expected keys and values below one of {allowed}")
    defaults = METHODS[method].defaults if method in METHODS else {}
    for key, value in (dict(defaults) | per_method.get(method, {}) | changes).items():
        _set(tree, key, value)
    return check_recipe(tree, f"recipe {name}")


class _Loader(yaml.SafeLoader):
    """The safe loader, except that it refuses a key given twice, of which it would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping in which no key is given twice."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for key in keys:
            if names.count(key.value) > 1:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """A YAML text by the safe loader; a key given twice is refused.

    Raises:
        YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)  # noqa: S506


def _changes(overrides: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    changes = dict(options)
    for override in overrides:
        key, value = parse_override(override)
        if twice := next((k for k in changes if f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}.")), None):
            other = f"by an option (--{key}, --vary, --grid)" if twice in options else f"as {twice}={changes[twice]}"
            raise UserError(f"{key}: given twice, as {override} and {other}; expected one of them")
        changes[key] = value
    return changes


def _read(name: str, inheriting: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe as a tree, merged into that of the recipe that it `extends`, if any."""
    if name in inheriting:
        raise UserError(f"recipe {inheriting[0]}: extends itself, by way of {name}")
    text = recipe_text(name)
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {name}: expected keys and values, for example `method: lora`")
    if (base := tree.pop("extends", None)) is None:
        return tree
    beside = str(base) if str(base) in shipped_recipes() else str(Path(name).parent / str(base))
    return _deep_merge(_read(beside, (*inheriting, name)), tree)


def _deep_merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = below.keys() & above.keys()
    nested = {k for k in both if isinstance(below[k], dict) and isinstance(above[k], dict)}
    return below | dict(above) | {key: _deep_merge(below[key], above[key]) for key in nested}


def check_recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    """`tree` as a recipe.

    Raises:
        UserError: names `where`, the first wrong key, and what is allowed there.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error
    if recipe.method not in METHODS:
        near = did_you_mean(recipe.method, METHODS)
        raise UserError(f"{where}: method: expected one of {', '.join(METHODS)}, got {recipe.method!r}{near}")
    return recipe


def change_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe, changed by `key=value` strings.

    Raises:
        UserError: as `load_recipe`.
    """
    if not overrides:
        return recipe
    tree = recipe.model_dump()
    for key, value in _changes(overrides, {}).items():
        _set(tree, key, value)
    return check_recipe(tree, "recipe")


def parse_override(text: str) -> tuple[str, Any]:
    """`train.epochs=3` as ("train.epochs", 3); the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text}: expected key=value, for example train.epochs=3")
    try:
        return key, load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {value!r} is not a YAML value") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise UserError(f"{key}: unknown key; {parent} has no keys below it")
        tree = branch
    tree[last] = value


def _key_path(loc: tuple[int | str, ...]) -> list[int | str]:
    """The keys in an error's location, without the types of a union that pydantic adds after them."""
    section: Any = Recipe
    kept: list[int | str] = []
    for part in loc:
        if isinstance(part, int) or (isinstance(section, type) and issubclass(section, Section)):
            kept.append(part)
            section = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
    return kept


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:  # of sections that do not go together; the message names the key
        return first["msg"]
    *parents, last = loc = _key_path(first["loc"])
    key = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for parent in parents:
            section = section.model_fields[parent].annotation
        near = did_you_mean(key, (known.name for known in recipe_keys()))
        return f"{key}: unknown key; allowed are {', '.join(section.model_fields)}{near}"
    if first["type"] == "missing":
        option = f" (or --{last})" if last in ("model", "dataset") else ""
        return f"{key}: missing; give {key}=...{option}"
    if first["type"] == "model_type":
        return f"{key}: expected keys and values below it, got {first['input']!r}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
