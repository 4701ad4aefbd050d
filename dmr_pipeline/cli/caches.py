"""`dmr bench cache`: one KV cache for all precisions beside one each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Table

from dmr_pipeline.cli.common import RecipeArgument, console, progress_lines, user_errors_exit_2, write_record
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:  # `dmr --help` needs none of it
    from dmr_pipeline.evaluation.caches import CacheRecord


@user_errors_exit_2
def bench_cache(
    recipe: RecipeArgument,
    games: Annotated[int, typer.Option(min=1, help="of the split, the first ones; all where it has fewer")] = 120,
    split: Annotated[Literal["router_train", "validation"], typer.Option(help="whose games")] = "validation",
    rungs: Annotated[
        str | None, typer.Option(help="names, dearest first, with commas between; by default those that are routed")
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="episodes that are acted on at once")] = 16,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="by default the recipe's")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Compare precisions.cache: separate with shared, on a ladder that is made already: success on the same games, tokens read,
    cost, memory and time, of each end of the route alone, mixed at random, in a cascade, by the oracle and checked."""
    from dmr_pipeline.cli.stages import verify_current
    from dmr_pipeline.environments.benchmark import benchmark_of
    from dmr_pipeline.evaluation.caches import CONFIDENCE, CacheRecord, compare_caches
    from dmr_pipeline.rollout.playing import Rollouts

    loaded = load_recipe(recipe)
    if device is not None:
        loaded = loaded.model_copy(update={"runtime": loaded.runtime.model_copy(update={"device": device})})
    checkpoints, tasks = (verify_current(stage, recipe).path for stage in ("quantized_checkpoints", "benchmark_tasks"))
    rollouts = Rollouts.load(checkpoints, loaded, None if rungs is None else rungs.split(","))
    some = benchmark_of(loaded.benchmark).read_tasks(tasks, split)[:games]
    with progress_lines():
        played, compared = compare_caches(
            rollouts,
            some,
            min(at_once, len(some)),
            loaded.evaluation.seed,
            lambda row: console.print(f"{row.policy}, {row.cache}: {row.success:.1%}", highlight=False),
        )
    record = CacheRecord(
        recipe=recipe,
        split=split,
        games=len(some),
        at_once=min(at_once, len(some)),
        device=str(rollouts.device),
        confidence=CONFIDENCE,
        played=played,
        compared=compared,
    )
    if json is not None:
        write_record(json, record)
    console.print(_played(record))
    console.print(_compared(record))
    console.print(
        f"{record.games} games of {split}, {record.at_once} at once. tokens: read in an episode. cost: in the ladder's unit. MB:"
        " keys and values that were written, of all episodes at once. ms: of a step of one episode, its environment included; on"
        " a CPU one thread's CPU time. difference: of success on the same games, points, with its"
        f" {record.confidence:.0%} interval.",
        highlight=False,
    )


def _played(record: "CacheRecord") -> Table:
    table = _table(f"{record.recipe}, {' and '.join(_CACHES.values())}", "tokens", "cost", "MB", "ms", first="success")
    for row in record.played:
        table.add_row(
            f"{row.policy}, {_CACHES[row.cache]}",
            f"{row.success:.1%}",
            f"{row.tokens:,.0f}",
            f"{row.cost:.3f}",
            f"{row.cache_bytes / 1e6:.1f}",
            f"{1000 * row.seconds:.1f}",
        )
    return table


def _compared(record: "CacheRecord") -> Table:
    table = _table("with one cache, of what it is with one each", "tokens", "cost", "MB", "ms", first="difference")
    for its in record.compared:
        table.add_row(
            its.policy,
            f"{100 * its.success:+.1f} ({100 * its.low:+.1f} to {100 * its.high:+.1f})",
            *(f"{share:.0%}" for share in (its.tokens, its.cost, its.cache_bytes, its.seconds)),
        )
    return table


_CACHES = {"separate": "one each", "shared": "one cache"}


def _table(title: str, *columns: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("policy", overflow="fold")
    for column in (first, *columns):
        table.add_column(column, justify="right", no_wrap=True)
    return table
