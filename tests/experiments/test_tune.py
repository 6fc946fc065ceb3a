"""`fvae-lora tune`: what it leaves, what it refuses, and that a search goes on however it was stopped."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from arguments import assert_refused
from colours import write_pictures
from fvae_lora_experiments.errors import RunError
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.report import summary_rows, write_page
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tune import search
from fvae_lora_experiments.tune.outcome import Search, TrialResult, read_search
from fvae_lora_experiments.tune.show import write_page as write_searches
from fvae_lora_experiments.tune.space import search_space, starting_points
from fvae_lora_experiments.tune.study import Plan, StudyFolder
from sweeps import assert_same, left

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tune(small: list[str], cli: Cli, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """The command on tiny pictures, with two trials in `tmp_path/s`."""

    def run(*arguments: str | Path, exactly: bool = False) -> tuple[int, str, str]:
        usual = ["tune", "image/default", *(word for word in small if word != "adapter.r=4"), "train.epochs=1"]
        return cli(*usual, "--methods", "lora", "--trials", "2", "--out", tmp_path / "s", *arguments, exactly=exactly)

    return run


def found(out: Path, method: str = "lora") -> Search:
    return read_search(StudyFolder(out / method))


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in sorted(out.rglob("run.json"))}


def test_a_search_ends_with_a_recipe_that_train_takes_and_a_page(tune: Any, cli: Cli, tmp_path: Path) -> None:
    code, out, err = tune("--methods", "lora,fvae-lora", "--trials", "3")
    assert code == 0, err
    runs = records(tmp_path / "s")
    assert len(runs) == 6
    for run in runs.values():
        assert run["recipe"]["purpose"] == "selection"
        assert run["state"] == "complete"
        assert "test" not in run["metrics"]
        assert run["seed"] == 0
    assert "fvae-lora trial 3/3: accuracy " in out
    assert re.search(r"lora trial 1/3: accuracy .*, the best so far, ends \d\d:\d\d, in ", out)
    tables = out[out.index("The best on validation") :]
    assert max(len(line) for line in tables.splitlines() if not line.startswith("The ")) <= 80
    best = tmp_path / "s" / "best.yaml"
    for method in ("lora", "fvae-lora"):
        winner = max((t for t in found(tmp_path / "s", method).trials), key=lambda t: (t.score, -t.number))
        chosen = load_recipe(str(best), options={"method": method})
        assert chosen.train.learning_rate == winner.values["train.learning_rate"]
        assert chosen.adapter.r == winner.values["adapter.r"]
    code, _, err = cli("train", best, "--quiet", "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test"]
    page = (tmp_path / "s" / "tune.html").read_text()
    assert "<script" not in page
    assert not re.search("https?:", page)
    for word in ("lora", "train.learning_rate", "fvae.elbo_stop_gradient", "All 3 trials of fvae-lora"):
        assert word in page


@pytest.mark.slow
def test_the_same_command_does_only_what_is_missing(tune: Any, tmp_path: Path) -> None:
    assert tune()[0] == 0
    before = left(tmp_path / "s")
    assert "2 of 2 trials are done already" in tune()[1]
    code, out, _ = tune("--trials", "3")
    assert code == 0
    assert "lora trial 3/3" in out
    assert "lora trial 2/" not in out
    after = left(tmp_path / "s")
    assert_same(before, {name: after[name] for name in before})
    assert len(after) == 3


@pytest.mark.slow
def test_a_point_that_was_tried_is_not_run_again(tune: Any, tmp_path: Path) -> None:
    code, out, _ = tune("--methods", "fvae-lora", "--knobs", "fvae.elbo_stop_gradient", "--trials", "4")
    assert code == 0
    assert "the same point as trial " in out
    assert len(records(tmp_path / "s")) == 2
    scores = {bool(t.values["fvae.elbo_stop_gradient"]): t.score for t in found(tmp_path / "s", "fvae-lora").trials}
    assert all(
        scores[t.values["fvae.elbo_stop_gradient"]] == t.score for t in found(tmp_path / "s", "fvae-lora").trials
    )


REFUSED: list[tuple[Sequence[str], str]] = [
    (["--trials", "0"], "--trials 0: expected at least 1"),
    (
        ["--knobs", "fvae.kl_weight"],
        "--knobs fvae.kl_weight: lora does not have it; allowed are train.learning_rate, adapter.r, adapter.dropout",
    ),
    (["--knobs", "adapter.r", "adapter.r=4"], "--knobs adapter.r: its value is also given"),
    (["--methods", "linear-probe", "train.learning_rate=1e-3"], "linear-probe has none of the knobs"),
    (["--methods", "lroa"], "did you mean lora?"),
    (["seed=3"], "seed: set by the search; use --seed"),
    (["method=lora"], "method: set by the search; use --methods"),
    (["train.epochs=none"], "train.epochs"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_searched_is_refused_in_one_line(
    tune: Any, tmp_path: Path, arguments: Sequence[str], says: str
) -> None:
    assert_refused(tune(*arguments), says)
    assert not (tmp_path / "s").exists()


def test_optuna_that_is_not_installed_is_told_of(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_refused(tune(), "tune: Optuna is not installed; pip install 'fvae-lora[experiments,tune]'")


def test_another_search_s_folder_is_left_as_it_is(tune: Any, tmp_path: Path) -> None:
    assert tune("--trials", "1")[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    assert_refused(tune("train.epochs=3"), "holds the search of another recipe, train.epochs is 1 there and 3 here")
    assert_refused(tune("--seed", "5"), "holds a search with the seed 0, not 5")
    assert_refused(tune("--knobs", "adapter.r"), "adapter.dropout is 0 to 0.3 there and fixed here")
    assert_refused(tune("--methods", "dora", "train.epochs=3"), "another recipe, train.epochs is 1 there and 3 here")
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()} == before


def test_a_journal_that_is_not_one_is_refused_in_one_line(tune: Any, tmp_path: Path) -> None:
    assert tune("--trials", "1")[0] == 0
    for contents in ("nonsense\n", "{}\n", "[1, 2]\n", '{"op_code": 99, "worker_id": "a"}\n', ""):
        (tmp_path / "s" / "lora" / "journal.log").write_text(contents)
        assert_refused(tune(), "journal.log: not the journal of a search; nothing was changed")


@pytest.mark.parametrize("contents", ["{", "[]", '{"recipe": 1}', '{"recipe": {}, "knobs": {}, "seed": 0}'])
def test_a_plan_that_is_not_one_is_refused_in_one_line(tune: Any, tmp_path: Path, contents: str) -> None:
    (tmp_path / "s" / "lora").mkdir(parents=True)
    (tmp_path / "s" / "lora" / "study.json").write_text(contents)
    assert_refused(tune(), "study.json")


@pytest.mark.slow
def test_a_line_that_a_kill_cut_off_does_no_harm(tune: Any, tmp_path: Path) -> None:
    assert tune("--trials", "1")[0] == 0
    journal = tmp_path / "s" / "lora" / "journal.log"
    with journal.open("a") as file:
        file.write('{"op_code":4,"wor')
    assert tune()[0] == 0
    assert tune()[0] == 0
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["complete"] * 2
    assert '"wor{' not in journal.read_text()


@pytest.mark.slow
def test_a_search_that_was_killed_while_it_began_begins_again(tune: Any, tmp_path: Path) -> None:
    (tmp_path / "s" / "lora").mkdir(parents=True)
    (tmp_path / "s" / "lora" / "journal.log").write_text('{"op_code":0,"worker_id":"a","study_name":"tu')
    assert tune("--trials", "1")[0] == 0
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["complete"]


@pytest.mark.slow
def test_trials_on_other_data_of_the_same_name_do_not_count(tune: Any, pictures: Path, tmp_path: Path) -> None:

    assert tune("--trials", "1")[0] == 0
    other = tmp_path / pictures.name
    write_pictures(other / "train", 12)
    write_pictures(other / "test", 4, seed=1)
    assert_refused(tune("--dataset", other), "done on another model or other data than the trials before")
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["complete", "running"]


@pytest.mark.slow
def test_a_trial_that_failed_is_tried_again_by_the_same_command(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: Recipe, path: Path, **options: Any) -> Any:
        if path.name == "trial-0001":
            raise RunError("no space left")
        return run_recipe(recipe, path, **options)

    monkeypatch.setattr(search, "run_recipe", run)
    code, out, err = tune()
    assert code == 1
    assert "lora trial 1/2: failed: no space left" in out
    assert err == "fvae-lora: 1 trials failed; the same command tries them again; the first: lora no space left\n"
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["running", "complete"]
    monkeypatch.undo()
    assert tune()[0] == 0
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["complete", "complete"]


@pytest.mark.slow
def test_a_trial_that_diverges_is_the_worst(tune: Any, tmp_path: Path) -> None:
    code, out, err = tune("--knobs", "train.learning_rate=1e30:1e31", "train.max_grad_norm=0")
    assert code == 1
    assert "diverged: " in out
    assert err.startswith("fvae-lora: lora: no trial was finished; see ")
    assert [trial.state for trial in found(tmp_path / "s").trials] == ["pruned"] * 2
    assert not (tmp_path / "s" / "best.yaml").exists()


def test_names_of_a_user_s_are_text_on_the_page(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    recipe = make_recipe().model_copy(update={"dataset": hostile, "model": hostile})
    values = starting_points(recipe, search_space(recipe))[0]
    trials = [TrialResult(1, values, "complete", 0.5, [(1, 0.5)]), TrialResult(2, values, "pruned", None, [], hostile)]
    searches = [Search(Plan(recipe, search_space(recipe), 0), hostile, True, trials, {})]
    page = write_searches(searches, tmp_path / "tune.html").read_text()
    assert "<img" not in page
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3


@pytest.mark.slow
def test_a_trial_that_is_worse_than_most_is_pruned(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "UNPRUNED", 0)
    code, out, err = tune("--knobs", "train.learning_rate", "--trials", "4", "train.epochs=4")
    assert code == 0, err
    trials = found(tmp_path / "s").trials
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial.curve[-1][0] in (2, 3), "half of the epochs are for everybody, the last ends nothing"
        assert trial.curve[-1][1] < dict(trials[0].curve)[trial.curve[-1][0]]
        record = records(tmp_path / "s")[f"lora/trial-{trial.number:04}"]
        assert (record["state"], f"pruned: {record['reason']}") == ("pruned", trial.reason)
    assert f"pruned: epoch {pruned[0].curve[-1][0]} of 4, validation accuracy" in out


class TestPruned:
    """A run that a judge ends."""

    @pytest.fixture
    def heard(self) -> list[tuple[int, float]]:
        return []

    def test_it_says_why_and_keeps_no_checkpoint(
        self, make_recipe: Callable[..., Recipe], heard: list[tuple[int, float]], tmp_path: Path
    ) -> None:
        def judge(epoch: int, score: float) -> str | None:
            heard.append((epoch, score))
            return "bad" if epoch == 2 else None

        recipe = make_recipe(purpose="selection", train={"epochs": 4})
        record = run_recipe(recipe, tmp_path / "r", quiet=True, judge=judge)
        assert (record.state, record.reason) == ("pruned", "bad")
        assert [epoch for epoch, _ in heard] == [1, 2]
        assert heard[1][1] >= heard[0][1], "the best so far"
        assert not (tmp_path / "r" / "checkpoints").exists()
        assert record.time.wall_s

    def test_the_last_epoch_is_heard_of_and_ends_nothing(
        self, make_recipe: Callable[..., Recipe], heard: list[tuple[int, float]], tmp_path: Path
    ) -> None:
        def judge(epoch: int, score: float) -> str | None:
            heard.append((epoch, score))
            return "bad" if epoch == 2 else None

        record = run_recipe(make_recipe(purpose="selection"), tmp_path / "r", quiet=True, judge=judge)
        assert record.state == "complete"
        assert record.score == heard[-1][1]

    def test_it_is_in_the_report_as_a_point_without_a_score(
        self, make_recipe: Callable[..., Recipe], cli: Cli, tmp_path: Path
    ) -> None:
        for rate in (1e-3, 1e-2, 1e-1):
            recipe = make_recipe(purpose="selection", adapter={"dropout": rate}, train={"learning_rate": rate})
            judge = (lambda epoch, score: "bad") if rate == 1e-1 else None
            run_recipe(recipe, tmp_path / "runs" / f"{rate}", quiet=True, judge=judge)
        rows = summary_rows(tmp_path / "runs")
        assert [row.reason for row in rows if row.validation_score is None] == ["pruned"]
        code, out, err = cli("report", tmp_path / "runs")
        assert code == 0, err
        assert "of a search" in out
        assert "Not counted" not in out
        assert write_page([tmp_path / "runs"], tmp_path / "page.html").exists()
        assert cli("pack", tmp_path / "runs", tmp_path / "runs.jsonl.gz")[0] == 0
        assert summary_rows(tmp_path / "runs.jsonl.gz") == rows
