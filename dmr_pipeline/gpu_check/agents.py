"""The tiny agent of the recipe `alfworld-tiny` on this device: its rungs, its actions, its speed, its router's training."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import polars as pl
import torch
from transformers import PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm
from dmr_pipeline.artifacts.manifest import write_manifest
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.benchmark import split_seeds
from dmr_pipeline.gpu_check.decoding import random_model
from dmr_pipeline.gpu_check.record import Part, Skipped
from dmr_pipeline.gpu_check.sizes import Shape, Sizes
from dmr_pipeline.precision.acting import acting_model
from dmr_pipeline.precision.quantization import dequantize, load_rung, quantize_rung, rung_size, save_rung
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.engine import play, play_alone
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import Disagreement, RandomMixing, two_way_shares
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import new_router, save_router
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks
from dmr_pipeline.stages.quantized_checkpoints import quantized_checkpoints

RECIPE = "alfworld-tiny"
RUNGS = (
    Rung(name="float", weights="float"),
    Rung(name="int8", weights="int8"),
    Rung(name="int4", weights="int4"),
    Rung(name="int4-mse", weights="int4", ranges="mse"),
    Rung(name="int2", weights="int2"),
    Rung(name="int2-mse", weights="int2", ranges="mse"),
    Rung(name="int3", weights="int3"),
    Rung(name="int4-head8", weights="int4", head="int8"),
)
MIXED_RATIO = 0.35
_CAPACITY = 4096
"""Tokens that the committed agent has positions for."""
_GROUPED = Shape("width 256", 2, 256, 4, 2, 64, 512, 512, tied=False)
"""Wide enough for groups of 128 along the input, for which there are kernels on a GPU."""
KERNEL_TOLERANCE = 0.02
"""‖logits - those of the dequantized weights‖ / ‖those‖ that bfloat16 may cause, through all layers."""


@dataclass(frozen=True)
class TinyAgent:
    """The committed agent on a device, and games for it."""

    device: torch.device
    sizes: Sizes
    data: Path
    """Project's data folder."""

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(RECIPE)

    @property
    def folder(self) -> Path:
        return self.data / RECIPE / "agent"

    @cached_property
    def games(self) -> list[Game]:
        """Of the validation split, made here."""
        seeds = split_seeds(self.recipe.benchmark, "validation")
        return [generate_game(seed)[0] for seed in islice(seeds, self.sizes.games)]

    @cached_property
    def prompter(self) -> Prompter:
        _, tokenizer = load_causal_lm(self.folder / "model", None, torch.device("cpu"))
        return Prompter.of(tokenizer, self.recipe.agent.prompt)

    def model(self, device: torch.device) -> PreTrainedModel:
        """In the dtype of the device's float rung."""
        return load_causal_lm(self.folder / "model", None, device)[0]


def rungs_reload(agent: TinyAgent, part: Part) -> None:
    """Quantize, save, reload: the logits must be those that were saved; and near those of the dequantized weights."""
    part.units = {"bytes": "B", "bits_per_weight": "bit", "error_to_dequantized": "relative"}
    (game,) = agent.games[:1]
    opening = agent.prompter.opening(AlfWorldEpisode(game).first_observation(), game.instruction)
    tokens = torch.tensor([opening], device=agent.device)
    for name, model in (
        ("tiny agent", agent.model(agent.device)),
        (_GROUPED.name, random_model(_GROUPED, agent.device)),
    ):
        for rung in RUNGS:
            quantized = quantize_rung(model, rung)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                save_rung(quantized, Path(folder) / rung.name)
                reloaded = load_rung(Path(folder) / rung.name, agent.device)
                before, after = (m(tokens).logits.float() for m in (quantized, reloaded))
                exact = dequantize(load_rung(Path(folder) / rung.name, agent.device))(tokens).logits.float()
            size, error = rung_size(reloaded), float((after - exact).norm() / exact.norm())
            kernels = sorted({type(module.weight.data).__name__ for module in _linear_layers(reloaded)})
            part.row(
                model=name,
                rung=rung.name,
                dtype=str(reloaded.dtype),
                weights=", ".join(kernels),
                bytes=size.bytes,
                bits_per_weight=size.bits_per_weight,
                error_to_dequantized=error,
            )
            difference = float((before - after).abs().max())
            part.check(
                f"{name}, {rung.name}: reloads equal", torch.equal(before, after), f"differs by {difference:.3g}"
            )
            part.check(
                f"{name}, {rung.name}: near its dequantized weights",
                error <= KERNEL_TOLERANCE,
                f"relative error {error:.2g}",
            )


