"""The command line: `fvae-lora`."""

import os
import textwrap
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from fvae_lora_experiments import completion, signals
from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.places import DATA_ROOT
from fvae_lora_experiments.process import exit_code, silence_libraries, use_one_gpu
from fvae_lora_experiments.run import distributed

if TYPE_CHECKING:
    from fvae_lora_experiments.sweep.launcher import Launcher
    from fvae_lora_experiments.sweep.plan import PlannedRun


class Command(TyperCommand):
    """A command that refuses an option that is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the command line like typer, which would silently take the last of several values."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            if given.count(option) > 1 and option.nargs == 1 and not getattr(option, "multiple", False):
                raise UserError(f"{option.opts[0]}: given twice; expected one of them")
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="FVAE-LoRA beside LoRA, its relatives, a linear probe and full fine-tuning: train, compare, report.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would turn H:M:S into an emoji
)
recipes = typer.Typer(help="Lists, shows and copies recipes.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")
console = Console(markup=False, emoji=False)  # names given by the user are shown as they are

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe (image/default) or a YAML file.",
        autocompletion=completion.recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For example train.epochs=3.", autocompletion=completion.keys),
]
Model = Annotated[str | None, typer.Option(help="Pretrained model: a name on the hub or a folder.")]
Dataset = Annotated[str | None, typer.Option(help="Data: a name on the hub, a folder of images or tables, a table.")]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Shows what would run: steps, trainable parameters, FLOPs; writes nothing.")
]
Timed = Annotated[
    bool, typer.Option("--timed", help="With --dry-run: trains a few steps of each setting here, for the hours.")
]
FlopsPerSecond = Annotated[
    float | None, typer.Option(metavar="N", help="With --dry-run: the device's speed, such as 1e13, to estimate hours.")
]


def _set_data_root(folder: Path | None) -> None:
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--data-root {folder}: no such folder")
        os.environ[DATA_ROOT] = str(folder.resolve())  # for the runs' processes as well


DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Copies of data sets on the hub, as DIR/owner/name or DIR/name; a study's other data sets, as DIR/name.",
        metavar="DIR",
        envvar=DATA_ROOT,
        callback=_set_data_root,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fvae-lora {version('fvae-lora')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def refuse_several_processes(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Prints the version.")
    ] = False,
) -> None:
    """Refuses torchrun for anything but `train`: each of its processes would run the whole command.

    Raises:
        UserError: there are several processes, and the command is not `train`.
    """
    if distributed.process_count() > 1 and context.invoked_subcommand != "train":
        raise UserError(f"{context.invoked_subcommand}: cannot run in several processes; torchrun is for train")
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(cls=Command)
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    method: Annotated[
        str | None,
        typer.Option(help="One of the methods that `fvae-lora recipes` lists.", autocompletion=completion.methods),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is random.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/METHOD-seedN).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    dry_run: DryRun = False,
    flops_per_second: FlopsPerSecond = None,
    timed: Timed = False,
) -> None:
    """Trains one run and scores it. A run that was stopped resumes where it was.

    On several GPUs: torchrun --nproc-per-node 2 --no-python fvae-lora train RECIPE, or accelerate launch. The recipe's
    batch is divided among them.
    """
    from fvae_lora_experiments.beforehand import refuse_at_once
    from fvae_lora_experiments.recipe import load_recipe
    from fvae_lora_experiments.run.finished import is_complete

    options = _without_none(model=model, dataset=dataset, method=method, seed=seed)
    chosen = load_recipe(recipe, overrides or [], options)
    folder = out or Path("runs") / f"{chosen.method}-seed{chosen.seed}"
    use_one_gpu()
    speed = _speed(flops_per_second, timed, dry_run)
    if distributed.process_count() == 1 and not is_complete(folder, chosen):
        refuse_at_once(chosen)
    if dry_run:
        from fvae_lora_experiments.forecast import print_forecast
        from fvae_lora_experiments.run.folder import RunFolder
        from fvae_lora_experiments.sweep.plan import PlannedRun

        silence_libraries()
        print_forecast([PlannedRun(chosen, RunFolder(folder), folder.name)], speed, console)
        return

    from fvae_lora_experiments.report import print_table, summary_rows
    from fvae_lora_experiments.run.runner import run_recipe

    silence_libraries()
    signals.raise_on_signal()
    run_recipe(chosen, folder, quiet)
    distributed.disconnect()
    if distributed.is_main():
        print_table(summary_rows(folder), console)
        console.print(f"The run is in {folder}", highlight=False)


class LauncherName(StrEnum):
    """Where `compare` runs."""

    local = "local"
    slurm = "slurm"


DEFAULT_METHODS = "fvae-lora,lora,linear-probe"
DEFAULT_SEEDS = "1,2,42"


@app.command(cls=Command)
def compare(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE[,RECIPE]...|STUDY",
            help="Recipes, shipped ones or YAML files; or a study, such as paper/images: recipes, methods and seeds.",
            autocompletion=completion.recipes_and_studies,
        ),
    ],
    overrides: Overrides = None,
    model: Model = None,
    dataset: Annotated[str | None, typer.Option(help="Data sets as for train, separated by commas.")] = None,
    data_root: DataRoot = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Methods, separated by commas (default: the study's, or {DEFAULT_METHODS}).",
            autocompletion=completion.methods_in_a_list,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help=f"Seeds and ranges of seeds, such as 1-5,42 (default: the study's, or {DEFAULT_SEEDS})."),
    ] = None,
    vary: Annotated[list[str] | None, typer.Option(help="KEY=A,B: run each value; may be given several times.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=A,B: choose the value on validation, for each method and data set; may be given several times. "
            "A wider grid reuses the points that exist; if it chooses another point, the results of the earlier choice "
            "stay, as rows of their own."
        ),
    ] = None,
    selection_seeds: Annotated[
        str | None, typer.Option(help="Seeds of the runs that choose; must differ from --seeds (default: 0).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the runs.")] = Path("runs"),
    launcher: Annotated[LauncherName, typer.Option(help="Run in processes on this machine, or as SLURM jobs.")] = (
        LauncherName.local
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at the same time.")] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="GPUs per run, with a process for each; the recipe's batch is divided among them (default: local 1 if "
            "there are any, possibly shared between runs; slurm 0).",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes per run, without GPUs (default: 1).")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: the partition (default: the cluster's).")] = None,
    account: Annotated[str | None, typer.Option(help="slurm: the account to charge.")] = None,
    time: Annotated[str | None, typer.Option(help="slurm: time limit of a run, as minutes, H:M:S or D-H:M:S.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="slurm: cores per run (default: one per process).")] = None,
    dry_run: DryRun = False,
    flops_per_second: FlopsPerSecond = None,
    timed: Timed = False,
) -> None:
    """Runs recipes x data sets x methods x seeds x varied keys; only what is missing is run.

    A study is a table of the paper, by its name. Its --dry-run needs neither data nor models.

    It can be killed at any moment and resumes from there. Local runs share the machine's cores and GPUs, and end when
    this command ends. SLURM jobs go on without it, and the same command waits for them; sbatch takes further options
    from its own variables (SBATCH_MEM_PER_NODE, SBATCH_QOS, SBATCH_CONSTRAINT). Their output is in OUT/.slurm until
    all runs of their array are complete.
    """
    from fvae_lora_experiments.beforehand import refuse_if_none_can_run
    from fvae_lora_experiments.study import requested_study
    from fvae_lora_experiments.sweep.grid import Grid, print_choices
    from fvae_lora_experiments.sweep.plan import contenders, parse_list, parse_seeds, parse_values, runs_of
    from fvae_lora_experiments.sweep.run_sweep import run_sweep

    speed = _speed(flops_per_second, timed, dry_run)
    slurm_options = _without_none(partition=partition, account=account, time=time, cpus=cpus)
    if slurm_options and launcher is not LauncherName.slurm:
        raise UserError(f"--{next(iter(slurm_options))}: only with --launcher slurm")
    if processes and gpus:
        raise UserError(f"--processes {processes}: for runs without GPUs; --gpus {gpus} starts a process for each GPU")
    size = {"processes": processes or gpus or 1, "gpus": 0 if processes else gpus}
    study = requested_study(recipe)
    methods = methods or (",".join(study.methods) if study else DEFAULT_METHODS)
    seeds = seeds or (",".join(map(str, study.seeds)) if study else DEFAULT_SEEDS)
    compared = (study.contenders if study else partial(contenders, recipe))(
        out,
        parse_list("--methods", methods),
        overrides or [],
        _without_none(model=model, dataset=dataset),
        parse_values("--vary", vary or []),
    )
    result_seeds = parse_seeds("--seeds", seeds)
    tried, lost = [], []
    seen: set[str] = set()
    if selection_seeds and not grid:
        raise UserError("--selection-seeds: only with --grid")
    if study is None:
        refuse_if_none_can_run(runs_of(compared, result_seeds))
    elif timed or not dry_run:
        study.refuse_missing_data(runs_of(compared, result_seeds))
    if dry_run:
        from fvae_lora_experiments.forecast import print_forecast

        silence_libraries()
        if grid:
            choosing = parse_seeds("--selection-seeds", selection_seeds or "0")
            tried = Grid(compared, parse_values("--grid", grid), choosing, result_seeds).runs()
        print_forecast([*tried, *runs_of(compared, result_seeds)], speed, console, published=study is not None)
        return
    launch = _make_launcher(launcher, out, jobs, size, slurm_options)

    from fvae_lora_experiments.check import inspect_each
    from fvae_lora_experiments.data.summary import print_summary
    from fvae_lora_experiments.report import print_table, summary_rows

    signals.raise_on_signal()

    def show_data(runs: list["PlannedRun"]) -> None:
        silence_libraries()
        for summary in inspect_each(runs, seen, strictly=study is not None):
            print_summary(summary, console)

    if grid:
        choosing = parse_seeds("--selection-seeds", selection_seeds or "0")
        points = Grid(compared, parse_values("--grid", grid), choosing, result_seeds)
        tried = points.runs()
        show_data(tried)
        run_sweep(tried, launch, console)
        choices = points.choices()
        print_choices(choices, console)
        compared = [choice.best.contender for choice in choices if choice.best]
        lost = [choice.name for choice in choices if not choice.best]
    runs = runs_of(compared, result_seeds)
    show_data(runs)
    failures = run_sweep(runs, launch, console)
    if any(out.rglob("run.json")):
        print_table(summary_rows(out), console)
    if failures:
        raise RunError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again; the first: {failures[0]}"
        )
    if lost:
        raise RunError(f"{', '.join(lost)}: failed at every point of the grid, so there is no result")
    if again := [run.name for run in tried if not run.is_done()]:
        raise RunError(
            f"{len(again)} runs of the grid failed; the same command tries them again; the first: {again[0]}"
        )


@app.command(cls=Command)
def tune(
    recipe: RecipeName,
    overrides: Overrides = None,
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas (default: the recipe's).", autocompletion=completion.methods_in_a_list
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials of each method, in this folder in all.")] = 40,
    knobs: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[=LOW:HIGH],...",
            help="What is searched, with ranges of one's own (default: all that a method has).",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the trials and of the search; results should have other seeds.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="The folder of the search.")] = Path("runs/tune"),
) -> None:
    """Searches for each method's best settings; validation alone judges, and what is not promising is pruned.

    It begins with the recipe's own and the published settings. It can be killed at any moment and resumes from there.
    The same command may run several times at once, also as jobs of a cluster: all share the folder's trials. It ends
    with OUT/best.yaml, a recipe for train and compare, and OUT/tune.html. Needs fvae-lora[tune].
    """
    from fvae_lora_experiments.tune.request import check_request

    request = check_request(
        recipe, overrides or [], _without_none(model=model, dataset=dataset), methods, trials, knobs, seed, out
    )
    use_one_gpu()

    from fvae_lora_experiments.tune.tune import tune as search

    silence_libraries()
    signals.raise_on_signal()
    if failures := search(request, console):
        raise RunError(f"{len(failures)} trials failed; the same command tries them again; the first: {failures[0]}")


def _speed(flops_per_second: float | None, timed: bool, dry_run: bool) -> float | Literal["timed"] | None:
    if timed and not dry_run:
        raise UserError("--timed: only with --dry-run")
    if timed and flops_per_second is not None:
        raise UserError("--timed and --flops-per-second: give one of them")
    if flops_per_second is not None and not (dry_run and 0 < flops_per_second < float("inf")):
        raise UserError(f"--flops-per-second {flops_per_second:g}: expected a number above 0, and --dry-run")
    return "timed" if timed else flops_per_second


def _make_launcher(
    where: LauncherName, out: Path, jobs: int, size: dict[str, Any], slurm_options: dict[str, Any]
) -> "Launcher":
    if where is LauncherName.slurm:
        from fvae_lora_experiments.sweep.slurm import SlurmLauncher

        return SlurmLauncher(out / ".slurm", jobs, **size, **slurm_options)

    from fvae_lora_experiments.sweep.local import LocalLauncher

    return LocalLauncher(jobs, **size)


@app.command(cls=Command)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
) -> None:
    """Scores a finished run again from its adapter."""
    from fvae_lora_experiments.run.finished import read_finished_run, read_record

    read_record(run)
    use_one_gpu()

    from fvae_lora_experiments.run import runner

    silence_libraries()
    signals.raise_on_signal()
    scores = runner.evaluate(run, model, dataset)
    _, record = read_finished_run(run, model, dataset)
    width = max(map(len, scores)) + 2
    for name, value in scores.items():
        console.print(f"{name:<{width}}{value:.6f}  recorded {record.metrics.test[name]:.6f}", highlight=False)


@app.command(cls=Command)
def reproduce(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|STUDY:RUN",
            help="A finished run's folder; or a folder or file of runs that `pack` wrote, and the name of a run in it.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The new run's folder (default: runs/reproduced/RUN).")] = None,
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Repeats a recorded run with its exact recipe, and says for each score whether it comes out the same.

    First what differs: versions, commit, hardware; other data or another model are refused. Exit code 0 if every score
    is equal to the bit, or where a further seed of the record's study would be (95%); 1 if one is not. A run that was
    stopped resumes where it was.
    """
    from fvae_lora_experiments.beforehand import refuse_at_once
    from fvae_lora_experiments.reproduce.recorded import choose_folder, find_recorded

    recorded = find_recorded(run, model, dataset)
    folder = choose_folder(recorded, out)
    refuse_at_once(recorded.recipe)
    use_one_gpu()

    from fvae_lora_experiments.reproduce.reproduce import reproduce as repeat

    silence_libraries()
    signals.raise_on_signal()
    if differing := repeat(recorded, folder, quiet, console):
        raise RunError(f"{run}: not reproduced: {', '.join(differing)}")


