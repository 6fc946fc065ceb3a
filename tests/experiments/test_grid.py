"""A grid: the same for every method, chosen on validation, and never on a seed of the results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.report import summary_rows
from fvae_lora_experiments.run import runner
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.sweep.grid import Choice, Grid, print_choices
from fvae_lora_experiments.sweep.plan import PlannedRun, contenders, parse_values, runs_of

Cli = Callable[..., tuple[int, str, str]]
PLACES = {"model": "vit-fashion-mnist", "dataset": "sklearn-digits"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that sweeps start, which do their runs in this process."""
    names: list[str] = []

    def sweep(runs: Sequence[PlannedRun], *_: Any, **__: Any) -> list[str]:
        failures = []
        for run in runs:
            if not run.is_done():
                names.append(run.name)
                try:
                    runner.run_recipe(run.recipe, run.folder.path, quiet=True)
                except RunError as error:
                    failures.append(str(error))
        return failures

    monkeypatch.setattr("fvae_lora_experiments.sweep.run_sweep.run_sweep", sweep)
    return names


def grid_at(out: Path, *grid: str, methods: Sequence[str] = ("lora",), selection: Sequence[int] = (0,)) -> Grid:
    compared = contenders("image/default", out, methods, options=PLACES)
    return Grid(compared, parse_values("--grid", grid), selection, [1])


def scored(run: PlannedRun, metric: dict[str, Any] | None = None, **validation: float) -> None:
    """Leaves the record of such a run, `failed` without a score."""
    run.folder.path.mkdir(parents=True)
    changes: dict[str, Any] = {"state": "failed", "reason": "the loss is nan at step 3"}
    if validation:
        changes = {"state": "complete", "metrics": {"validation": validation}} | ({"metric": metric} if metric else {})
    run.folder.write(Record.model_validate(run.folder.initial_record(run.recipe).contents() | changes))


