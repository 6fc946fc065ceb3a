"""What holds the house together: two layers, no import circle, public names, a fast command line, tests by subject."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fvae_lora

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
LONGEST = 600
METHOD, EXPERIMENTS = "fvae_lora", "fvae_lora_experiments"
MODULES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
HEAVY = ("torch", "transformers", "peft", "datasets", "sklearn", "scipy", "optuna", METHOD)


def imported(module: str) -> Iterator[str]:
    """The names that a module imports, at its top, inside functions and for the type checker alone."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dependencies(module: str) -> set[str]:
    """The modules of the project that a module imports."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imported(module)}
    return (found & MODULES.keys()) - {module}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: dependencies(module) for module in MODULES}
    while leaves := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other: {', '.join(sorted(graph))}"


def test_the_method_knows_nothing_of_the_experiments() -> None:
    method = [module for module in MODULES if module.partition(".")[0] == METHOD]
    assert {module: found for module in method if (found := _of(module, EXPERIMENTS))} == {}


def test_the_experiments_use_the_method_by_its_public_names() -> None:
    public = {METHOD, *(f"{METHOD}.{name}" for name in fvae_lora.__all__)}
    experiments = [module for module in MODULES if module.partition(".")[0] == EXPERIMENTS]
    assert {module: found for module in experiments if (found := _of(module, METHOD) - public)} == {}


def _of(module: str, package: str) -> set[str]:
    return {name for name in imported(module) if name.partition(".")[0] == package}


def test_the_command_line_waits_for_no_heavy_library() -> None:
    for needed in ("pydantic", "yaml", "PIL", "typer"):
        pytest.importorskip(needed, reason="the experiments are not installed")
    program = "import importlib, sys\n"
    for module in ("", ".cli", ".__main__", ".recipe", ".schema", ".methods", ".run.record"):
        name = f"{EXPERIMENTS}{module}"
        program += f"importlib.import_module({name!r}); print({name!r}, *sorted({set(HEAVY)!r} & sys.modules.keys()))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if " " in line] == []


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in fvae_lora.__all__:
        assert getattr(fvae_lora, name).__doc__, name


def test_a_file_of_tests_is_short_or_says_why_it_is_not() -> None:
    """The reason is a comment that begins with ``# Long: ``."""
    for file in sorted(TESTS.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST or "\n# Long: " in text, f"{file.name} has over {LONGEST} lines: split it"


def test_what_tests_share_stands_in_support() -> None:
    for folder in {file.parent for file in TESTS.rglob("test_*.py")}:
        loose = {file.name for file in folder.glob("*.py") if not file.match("test_*.py")} - {"conftest.py"}
        assert not loose, f"{folder.name}: {loose}"


def test_no_test_sleeps_or_borrows_from_another() -> None:
    names = {file.stem for file in TESTS.rglob("test_*.py")}
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="sleep")):
                    raise AssertionError(f"{file.name}, line {node.lineno}: wait for what is to happen")
                case ast.ImportFrom(module=str(module)) if module in names:
                    raise AssertionError(f"{file.name}, line {node.lineno}: what two files need stands in support")