class OnError(StrEnum):
    """What to do with a row that cannot be used."""

    stop = "stop"
    skip = "skip"


@app.command(cls=Command)
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Images or recordings, folders of them, tables (CSV, TSV, JSON lines, JSON, parquet), or -: standard "
            "input with a text, the path of a file, or keys and values in JSON on each line.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write, .csv or .jsonl (default: CSV on standard output).")
    ] = None,
    model: Model = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The column to read (default: as in training); give it twice for pairs of texts."),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write each class's probability.")
    ] = False,
    draws: Annotated[
        int,
        typer.Option(
            min=0,
            help="FVAE-LoRA: number of draws of z1, for the entropy of the mean prediction and for mutual_information, "
            "the part of it that comes from the draws.",
        ),
    ] = 0,
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign",
            help="FVAE-LoRA: how unlike the inputs of training a row is (foreign_score), and the share of inputs like "
            "those that are as far (foreign_p_value); by the detector that `inspect --detector` makes.",
        ),
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a batch (default: as in training).")] = None,
    on_error: Annotated[
        OnError, typer.Option(help="At a row that cannot be used: stop, or leave it out and report it.")
    ] = OnError.stop,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the last row of the file --out.")] = False,
) -> None:
    """Predicts with a finished run: a line for each row, with its file, its number and the prediction."""
    from fvae_lora_experiments.run.finished import usable_run

    recipe, _ = usable_run(run, model)

    from fvae_lora_experiments.predict.output import Output
    from fvae_lora_experiments.predict.request import check_foreign, check_request
    from fvae_lora_experiments.predict.rows import begun, read_rows
    from fvae_lora_experiments.predict.wanted import wanted_by
    from fvae_lora_experiments.run.folder import RunFolder

    output = Output(out, resume)
    check_request(recipe, output, probabilities, draws)
    if foreign:
        check_foreign(RunFolder(run), recipe)
    rows = begun(read_rows(inputs, wanted_by(recipe, column or [])))
    use_one_gpu()

    from fvae_lora_experiments.predict.foreign import load_detector
    from fvae_lora_experiments.predict.predict import predict as predict_rows
    from fvae_lora_experiments.predict.trained import load_run

    silence_libraries()
    signals.raise_on_signal("stopped" if out is None else f"stopped; --resume goes on after the last row of {out}")
    trained = load_run(run, model)
    detector = load_detector(RunFolder(run), trained) if foreign else None
    done, left_out = predict_rows(trained, rows, output, probabilities, draws, detector, batch_size, on_error.value)
    if out is not None:
        skipped = f", {left_out} left out" if left_out else ""
        console.print(f"{out}: {done} rows predicted{skipped}", highlight=False, soft_wrap=True)


