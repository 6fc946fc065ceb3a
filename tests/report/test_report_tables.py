"""The terminal table, CSV, Markdown and LaTeX."""

import csv
import re
import shutil
import subprocess

import pytest

from fvae_lora_experiments.report import summary_rows, write_csv, write_latex, write_markdown
from fvae_lora_experiments.report.numbers import duration, memory, number, quantity
from synthetic_runs import printed, record, write_run


@pytest.fixture
def three_seeds(tmp_path):
    for seed, accuracy in ((1, 0.90), (2, 0.92), (42, 0.97)):
        run = record("lora", seed, time={"wall_s": 83.0}, memory={"peak_mb": 812.4})
        run["metrics"]["test"]["accuracy"] = accuracy
        write_run(tmp_path / str(seed), run)
    return summary_rows(tmp_path)


def test_the_terminal_table_says_what_was_measured(three_seeds):
    text = printed(three_seeds)
    assert "image · digits · clean · tiny-vit" in text
    line, costs = (line for line in text.splitlines() if line.startswith("lora"))
    assert line.split() == ["lora", "93.00", "±", "3.61", "8.96", "3"]
    assert costs.split() == ["lora", "0.001", "295k", "295k", "1m23s", "812MB", "9.6T", "3G"]
    assert "Not counted" not in text


def test_the_terminal_table_fits_80_columns(demo):
    text = printed(summary_rows(demo))
    assert max(map(len, text.splitlines())) <= 80
    for method in ("fvae-lora", "lora", "linear-probe", "full"):
        assert sum(line.startswith(f"{method} ") for line in text.splitlines()) == 2  # scores, costs


