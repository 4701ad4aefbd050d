"""What each stage does, in tokens, and what it holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dmr_pipeline.plan.episodes import Episodes
from dmr_pipeline.plan.shapes import RungShape, weights_held
from dmr_pipeline.plan.speed import Speed
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Finetune
from dmr_pipeline.recipe.evaluation import RuleName
from dmr_pipeline.recipe.precisions import GROUPED, Gptq
from dmr_pipeline.stages.quantized_checkpoints import KL_EPISODES_AT_ONCE
from dmr_pipeline.training.train import TOKENS_AT_ONCE

PLAYED_THRESHOLDS = 3
"""Of at most five that a threshold is looked for by (router/calibration.py)."""
SAME_BEFORE = {"trajectories": 0.13, "kl_router": 0.5, "grpo_router": 0.25, "evaluation_report": 0.5}
"""Share of the actions that are looked up, since another policy of the stage has met the same transcript: as the demo's recipes
were measured."""
DIFFERING = 0.4
"""Of the steps, those at which two rungs act otherwise, as the demo was measured."""
TIMED_POLICIES, TIMED_GAMES = 6, 10
"""Played one at a time at the end of the evaluation."""
PLAYED_TIMES = 4
"""That a precision plays a test game in the evaluation: of about eight policies that it has a part in, half of whose actions are
looked up."""
STEP_BYTES = 1500
"""Of a step of a trajectory in tables: texts and numbers, compressed."""
PROCESS_BYTES = 60_000_000
"""Of each process that plays, what it changes of the memory that it was forked with."""


@dataclass(frozen=True)
class Assumptions:
    """What the estimate rests on."""

    success: float
    """Of games that the agent wins."""
    success_from: Literal["said", "agent", "nothing"]
    """Whether it was said; is what the agent's artifact says of validation games; or is like that of others."""
    episodes: Episodes
    speed: Speed
    processes: int
    """That play at once, each on a core of its own."""
    program_bytes: int
    """Of the program with its libraries, before anything is loaded."""


@dataclass(frozen=True)
class Need:
    """Of one stage."""

    stage: str
    memory: int
    """Bytes of the machine's memory at its peak."""
    gpu: int
    """Bytes of the GPU's memory at its peak; 0 on a CPU."""
    disk: int
    """Bytes of the artifact, and of what is kept meanwhile."""
    seconds: float


@dataclass(frozen=True)
class Work:
    """Tokens that a stage goes through, all processes together."""

    read: float = 0.0
    written: float = 0.0
    learned: float = 0.0
    steps: float = 0.0
    """Of environments."""
    compared: float = 0.0
    """At which the distributions of two precisions are compared."""
    rounded: float = 0.0
    """Columns of weights, by GPTQ."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.read + other.read,
            self.written + other.written,
            self.learned + other.learned,
            self.steps + other.steps,
            self.compared + other.compared,
            self.rounded + other.rounded,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(*(value * times for value in vars(self).values()))


def seconds(work: Work, assumed: Assumptions) -> float:
    """That the work takes. Learning and rounding are one process's."""
    speed = assumed.speed
    played = (
        work.read / speed.read
        + work.written / speed.write
        + work.steps * assumed.episodes.environment_seconds
        + (work.compared / speed.compare if speed.compare else 0.0)
    ) / assumed.processes
    rounded = work.rounded / speed.round if speed.round else 0.0
    return played + rounded + (work.learned / speed.learn if work.learned else 0.0)


@dataclass(frozen=True)
class Model:
    """The agent's, as it acts."""

    parameters: int
    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    dtype: torch.dtype
    stored: torch.dtype
    cached_numbers: int
    """Of keys and values, a token."""
    capacity: int
    """Tokens of a transcript, at most."""
    rungs: Mapping[str, RungShape]
    """Dearest first."""
    on_gpu: bool

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize


