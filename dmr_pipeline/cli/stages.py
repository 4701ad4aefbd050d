"""`dmr run`, `materialize`, `status`, `render` and `report`: the pipeline's stages."""

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import Artifact, verify
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.artifacts.run_record import run_record_beside
from dmr_pipeline.cli.common import (
    DEFAULT_RECIPE,
    RecipeArgument,
    RecipeOption,
    console,
    errors,
    progress_lines,
    user_errors_exit_2,
)
from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.precision.ladder import LadderFacts, to_deploy_instead
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe, recipe_names
from dmr_pipeline.versioning import dvc_objects, dvc_stages, lock_file

if TYPE_CHECKING:
    from dmr_pipeline.evaluation.results import Metrics


@user_errors_exit_2
def run(recipe: RecipeArgument) -> None:
    """Materialise every stage of a recipe that is not up to date, and show the result."""
    loaded = load_recipe(recipe)
    for problem in loaded.kl_router.nothing_for_stage_2():
        raise UserError(problem)
    dvc_stages.check_rendered(pipeline.STAGES, recipe_names())
    _tell_lost_entries(recipe)
    if up_to_date(loaded, [stage.name for stage in pipeline.STAGES]):
        from dmr_pipeline.ingestion.inbox import archive

        archive(DATA_ROOT, recipe)  # what was dropped again, or by a run that was killed before it did so itself
        console.print(f"{recipe}: every stage is up to date, nothing to do.")
    else:
        _materialize(recipe, [stage.name for stage in pipeline.STAGES])
    _show_report(recipe)
    _show_verdict(recipe)


@user_errors_exit_2
def materialize(
    stage: Annotated[str, typer.Argument(help="a stage of the pipeline")],
    recipe: RecipeOption = DEFAULT_RECIPE,
    force: Annotated[bool, typer.Option("--force", help="make it again although it is up to date")] = False,
    code_version: Annotated[
        str | None, typer.Option(help="refuse to run another code version than this (for DVC)")
    ] = None,
) -> None:
    """Materialise one stage from its inputs; a killed run of it is resumed."""
    found = pipeline.find_stage(stage, pipeline.STAGES)
    load_recipe(recipe)
    if code_version not in (None, found.code_version):
        raise UserError(f"{stage} has code version {found.code_version}, not {code_version}: run `dmr render`")
    _materialize(recipe, [stage], force=force)


@user_errors_exit_2
def restore(
    stage: Annotated[str, typer.Argument(help="a stage of the pipeline")],
    recipe: RecipeOption = DEFAULT_RECIPE,
) -> None:
    """Get a damaged or lost artifact back as dvc.lock records it, from DVC's cache or remote; a committed agent from Git."""
    found = pipeline.find_stage(stage, pipeline.STAGES)
    dvc_objects.restore_recorded(found, recipe, load_recipe(recipe).versioning.remote)
    console.print(f"{artifact_folder(stage, recipe)} is {verify(artifact_folder(stage, recipe)).hash}.", soft_wrap=True)


@user_errors_exit_2
def status(recipe: RecipeArgument = DEFAULT_RECIPE) -> None:
    """Show which stages of a recipe are present, stale or missing."""
    _show_status(recipe)


def _show_status(recipe: str) -> None:
    table = Table(title=recipe, box=box.SIMPLE)
    for column in ("stage", "hash", "size", "made"):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    table.add_column("state", overflow="fold")
    for name, state, why, artifact in stage_states(load_recipe(recipe)):
        colour = {"present": "green", "stale": "yellow"}.get(state, "red")
        described = ("", "", "")
        if artifact is not None:
            described = (artifact.hash[:7], f"{artifact.size / 1e6:.2f} MB", _when(artifact))
        table.add_row(name, *described, f"[{colour}]{state}[/]" + (f": {escape(printable(why))}" if why else ""))
    console.print(table)
    _name_what_lies(recipe)
    _tell_lost_entries(recipe)