def _linear_layers(model: PreTrainedModel) -> list[torch.nn.Linear]:
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def same_actions(agent: TinyAgent, part: Part) -> None:
    """The agent on this device and on the CPU: equal episodes in float32, and how many equal actions in its own dtype."""
    part.units = {"steps": "steps", "equal_actions": "share", "seconds": "s"}
    cpu = torch.device("cpu")
    reference = agent.model(cpu)
    limit, games = agent.sizes.compared_steps, agent.games[:24]
    played = {
        device.type: play_alone(agent.model(cpu).to(device), games, agent.prompter, limit, len(games))
        for device in dict.fromkeys((cpu, agent.device))
    }
    theirs, ours = played[cpu.type], played[agent.device.type]
    equal = [_taken(one) == _taken(other) for one, other in zip(theirs, ours, strict=True)]
    part.row(compared="whole episodes", dtype="torch.float32", steps=sum(len(t.steps) for t in theirs))
    won = sum(t.success for t in theirs)
    part.check(
        "float32 episodes are the CPU's", all(equal), f"{sum(equal)} of {len(equal)} equal; {won} won on the CPU"
    )

    for rung in (RUNGS[0], RUNGS[2], RUNGS[4]):
        one = acting_model(quantize_rung(reference, rung), cpu)
        other = acting_model(quantize_rung(agent.model(agent.device), rung), agent.device)
        share, steps, seconds = _agreement(one, other, agent, games, limit)
        part.row(
            compared=f"{rung.name}: actions along the CPU's episodes",
            dtype=str(other.dtype),
            steps=steps,
            equal_actions=share,
            seconds=seconds,
        )


def _taken(trajectory: Trajectory) -> list[list[int]]:
    return [step.action for step in trajectory.steps]


def _agreement(
    one: PreTrainedModel, other: PreTrainedModel, agent: TinyAgent, games: Sequence[Game], limit: int
) -> tuple[float, int, float]:
    """Share of steps of the first model's episodes at which the second would act the same; the steps; seconds."""
    started = time.perf_counter()
    streams = {"one": Streams(one, len(games), _CAPACITY), "other": Streams(other, len(games), _CAPACITY)}
    played = play(
        [RolloutRequest(game) for game in games], streams, agent.prompter, Disagreement(tuple(streams)), limit
    )
    steps = [step for trajectory in played for step in trajectory.steps]
    agreed = sum(step.precision == "other" for step in steps)
    return agreed / len(steps), len(steps), time.perf_counter() - started


def speed(agent: TinyAgent, part: Part) -> None:
    """Steps a second of every rung alone, and of random mixing of float and int2."""
    part.units = {"episodes": "at once", "steps_a_second": "steps/s", "ms_a_step": "ms for all episodes"}
    float_model = agent.model(agent.device)
    models = {rung.name: acting_model(quantize_rung(float_model, rung), agent.device) for rung in RUNGS}

    def timed(rungs: Sequence[str], batch: int, limit: int) -> Timings:
        runs, clock = [RolloutRequest(game) for game in agent.games[:batch]], Timings()
        streams = {rung: Streams(models[rung], batch, _CAPACITY) for rung in rungs}
        mixing = RandomMixing(two_way_shares(rungs, MIXED_RATIO), seed=0)
        policy = mixing if len(rungs) > 1 else SinglePrecision(rungs[0])
        play(runs, streams, agent.prompter, policy, limit, clock=clock)
        return clock

    acting = {name: (name,) for name in models} | {f"routed, {MIXED_RATIO:.0%} float, else int2": ("float", "int2")}
    for name, rungs in acting.items():
        timed(rungs, 1, 1)  # loads the kernels
        for batch in agent.sizes.batches:
            clock = timed(rungs, batch, agent.sizes.timed_steps)
            seconds = clock.router + clock.agent + clock.environment
            part.row(
                acting=name,
                episodes=batch,
                steps_a_second=clock.steps / seconds,
                ms_a_step=1000 * clock.agent / len(clock.durations),
            )