def test_wide_tables_are_told_in_parts_that_fit(tmp_path):
    scores = {f"group_{n}_accuracy": n / 100 for n in range(12)}
    for method in ("fvae-lora-reference", "lora"):
        run = record(method)
        run["metrics"]["test"] |= scores
        write_run(tmp_path / method, run)
    text = printed(summary_rows(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{n}.00" in text.split() for n in range(12))


def test_the_terminal_table_lists_what_it_does_not_count(demo):
    text = printed(summary_rows(demo), width=200)
    assert "Not counted: 3" in text
    assert "failed     full-42  the loss is NaN at step 310" in text
    assert "running    linear-probe-42  not finished" in text
    assert "unreadable cut-off  run.json: Invalid JSON" in text
    assert "2 of 3" in text


def test_names_neither_style_nor_drive_the_terminal(tmp_path):
    run = record("lora", dataset="[red]loud[/red]\x1b[2J")
    write_run(tmp_path / "run", run | {"method": "[bold]x[/bold]"})
    text = printed(summary_rows(tmp_path), width=120)
    assert "[red]loud[/red]" in text
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text


def test_csv_holds_the_unrounded_numbers(three_seeds, demo, tmp_path):
    write_csv(three_seeds, tmp_path / "table.csv")
    (row,) = csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8"))
    assert float(row["score"]) == three_seeds[0].score
    assert float(row["score_std"]) == three_seeds[0].score_std
    assert (row["seeds"], row["scores"], row["missing_seeds"]) == ("1 2 42", "0.9 0.92 0.97", "")
    assert float(row["score_half_width"]) == three_seeds[0].score_half_width
    write_csv(summary_rows(demo), tmp_path / "table.csv")
    states = [row["state"] for row in csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8"))]
    assert states == ["complete"] * 4 + ["unreadable", "failed", "running"]


def test_markdown_escapes_names(tmp_path):
    write_run(tmp_path / "run", record(dataset="a|b <script>", method="*x*|y"))
    write_markdown(summary_rows(tmp_path), tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert r"a\|b \<script\>" in text
    scores, costs = (line for line in text.splitlines() if line.startswith(r"| \*x\*\|y | "))
    assert scores.replace(r"\|", "").count("|") == 5
    assert costs.replace(r"\|", "").count("|") == 9


def test_latex_is_a_booktabs_table_with_escaped_names(tmp_path):
    write_run(tmp_path / "run", record(method=r"50%_a&b\c#$"))
    write_latex(summary_rows(tmp_path), tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"accuracy \%"):
        assert part in text
    assert r"50\%\_a\&b\textbackslash{}c\#\$ & " in text


def test_latex_says_the_protocol_the_seeds_and_the_interval_where_a_paper_shows_them(tmp_path):
    for method in ("lora", "full"):
        for seed in (1, 2, 42):
            write_run(tmp_path / f"{method}-{seed}", record(method, seed, dataset="50%_a&b"))
    write_latex(summary_rows(tmp_path), tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    caption = next(line for line in text.splitlines() if line.startswith(r"\caption{"))
    for said in (
        r"50\%\_a\&b",
        "model tiny-vit",
        "protocol clean",
        "seeds 1, 2, 42",
        r"95\% confidence interval",
        "pairs",
    ):
        assert said in caption
    assert r"method & accuracy \% & 95\% CI $\pm$ & seeds & \shortstack[r]{vs lora $\pm$ \\ 95\% CI} & pairs \\" in text


def test_latex_compiles_and_fits_the_page_or_is_at_least_whole(tmp_path):
    names = r"50%_a&b\c#$^~{}<>|"
    for seed in (1, 2):
        write_run(tmp_path / "runs" / str(seed), record("lora", seed, dataset="tanganke/dtd"))
        write_run(tmp_path / "runs" / f"b{seed}", record(names, seed, dataset=names))
    write_latex(summary_rows(tmp_path / "runs"), tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    for table in text.split(r"\begin{tabular}{")[1:]:
        columns, _, rest = table.partition("}")
        body = re.sub(r"\\[&%$#_{}]", "", rest.partition(r"\end{tabular}")[0])
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") + 1 for line in lines} == {len(columns)}
    for kind in ("table", "tabular"):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") == text.count(r"\toprule")
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert all(ord(c) < 128 for c in text)
    if compiler := shutil.which("pdflatex") or shutil.which("tectonic"):
        document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}" + text + r"\end{document}"
        (tmp_path / "paper.tex").write_text(document, encoding="utf-8")
        options = ["-interaction=nonstopmode", "-halt-on-error"] if compiler.endswith("pdflatex") else []
        done = subprocess.run([compiler, *options, "paper.tex"], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]
        assert b"Overfull" not in done.stdout, "a table is wider than the page"


def test_latex_runs_no_name_as_a_command(tmp_path):
    write_run(tmp_path / "run", record(dataset="x\n\\input{y}"))
    write_run(tmp_path / "failed", record(seed=2, state="failed", reason="x\n\\input{y}", metrics=None))
    write_latex(summary_rows(tmp_path), tmp_path / "table.tex")
    lines = (tmp_path / "table.tex").read_text(encoding="utf-8").splitlines()
    assert any(r"\textbackslash{}input\{y\}" in line for line in lines)
    assert all(line.startswith("%") for line in lines if r"\input" in line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (7, "7"),
        (999.4, "999"),
        (999.6, "1k"),
        (1930, "1.93k"),
        (294_912, "295k"),
        (2.8e6, "2.8M"),
        (1.25e13, "12.5T"),
        (3e19, "30E"),
    ],
)
def test_quantities(value, text):
    assert quantity(value) == text


def test_durations_sizes_and_numbers():
    assert [duration(s) for s in (None, 4.24, 59.94, 59.96, 83, 3599.7, 11100)] == [
        "–", "4.2s", "59.9s", "1m00s", "1m23s", "1h00m", "3h05m",
    ]  # fmt: skip
    assert [memory(m) for m in (None, 812.4, 999.6, 15300)] == ["–", "812MB", "1.0GB", "15.3GB"]
    assert number(-351.2) == "−351"