@user_errors_exit_2
def pull(recipe: RecipeArgument) -> None:
    """Bring here what other machines have made of a recipe, and record it in dvc.lock."""
    loaded = load_recipe(recipe)
    if loaded.versioning.remote is None:
        raise UserError(f"{recipe} names no versioning.remote, over which machines exchange artifacts: use `dvc pull`")
    from dmr_pipeline.defs import runs

    with progress_lines():
        runs.pull(pipeline.STAGES, loaded)
    _show_status(recipe)


@user_errors_exit_2
def render(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit with 1 where a file differs")] = False,
) -> None:
    """Write dvc.yaml, and data/.gitignore, from the pipeline table and the folder of recipes."""
    contents = {
        dvc_stages.DVC_FILE: dvc_stages.render(pipeline.STAGES, recipe_names()),
        dvc_stages.IGNORE_FILE: dvc_stages.render_ignored(pipeline.STAGES),
    }
    differing = [file for file, content in contents.items() if not dvc_stages.has_content(file, content)]
    if check and differing:
        errors.print(f"{' and '.join(map(str, differing))}: not what the pipeline table says: run `dmr render`")
        raise typer.Exit(1)
    for file, content in contents.items():
        if file in differing:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content, encoding="utf-8")
        console.print(f"{file} {'written' if file in differing else 'is up to date'}.")


@user_errors_exit_2
def report(
    recipe: RecipeArgument,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="write the tables between the recipe's markers in README.md and docs/; of what docs/results/ keeps of its"
            " metrics, which a finished run renews",
        ),
    ] = False,
) -> None:
    """Show the accuracy-cost report of a recipe."""
    load_recipe(recipe)
    if as_markdown:
        _write_pages(recipe)
    elif as_json:
        metrics, html = _render_report(recipe)
        typer.echo(json.dumps({**metrics, "html": str(html)}, indent=2))
    else:
        _show_report(recipe)


def _write_pages(recipe: str) -> None:
    from dmr_pipeline.evaluation import pages

    if artifact_folder("evaluation_report", recipe).is_dir():
        verify_current("evaluation_report", recipe)
        pages.keep(DATA_ROOT, recipe, [stage.name for stage in pipeline.STAGES])
    for page, changed in pages.write_pages(recipe).items():
        console.print(f"{page} {'written' if changed else 'is up to date'}.", soft_wrap=True)


def _tell_lost_entries(recipe: str) -> None:
    """Of stages whose artifacts are there: they count, and are recorded again, as they are found."""
    lost = lock_file.lost_entries(lock_file.read_entries())
    names = [
        stage.name
        for stage in pipeline.STAGES
        if dvc_stages.stage_address(stage, recipe) in lost and artifact_folder(stage.name, recipe).is_dir()
    ]
    if names:
        errors.print(
            f"{lock_file.LOCK_FILE} has lost its entries of {', '.join(names)}, whose artifacts are there: `dmr run {recipe}`"
            f" records them as they are, `cp {lock_file.COPY} {lock_file.LOCK_FILE}` brings all lost entries back",
            style="yellow",
            markup=False,
            highlight=False,
        )


def _materialize(recipe: str, stages: list[str], *, force: bool = False) -> None:
    os.environ.setdefault("TQDM_DELAY", "1")  # bars of less than a second, as when a tiny model is loaded, are noise
    from dmr_pipeline.defs import runs  # Dagster takes a second to import

    with progress_lines():
        runs.materialize(pipeline.STAGES, recipe, stages, force=force)