class SplitName(StrEnum):
    """A part of the data."""

    train = "train"
    validation = "validation"
    test = "test"


@app.command(cls=Command)
def inspect(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run's folder, or an adapter's.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="With --dataset: how it is read, for example data.group_column=place.",
            autocompletion=completion.keys,
        ),
    ] = None,
    model: Model = None,
    dataset: Annotated[
        str | None, typer.Option(help="Other data than the run's, as for train; labels are not needed.")
    ] = None,
    data_root: DataRoot = None,
    task: Annotated[str | None, typer.Option(help="Of an adapter alone (default: judged by the data).")] = None,
    split: Annotated[SplitName, typer.Option(help="The split that is looked at.")] = SplitName.validation,
    rows: Annotated[int, typer.Option(min=2, help="Rows of a split at most, drawn from it.")] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and the numbers (default: RUN_OR_ADAPTER).")
    ] = None,
    detector: Annotated[
        bool,
        typer.Option(
            "--detector",
            help="Fits a detector of foreign inputs to the run's training and validation rows, for predict --foreign.",
        ),
    ] = False,
) -> None:
    """Looks into an adapter of FVAE-LoRA: what its autoencoders know, layer by layer, and what to change."""
    from fvae_lora_experiments.inspect.source import find_source, refuse_detector

    chosen = find_source(source, model, dataset, task, overrides or [])
    if detector:
        refuse_detector(chosen)
    use_one_gpu()

    from fvae_lora_experiments.inspect import run
    from fvae_lora_experiments.report.terminal import print_grid

    silence_libraries()
    signals.raise_on_signal("stopped; nothing was written")
    folder = out or source
    inspection = run.inspect(chosen, split.value, rows, folder)
    for table in inspection.tables():
        print_grid(table, console)
        for note in table.notes:
            console.print(note, style="dim", highlight=False)
    for note in inspection.notes:
        console.print(note, style="dim", highlight=False)
    for warning in inspection.warnings:
        console.print(warning, style="yellow", highlight=False)
    console.print(f"The page is {folder / run.PAGE}, the numbers are in {run.JSON} beside it", highlight=False)
    if detector:
        where = run.fit_detector(chosen, rows)
        console.print(
            f"The detector is in {where}; fvae-lora predict {source} INPUT... --foreign uses it", highlight=False
        )


