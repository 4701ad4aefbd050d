"""The command line. Bad input gives one clear line on stderr and exit code 2."""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec

import typer
from rich import box, get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from dmr_pipeline import pipeline, versioning
from dmr_pipeline.artifacts import Artifact, artifact_folder, provenance, sidecar_path, verify
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe, load_recipe, recipe_names

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.official import Pack
    from dmr_pipeline.evaluation.metrics import Metrics

DEFAULT_RECIPE = "alfworld-tiny"
P = ParamSpec("P")

app = typer.Typer(
    help="Dynamic mixed-precision routing of LLM agents: one pipeline from games to the accuracy-cost report.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
console = get_console()  # the one that the stages' progress bars are on: lines then appear above them
errors = Console(stderr=True, soft_wrap=True)

RecipeOption = Annotated[str, typer.Option("--recipe", help="a recipe, the name of a file in recipes/")]
RecipeArgument = Annotated[str, typer.Argument(help="a recipe, the name of a file in recipes/")]


def user_errors_exit_2(command: Callable[P, None]) -> Callable[P, None]:
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error

    return wrapped


@app.command()
@user_errors_exit_2
def run(recipe: RecipeArgument) -> None:
    """Materialise every stage of a recipe that is not up to date, and show the result."""
    loaded = load_recipe(recipe)
    versioning.check_rendered(pipeline.STAGES, recipe_names())
    if _all_done(loaded):
        console.print(f"{recipe}: every stage is up to date, nothing to do.")
    else:
        _materialize(recipe, [stage.name for stage in pipeline.STAGES])
    _show_report(recipe)


@app.command()
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


@app.command()
@user_errors_exit_2
def status(recipe: RecipeOption = DEFAULT_RECIPE) -> None:
    """Show which stages of a recipe are present, stale or missing."""
    table = Table(title=recipe, box=box.SIMPLE)
    for column in ("stage", "hash", "size", "made"):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    table.add_column("state", overflow="fold")
    for name, state, why, artifact in stage_states(load_recipe(recipe)):
        colour = {"present": "green", "stale": "yellow"}.get(state, "red")
        described = ("", "", "")
        if artifact is not None:
            described = (artifact.hash[:7], f"{artifact.size / 1e6:.2f} MB", _when(artifact))
        table.add_row(name, *described, f"[{colour}]{state}[/]" + (f": {why}" if why else ""))
    console.print(table)


@app.command()
@user_errors_exit_2
def render(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit with 1 where dvc.yaml differs")] = False,
) -> None:
    """Write dvc.yaml from the pipeline table and the folder of recipes."""
    if versioning.is_rendered(pipeline.STAGES, recipe_names()):
        console.print(f"{versioning.DVC_FILE} is up to date.")
    elif check:
        errors.print(f"{versioning.DVC_FILE} differs from the pipeline table: run `dmr render`")
        raise typer.Exit(1)
    else:
        versioning.DVC_FILE.write_text(versioning.render(pipeline.STAGES, recipe_names()), encoding="utf-8")
        console.print(f"{versioning.DVC_FILE} written.")


@app.command()
@user_errors_exit_2
def report(
    recipe: RecipeArgument,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Show the accuracy-cost report of a recipe."""
    load_recipe(recipe)
    if as_json:
        metrics, html = _render_report(recipe)
        typer.echo(json.dumps({**metrics, "html": str(html)}, indent=2))
    else:
        _show_report(recipe)


data = typer.Typer(help="Get the official data of a benchmark.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
@user_errors_exit_2
def alfworld(
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", envvar="ALFWORLD_DATA", help="take the games from this folder, which has json_2.1.1/ in it"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="another address of the archive")] = None,
    sha256: Annotated[str | None, typer.Option(help="refuse the archive where it has another checksum")] = None,
) -> None:
    """Get the official ALFWorld games: download them, or take them from a folder, and pack them for `dmr run`.

    The games are those of the ALFWorld project, under the MIT licence.

    The download is about 36 MB, and some ten times that while it is unpacked; the pack that stays is 1.4 MB.

    A download that was cut is resumed by the same command.
    """
    from dmr_pipeline.environments.alfworld import official

    if source is None:
        archive = official.download_games(url or official.ARCHIVE_URL, sha256=sha256)
        console.print(f"archive: sha256 {archive.sha256}", soft_wrap=True)
        packed = official.pack(official.DOWNLOAD_FOLDER, archive=archive)
        shutil.rmtree(official.DOWNLOAD_FOLDER)
    elif url or sha256:
        raise UserError(
            f"--url and --sha256 are for the download, but the games are in {source}: "
            "leave them out, or --from and $ALFWORLD_DATA"
        )
    else:
        packed = official.pack(source)
    _show_pack(packed)


def _show_pack(packed: "Pack") -> None:
    from dmr_pipeline.environments.alfworld.official import OFFICIAL_GAMES, PACK_FOLDER

    table = Table(title="official ALFWorld games", box=box.SIMPLE)
    for column in ("split", "games", "official", "skipped"):
        table.add_column(column, justify="right" if column in ("games", "official") else "left")
    for split, official in OFFICIAL_GAMES.items():
        found = packed.splits.get(split)
        if found is None:
            table.add_row(split, "not there", str(official))
        else:
            skipped = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items() if count)
            table.add_row(split, str(found.games), str(official), skipped or "none")
    console.print(table)
    for split, found in packed.splits.items():
        if found.games != found.official:
            console.print(
                f"{split}: {found.games} games, but the official split has {found.official}",
                style="yellow",
                soft_wrap=True,
            )
    size = sum(path.stat().st_size for path in PACK_FOLDER.iterdir())
    console.print(f"packed: {PACK_FOLDER} ({size / 1e6:.2f} MB)", soft_wrap=True)


env = typer.Typer(help="Check an environment.", no_args_is_help=True)
verify_env = typer.Typer(help="Check that an environment does what the benchmark's own does.", no_args_is_help=True)
app.add_typer(env, name="env")
env.add_typer(verify_env, name="verify")

GamesOption = Annotated[
    Path, typer.Option("--games", envvar="ALFWORLD_DATA", help="folder with game.tw-pddl files, at any depth")
]


@verify_env.command("alfworld")
@user_errors_exit_2
def verify_alfworld(
    games: GamesOption,
    against: Annotated[
        Literal["textworld"] | None,
        typer.Option(help="compare with the official engine, which pip install 'dmr-pipeline\\[alfworld]' brings"),
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="only so many games, drawn by the seed")] = None,
    steps: Annotated[int, typer.Option(min=1, help="commands in a walk, with --against")] = 60,
    seed: Annotated[int, typer.Option(help="decides the sample and the walks")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="at once, with --against")] = 2,
) -> None:
    """Replay the walkthrough of every game; or walk through games at random in our engine and in the official one.

    Exits with 1 where a walkthrough does not win, or the engines differ.
    """
    from rich.progress import track

    from dmr_pipeline.environments.alfworld import verify as verification

    paths = verification.game_files(games)
    if sample is not None:
        paths = sorted(random.Random(seed).sample(paths, min(sample, len(paths))))
    started = time.perf_counter()
    failed = 0
    if against is None:
        for replay in track(verification.replay(paths), description="walkthroughs", total=len(paths)):
            if replay.failure is not None:
                failed += 1
                console.print(f"{replay.path}: {replay.failure}", style="red", soft_wrap=True, markup=False)
        rate = len(paths) / (time.perf_counter() - started)
        console.print(f"{rate:,.0f} games a second, reading their files included")
        console.print(f"games {len(paths)} won {len(paths) - failed} failed {failed}")
    else:
        walked = 0
        compared = verification.compare(paths, steps, seed, processes)
        for comparison in track(compared, description="walks in both engines", total=len(paths)):
            walked += comparison.steps
            for difference in comparison.differences:
                console.print(f"{comparison.path}: {difference}", style="red", soft_wrap=True, markup=False)
            failed += bool(comparison.differences)
        seconds = time.perf_counter() - started
        console.print(f"{walked:,} commands in {seconds:,.0f} s; a walk ends where the engines first differ")
        console.print(f"compared {len(paths)} differences {failed}")
    if failed:
        raise typer.Exit(1)


compare_env = typer.Typer(help="Compare generated tasks with the official ones.", no_args_is_help=True)
env.add_typer(compare_env, name="compare")


@compare_env.command("alfworld")
@user_errors_exit_2
def compare_alfworld(
    generated: Annotated[int, typer.Option(min=1, help="games to generate")] = 1000,
) -> None:
    """Compare generated ALFWorld games with the official train split (`dmr data alfworld` first)."""
    from rich.progress import track

    from dmr_pipeline.environments.alfworld import likeness
    from dmr_pipeline.environments.alfworld.generator import generate_game
    from dmr_pipeline.environments.alfworld.official import read_official

    theirs = read_official("train")
    ours = [generate_game(seed)[0] for seed in track(range(generated), description="games")]
    with console.status("planning every game"):
        measured = likeness.numbers(theirs, ours)
    table = Table(title=f"{len(theirs):,} official games, {len(ours):,} generated: mean ± sd", box=box.SIMPLE)
    for column in ("room", "measure", "official", "generated", "KS distance"):
        table.add_column(column, justify="left" if column in ("room", "measure") else "right")
    room = ""
    for row in measured:
        if row.room != room:
            table.add_section()
        pairs = (f"{average:.1f} ± {deviation:.1f}" for average, deviation in (row.official, row.generated))
        table.add_row("" if row.room == room else row.room, row.measure, *pairs, f"{row.distance:.2f}")
        room = row.room
    console.print(table)
    for spread in likeness.shares(theirs, ours):
        table = Table(title=f"{spread.what}: {spread.distance:.1%} of the games apart", box=box.SIMPLE)
        for column in (spread.what, "official", "generated"):
            table.add_column(column, justify="left" if column == spread.what else "right")
        for name in sorted(spread.official.keys() | spread.generated.keys()):
            table.add_row(name, f"{spread.official.get(name, 0.0):.1%}", f"{spread.generated.get(name, 0.0):.1%}")
        console.print(table)


experts_env = typer.Typer(help="See how well the hand-written experts do.", no_args_is_help=True)
env.add_typer(experts_env, name="experts")


@experts_env.command("alfworld")
@user_errors_exit_2
def experts_alfworld(
    split: Annotated[
        Literal["train", "valid_seen", "valid_unseen"], typer.Option(help="official games (`dmr data alfworld` first)")
    ] = "valid_seen",
    step_limit: Annotated[int, typer.Option(min=1, help="steps that the exploring expert may take")] = 50,
) -> None:
    """Let the exploring expert, which knows what it has seen, and the planner, which knows all, play official games."""
    from rich.progress import track

    from dmr_pipeline.environments.alfworld.generator import expert_steps
    from dmr_pipeline.environments.alfworld.official import read_official
    from dmr_pipeline.environments.alfworld.planner import shortest_plan

    games = read_official(split)
    explored = [expert_steps(game, step_limit) for game in games]
    won = [steps for steps in explored if steps is not None]
    plans = [shortest_plan(game) for game in track(games, description="planning")]
    found = [plan for plan in plans if plan is not None]
    console.print(
        f"exploring expert: {len(won)} of {len(games)} won in {step_limit} steps ({len(won) / len(games):.1%}), "
        f"{mean(won):.1f} steps on average",
        soft_wrap=True,
    )
    console.print(
        f"planner: {len(found)} of {len(games)} won, {mean(len(plan.commands) for plan in found):.1f} steps on average, "
        f"{sum(plan.shortest for plan in found)} plans proven shortest",
        soft_wrap=True,
    )


bench = typer.Typer(help="Measure how quick a part is.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("env")
@user_errors_exit_2
def bench_env(
    games: GamesOption,
    sample: Annotated[int, typer.Option(min=1, help="games timed in both engines, drawn at random")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="commands in a walk")] = 30,
) -> None:
    """Time our ALFWorld engine beside the official one, and see what many environments take.

    The official engine is left out where it is not installed (pip install 'dmr-pipeline\\[alfworld]').
    """
    from rich.progress import track

    from dmr_pipeline.environments.alfworld import bench as benchmark
    from dmr_pipeline.environments.alfworld import stock
    from dmr_pipeline.environments.alfworld.game import read_game
    from dmr_pipeline.environments.alfworld.store import to_json
    from dmr_pipeline.environments.alfworld.verify import game_files

    paths = game_files(games)
    some = random.Random(0).sample(paths, min(1000, len(paths)))
    timed = some[:sample]
    pairs = list(
        track(
            benchmark.timings(timed, steps, stock=stock.is_installed()),
            description="the same walks in both engines",
            total=len(timed),
        )
    )
    loaded = [read_game(path) for path in track(some, description="games for many environments")]
    packed = [to_json(game) for game in loaded]
    table = Table(title=f"ALFWorld: medians over {len(timed)} games, {steps} commands each", box=box.SIMPLE)
    for column in ("", "ours", "official engine", "times faster"):
        table.add_column(column, justify="right" if column else "left")
    for name, field in (("load a game file", "load"), ("reset", "reset"), ("step", "step")):
        ours = median(getattr(mine, field) for mine, _ in pairs)
        theirs = [getattr(other, field) for _, other in pairs if other is not None]
        table.add_row(
            name, _duration(ours), *([_duration(median(theirs)), f"{median(theirs) / ours:,.0f}"] if theirs else [])
        )
    table.add_row("load a packed game", _duration(median(map(benchmark.packed_load_seconds, packed[:sample]))))
    console.print(table)
    if not stock.is_installed():
        console.print(
            "left out: the official engine, which is not installed (pip install 'dmr-pipeline[alfworld]')", markup=False
        )
    console.print("A reset includes the first admissible commands, a step those that follow it.")
    megabytes = benchmark.memory_bytes(packed, 1000) / 1e6
    console.print(f"1,000 live environments, {len(packed):,} games: {megabytes:,.0f} MB")
    for environments in (1, 10, 100, 1000):
        rate = benchmark.steps_a_second(loaded, environments)
        console.print(f"{environments:5,} environments in a process: {rate:8,.0f} steps a second")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def _materialize(recipe: str, stages: list[str], *, force: bool = False) -> None:
    os.environ.setdefault("TQDM_DELAY", "1")  # bars of less than a second, as when a tiny model is loaded, are noise
    from dmr_pipeline.defs import runs  # Dagster takes a second to import

    with _progress_lines():
        runs.materialize(pipeline.STAGES, recipe, stages, force=force)


@contextmanager
def _progress_lines() -> Iterator[None]:
    """What the package logs goes to the terminal, a line each."""
    handler = RichHandler(console=console, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S")
    package = logging.getLogger("dmr_pipeline")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def stage_states(recipe: Recipe) -> Iterator[tuple[str, str, str, Artifact | None]]:
    """Each stage's name, state, reason in a few words, and artefact where there is a valid one."""
    present: dict[str, str] = {}
    for stage in pipeline.STAGES:
        folder = artifact_folder(stage.name, recipe.name)
        try:
            artifact = verify(folder)
        except UserError as error:
            yield stage.name, "damaged" if folder.exists() else "missing", str(error) if folder.exists() else "", None
            continue
        waiting = [name for name in stage.inputs if name not in present]
        wanted = provenance(stage, recipe, {name: present.get(name, "") for name in stage.inputs})
        difference = f"not up to date: {', '.join(waiting)}" if waiting else wanted.difference(artifact.manifest)
        if difference is None:
            present[stage.name] = artifact.hash
        yield stage.name, "present" if difference is None else "stale", difference or "", artifact


def _all_done(recipe: Recipe) -> bool:
    """Every artefact is there, valid, current, and recorded in DVC."""
    return all(
        state == "present" and artifact is not None and versioning.is_committed(stage, recipe.name, artifact)
        for stage, (_, state, _, artifact) in zip(pipeline.STAGES, stage_states(recipe), strict=True)
    )


def _when(artifact: Artifact) -> str:
    sidecar = sidecar_path(artifact.path)
    if not sidecar.is_file():
        return "elsewhere"
    finished = datetime.fromisoformat(json.loads(sidecar.read_text(encoding="utf-8"))["finished"])
    return f"{finished.astimezone():%Y-%m-%d %H:%M}"


def _render_report(recipe: str) -> tuple["Metrics", Path]:
    """The metrics of the evaluation, and the HTML file, which is no artefact since it shows measured times."""
    from dmr_pipeline.evaluation.report import render_html

    folder = verify(artifact_folder("evaluation_report", recipe)).path
    sidecar = sidecar_path(folder)
    html = folder.parent / "report.html"
    render_html(folder, sidecar if sidecar.is_file() else None, html)
    metrics: Metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics, html.resolve()


def _show_report(recipe: str) -> None:
    from dmr_pipeline.evaluation.report import console_table

    metrics, html = _render_report(recipe)
    console.print(console_table(metrics))
    console.print(f"report: {html}", soft_wrap=True)
