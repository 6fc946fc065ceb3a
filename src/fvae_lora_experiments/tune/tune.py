"""A search from the beginning to its page."""

from collections.abc import Sequence

from filelock import FileLock
from rich.console import Console

from fvae_lora_experiments.check import inspect_data
from fvae_lora_experiments.data.summary import print_summary
from fvae_lora_experiments.errors import RunError
from fvae_lora_experiments.tune.outcome import Search, read_search, write_best
from fvae_lora_experiments.tune.request import Request
from fvae_lora_experiments.tune.search import Progress, Worker
from fvae_lora_experiments.tune.show import print_searches, write_page
from fvae_lora_experiments.tune.study import StudyFolder, searches_in


def tune(request: Request, console: Console) -> list[str]:
    """Does the trials that are left, beside other workers; ends with a table, a page and the best recipe.

    Returns:
        A line for each trial that failed here.

    Raises:
        UserError: the data or the first trial is refused, or the folder cannot be used.
        RunError: no trial of a method has a score.
    """
    workers = [
        Worker(StudyFolder(request.out / plan.recipe.method), plan, request.trials, console) for plan in request.plans
    ]
    done = sum(min(worker.done(), request.trials) for worker in workers)
    total = request.trials * len(workers)
    if done < total:
        print_summary(inspect_data(request.plans[0].recipe), console)
    if done:
        console.print(f"{done} of {total} trials are done already", highlight=False)
    progress = Progress(total, done, done)
    for worker in workers:
        worker.work(progress, lambda: _write(request))
    searches = _write(request)
    print_searches(searches, console)
    lost = [search.method for search in searches if search.best is None and search.count("running") == 0]
    if lost:
        raise RunError(f"{', '.join(lost)}: no trial was finished; see {request.out / 'tune.html'}")
    if any(search.best for search in searches):
        methods = ",".join(search.method for search in searches if search.best)
        console.print(
            f"The best recipe is {request.out / 'best.yaml'}: fvae-lora compare {request.out / 'best.yaml'} "
            f"--methods {methods} trains it with fresh seeds",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"The page is {request.out / 'tune.html'}", highlight=False, soft_wrap=True)
    return [f"{worker.folder.path.name} {line}" for worker in workers for line in worker.failures.values()]


def _write(request: Request) -> Sequence[Search]:
    """Writes page and recipe of all searches of the folder; one worker at a time."""
    with FileLock(request.out / ".lock"):
        searches = [read_search(folder) for folder in searches_in(request.out)]
        write_best(request.source, request.overrides, request.options, request.out, searches)
        write_page(searches, request.out / "tune.html")
    return searches
