"""`dmr route`: a router, or a rule that nobody trained, set to a budget."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dmr_pipeline.cli.common import DEFAULT_RECIPE, RecipeOption, console, progress_lines, user_errors_exit_2
from dmr_pipeline.errors import UserError
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from dmr_pipeline.evaluation.route_calibration import Played

route = typer.Typer(help="A router, or a rule that nobody trained, set to a budget.", no_args_is_help=True)


@route.callback()
def commands() -> None:
    """So that `calibrate` has to be named, as commands of other groups have."""


@route.command()
@user_errors_exit_2
def calibrate(
    recipe: RecipeOption = DEFAULT_RECIPE,
    router: Annotated[
        str,
        typer.Option(
            help="kl_router, grpo_router, or a rule that nobody trained: margin, entropy, stuck, inadmissible, random, evenly,"
            " first, last, ... (router/rules.py)"
        ),
    ] = "grpo_router",
    high_ratio: Annotated[
        float | None,
        typer.Option(help="share of the steps at high precision, at most (of three rungs and more: spend)"),
    ] = None,
    cost: Annotated[
        float | None, typer.Option(help="mean cost of an episode, at most (dearest rung, 16-bit weights = 1)")
    ] = None,
    fresh_games: Annotated[int, typer.Option(min=0, help="games of seeds that no split uses, to check it on")] = 200,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="of the first n steps of an episode at most ceil(ratio * n) at high precision"),
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="draw the precision by the router's probabilities")] = False,
    write: Annotated[Path | None, typer.Option(help="a new folder, for the router so calibrated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Find the threshold of a router, or of a rule that nobody trained, for a budget: on validation games, by playing them; and
    check it on fresh games.

    What was played is kept in data/scratch: the same command goes on where it broke off.
    """
    from dmr_pipeline.artifacts.folders import DATA_ROOT, published
    from dmr_pipeline.cli.stages import verify_current
    from dmr_pipeline.environments.benchmark import benchmark_of
    from dmr_pipeline.evaluation.route_calibration import NAMES, RouteBudget, RouterName
    from dmr_pipeline.evaluation.route_calibration import calibrate as calibrated
    from dmr_pipeline.router.model import SETTINGS_FILE, save_router
    from dmr_pipeline.router.rules import named_at

    if router not in NAMES:
        raise UserError(f"--router {router!r}: name one of {', '.join(NAMES)}")
    is_rule = router not in get_args(RouterName)
    if write is not None and is_rule:
        raise UserError(f"--write is for routers: {router} has no weights, and is deployed by its name and threshold")
    budget, loaded = RouteBudget(high_ratio, cost, sample, strict), load_recipe(recipe)
    if write is not None and write.exists():
        raise UserError(f"--write {write}: there is something already; name a new folder")
    stages = ("benchmark_tasks", "quantized_checkpoints", *([] if is_rule else [router]))
    artifacts = {stage: verify_current(stage, recipe).path for stage in stages}
    benchmark = benchmark_of(loaded.benchmark)
    validation = benchmark.read_tasks(artifacts["benchmark_tasks"], "validation")
    fresh = benchmark.fresh_tasks(fresh_games) if fresh_games else []
    kept = DATA_ROOT / "scratch" / recipe / "route"
    with nullcontext() if as_json else progress_lines(), Bars(console=console, disable=as_json) as progress:
        found, settled = calibrated(loaded, router, budget, artifacts, validation, fresh, kept, progress)
    settings = None if settled is None else settled.settings.model_dump(mode="json")
    named = named_at(router, found.bar) if is_rule else None
    told: dict[str, Any] = {
        "recipe": recipe,
        "router": router,
        "asked_high_ratio": high_ratio,
        "asked_cost": cost,
        "confidence": loaded.evaluation.confidence,
        **found.model_dump(mode="json", exclude={"validation", "fresh"}),
        **_flat("validation", found.validation),
        **_flat("fresh", found.fresh),
        "settings": settings,
        "written": None if write is None else str(write),
        "static": named,
    }
    if write is not None and settled is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        with published(write) as folder:
            save_router(settled, folder)
    if as_json:
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    lines = [f"{router} of {recipe}: threshold {found.threshold:.6g}"]
    lines += [f"  on {found.validation.games} validation games: {_said(found.validation)}"]
    if found.fresh is not None:
        lines += [f"  on {found.fresh.games} fresh games: {_said(found.fresh)}"]
    elif fresh_games:
        lines += [f"  {loaded.benchmark.environment} has no fresh games: its tasks are a list that ends"]
    lines += [f"  brackets: {loaded.evaluation.confidence:.0%} intervals, by game"]
    if settings is not None:
        lines += [f"{SETTINGS_FILE}: {json.dumps(settings)}"]
    if write is not None:
        lines += [f"written to {write}; to deploy it: dmr serve {recipe} --router {write}"]
    if named is not None:
        lines += [f"to deploy it: dmr serve {recipe} --static '{named}'"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _flat(games: str, played: "Played | None") -> dict[str, Any]:
    """Facts as top-level keys; without games each is null."""
    from dmr_pipeline.evaluation.route_calibration import Played

    facts = dict.fromkeys(Played.model_fields) if played is None else played.model_dump(mode="json")
    return {f"{games}_{fact}": value for fact, value in facts.items()}


def _said(played: "Played") -> str:
    ratio, success, cost = played.high_ratio_ci95, played.success_ci95, played.cost_ci95
    return (
        f"high-precision ratio {played.high_ratio:.1%} [{100 * ratio[0]:.1f}, {100 * ratio[1]:.1f}], "
        f"success {played.success:.1%} [{100 * success[0]:.1f}, {100 * success[1]:.1f}], "
        f"cost {played.cost:.3f} [{cost[0]:.3f}, {cost[1]:.3f}]"
    )