@app.command(cls=Command)
def check(
    what: Annotated[str, typer.Argument(metavar="DATA|RECIPE", help="A data set as for --dataset, or a recipe.")],
    overrides: Overrides = None,
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    task: Annotated[
        str | None, typer.Option(help="DATA: the task (default: judged by its columns, else image).")
    ] = None,
) -> None:
    """Shows what training would see of the data, and what is wrong with it; exit code 2 if it would be refused."""
    from fvae_lora_experiments.check import DEFAULT_RECIPES, guess_task, inspect_data
    from fvae_lora_experiments.data.summary import print_summary
    from fvae_lora_experiments.recipe import load_recipe, shipped_recipes

    signals.raise_on_signal()
    silence_libraries()
    if what in shipped_recipes() or Path(what).suffix in (".yaml", ".yml"):
        recipe = load_recipe(what, overrides or [], _without_none(model=model, dataset=dataset))
        print_summary(inspect_data(recipe), console)
        return
    if task is not None and task not in DEFAULT_RECIPES:
        raise UserError(f"--task {task}: no such task; allowed are {', '.join(DEFAULT_RECIPES)}")
    own = task or guess_task(what)
    recipe = load_recipe(DEFAULT_RECIPES[own], overrides or [], {"model": model or "none", "dataset": what})
    try:
        print_summary(inspect_data(recipe, with_model=model is not None), console)
    except UserError as error:
        if task is None:
            raise UserError(f"{error} (read for the task {own}; --task chooses another)") from error
        raise


