"""Policies play games: a row an episode, kept from one evaluation to the next."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import polars as pl
from pydantic import JsonValue
from rich.progress import Progress

from dmr_pipeline.artifacts.manifest import MANIFEST, Manifest
from dmr_pipeline.environments.base import Task
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.metrics import EPISODES
from dmr_pipeline.evaluation.results import checking_name
from dmr_pipeline.evaluation.transcripts import KEPT, SHOWN, kept_rows
from dmr_pipeline.precision.acting import spend_by_bytes
from dmr_pipeline.precision.frontier import clearly_beaten
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.failures import FAILURES
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import Router

log = logging.getLogger(__name__)

PLAYED = pl.Schema({**EPISODES, "outgrown": pl.Boolean()})
"""As `metrics.EPISODES`; `outgrown`: there was no room for another step in the transcript, so the episode ended as lost."""


@dataclass(frozen=True)
class Entry:
    """One policy as the report lists it."""

    name: str
    kind: str
    policy: RoutingPolicy
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    """All that tells the policy from others of its name, such as its threshold: its episodes are kept under that."""
    draws: int = 1
    router: PassBytes | None = None
    """What a pass of its router reads, where it has one."""
    variant_of: str = ""
    """Policy that it is compared with, as in `metrics.EPISODES`."""


@dataclass(frozen=True)
class Arena:
    """With what policies play."""

    rollouts: Rollouts
    bits: Mapping[str, float]
    """Rung -> its bits per weight, embeddings and scales included."""
    seed: int
    """Of actions that are drawn at a temperature."""

    @classmethod
    def load(cls, checkpoints: Path, recipe: Recipe, seed: int, rungs: Sequence[str] | None = None) -> "Arena":
        """As `Rollouts.load`."""
        bits = {rung.name: rung.bits_per_weight for rung in read_ladder(checkpoints).rungs}
        return cls(Rollouts.load(checkpoints, recipe, rungs), bits, seed)

    def with_step_limit(self, steps: int) -> "Arena":
        """The same with another one."""
        return replace(self, rollouts=replace(self.rollouts, step_limit=steps))


def evaluate(
    entries: Sequence[Entry],
    arena: Arena,
    games: Sequence[Task],
    progress: Progress,
    note: str = "",
    kept: KeptTables | None = None,
    known: Known | None = None,
    shown: dict[str, pl.DataFrame] | None = None,
) -> dict[str, pl.DataFrame]:
    """Rows of `PLAYED` for each policy, by its name. They are played side by side, in this order.

    Args:
        kept: where each draw of a policy is looked for before it is played, and written as soon as the policy has played.
        known: as in `Rollouts.play_each`.
        shown: gets the steps of each policy of the kinds `transcripts.SHOWN`, rows of `transcripts.KEPT`.
    """
    found: dict[tuple[str, int], pl.DataFrame] = {}
    missing: list[tuple[Entry, list[int]]] = []
    plays: list[PolicyRuns] = []
    for entry in entries:
        tables = {draw: kept.read(**_facts(entry, draw)) if kept else None for draw in range(entry.draws)}
        if shown is not None and entry.kind in SHOWN:
            steps = kept.read(**_facts_of_steps(entry)) if kept else None
            if steps is None:
                tables[0] = None
            else:
                shown[entry.name] = steps
        found |= {(entry.name, draw): table for draw, table in tables.items() if table is not None}
        draws = [draw for draw, table in tables.items() if table is None]
        total = entry.draws * len(games)
        bar = progress.add_task(entry.name + note, total=total, completed=total - len(draws) * len(games))
        if draws:
            missing.append((entry, draws))
            # The draws of a game at the same time: they begin alike, and what one has read the others copy.
            runs = [RolloutRequest(game, draw) for game in games for draw in draws]
            plays.append(PolicyRuns(entry.policy, runs, partial(progress.advance, bar)))

    def on_played(index: int, played: list[Trajectory], _: Timings) -> None:
        entry, draws = missing[index]
        for draw in draws:
            rows = [_row(entry, trajectory, arena) for trajectory in played if trajectory.run.member == draw]
            table = pl.DataFrame(rows, schema=PLAYED, orient="row")
            found[entry.name, draw] = table
            if kept is not None:
                kept.write(table, **_facts(entry, draw))
        if shown is not None and entry.kind in SHOWN:
            shown[entry.name] = kept_rows([t for t in played if t.run.member == 0], entry.name)
            if kept is not None:
                kept.write(shown[entry.name], **_facts_of_steps(entry))

    if kept is not None and len(missing) < len(entries):
        names = [entry.name for entry in entries if all(entry is not other for other, _ in missing)]
        log.info("not played again%s: %s", note, ", ".join(names))
    if plays:
        arena.rollouts.play_each(plays, arena.seed, on_played, known)
    return {entry.name: pl.concat([found[entry.name, draw] for draw in range(entry.draws)]) for entry in entries}


def rung_alone(checkpoints: Path, recipe: Recipe, rung: str, games: Sequence[Task], kept: KeptTables) -> pl.DataFrame:
    """Rows of `PLAYED` for one rung that always acts; it is in memory while it plays, and not after."""
    entry = Entry(f"always_{rung}", "rung", SinglePrecision(rung))
    kept = kept.under(**acting_facts(checkpoints, recipe, (rung,)))
    table = kept.read(**_facts(entry, 0))
    if table is not None:
        log.info("not played again: %s", entry.name)
        return table
    arena = Arena.load(checkpoints, recipe, recipe.evaluation.seed, (rung,))
    with Bars() as progress:
        return evaluate([entry], arena, games, progress, kept=kept)[entry.name]


def checking_alone(
    checkpoints: Path, recipe: Recipe, pair: tuple[str, str], games: Sequence[Task], kept: KeptTables
) -> pl.DataFrame:
    """Rows of `PLAYED` for a rung that only checks what another one drafts; both are in memory while they play, and not after.

    Args:
        pair: the rung that checks, and the one that drafts.
    """
    rung, ladder = pair[0], read_ladder(checkpoints)
    route = ladder.route
    entry = checking_entry(pair, pair, route, recipe.precisions.speculative)
    kept = kept.under(**acting_facts(checkpoints, recipe, pair))
    arena = Arena.load(checkpoints, recipe, recipe.evaluation.seed, pair)
    with Bars() as progress:
        played = evaluate([entry], arena, games, progress, kept=kept)[entry.name]
    # What is counted for the dearest routed rung was counted for the dearest of the pair.
    sizes = {one.name: one.pass_bytes for one in ladder.rungs}
    spend = spend_by_bytes({one: sizes[one] for one in route})
    steps, high, routed = pl.col("steps"), rung == route[0], rung in route
    at = pl.concat_list([steps * (rung == one) for one in route]) if routed else pl.lit([], pl.List(pl.Int64()))
    return played.with_columns(
        variant_of=pl.lit(entry.variant_of),
        steps_at=at,
        high_steps=steps * high,
        high_tokens=pl.col("high_tokens") * high,
        spend=steps * spend.get(rung, 0.0),
    ).cast(PLAYED)


def checking_entry(
    pair: tuple[str, str], rungs: Sequence[str], route: Sequence[str], settings: Speculative | None
) -> Entry:
    """A rung acts alone and only checks what a cheaper one drafts.

    Args:
        pair: the rung that checks, and the one that drafts.
        rungs: that are loaded, dearest first.
        route: the routed ones: what the rung is called where it writes itself depends on them.
        settings: of the recipe.
    """
    rung, drafter = pair
    alone = {route[-1]: "always_low", route[0]: "always_high"}
    return Entry(
        checking_name(rung, drafter),
        "speculative",
        SinglePrecision(rung, rungs, drafter),
        (settings or Speculative()).model_dump(mode="json"),
        variant_of=alone.get(rung, f"always_{rung}"),
    )


def static_beside_the_route(
    checkpoints: Path, recipe: Recipe, games: Sequence[Task], kept: KeptTables
) -> list[pl.DataFrame]:
    """Rows of `PLAYED` of what needs no router and has rungs that are not routed, one policy after another: each such rung alone,
    but for those that are beaten clearly; and the rung that the verdict would deploy, where it had best check drafts."""
    ladder = read_ladder(checkpoints)
    verdict = ladder.verdict
    left_out = {*ladder.route, *clearly_beaten(ladder.rungs)}
    names = [rung.name for rung in recipe.precisions.ladder if rung.name not in left_out]
    frames = [rung_alone(checkpoints, recipe, name, games, kept) for name in names]
    pair = (verdict.deploy, verdict.drafter)
    if verdict.drafter and pair not in pairwise(ladder.route):
        frames.append(checking_alone(checkpoints, recipe, pair, games, kept))
    return frames


def acting_facts(checkpoints: Path, recipe: Recipe, rungs: Sequence[str]) -> dict[str, JsonValue]:
    """All that the episodes of any policy depend on, but for its games: the rungs that act and not the whole ladder, so that a
    rung that is added to it changes nothing.

    Args:
        checkpoints: artifact of the stage `quantized_checkpoints`.
        rungs: that act, dearest first.
    """
    precisions, counted = recipe.precisions, {"prompt_lookup", "kernels"} | ({"cache"} if len(rungs) > 1 else set())
    return {
        **precisions.model_dump(mode="json", include=counted),  # nothing, by their defaults
        "rungs": [[rung, content(checkpoints, f"{rung}/")] for rung in rungs],
        "tokenizer": content(checkpoints, "tokenizer/"),
        "unit_bytes": read_ladder(checkpoints).unit_bytes,
        "cache_bits": precisions.cache_bits,
        "step_limit": recipe.benchmark.step_limit,
        "agent": recipe.agent.model_dump(mode="json", exclude={"pretrained", "training"}),
        "seed": recipe.evaluation.seed,
    }


def router_content(artifact: Path, router: Router, drafts: Speculative | None) -> dict[str, JsonValue]:
    """All of a router's artifact that its episodes depend on; and how drafts are written, where it decides after them.

    Args:
        drafts: `precisions.speculative`.
    """
    found = content(artifact, f"{ROUTER_FOLDER}/")
    if router.settings.decides == "after" and drafts is not None:
        found["drafts"] = drafts.model_dump(mode="json")
    return found


def content(artifact: Path, prefix: str = "") -> dict[str, JsonValue]:
    """Files of an artifact, which was verified, with such a path in it -> their md5."""
    manifest = Manifest.model_validate_json((artifact / MANIFEST).read_bytes())
    return {path.removeprefix(prefix): md5 for path, md5 in manifest.files.items() if path.startswith(prefix)}


def _facts(entry: Entry, draw: int) -> dict[str, JsonValue]:
    columns: list[JsonValue] = [*PLAYED.names()]
    return {
        "policy": entry.name,
        "kind": entry.kind,
        "parameters": dict(entry.parameters),
        "draw": draw,
        "columns": columns,
    }


def _facts_of_steps(entry: Entry) -> dict[str, JsonValue]:
    columns: list[JsonValue] = [*KEPT.names()]
    return {**_facts(entry, 0), "steps": columns}


def _row(entry: Entry, trajectory: Trajectory, arena: Arena) -> tuple[object, ...]:
    rollouts = arena.rollouts
    task, steps = trajectory.run.task, trajectory.steps
    routed = len(rollouts.route) > 1
    dearest = rollouts.acting.dearest if routed else None
    cost = rollouts.cost(trajectory, entry.router)
    return (
        entry.name,
        entry.kind,
        entry.variant_of,
        trajectory.run.member,
        task.task_id,
        task.task_type,
        trajectory.success,
        trajectory.reward,
        len(steps),
        sum(step.precision == dearest for step in steps),
        trajectory.tokens_read,
        sum(reading.tokens for step in steps for rung, reading in step.readings if rung == dearest),
        sum(step.reading.passes for step in steps),
        sum(step.drafted for step in steps),
        sum(step.accepted for step in steps),
        [sum(step.precision == rung for step in steps) for rung in rollouts.route] if routed else [],
        sum(rollouts.acting.spend[step.precision] for step in steps) if routed else 0.0,
        sum(arena.bits[step.precision] for step in steps),
        sum(before.precision != after.precision for before, after in pairwise(steps)),
        cost.total,
        cost.cache,
        *(sum(step.failure == failure for step in steps) for failure in FAILURES),
        trajectory.outgrown,
    )