def works(recipe: Recipe, model: Model, assumed: Assumptions) -> dict[str, Work]:
    """Of all stages that compute, by name."""
    games, episodes = recipe.benchmark.splits, assumed.episodes
    route = _route(recipe)
    one = _played(episodes, assumed.success)

    def routed(count: float) -> Work:
        """Episodes that several precisions share: each reads all of them, where they have a cache each."""
        readers = 1 if recipe.precisions.cache == "shared" else len(route)
        return Work(one.read * readers, one.written, 0.0, one.steps) * count

    whole = episodes.tokens(episodes.played(assumed.success))
    differences = (len(route) - 1) * episodes.played(assumed.success) * episodes.action
    ladder = Work()
    for rung in recipe.precisions.ladder:
        ladder += one * games.validation
        kl = min(recipe.precisions.kl_episodes, games.validation)
        ladder += Work(read=2 * kl * episodes.tokens(episodes.steps), compared=kl * episodes.steps * episodes.action)
        if rung.rounding is not None:
            settings = recipe.precisions.gptq or Gptq()
            ladder += Work(
                read=2 * settings.episodes * episodes.tokens(episodes.steps),
                rounded=_columns(model, rung.head in GROUPED),
            )
    # By each rung below the one to deploy, as if that were the second.
    ladder += Work(2 * one.read, one.written, 0.0, one.steps) * (
        max(1, len(recipe.precisions.ladder) - 2) * games.validation
    )
    behaviours = len(recipe.trajectories.behaviour) or len(route) + 1
    collected = behaviours * games.router_train
    kl_router, grpo, evaluation = recipe.kl_router, recipe.grpo_router, recipe.evaluation
    thresholds = PLAYED_THRESHOLDS
    found = {
        "agent": _agent_work(recipe, assumed),
        "quantized_checkpoints": ladder,
        "trajectories": routed(collected),
        "sensitivity_dataset": Work(read=len(route) * collected * whole, compared=collected * differences)
        + one * _branches(recipe, behaviours, episodes.played(assumed.success)),
        "kl_router": Work(read=collected * whole)
        + routed(kl_router.validation_games * (1 + thresholds))
        + Work(read=len(route) * kl_router.validation_games * whole, compared=kl_router.validation_games * differences),
        "grpo_router": routed(
            grpo.updates * grpo.games_per_update * grpo.group_size
            + grpo.validation_games * (2 + grpo.updates // grpo.validate_every)
            + (grpo.validation_games * (1 + thresholds) if grpo.target_ratio is not None else 0)
        ),
        "evaluation_report": _evaluation_work(recipe, one, routed, games.test, games.validation)
        + routed(evaluation.confidence_games * (1 + thresholds)),
        "released_router": Work(),
    }
    alone = TIMED_POLICIES * min(TIMED_GAMES, games.test)
    # One episode at a time, in one process: about as slow as the rows that there are otherwise are quick.
    rows = max(1, min(16, recipe.runtime.batch_episodes))
    looked_up = {name: work * (1 - SAME_BEFORE.get(name, 0.0)) for name, work in found.items()}
    looked_up["evaluation_report"] += one * (alone * min(4, rows) * assumed.processes)
    return looked_up


def _columns(model: Model, head: bool) -> float:
    """That GPTQ rounds: of layers with gated feed-forwards, and of the head, as many as take as long as its outputs do."""
    of_layers = model.layers * (6 * model.hidden + model.feed_forward)
    return of_layers + (model.vocabulary if head else 0)


def _branches(recipe: Recipe, behaviours: int, steps: float) -> float:
    """Episodes that swapped steps take: two each, half of whose actions are known.

    Args:
        steps: of an episode.
    """
    section, there = recipe.sensitivity.consequences, recipe.benchmark.splits.router_train
    if section is None:
        return 0.0
    games, cheaper = min(section.games or there, there), len(_route(recipe)) - 1
    return behaviours * games * steps * DIFFERING * section.share * cheaper


def _played(episodes: Episodes, success: float) -> Work:
    """One episode by one precision."""
    steps = episodes.played(success)
    return Work(
        read=episodes.opening + (steps - 1) * episodes.segment + steps,  # the last token of each action is read too
        written=steps * (episodes.action - 1),
        steps=steps,
    )


def _route(recipe: Recipe) -> Sequence[str]:
    """As it is named; of `auto`, what is routed between where nothing better is found."""
    return recipe.precisions.fallback if recipe.precisions.route == "auto" else recipe.precisions.route


def _agent_work(recipe: Recipe, assumed: Assumptions) -> Work:
    training = recipe.agent.imitation
    if training is None:
        return Work()
    episodes = assumed.episodes
    expert = episodes.tokens(episodes.steps)
    looks = training.looks_per_update * (episodes.opening + episodes.action)
    alone = training.looks_alone_until
    cloned = max(0, min(training.dagger_from, training.updates) - alone)
    mixed = training.updates - max(training.dagger_from, alone)
    learned = alone * looks + (cloned + mixed) * looks / 4
    learned += cloned * training.episodes_per_update * expert
    learned += mixed * (training.episodes_per_update / 2 * expert + training.dagger_tokens)
    collections = max(0, training.updates - training.dagger_from) / training.dagger_every
    short = Episodes(**{**vars(episodes), "step_limit": min(training.dagger_steps, episodes.step_limit)})
    # In one process each.
    own = _played(short, assumed.success / 2) * (collections * training.dagger_episodes * assumed.processes)
    tried = _played(episodes, assumed.success) * (recipe.benchmark.splits.validation * assumed.processes)
    return Work(learned=learned) + own + tried


def _evaluation_work(recipe: Recipe, one: Work, routed: Callable[[float], Work], test: int, validation: int) -> Work:
    route, ladder = _route(recipe), recipe.precisions.ladder
    singles = len(ladder) + len(route)  # checking without writing among them, and what the verdict deploys
    of_routers = 2 * (1 + recipe.evaluation.random_draws)
    several = of_routers + 2  # the confidence cascade and the oracle
    return one * (singles * test) + routed(several * test + 2 * validation + _episodes_of_curves(recipe))


def _episodes_of_curves(recipe: Recipe) -> int:
    """Of both routers and of all rules."""
    section, games = recipe.evaluation, recipe.benchmark.splits
    budgets, curves = len(section.budgets), 2 + len(section.rules or get_args(RuleName))
    tuned_on = min(section.budget_games or games.validation, games.validation)
    return curves * (budgets * games.test + (1 + PLAYED_THRESHOLDS * budgets) * tuned_on) if budgets else 0


def memory(recipe: Recipe, model: Model, assumed: Assumptions) -> dict[str, tuple[int, int]]:
    """Peak of the machine's and of the GPU's memory, by stage."""
    episodes, program = assumed.episodes, assumed.program_bytes
    rungs, route = list(model.rungs.values()), [model.rungs[name] for name in _route(recipe)]
    size = model.dtype.itemsize
    playing = assumed.processes
    splits = recipe.benchmark.splits

    def caches(games: int, models: int, worst: bool = False, times: int = 1, sorted_by_length: bool = False) -> int:
        """
        Args:
            worst: a precision that fails may lose all games, and write to its limit at every step.
            times: that each game is played by a model, one after another: slots keep what the longest of their episodes took.
            sorted_by_length: the longest episodes are gone through first, and side by side.
        """
        rows = min(recipe.runtime.batch_episodes, -(-games // playing))
        a_slot = max(times * games / max(playing * rows, 1), 1)
        lost = 1 - assumed.success**a_slot  # of a slot, that one of its episodes takes all steps
        if sorted_by_length:
            lost = min(1.0, (1 - assumed.success) * a_slot)
        longest = lost * episodes.tokens(episodes.step_limit) + (1 - lost) * episodes.tokens(1.3 * episodes.steps)
        if worst:
            written = recipe.agent.prompt.max_action_tokens
            longest = episodes.opening + episodes.step_limit * (episodes.segment + written)
        longest = min(longest, model.capacity)
        held = longest * model.cached_numbers * size * (1 if recipe.precisions.cache == "shared" else models)
        attended = longest * model.cached_numbers / model.layers * 8  # of one layer, in float32 while it attends
        read = episodes.opening * (4 * model.hidden + 3 * model.feed_forward) * size + 8 * model.vocabulary
        return int(playing * (rows * (held + attended + read) + (PROCESS_BYTES if playing > 1 else 0)))

    kl = KL_EPISODES_AT_ONCE * episodes.steps * episodes.action * model.vocabulary
    kl_tokens = KL_EPISODES_AT_ONCE * episodes.tokens(episodes.steps) * (4 * model.hidden + 3 * model.feed_forward)
    comparing = playing * int(kl * 8 + min(kl, 1 << 23) * 40 + kl_tokens * size)
    beside = max(max(rung.acting - rung.common, rung.file) for rung in rungs)
    acting = weights_held(route)
    failing = [rung.name for rung in recipe.precisions.ladder if rung.weights in ("int3", "int2")]
    # Those that may stop do so soon.
    fails = any(not recipe.precisions.may_stop(name) for name in failing)
    begun = min(recipe.precisions.stop_beaten_after or 0, splits.validation) if failing else 0
    behaviours, grpo = len(recipe.trajectories.behaviour) or len(route) + 1, recipe.grpo_router
    by_stage = {
        "agent": _agent_memory(recipe, model, episodes, caches(splits.validation, 1)),
        "quantized_checkpoints": model.bytes
        + beside
        + max(caches(splits.validation, 1, fails), caches(begun, 1, True), caches(splits.validation, 2), comparing),
        "trajectories": acting + caches(splits.router_train, len(route), times=2),  # alone, and mixed
        "sensitivity_dataset": acting
        + caches(behaviours * splits.router_train, len(route), sorted_by_length=True)
        + len(route) * (1 << 29) // 8,
        "kl_router": acting + caches(recipe.kl_router.validation_games, len(route)),
        "grpo_router": acting + caches(max(grpo.games_per_update * grpo.group_size, grpo.validation_games), len(route)),
        "evaluation_report": max(
            acting + caches(splits.test, len(route), times=PLAYED_TIMES), beside + caches(splits.test, 1, fails)
        ),
        "released_router": 0,
    }
    if model.on_gpu:
        return {stage: (program + model.parameters * model.stored.itemsize, held) for stage, held in by_stage.items()}
    return {stage: (program + held, 0) for stage, held in by_stage.items()}


def _agent_memory(recipe: Recipe, model: Model, episodes: Episodes, playing: int) -> int:
    training = recipe.agent.imitation
    if training is None:
        return model.parameters * model.stored.itemsize
    lora = training.lora if isinstance(training, Finetune) else None
    masters = 16 * model.parameters  # weights, gradients and two moments in float32
    if lora is not None:
        share = 2 * lora.rank * (4 * model.hidden + 3 * model.feed_forward) * model.layers
        masters = 2 * model.parameters + 16 * share
    tokens = TOKENS_AT_ONCE["cuda" if model.on_gpu else "cpu"]
    if model.on_gpu:  # a piece of a batch that does not fit is halved, down to one episode
        tokens = min(tokens, int(episodes.tokens(min(training.dagger_steps, episodes.step_limit))), model.capacity)
    width = 2 if isinstance(training, Finetune) else 4
    held = tokens * model.layers * (14 * model.hidden + 5 * model.feed_forward) * width
    trained = episodes.action / (episodes.segment + episodes.action)
    logits = int(tokens * trained * model.vocabulary * 16)
    merged = 2 * model.parameters if lora is not None else 0
    return masters + max(held + logits, merged + playing)


def disk(recipe: Recipe, model: Model, assumed: Assumptions) -> dict[str, int]:
    """Bytes of each stage's artifact, and of its resume state; DVC's cache holds artifacts a second time where the disk cannot
    share blocks."""
    splits, route = recipe.benchmark.splits, _route(recipe)
    steps = assumed.episodes.played(assumed.success)
    games = sum(getattr(splits, split) for split in type(splits).model_fields)
    behaviours = len(recipe.trajectories.behaviour) or len(route) + 1
    collected = int(behaviours * splits.router_train * steps)
    finetune = recipe.agent.finetune
    agent = model.parameters * (2 if recipe.agent.training else model.stored.itemsize)
    learned = model.parameters if recipe.agent.imitation is not None else 0
    if finetune is not None and finetune.lora is not None:
        learned = model.layers * finetune.lora.rank * (8 * model.hidden + 4 * model.feed_forward)
        agent = 2 * learned
    by_gptq = sum(rung.rounding == "gptq" for rung in recipe.precisions.ladder)
    return {
        "benchmark_tasks": 300 * games,
        "agent": agent + 24 * learned,  # weights and two moments in float32, the new state beside the old one
        "quantized_checkpoints": sum(rung.file for rung in model.rungs.values()) + by_gptq * model.parameters,
        "trajectories": collected * STEP_BYTES // 5,
        "sensitivity_dataset": collected * STEP_BYTES // 15,
        "kl_router": 1_000_000,
        "grpo_router": 1_000_000,
        "evaluation_report": 2_000_000,
        "released_router": 1_000_000,
    }