@app.command(cls=Command)
def demo(
    out: Annotated[Path | None, typer.Option(help="The folder of the runs (default: runs/demo).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, two epochs: only to see whether everything works.")
    ] = False,
) -> None:
    """Compares FVAE-LoRA, LoRA and a linear probe on handwritten digits, without downloads."""
    from fvae_lora_experiments.demo import run_demo

    signals.raise_on_signal()
    if failures := run_demo(out or Path("runs/demo-quick" if quick else "runs/demo"), quick, console):
        raise RunError(f"{len(failures)} runs failed")


@app.command(cls=Command)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Folders of runs, or files of runs that `pack` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page and the tables (default: the folder of runs, or that of their file)."),
    ] = None,
) -> None:
    """Reports runs as a table, as CSV, Markdown and LaTeX, and as one HTML page."""
    if out is None and len(runs) > 1:
        raise UserError("report: several folders or files need --out, the folder for the page and the tables")

    from fvae_lora_experiments.report import (
        print_table,
        summary_rows,
        write_csv,
        write_latex,
        write_markdown,
        write_page,
    )

    signals.raise_on_signal()
    rows = summary_rows(*runs)
    folder = out or (runs[0].parent if runs[0].is_file() else runs[0])
    folder.mkdir(parents=True, exist_ok=True)
    print_table(rows, console)
    for write, name in ((write_csv, "report.csv"), (write_markdown, "report.md"), (write_latex, "report.tex")):
        write(rows, folder / name)
    page = write_page(runs, folder / "report.html")
    console.print(f"The page is {page}, the tables are beside it", highlight=False)


