"""`dmr sensitivity`: at which steps high precision is needed, and what tells so."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import RecipeArgument, console, progress_lines, user_errors_exit_2
from dmr_pipeline.errors import UserError
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:  # `dmr --help` needs none of it
    from dmr_pipeline.evaluation.consequence import Spent
    from dmr_pipeline.router.consequence_analysis import Estimate, Part

sensitivity = typer.Typer(help="At which steps high precision is needed, and what tells so.", no_args_is_help=True)
Acting = Literal["low", "high", "mixed", "kl_router", "grpo_router"]


@sensitivity.command()
@user_errors_exit_2
def analyse(
    recipe: RecipeArgument,
    games: Annotated[int, typer.Option(min=1, help="of the split, the first ones; all where it has fewer")] = 100,
    split: Annotated[Literal["router_train", "validation"], typer.Option(help="whose games")] = "router_train",
    behaviour: Annotated[
        Acting, typer.Option(help="who plays the episodes: the cheapest or the dearest rung, all mixed, or a router")
    ] = "kl_router",
    continuations: Annotated[
        str, typer.Option(help="who goes on after a step was swapped, with commas between")
    ] = "low,high,kl_router",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Swap the precision of single steps, play on, and show how well the divergences, the draft's margin and others predict
    where that decides the episode. What was played is kept in data/scratch: the same command goes on where it broke off."""
    from dmr_pipeline.artifacts.folders import DATA_ROOT
    from dmr_pipeline.cli.stages import verify_current
    from dmr_pipeline.environments.benchmark import benchmark_of
    from dmr_pipeline.evaluation.consequence import ROUTERS, label_games
    from dmr_pipeline.rollout.playing import Rollouts
    from dmr_pipeline.router.consequence_analysis import analyse as analysed
    from dmr_pipeline.router.consequence_analysis import one_swap

    on = _players(continuations)
    loaded = load_recipe(recipe)
    stages = ["benchmark_tasks", "quantized_checkpoints", *(name for name in ROUTERS if name in (behaviour, *on))]
    artifacts = {stage: verify_current(stage, recipe).path for stage in stages}
    rollouts = Rollouts.load(artifacts["quantized_checkpoints"], loaded)
    some = benchmark_of(loaded.benchmark).read_tasks(artifacts["benchmark_tasks"], split, games)
    folder = DATA_ROOT / "scratch" / recipe / "consequence"
    with nullcontext() if as_json else progress_lines(), Bars(console=console, disable=as_json) as progress:
        bar = progress.add_task(f"games by {behaviour}, labelled", total=len(some))
        branches = progress.add_task("branches played", total=None)
        table, spent = label_games(
            rollouts,
            loaded,
            some,
            behaviour,
            on,
            artifacts,
            folder,
            lambda n: progress.advance(bar, n),
            lambda n: progress.advance(branches, n),
        )
        progress.update(branches, total=1, completed=1)
    path = folder / "steps.parquet"
    table.write_parquet(path)
    parts, swap = analysed(table, loaded.evaluation.seed), one_swap(table, loaded.evaluation.seed)
    told: dict[str, Any] = {
        "recipe": recipe,
        "split": split,
        "games": len(some),
        "behaviour": behaviour,
        "continuations": on,
        "steps": str(path),
        "tokens": int(table["high_tokens"].sum()) + int(table["low_tokens"].sum()),
        **spent.model_dump(),
        "one_swap": None if swap is None else swap.model_dump(mode="json"),
        "parts": [part.model_dump(mode="json") for part in parts],
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    for part in parts:
        _show(part)
    if swap is not None:
        console.print(
            f"An oracle that swaps at most one step a game: the cheapest rung alone wins {_number(swap.won)} of {swap.games}"
            f" games, with one step at the dearest {_number(swap.won_with_one)}, at a ratio of {swap.ratio:.3f}.\n",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    _say(told, spent, path)


def _players(names: str) -> list[Acting]:
    """
    Raises:
        UserError: one that there is not.
    """
    found: list[Acting] = []
    for name in names.split(","):
        known = [acting for acting in get_args(Acting) if acting == name.strip()]
        if not known:
            raise UserError(f"--continuations: {name.strip()!r} is none of {', '.join(get_args(Acting))}")
        found += known
    return list(dict.fromkeys(found))


def _show(part: "Part") -> None:
    title = f"{part.precision}, on under {part.continuation}; {part.among}, {part.where}"
    said = f"{part.steps} steps: needed {part.needed}, harmful {part.harmful}"
    if part.refusal is not None:
        console.print(f"{title}: {part.refusal}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(
        title=title, caption=said, box=box.SIMPLE, pad_edge=False, collapse_padding=True, caption_justify="left"
    )
    table.add_column("predictor", overflow="fold")
    for column in ("AUROC", "average precision", "rank correlation"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in part.predictions:
        numbers = (row.auroc, row.average_precision, row.rank_correlation)
        table.add_row(row.predictor, *(_number(estimate) for estimate in numbers))
    console.print(table)


def _number(estimate: "Estimate") -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _say(told: dict[str, Any], spent: "Spent", path: Path) -> None:
    console.print(
        f"{told['games']} games of {told['split']}, played by {told['behaviour']}. needed: high precision wins and low loses;"
        " harmful: the other way round. AUROC and average precision are for needed; the rank correlation (Spearman's) is with"
        " high's success minus low's. 95% intervals: games resampled.\n"
        f"Took {spent.seconds:,.0f} s: {spent.actions:,} actions, {spent.looked_up / max(spent.actions, 1):.0%} of them looked"
        f" up; the branches read {told['tokens']:,} tokens, those looked up included. Every step: {path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