def stage_states(recipe: Recipe) -> Iterator[tuple[str, str, str, Artifact | None]]:
    """Each stage's name, state, reason in a few words, and artifact where there is a valid one."""
    present: dict[str, str] = {}
    entries = lock_file.read_entries()
    for stage in pipeline.STAGES:
        folder = artifact_folder(stage.name, recipe.name)
        try:
            artifact = verify(folder)
        except UserError as error:
            yield stage.name, "damaged" if folder.exists() else "missing", str(error) if folder.exists() else "", None
            continue
        problem = dvc_objects.damage(stage, recipe.name, artifact, entries)
        if problem is not None:
            yield stage.name, "damaged", problem, None
            continue
        waiting = [name for name in stage.inputs if name not in present]
        wanted = provenance(stage, recipe, {name: present.get(name, "") for name in stage.inputs})
        difference = f"not up to date: {', '.join(waiting)}" if waiting else wanted.difference(artifact.manifest)
        files = stage.pending_inputs(DATA_ROOT, recipe.name) if stage.pending_inputs is not None else ()
        if files and difference is None:
            difference = f"to be ingested: {', '.join(file.name for file in files)}"
        if difference is None:
            present[stage.name] = artifact.hash
        yield stage.name, "present" if difference is None else "stale", difference or "", artifact


def _name_what_lies(recipe: str) -> None:
    """What was dropped for ingestion and will not move by itself."""
    from dmr_pipeline.ingestion.inbox import lying_files, misplaced_lines

    for line in lying_files(DATA_ROOT, recipe) + misplaced_lines(DATA_ROOT, recipe_names()):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def up_to_date(recipe: Recipe, names: Collection[str]) -> bool:
    """The artifacts of these stages are there, valid, current, and recorded in DVC."""
    entries = lock_file.read_entries()
    return all(
        state == "present" and artifact is not None and dvc_stages.records(entries, stage, recipe.name, artifact)
        for stage, (_, state, _, artifact) in zip(pipeline.STAGES, stage_states(recipe), strict=True)
        if stage.name in names
    )


def verify_current(stage: str, recipe: str) -> Artifact:
    """A stage's artifact, whose files this version of the package can read.

    Raises:
        UserError: it is missing or damaged, or another version of the stage's code has made it.
    """
    artifact, wanted = verify(artifact_folder(stage, recipe)), pipeline.find_stage(stage, pipeline.STAGES).code_version
    if artifact.manifest.code_version != wanted:
        raise UserError(
            f"{artifact.path} was made by code version {artifact.manifest.code_version} of its stage, this is {wanted}: make it"
            f" again with `dmr run {recipe}`"
        )
    return artifact


def _when(artifact: Artifact) -> str:
    """By the run record beside it."""
    if not sidecar_path(artifact.path).is_file():
        return "elsewhere"
    record = run_record_beside(artifact.path)
    return "run record is damaged" if record is None else f"{record.finished.astimezone():%Y-%m-%d %H:%M}"


def _render_report(recipe: str) -> tuple["Metrics", Path]:
    """The metrics of the evaluation, and the HTML file."""
    from dmr_pipeline.evaluation.report import render_beside
    from dmr_pipeline.evaluation.results import read_metrics

    artifact = verify_current("evaluation_report", recipe)
    dvc_objects.check(pipeline.find_stage("evaluation_report", pipeline.STAGES), recipe, artifact)
    html = render_beside(DATA_ROOT, recipe)
    return read_metrics(artifact.path), html.resolve()


def _show_verdict(recipe: str) -> None:
    """Whether routing can pay at all; where it cannot, which precision to deploy instead."""
    artifact = verify_current("quantized_checkpoints", recipe)
    facts = LadderFacts.model_validate(artifact.manifest.summary)
    rungs = to_deploy_instead(facts, load_recipe(recipe).precisions.margin)
    where = f" ({', '.join(str(artifact.path / rung) for rung in rungs)})" if rungs else ""
    console.print(f"verdict: {facts.verdict.text}{where}", soft_wrap=True, markup=False, highlight=False)


def _show_report(recipe: str) -> None:
    from dmr_pipeline.evaluation.report import console_table

    metrics, html = _render_report(recipe)
    console.print(console_table(metrics))
    console.print(f"report: {html}", soft_wrap=True)
