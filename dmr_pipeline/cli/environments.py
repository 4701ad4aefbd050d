"""`dmr env`: checks of the environments."""

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import console, user_errors_exit_2
from dmr_pipeline.errors import UserError

env = typer.Typer(help="Check an environment.", no_args_is_help=True)
verify_env = typer.Typer(help="Check that an environment does what the benchmark's own does.", no_args_is_help=True)
env.add_typer(verify_env, name="verify")

GAMES_HELP = "folder with game.tw-pddl files, at any depth"
GamesOption = Annotated[Path, typer.Option("--games", envvar="ALFWORLD_DATA", help=GAMES_HELP)]
_NAMED = 20
"""Differences that are named at most."""


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

    from dmr_pipeline.environments.alfworld.official import verify as verification

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


WebShopData = Annotated[
    Path | None, typer.Option("--data", envvar="WEBSHOP_DATA", help="folder with the authors' WebShop files")
]


@verify_env.command("webshop")
@user_errors_exit_2
def verify_webshop(
    episodes: Annotated[Path, typer.Option(help="episodes recorded from WebShop, a path or a name in --data")],
    data: WebShopData = None,
) -> None:
    """Replay episodes that were recorded from WebShop, and compare pages, actions, rewards and goals.

    The recorded result lists stand in for our search, whose own first pages are compared apart. Exits with 1 where anything
    differs, but for rewards that differ only through the nouns of titles.
    """
    from rich.progress import track

    from dmr_pipeline.environments.webshop.official import verify as verification

    if data is None:
        raise UserError("no WebShop files: name their folder with --data or $WEBSHOP_DATA")
    recorded = verification.read_episodes(episodes if episodes.is_file() else data / episodes)
    with tempfile.TemporaryDirectory() as folder:
        shop, goals = verification.recorded_shop(data, Path(folder) / "shop")
        compared = verification.compare(shop, goals, track(recorded, description="episodes", console=console))
    for difference in compared.differences[:_NAMED]:
        console.print(
            f"{difference.where}: {difference.kind}: {difference.what}", style="red", soft_wrap=True, markup=False
        )
    if len(compared.differences) > _NAMED:
        console.print(f"and {len(compared.differences) - _NAMED} more")
    table = Table(title=f"{compared.episodes} episodes, {compared.steps} steps", box=box.SIMPLE)
    for column in ("", "different"):
        table.add_column(column, justify="right" if column else "left")
    for kind in verification.KINDS:
        table.add_row(kind, str(sum(difference.kind == kind for difference in compared.differences)))
    table.add_row("reward, through nouns alone", str(len(compared.nouns)))
    console.print(table)
    console.print(f"{compared.same_top_10} of {compared.searches} first pages of our search are the recorded ones")
    console.print(
        f"compared {compared.steps} differences {len(compared.differences)} nouns {len(compared.nouns)} "
        f"top10 {compared.top_10:.4f}"
    )
    if compared.differences or not compared.steps:
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

    from dmr_pipeline.environments.alfworld.generator import generate_game
    from dmr_pipeline.environments.alfworld.official import distributions
    from dmr_pipeline.environments.alfworld.official.packing import read_official

    theirs = read_official("train")
    ours = [generate_game(seed)[0] for seed in track(range(generated), description="games")]
    with console.status("planning every game"):
        measured = distributions.numbers(theirs, ours)
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
    for spread in distributions.shares(theirs, ours):
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
    from dmr_pipeline.environments.alfworld.official.packing import read_official
    from dmr_pipeline.environments.alfworld.planner import shortest_plan

    games = read_official(split)
    explored = [expert_steps(game, step_limit) for game in games]
    won = [steps for steps in explored if steps is not None]
    plans = [shortest_plan(game) for game in track(games, description="planning")]
    found = [plan for plan in plans if plan is not None]
    console.print(
        f"exploring expert: {len(won)} of {len(games)} won in {step_limit} steps ({len(won) / len(games):.1%}), "
        f"{_mean(won)} steps on average",
        soft_wrap=True,
    )
    console.print(
        f"planner: {len(found)} of {len(games)} won, {_mean([len(plan.commands) for plan in found])} steps on average, "
        f"{sum(plan.shortest for plan in found)} plans proven shortest",
        soft_wrap=True,
    )


def _mean(numbers: Sequence[int]) -> str:
    return f"{mean(numbers):.1f}" if numbers else "no"


@experts_env.command("webshop")
@user_errors_exit_2
def experts_webshop(
    recipe: Annotated[str, typer.Option(help="a WebShop recipe: its catalogue and its goals")] = "webshop-tiny",
    split: Annotated[
        Literal["train", "eval", "test"], typer.Option(help="published split: goals 1,500 and on, 500-1,499, 0-499")
    ] = "eval",
    goals: Annotated[int, typer.Option(min=1, help="of the split's goals, the first so many")] = 500,
) -> None:
    """Let the shopping expert, which the tiny agents learn from, shop for goals of a recipe's catalogue."""
    from tempfile import TemporaryDirectory

    from rich.progress import track

    from dmr_pipeline.environments.benchmark import benchmark_of
    from dmr_pipeline.environments.webshop.benchmark import ShoppingBenchmark
    from dmr_pipeline.environments.webshop.catalogue import open_shop
    from dmr_pipeline.environments.webshop.expert import shop_as_expert
    from dmr_pipeline.environments.webshop.goals import PUBLISHED_SPLITS, ShoppingTask
    from dmr_pipeline.environments.webshop.tasks import SHOP_FOLDER
    from dmr_pipeline.recipe.reading import load_recipe

    settings = load_recipe(recipe).benchmark
    match benchmark_of(settings):
        case ShoppingBenchmark() as benchmark:
            pass
        case _:
            raise UserError(f"{recipe}: its benchmark is {settings.environment}, name a WebShop recipe")
    with TemporaryDirectory() as folder:
        all_goals, facts = benchmark.make_shop(Path(folder))
        shop = open_shop(Path(folder) / SHOP_FOLDER)
        chosen = all_goals[PUBLISHED_SPLITS[split]][:goals]
        played = [shop_as_expert(ShoppingTask(goal, shop), settings.step_limit) for goal in track(chosen, "shopping")]
    rewards, steps = zip(*played, strict=True)
    full = sum(reward == 1.0 for reward in rewards) / len(rewards)
    console.print(f"{facts['catalogue']}; nouns: {facts['nouns']}", soft_wrap=True)
    console.print(
        f"shopping expert: full reward for {full:.1%} of {len(rewards)} {split} goals in "
        f"{settings.step_limit} steps, score {100 * mean(rewards):.1f}, {mean(steps):.1f} steps on average",
        soft_wrap=True,
    )
