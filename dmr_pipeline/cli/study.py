"""`dmr study`: routers trained in several ways and with several seeds, against rules, on games that nothing was chosen on."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Column, Table

from dmr_pipeline.cli.common import console, progress_lines, user_errors_exit_2, write_record
from dmr_pipeline.progress import Bars

if TYPE_CHECKING:  # `dmr --help` needs none of it
    from dmr_pipeline.study.results import Results

study = typer.Typer(help="Routers trained in several ways, against rules, on fresh games.", no_args_is_help=True)


@study.callback()
def commands() -> None:
    """So that `run` has to be named, as commands of other groups have."""


@study.command()
@user_errors_exit_2
def run(
    file: Annotated[Path, typer.Argument(help="the study: YAML, as those in studies/")],
    out: Annotated[Path | None, typer.Option(help="a JSON file for the results, besides")] = None,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="keep the results in docs/results/, and write the tables between the study's markers in README.md and docs/",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Train what is missing, tune every policy to every budget on validation games, play others, and compare.

    Routers, episodes and results are kept in data/scratch/studies: the same command goes on where it broke off.
    """
    from dmr_pipeline.artifacts.folders import DATA_ROOT
    from dmr_pipeline.cli.stages import verify_current
    from dmr_pipeline.precision.ladder import read_ladder
    from dmr_pipeline.study.design import load_study
    from dmr_pipeline.study.made import make
    from dmr_pipeline.study.pages import results_file, write_pages
    from dmr_pipeline.study.play import play_study
    from dmr_pipeline.study.results import Place, study_results

    plan = load_study(file)
    verify_current("agent" if plan.precisions else "quantized_checkpoints", plan.recipe)
    studies = DATA_ROOT / "scratch" / "studies"
    folder = studies / file.stem
    with nullcontext() if as_json else progress_lines():
        made = make(plan, DATA_ROOT, folder / "artifacts")
        with Bars(console=console, disable=as_json) as progress:
            episodes = play_study(plan, made, studies / ".kept", progress)
    folder.mkdir(parents=True, exist_ok=True)
    episodes.write_parquet(folder / "episodes.parquet")
    ladder = read_ladder(made.checkpoints)
    alone = {rung.name: Place(rung.cost, rung.validation_success) for rung in ladder.rungs}
    ends = (alone[ladder.route[0]], alone[ladder.route[-1]])
    results = study_results(episodes, plan, made.recipe, ladder.route, ends)
    kept = [results_file(file.stem)] if as_markdown else []
    for path in (folder / "results.json", *([out] if out is not None else []), *kept):
        write_record(path, results)
    if as_json:
        typer.echo(results.model_dump_json(indent=2))
        return
    _show(results)
    seeds = f"; routers of seeds {', '.join(map(str, plan.seeds))}" if plan.routers else ""
    console.print(f"{results.games} games{seeds}. Kept in {folder}", highlight=False, soft_wrap=True)
    for page, changed in write_pages(file.stem).items() if as_markdown else ():
        console.print(f"{page} {'written' if changed else 'is up to date'}.", soft_wrap=True)


def _show(results: "Results") -> None:
    from dmr_pipeline.evaluation.interval_text import in_brackets, seen_in_points
    from dmr_pipeline.study.pages import by_seed, named_reference

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("policy", overflow="fold")
    seeds = ["seeds ±"] if any(point.seed_deviation is not None for point in results.points) else []
    for column in ("budget", "ratio", "success, %", *seeds, "cost", "gain, points"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in results.points:
        deviation = "" if point.seed_deviation is None else f"{100 * point.seed_deviation:.1f}"
        table.add_row(
            point.policy,
            "" if point.budget is None else f"{point.budget:g}",
            f"{point.ratio:.3f}",
            f"{100 * point.success:.1f} {in_brackets(point.success_ci95)}",
            *([deviation] if seeds else []),
            f"{point.cost:.3f}",
            f"{100 * point.gain:+.1f} {in_brackets(point.gain_ci95)}",
        )
    console.print(table)
    references = [
        (
            f"{one.policy} at {one.budget:g}",
            named_reference(one.against),
            f"{100 * one.difference:+.1f} {in_brackets(one.difference_ci95)}",
            seen_in_points(one.smallest_difference),
            f"{100 * one.saved:.0f}% {in_brackets(one.saved_ci95)}",
        )
        for one in results.references
    ]
    of_references = ("policy", "against", "better by, points", "could see", "cost saved")
    _show_rows("Against the route's ends and the oracle", of_references, references)
    if not results.compared:
        return
    trainings = ["seeds"] if any(len(one.difference_by_seed) > 1 for one in results.compared) else []
    compared = [
        (
            f"{one.router} at {one.budget:g}",
            one.rule,
            f"{100 * one.difference:+.1f} {in_brackets(one.difference_ci95)}",
            *([by_seed(one.difference_by_seed, "\n")] if trainings else []),
            f"{one.p_holm:.3f}",
            f"{100 * one.lost:.1f} {in_brackets(one.lost_ci95)}",
        )
        for one in results.compared
    ]
    columns = ("router", "rule", "better by, points", *trainings, "p, Holm", "lost to the dearest")
    _show_rows("Routers against the best rule at equal cost", columns, compared)


def _show_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    first, *others = columns
    headers = [Column(first, overflow="fold"), *(Column(name, no_wrap=True) for name in others)]
    table = Table(*headers, title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.title_justify = "left"
    named = None
    for name, *cells in rows:
        table.add_row("" if name == named else name, *cells)
        named = name
    console.print(table)
