"""Episodes with the rungs that a router chooses from, many policies side by side in several processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_tokenizer, resolve_device
from dmr_pipeline.agent.memory import halving
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.cost import Cost, episode_cost
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.choice import (
    rows_that_fit,
    shared_streams,
    token_streams,
    transcript_capacity,
    way_of,
)
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.parallel import in_processes, processes_on
from dmr_pipeline.rollout.policy import RoutingPolicy
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory, warn_of_outgrown


@dataclass(frozen=True)
class PolicyRuns:
    """A policy and the episodes that it is to play."""

    policy: RoutingPolicy
    """Each process has a copy of its own; what it remembers of the episodes is lost."""
    runs: Sequence[RolloutRequest]
    on_progress: Callable[[int], None] = lambda _: None
    """Called with the number of episodes that have just ended (progress)."""


@dataclass(frozen=True)
class _Ended:
    """Episodes of one of several `PolicyRuns` have ended in a process."""

    index: int
    count: int


@dataclass(frozen=True)
class _Share:
    """What a process has played of one of several `PolicyRuns`."""

    index: int
    played: dict[int, Trajectory]
    """By their index in the runs."""
    clock: Timings


@dataclass(frozen=True)
class Rollouts:
    """Plays episodes with the rungs that a router chooses from."""

    acting: ActingModels
    prompter: Prompter
    unit_bytes: float
    """What costs are divided by: see `LadderFacts.unit_bytes`."""
    cache_bits: int
    """Of a number in the KV cache, as its reading is charged for."""
    step_limit: int
    action: Literal["generate", "score"]
    temperature: float
    capacity: int
    """Tokens that a transcript may have."""
    batch_episodes: int
    """Episodes that a process acts on at once, if there is memory for them."""
    processes: int
    reuse_actions: bool
    speculative: Speculative | None
    """As of `engine.play`."""
    shared_cache: bool = False
    """Whether the rungs have one KV cache."""
    prompt_lookup: PromptLookup | None = None
    """As of `engine.play`."""

    @classmethod
    def load(cls, checkpoints: Path, recipe: Recipe, rungs: Sequence[str] | None = None) -> "Rollouts":
        """From the folder of the stage `quantized_checkpoints`.

        Args:
            rungs: names, dearest first; by default those that are routed.
        """
        ladder, device = read_ladder(checkpoints), resolve_device(recipe.runtime.device)
        acting = ActingModels.load(checkpoints, rungs or ladder.route, device, recipe.precisions.kernels)
        model = acting.models[acting.dearest]
        return cls(
            acting,
            Prompter.of(load_tokenizer(checkpoints / "tokenizer"), recipe.agent.prompt, model.generation_config),
            ladder.unit_bytes,
            recipe.precisions.cache_bits,
            recipe.benchmark.step_limit,
            recipe.agent.action,
            recipe.agent.temperature,
            transcript_capacity(model.config, recipe.agent.max_transcript_tokens),
            recipe.runtime.batch_episodes,
            processes_on(acting.device, recipe.runtime),
            recipe.runtime.reuse_actions,
            recipe.precisions.speculative,
            recipe.precisions.cache == "shared",
            recipe.precisions.prompt_lookup,
        )

    @property
    def route(self) -> tuple[str, ...]:
        """Names of the rungs, dearest first."""
        return self.acting.route

    @property
    def device(self) -> torch.device:
        return self.acting.device

    def cost(self, trajectory: Trajectory, router: PassBytes | None = None) -> Cost:
        """Of an episode, in units of cost; `router` as in `episode_cost`."""
        read = episode_cost(trajectory, self.acting.pass_bytes, self.cache_bits, router)
        return Cost(read.weights / self.unit_bytes, read.cache / self.unit_bytes)

    @cached_property
    def can_draft(self) -> bool:
        """Whether one of these precisions can draft what another one checks: tokens are written, and all caches can be cut."""
        return self.action == "generate" and not any(way_of(model).slow for model in self.acting.models.values())

    @cached_property
    def rows(self) -> int:
        """Episodes that a process may act on at once: as the recipe says, or as many as there is memory for."""
        models = list(self.acting.models.values())
        return rows_that_fit(models, self.capacity, self.batch_episodes, self.processes, self.shared_cache)

    @property
    def sharing(self) -> Mapping[str, PreTrainedModel] | None:
        """The models of the rungs, dearest first, where they have one cache."""
        return self.acting.models if self.shared_cache else None

    def slots(self, runs: int) -> int:
        """Episodes that are acted on at once in one process, of so many."""
        return min(self.rows, runs)

    def play(
        self,
        runs: Sequence[RolloutRequest],
        policy: RoutingPolicy,
        seed: int,
        clock: Timings | None = None,
        on_progress: Callable[[int], None] = lambda _: None,
        known: Known | None = None,
    ) -> list[Trajectory]:
        """`engine.play` with these rungs, in several processes.

        Args:
            policy: each process has a copy of its own; what it remembers of the episodes is lost.
            seed: of the actions.
            clock: gets the seconds of all processes.
            known: what may be looked up, by and by what is found; by default what this call itself finds.
        """
        found: list[Trajectory] = []

        def keep(_: int, played: list[Trajectory], spent: Timings) -> None:
            found.extend(played)
            if clock is not None:
                clock.add(spent)

        self.play_each([PolicyRuns(policy, runs, on_progress)], seed, keep, known)
        return found

    def play_each(
        self,
        plays: Sequence[PolicyRuns],
        seed: int,
        on_played: Callable[[int, list[Trajectory], Timings], None],
        known: Known | None = None,
    ) -> None:
        """As `play`, several policies one after another: a process that has played its share of one goes on with the next,
        so that all are busy to the end. A game is played by the same process under every policy.

        Args:
            seed: of the actions.
            on_played: called here as soon as one of `plays` is finished everywhere, in their order: its index, its
                trajectories in the order of its runs, and the seconds that all processes spent on it.
            known: what may be looked up, by and by what is found; by default what this call itself finds.
        """
        known = known if known is not None else Known()
        rows = self.rows  # the same in all processes
        parts = scatter_by_game([play.runs for play in plays], self.processes)

        def play_part(part: Sequence[Sequence[int]], tell: Callable[[_Ended | _Share], None]) -> Known:
            mine, streams = known.copied(), dict[int, Mapping[str, TokenStreams]]()
            for index, runs in enumerate(part):
                tell(self._play_share(index, plays[index], runs, rows, seed, tell, mine, streams))
            return mine.since(known)

        waiting = [len(parts)] * len(plays)
        found: list[dict[int, Trajectory]] = [{} for _ in plays]
        clocks = [Timings() for _ in plays]

        def told(message: _Ended | _Share) -> None:
            index = message.index
            if isinstance(message, _Ended):
                plays[index].on_progress(message.count)
                return
            found[index] |= message.played
            clocks[index].add(message.clock)
            waiting[index] -= 1
            if not waiting[index]:
                played = [found[index].pop(i) for i in range(len(plays[index].runs))]
                warn_of_outgrown(played, self.capacity)
                on_played(index, played, clocks[index])

        for found_there in in_processes(play_part, parts, told):
            known.add(found_there)

    def _play_share(
        self,
        index: int,
        plays: PolicyRuns,
        mine: Sequence[int],
        rows: int,
        seed: int,
        tell: Callable[[_Ended | _Share], None],
        known: Known,
        streams: dict[int, Mapping[str, TokenStreams]],
    ) -> _Share:
        """One process's share of the runs, by their indices.

        Args:
            streams: number of slots -> those of the policy before, which hold what it has read; replaced where the number is
                another.
        """
        spent, done = Timings(), dict[int, Trajectory]()

        def attempt(slots: int) -> list[Trajectory]:
            if slots not in streams:
                streams.clear()
                streams[slots] = self.streams(slots)
            return play(
                [plays.runs[i] for i in mine],
                streams[slots],
                self.prompter,
                plays.policy,
                self.step_limit,
                self.action,
                self.temperature,
                seed,
                spent,
                lambda count: tell(_Ended(index, count)),
                done,
                known if self.reuse_actions else None,
                self.speculative,
                self.prompt_lookup,
            )

        played = halving(min(rows, len(mine)), "episodes", attempt) if mine else []
        return _Share(index, dict(zip(mine, played, strict=True)), spent)

    def streams(self, slots: int) -> Mapping[str, TokenStreams]:
        """Fresh token streams of every rung."""
        if self.shared_cache:
            return shared_streams(self.acting.models, slots, self.capacity)
        return {rung: token_streams(model, slots, self.capacity) for rung, model in self.acting.models.items()}


def scatter_by_game(plays: Sequence[Sequence[RolloutRequest]], processes: int) -> list[list[list[int]]]:
    """For each process, the indices of the runs that it is to play of each of `plays`; none has nothing to do, but for the
    only one of no runs. Games go to the processes in turn, and all runs of a game to the same one; where there are too few
    games for that, the members of a game are dealt as if they were games.
    """
    by_game = len({run.task.task_id for runs in plays for run in runs}) >= processes
    units = [[(run.task.task_id, 0 if by_game else run.member) for run in runs] for runs in plays]
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(chain.from_iterable(units)))}
    count = max(1, min(processes, len(numbers)))
    return [
        [[i for i, unit in enumerate(row) if numbers[unit] % count == process] for row in units]
        for process in range(count)
    ]