def two_grpo_updates(agent: TinyAgent, part: Part) -> None:
    """The stages from the games to the router, with an untrained probe in the place of stage 1's."""
    from dmr_pipeline.stages.grpo_router import grpo_router

    part.units = {"ratio": "share of steps", "divergence": "nats a decision"}
    number = agent.sizes.grpo_games
    changes = {
        "benchmark": {
            "splits": {"agent_train": 1, "router_train": 2 * number, "validation": number, "test": 1},
            "step_limit": agent.sizes.compared_steps,
        },
        "precisions": agent.recipe.precisions.model_dump()
        | {
            "ladder": [RUNGS[0].model_dump(), RUNGS[4].model_dump()],
            "route": ["float", "int2"],
            "pair": None,
            "kl_episodes": number,
        },
        "grpo_router": agent.recipe.grpo_router.model_dump()
        | {
            "updates": 2,
            "games_per_update": number,
            "group_size": number,
            "iterations": 2,
            "validate_every": 1,
            "validation_games": number,
            "target_ratio": None,
        },
        "runtime": {"device": agent.device.type, "processes": 1},
    }
    recipe = Recipe.model_validate(agent.recipe.model_dump() | changes)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("benchmark_tasks", "quantized_checkpoints", "grpo_router")}
        scratch = Path(temporary) / "scratch"
        scratch.mkdir()
        done = {"agent": agent.folder}
        for name, stage in (("benchmark_tasks", benchmark_tasks), ("quantized_checkpoints", quantized_checkpoints)):
            folders[name].mkdir()
            stage(StageContext(recipe, done, folders[name], scratch))
            write_manifest(folders[name])
            done[name] = folders[name]
        rollouts = Rollouts.load(done["quantized_checkpoints"], recipe)
        done["kl_router"] = Path(temporary) / "kl_router"
        cheapest = rollouts.acting.models["int2"]
        router = new_router(
            recipe.kl_router.model, rollouts.route, rollouts.prompter.tokenizer, 0, agent.device, cheapest
        )
        save_router(router, done["kl_router"] / ROUTER_FOLDER)
        folders["grpo_router"].mkdir()
        result = grpo_router(StageContext(recipe, done, folders["grpo_router"], scratch))
        log = pl.read_parquet(folders["grpo_router"] / "training.parquet")
    for row in log.select("update", "reward", "success", "ratio", "divergence").iter_rows(named=True):
        part.row(**row)
    part.check("two updates", result.summary["updates"] == 2, result.summary["updates"])
    divergence = float(result.summary["last_divergence"])
    part.check("the router has moved from its start", 0 < divergence < 10, f"{divergence:.3g} nats a decision")


def halved_batches(agent: TinyAgent, part: Part) -> None:
    """Where not all episodes fit at once, the batch is halved, and the episodes stay the same."""
    if agent.device.type != "cuda":
        raise Skipped("there is no GPU whose memory could run out")
    part.units = {"episodes": "at once", "peak": "B", "equal": "episodes"}
    model = agent.model(torch.device("cpu")).to(agent.device)  # float32: what a batch rounds changes no action
    games, limit = agent.games, 4

    def peak(slots: int) -> tuple[list[list[list[int]]], int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        played = play_alone(model, games, agent.prompter, limit, slots)
        return [_taken(trajectory) for trajectory in played], torch.cuda.max_memory_reserved()

    def equal(taken: list[list[list[int]]]) -> int:
        return sum(one == other for one, other in zip(taken, wanted, strict=True))

    few = max(1, len(games) // 8)
    wanted, most = peak(len(games))
    fewer, least = peak(few)
    part.row(episodes=len(games), peak=most, equal=len(games))
    part.row(episodes=few, peak=least, equal=equal(fewer))
    torch.cuda.empty_cache()
    limit_bytes = (most + least) // 2
    if not torch.cuda.memory_reserved() < least < limit_bytes < most:
        raise Skipped(f"{len(games)} episodes take {most:,} bytes and {few} take {least:,}: no limit lies between them")
    torch.cuda.set_per_process_memory_fraction(
        limit_bytes / torch.cuda.get_device_properties(agent.device).total_memory
    )
    try:
        taken, used = peak(len(games))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    part.row(episodes=len(games), peak=used, equal=equal(taken))
    part.check("fewer at once fitted", used < most, f"{used:,} bytes, where all at once took {most:,}")
    part.check("the episodes are the same", equal(taken) == len(games), f"{equal(taken)} of {len(games)} equal")