@app.command()
def pack(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder of runs.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write; its name must end in runs.jsonl.gz.")
    ],
) -> None:
    """Writes the records and learning curves of many runs to one small file, which `report` reads like RUNS."""
    from fvae_lora_experiments.run.archive import pack as pack_runs

    console.print(f"{file}: {pack_runs(runs, file)} runs, without their adapters", highlight=False)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of runs that `pack` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put the runs' folders.")],
) -> None:
    """Restores the folders of packed runs, without adapters; `compare --out DIR` then runs what is missing."""
    from fvae_lora_experiments.run.archive import unpack as unpack_runs

    console.print(f"{out}: {unpack_runs(file, out)} runs", highlight=False)


class Format(StrEnum):
    """What `export` writes."""

    inference = "inference"
    lora = "lora"


class Bias(StrEnum):
    """Where the encoders' constant goes in a LoRA."""

    keep = "keep"
    fold = "fold"


NewFolder = Annotated[Path, typer.Option(help="The folder to write; must not exist, or be empty.")]


@app.command(cls=Command)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A finished run's folder, or an adapter's.")],
    out: NewFolder,
    format: Annotated[Format, typer.Option(help="inference: small, for this package; lora: for any software.")] = (
        Format.inference
    ),
    model: Model = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    bias: Annotated[Bias, typer.Option(help="lora: keep (exact, for peft) or fold (for servers).")] = Bias.keep,
    max_error: Annotated[
        float, typer.Option(help="lora: the largest relative error accepted for a layer's update.")
    ] = 0.1,
    rows: Annotated[int, typer.Option(min=1, help="lora: rows of the training split to fit on.")] = 512,
) -> None:
    """Writes an adapter for inference only, or as a plain LoRA that loads without this package."""
    use_one_gpu()

    from fvae_lora_experiments.export import export_inference, export_lora

    silence_libraries()
    signals.raise_on_signal()
    if format is Format.inference:
        export_inference(source, out, model)
    else:
        report = export_lora(source, out, model, dataset, bias.value, max_error, rows)
        console.print(str(report), highlight=False, soft_wrap=True)
    console.print(f"The adapter is in {out}", highlight=False)


@app.command("import-reference", cls=Command)
def import_reference(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter that the reference saved.")],
    model: Annotated[str, typer.Option(help="The base model it was trained on: a name on the hub or a folder.")],
    out: NewFolder,
) -> None:
    """Turns an adapter of the reference implementation into one of this package."""
    use_one_gpu()

    from fvae_lora_experiments import export

    silence_libraries()
    signals.raise_on_signal()
    export.import_reference(folder, model, out)
    console.print(f"The adapter is in {out}", highlight=False)


