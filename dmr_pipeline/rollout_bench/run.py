"""Steps a second of the engine and of `generate`, each measured in a process of its own."""

import logging
import multiprocessing
import platform
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

import psutil
import torch
import transformers

from dmr_pipeline.artifacts.run_record import git_state, this_machine
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.errors import UserError
from dmr_pipeline.interrupts import SIGNALS
from dmr_pipeline.peak_memory import peak_bytes
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout_bench.agents import Actions, Agent, RandomLlama, TinyAgent, Way
from dmr_pipeline.rollout_bench.record import Figure, RolloutRecord
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks

log = logging.getLogger(__name__)

RECIPES = ("alfworld-tiny", "webshop-tiny")


@dataclass(frozen=True)
class Sizes:
    by_generate: int
    """Episodes of a tiny agent by `generate`."""
    in_slots: dict[int, int]
    """Episodes of a tiny agent by this engine, by how many at once."""
    llama_by_generate: int
    llama_in_slots: dict[int, int]
    llama_layers: int
    llama_steps: int
    llama_action_tokens: int


FULL = Sizes(
    by_generate=4,
    in_slots={1: 12, 16: 48, 64: 128},
    llama_by_generate=2,
    llama_in_slots={1: 2, 16: 16, 64: 64},
    llama_layers=30,
    llama_steps=4,
    llama_action_tokens=8,
)
QUICK = Sizes(
    by_generate=1,
    in_slots={1: 1, 3: 3},
    llama_by_generate=1,
    llama_in_slots={2: 2},
    llama_layers=2,
    llama_steps=2,
    llama_action_tokens=3,
)


@dataclass(frozen=True)
class Measured:
    actions: Actions
    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Measurement:
    agent: Agent
    way: Way
    at_once: int
    episodes: int

    def run(self) -> Measured:
        """In this process, whose peak of memory is read: no other measurement may have run in it."""
        torch.set_num_threads(1)
        play = self.agent.player(self.way)
        loaded = psutil.Process().memory_info().rss
        play([self.episodes], 1)  # an episode of none of the measurements loads what is loaded at the first use
        cpu, wall = time.process_time(), time.perf_counter()
        actions = play(range(self.episodes), self.at_once)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Measured(actions, cpu, wall, max(peak_bytes() - loaded, 0))


def measurements(sizes: Sizes, data: Path, tasks: Path) -> list[list[Measurement]]:
    """Of each agent; the first one is the reference, whose actions those of the others are compared with.

    Args:
        data: the project's data folder, with the committed agents.
        tasks: holds a folder of tasks for each recipe.
    """
    tiny = [TinyAgent(recipe, data, tasks / recipe) for recipe in RECIPES]
    llama = RandomLlama(
        name="random Llama of 135 M" if sizes is FULL else "random Llama, tiny",
        reader=tiny[0],
        layers=sizes.llama_layers,
        width=576,
        heads=9,
        key_value_heads=3,
        feed_forward=1536,
        vocabulary=49_152,
        steps=sizes.llama_steps,
        action_tokens=sizes.llama_action_tokens,
    )
    planned: list[tuple[Agent, int, dict[int, int]]] = [
        *((agent, sizes.by_generate, sizes.in_slots) for agent in tiny),
        (llama, sizes.llama_by_generate, sizes.llama_in_slots),
    ]
    return [
        [
            Measurement(agent, Way.REREAD, 1, by_generate),
            Measurement(agent, Way.KEPT, 1, by_generate),
            *(Measurement(agent, Way.ENGINE, at_once, episodes) for at_once, episodes in in_slots.items()),
        ]
        for agent, by_generate, in_slots in planned
    ]


def new_record() -> RolloutRecord:
    """Of this machine, without figures."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return RolloutRecord(date=date, git=git_state(), machine=this_machine(), versions=versions)


def bench_rollout(sizes: Sizes, data: Path) -> Iterator[Figure]:
    """Each figure once it is measured.

    Args:
        data: the project's data folder.

    Raises:
        UserError: a committed agent is not there.
    """
    for recipe in RECIPES:
        if not (data / recipe / "agent" / "model").is_dir():
            raise UserError(f"no agent in {data / recipe / 'agent'}: run this in the project's folder")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            make_tasks(recipe, max(sizes.in_slots.values()) + 1, Path(folder, recipe))
        planned = measurements(sizes, data, Path(folder))
        left = sum(map(len, planned))
        for of_agent in planned:
            log.info("%s: %d of the measurements left", of_agent[0].agent.name, left)
            yield from figures(of_agent)
            left -= len(of_agent)


def make_tasks(recipe: str, count: int, folder: Path) -> None:
    """The first `count` games of the recipe's validation split, as its stage `benchmark_tasks` makes them."""
    whole = load_recipe(recipe)
    splits = {"agent_train": 1, "router_train": 1, "validation": count, "test": 1}
    benchmark = whole.benchmark.model_copy(update={"splits": Splits(**splits)})
    folder.mkdir(parents=True)
    benchmark_tasks(StageContext(whole.model_copy(update={"benchmark": benchmark}), {}, folder, folder))


def figures(of_agent: Sequence[Measurement]) -> Iterator[Figure]:
    """The actions of all are compared with those of the first."""
    reference: Actions | None = None
    for measurement in of_agent:
        measured = _in_own_process(measurement)
        reference = measured.actions if reference is None else reference
        found = figure(measurement, measured, reference)
        log.info(
            "  %s, %d at once: %d steps in %.1f CPU seconds", found.way, found.at_once, found.steps, found.cpu_seconds
        )
        yield found


def figure(measurement: Measurement, measured: Measured, reference: Actions) -> Figure:
    pairs = [
        pair
        for ours, theirs in zip(measured.actions, reference, strict=False)  # one of them may have fewer episodes
        for pair in zip_longest(ours, theirs)
    ]
    lengths = [len(action) for episode in measured.actions for action in episode]
    return Figure(
        agent=measurement.agent.name,
        way=measurement.way.value,
        at_once=measurement.at_once,
        episodes=measurement.episodes,
        steps=len(lengths),
        tokens=sum(lengths),
        cpu_seconds=round(measured.cpu_seconds, 4),
        wall_seconds=round(measured.wall_seconds, 4),
        memory_bytes=measured.memory_bytes,
        compared=len(pairs),
        equal=sum(ours == theirs for ours, theirs in pairs),
    )


def _in_own_process(measurement: Measurement) -> Measured:
    # A server that has imported everything forks it off: that is quicker than to import again, and nothing has computed there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, initializer=_ignore_signals) as pool:
        return pool.submit(measurement.run).result()


def _ignore_signals() -> None:
    """Ctrl-C reaches all processes of a terminal's group; the command's own one ends this one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