def told(choice: Choice, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_choices([choice], console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_long_name_is_told_whole_on_80_columns(tmp_path: Path) -> None:
    name = "clipart-backgrounds/fvae-lora-reference"
    for seed, rate in enumerate((0.001, 0.01)):
        scored(grid_at(tmp_path, "train.learning_rate=1e-3,1e-2").runs()[seed], accuracy=rate)
    (choice,) = grid_at(tmp_path, "train.learning_rate=1e-3,1e-2").choices()
    lines = told(replace(choice, name=name), width=80).splitlines()
    assert "".join(line.split("  ")[0] for line in lines[1:]).startswith(name)


def test_every_method_gets_every_point_on_every_selection_seed(tmp_path: Path) -> None:
    runs = grid_at(
        tmp_path,
        "train.learning_rate=3e-4,1e-3",
        "train.weight_decay=[0,0.1]",
        methods=["lora", "linear-probe"],
        selection=[7, 8],
    ).runs()
    assert sorted(run.name for run in runs) == sorted(
        f"selection/{method}-learning_rate={rate}-weight_decay={decay}-seed{seed}"
        for method in ("lora", "linear-probe")
        for rate in (0.0003, 0.001)
        for decay in (0.0, 0.1)
        for seed in (7, 8)
    )
    for run in runs:
        assert run.recipe.purpose == "selection"
        assert f"learning_rate={run.recipe.train.learning_rate}-" in run.name
        assert run.folder.path == tmp_path / run.name


def test_a_grid_wins_over_the_rate_that_a_recipe_has_for_a_method(tmp_path: Path) -> None:
    (run,) = grid_at(tmp_path, "train.learning_rate=0.25", methods=["full"]).runs()
    assert run.recipe.train.learning_rate == 0.25


def test_the_point_with_the_best_mean_validation_score_is_chosen(tmp_path: Path) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.1,0.2,0.3", selection=[7, 8])
    scores = {(0.1, 7): 0.9, (0.1, 8): 0.1, (0.2, 7): 0.6, (0.2, 8): 0.7, (0.3, 7): 0.5, (0.3, 8): 0.5}
    for run in grid.runs():
        scored(run, accuracy=scores[run.recipe.train.learning_rate, run.recipe.seed])
    (choice,) = grid.choices()
    assert choice.best is not None
    assert choice.best.contender.recipe.train.learning_rate == 0.2
    assert choice.best.score == pytest.approx(0.65)
    assert choice.remarks() == []
    assert "learning_rate=0.2" in told(choice)
    assert "accuracy 0.6500" in told(choice)


def test_a_metric_of_which_less_is_better_is_minimised(tmp_path: Path) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.1,0.2,0.3")
    metric = {"name": "wer", "greater_is_better": False}
    for run, wer in zip(grid.runs(), (0.5, 0.2, 0.4), strict=True):
        scored(run, metric, wer=wer)
    (choice,) = grid.choices()
    assert "learning_rate=0.2" in told(choice)
    assert "wer 0.2000" in told(choice)


def test_of_equal_points_the_first_is_chosen_and_the_others_are_named(tmp_path: Path) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.3,0.2,0.1,0.4")
    for run, accuracy in zip(grid.runs(), (0.1, 0.5, 0.5, 0.2), strict=True):
        scored(run, accuracy=accuracy)
    (choice,) = grid.choices()
    assert choice.values(choice.best) == "learning_rate=0.2"  # type: ignore[arg-type]
    assert choice.remarks() == ["the first of several equal ones, with learning_rate=0.1"]


@pytest.mark.parametrize(("accuracies", "edge"), [((0.9, 0.5, 0.4), True), ((0.5, 0.9, 0.4), False)])
def test_a_best_point_on_the_edge_is_a_warning(
    tmp_path: Path, accuracies: tuple[float, float, float], edge: bool
) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.1,0.2,0.3", "train.schedule=[linear]")
    for run, accuracy in zip(grid.runs(), accuracies, strict=True):
        scored(run, accuracy=accuracy)
    (choice,) = grid.choices()
    assert choice.remarks() == (["best learning_rate on the grid's edge: widen it"] if edge else [])


def test_of_equal_points_one_with_results_is_chosen_again_and_they_are_not_run_anew(tmp_path: Path) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.1,0.2,0.3")
    for run, accuracy in zip(grid.runs(), (0.5, 0.5, 0.4), strict=True):
        scored(run, accuracy=accuracy)
    assert grid.choices()[0].best == grid.choices()[0].tried[0]
    (_, second, _) = grid.choices()[0].tried
    scored(second.contender.run(1), accuracy=0.9)
    (choice,) = grid.choices()
    assert choice.values(choice.best) == "learning_rate=0.2"  # type: ignore[arg-type]
    assert choice.remarks()[0] == "of several equal ones the one with results, with learning_rate=0.1"


@pytest.mark.parametrize(
    ("values", "accuracies", "edge"),
    [
        ("train.learning_rate=0.1,0.2", (0.9, 0.5), True),
        ("train.learning_rate=0.2,0.1", (0.9, 0.5), True),
        ("train.learning_rate=0.3,0.1,0.2", (0.5, 0.6, 0.9), False),
        ("train.learning_rate=0.1", (0.9,), False),
        ("fvae.elbo_stop_gradient=true,false", (0.9, 0.5), False),
    ],
    ids=["two values", "two values, the larger first", "inside", "one value", "no numbers"],
)
def test_the_terminal_and_the_report_warn_alike_of_an_edge(
    tmp_path: Path, values: str, accuracies: Sequence[float], edge: bool
) -> None:
    grid = grid_at(tmp_path, values)
    for run, accuracy in zip(grid.runs(), accuracies, strict=True):
        scored(run, accuracy=accuracy)
    (choice,) = grid.choices()
    (row,) = (row for row in summary_rows(tmp_path) if row.chosen)
    key = values.partition("=")[0]
    assert choice.remarks() == ([f"best {key.rpartition('.')[2]} on the grid's edge: widen it"] if edge else [])
    assert row.edge == ((key,) if edge else ())


def test_a_failed_point_is_named_and_never_chosen(tmp_path: Path) -> None:
    grid = grid_at(tmp_path, "train.learning_rate=0.1,0.2,0.3", selection=[7, 8])
    for run in grid.runs():
        if (run.recipe.train.learning_rate, run.recipe.seed) == (0.3, 8):
            scored(run)
        else:
            scored(run, accuracy=run.recipe.train.learning_rate)
    (choice,) = grid.choices()
    assert choice.values(choice.best) == "learning_rate=0.2"  # type: ignore[arg-type]
    assert choice.remarks() == ["failed: learning_rate=0.3"]


def test_data_sets_and_recipes_have_folders_of_their_own(tmp_path: Path) -> None:
    def names(recipe: str, dataset: str | None = None) -> list[str]:
        options = {"model": "vit-fashion-mnist"} | ({"dataset": dataset} if dataset else {})
        return [run.name for run in runs_of(contenders(recipe, tmp_path, ["lora"], options=options), [1])]

    assert names("image/dtd") == ["lora-seed1"]
    assert names("image/dtd,image/eurosat") == ["dtd/lora-seed1", "eurosat/lora-seed1"]
    assert names("image/default", "tanganke/dtd,sklearn-digits") == ["dtd/lora-seed1", "sklearn-digits/lora-seed1"]
    assert names("image/default,image/reference", "tanganke/dtd,sklearn-digits") == [
        "default-dtd/lora-seed1",
        "default-sklearn-digits/lora-seed1",
        "reference-dtd/lora-seed1",
        "reference-sklearn-digits/lora-seed1",
    ]
    (tmp_path / "one, two").mkdir()
    assert names("image/default", str(tmp_path / "one, two")) == ["lora-seed1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "train.rate=1,2"], "recipe image/demo: train.rate: unknown key; allowed are epochs"),
        (["--grid", "train=1,2"], "recipe image/demo: train: expected keys and values below it, got 1"),
        (["--grid", "train={}"], "recipe image/demo: train: expected one of the keys below it"),
        (["--grid", "train.learning_rate=1,-2"], "train.learning_rate: input should be greater than 0, got -2"),
        (["--grid", "train.learning_rate="], "--grid train.learning_rate: expected values separated by commas"),
        (["--grid", "train.learning_rate=[]"], "--grid train.learning_rate: expected values, for example"),
        (["--grid", "train.learning_rate"], "expected key=value"),
        (["--grid", "seed=1,2"], "--grid seed: cannot be varied here; use --seeds"),
        (["--vary", "fvae.encoder_hidden_dims=[]"], "--vary fvae.encoder_hidden_dims: expected values"),
        (["--vary", "fvae.encoder_hidden_dims=[]"], "[[]] is an empty list as a value"),
        (["--grid", "adapter.r=1", "--grid", "adapter.r=2"], "--grid adapter.r: given twice"),
        (["--grid", "adapter.r=1", "--vary", "adapter.r=2"], "--grid adapter.r: also given in --vary"),
        (["--grid", "train.learning_rate=1e-3,0.001"], "selection/lora-learning_rate=0.001-seed0 is requested twice"),
        (["--grid", "adapter.r=1", "--selection-seeds", "3,1"], "--selection-seeds: 1 is also in --seeds"),
        (["--grid", "adapter.r=1", "--selection-seeds", "3,3"], "selection/lora-r=1-seed3 is requested twice"),
        (["--grid", "adapter.r=1", "--seeds", "-1"], "seed: input should be greater than or equal to 0, got -1"),
        (["--selection-seeds", "3"], "--selection-seeds: only with --grid"),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_line(
    cli: Cli, started: list[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, _, error = cli("compare", "image/demo", "--methods", "lora", *arguments, "--out", tmp_path / "runs")
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "runs").exists()
    assert started == []


def test_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtd/lora-seed1 is requested twice"):
        runs_of(contenders("image/dtd,image/dtd", tmp_path, ["lora"]), [1])


def test_results_are_run_at_the_chosen_point_with_fresh_seeds(
    cli: Cli, small: list[str], started: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    compare = ("compare", "image/default", *small, "--methods", "lora,linear-probe", "--seeds", "1,2", "--out", out)
    code, said, error = cli(*compare, "train.max_grad_norm=0", "--grid", "train.learning_rate=1e-5,1e-2,1e30")
    assert code == 0, error
    assert "failed: learning_rate=1e+30" in said
    chosen = {}
    for method in ("lora", "linear-probe"):
        tried = {
            rate: json.loads((out / "selection" / f"{method}-learning_rate={rate}-seed0" / "run.json").read_text())
            for rate in ("1e-05", "0.01")
        }
        assert all("test" not in record["metrics"] for record in tried.values())
        chosen[method] = max(tried, key=lambda rate: tried[rate]["metrics"]["validation"]["accuracy"])
        for seed in (1, 2):
            result = json.loads((out / f"{method}-learning_rate={chosen[method]}-seed{seed}" / "run.json").read_text())
            assert (result["recipe"]["purpose"], result["state"]) == ("result", "complete")
            assert "accuracy" in result["metrics"]["test"]
    assert len(list(out.glob("*/run.json"))) == 4

    # what is done is not done again, nor what diverged; a wider grid adds its points alone
    started.clear()
    again = cli(*compare, "train.max_grad_norm=0", "--grid", "train.learning_rate=1e-5,1e-2,1e30")
    assert (again[0], started) == (0, [])
    cli(*compare, "train.max_grad_norm=0", "--grid", "train.learning_rate=1e-5,1e-2,3e-2", "--methods", "lora")
    assert started[0] == "selection/lora-learning_rate=0.03-seed0"
    assert all(name.startswith("lora-learning_rate=0.03-seed") for name in started[1:])


def test_a_method_that_fails_everywhere_has_no_result_and_does_not_block_the_others(
    cli: Cli, small: list[str], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner.run_recipe

    def failing(recipe: Any, path: Path, quiet: bool) -> Any:
        if recipe.method == "lora":
            raise RunError("it does not work")
        return run(recipe, path, quiet)

    monkeypatch.setattr(runner, "run_recipe", failing)
    out = tmp_path / "runs"
    compare = ("compare", "image/default", *small, "--methods", "lora,linear-probe", "--seeds", "1", "--out", out)
    code, _, error = cli(*compare, "--grid", "train.learning_rate=1e-3,1e-2")
    assert (code, error) == (1, "fvae-lora: lora: failed at every point of the grid, so there is no result\n")
    assert [name.partition("-learning_rate")[0] for name in started if "/" not in name] == ["linear-probe"]


def test_a_point_that_failed_by_accident_is_told_and_tried_again(
    cli: Cli, small: list[str], started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner.run_recipe

    def failing(recipe: Any, path: Path, quiet: bool) -> Any:
        if recipe.train.learning_rate == 1e-2:
            raise RunError("the disk is full")
        return run(recipe, path, quiet)

    out = tmp_path / "runs"
    compare = ("compare", "image/default", *small, "--methods", "linear-probe", "--seeds", "1", "--out", out)
    point = "selection/linear-probe-learning_rate=0.01-seed0"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_recipe", failing)
        code, said, error = cli(*compare, "--grid", "train.learning_rate=1e-3,1e-2")
    assert (code, error) == (
        1, f"fvae-lora: 1 runs of the grid failed; the same command tries them again; the first: {point}\n"
    )  # fmt: skip
    assert "failed: learning_rate=0.01" in said
    started.clear()
    assert cli(*compare, "--grid", "train.learning_rate=1e-3,1e-2")[0] == 0
    assert started[0] == point
