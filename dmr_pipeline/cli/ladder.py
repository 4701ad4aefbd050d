"""`dmr ladder`: what each precision costs and wins by itself, and whether routing between them can pay."""

import json
from typing import Annotated

import typer
from rich import box, filesize
from rich.table import Table

from dmr_pipeline import pipeline
from dmr_pipeline.cli.common import RecipeArgument, console, progress_lines, user_errors_exit_2
from dmr_pipeline.cli.stages import up_to_date, verify_current
from dmr_pipeline.precision.ladder import LadderFacts, RungPlayed, to_deploy_instead
from dmr_pipeline.recipe.reading import load_recipe

STAGE = "quantized_checkpoints"
MADE_FOR_IT = ["benchmark_tasks", "agent", STAGE]


@user_errors_exit_2
def ladder(
    recipe: RecipeArgument,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON and nothing else, of a ladder that is made already")
    ] = False,
) -> None:
    """Make the precision ladder of a recipe where it is not up to date, and show what each rung costs and wins: no router is
    trained."""
    loaded = load_recipe(recipe)
    if not as_json and not up_to_date(loaded, MADE_FOR_IT):
        from dmr_pipeline.defs import runs  # Dagster takes a second to import

        with progress_lines():
            runs.materialize(pipeline.STAGES, recipe, MADE_FOR_IT)
    artifact = verify_current(STAGE, recipe)
    facts = LadderFacts.model_validate(artifact.manifest.summary)
    if as_json:
        typer.echo(json.dumps(facts.model_dump(mode="json"), indent=2))
        return
    console.print(ladder_table(facts, recipe))
    console.print(facts.verdict.text, highlight=False, markup=False)
    if rungs := to_deploy_instead(facts, loaded.precisions.margin):
        weights = " and ".join(str(artifact.path / rung) for rung in rungs)
        console.print(f"Its weights: {weights}", highlight=False, markup=False, soft_wrap=True)


def ladder_table(facts: LadderFacts, title: str) -> Table:
    """A row a rung, the dearest first; within 80 columns."""
    table = Table(
        title=title,
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        caption=_caption(facts),
        caption_justify="left",
    )
    table.add_column("precision", overflow="fold")
    for column in ("stored", "bits", "KL", "success", "cost", "cache"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("beaten by", overflow="fold")
    for rung in facts.rungs:
        table.add_row(*_row(rung), style="dim" if rung.dominated_by else None)
    for one in facts.checked:
        name = f"{facts.verdict.deploy} checks {one.drafter}"
        table.add_row(name, "", "", "", f"{one.validation_success:.1%}", f"{one.cost:.3f}", f"{one.cost_cache:.3f}", "")
    return table


def _row(rung: RungPlayed) -> tuple[str, ...]:
    interval = f"{100 * rung.success_low:.0f}-{100 * rung.success_high:.0f}"
    return (
        rung.name,
        filesize.decimal(rung.bytes),
        f"{rung.bits_per_weight:.2f}",
        f"{rung.kl_to_float:.3f}",
        f"{rung.validation_success:.1%} ({interval})",
        f"{rung.cost:.3f}",
        f"{rung.cost_cache:.3f}",
        rung.dominated_by,
    )


def _stopped(facts: LadderFacts) -> str:
    """Who has played fewer games, being beaten."""
    played = [f"{rung.name} on {rung.games}" for rung in facts.rungs if rung.games is not None]
    return f" ({', '.join(played)})" if played else ""


def _parse_failures(facts: LadderFacts) -> str:
    """Whose actions were none, and at how many of its steps; nothing where all could be read."""
    failing = [f"{rung.name} {rung.parse_failures:.1%}" for rung in facts.rungs if rung.parse_failures]
    return f" Actions that are not as the prompt wants them, of the steps: {', '.join(failing)}." if failing else ""


def _caption(facts: LadderFacts) -> str:
    return (
        f"Success on {facts.games} validation games{_stopped(facts)}, {facts.confidence:.0%} intervals. bits: a weight, as"
        " stored. KL: to the float model, nats an action. cost: bytes that an episode's forward passes read, in episodes of"
        f" {facts.rungs[0].name} with 16-bit weights at a pass a token; cache: the part of it that is keys and values."
        " beaten by: another that wins as much for less, or more for no more; who has none is on the front."
        + (" checks: corrects what another one drafts, so that its own actions are taken." if facts.checked else "")
        + _parse_failures(facts)
    )