@app.command(cls=Command)
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub; created if missing.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public (default: private).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shows what would be uploaded, without contacting the hub.")
    ] = False,
) -> None:
    """Uploads a run's adapter and its model card to the hub; the licence is for you to add to the card."""
    from fvae_lora_experiments.push import collect, upload

    signals.raise_on_signal()
    what = collect(run, repository)
    if what.base_is_local:
        console.print("The base model is a local folder, so others need a copy of it", highlight=False)
    if dry_run:
        console.print(f"{repository} ({'public' if public else 'private'}) would receive:", highlight=False)
        for name, size in what.sizes().items():
            console.print(f"  {name}  {size:,} bytes", highlight=False)
        return
    console.print(f"The adapter is at {upload(what, public)}", highlight=False, soft_wrap=True)


@recipes.callback()
def recipes_default(context: typer.Context) -> None:
    """Lists recipes, studies, methods and built-in data; `show` prints a recipe, `copy` makes it yours."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes.command("list", cls=Command)
def list_recipes() -> None:
    """Lists recipes, studies, methods, and the models and data that need neither a folder nor a network."""
    from fvae_lora_experiments.methods import METHODS
    from fvae_lora_experiments.places import DATASETS, MODELS
    from fvae_lora_experiments.recipe import shipped_recipes, shipped_studies

    table = Table(box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for heading, entries in (
        ("Recipes", {name: _first_sentence(text) for name, text in shipped_recipes().items()}),
        ("Studies, for compare", {name: _first_sentence(text) for name, text in shipped_studies().items()}),
        ("Methods", {name: method.summary for name, method in METHODS.items()}),
        ("Models", dict.fromkeys(MODELS, "comes with the package; others: a folder, or a name on the hub")),
        ("Data sets", dict.fromkeys(DATASETS, "comes with a package; others: a folder, or a name on the hub")),
    ):
        table.add_row(heading, "", style="underline")
        for name, what in entries.items():
            table.add_row(f"  {name}", what)
    console.print(table)


@recipes.command("show", cls=Command)
def show_recipe(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A shipped recipe or study, or a YAML file.")
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Every key with its value (set or default), what is allowed and what it means."),
    ] = False,
) -> None:
    """Prints a recipe, or every key that recipes may have."""
    from fvae_lora_experiments.recipe import as_yaml, recipe_keys, recipe_text, recipe_tree, shipped_studies

    if recipe is None and not every:
        raise UserError("recipes show: expected a recipe, or --all")
    if not every:
        print(shipped_studies().get(str(recipe)) or recipe_text(str(recipe)), end="")
        return
    here = {} if recipe is None else recipe_tree(recipe)
    for key in recipe_keys():
        value = as_yaml(here[key.name]) if key.name in here else key.default
        default = f"; {key.default} by default" if key.default not in (None, value) else ""
        print(f"{key.name}: {'(required)' if value is None else value}")
        for line in (f"{key.allowed}{default}", key.meaning):
            print(textwrap.fill(line, 120, initial_indent="    # ", subsequent_indent="    # "))


@recipes.command("copy", cls=Command)
def copy_recipe(
    recipe: RecipeName,
    to: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to (default: its name, here).")] = None,
) -> None:
    """Copies a recipe to a file, for you to change."""
    from fvae_lora_experiments.recipe import recipe_text
    from fvae_lora_experiments.run.folder import write_atomically

    text = recipe_text(recipe)
    target = to or Path(Path(recipe if Path(recipe).suffix else f"{recipe}.yaml").name)
    if target.exists():
        raise UserError(f"{target}: exists already")
    write_atomically(target, text)
    console.print(f"{target}: change it, then run fvae-lora train {target}", highlight=False)


def _first_sentence(recipe: str) -> str:
    comment = recipe.partition("\n\n")[0]
    lines = [line.removeprefix("# ") for line in comment.splitlines() if line.startswith("#")]
    return " ".join(lines).partition(". ")[0].rstrip(".")


def _without_none(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def main() -> None:
    """Runs the command line: one line and exit code 2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C.

    143 after SIGTERM, if signals are handled (`fvae_lora_experiments.__main__`).
    """
    distributed.exit_process(exit_code(lambda: app(standalone_mode=False)))
