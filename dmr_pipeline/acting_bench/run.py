"""Time for a step: at each precision alone, by transformers' `generate`, checked, and mixed.

Each way of acting reads the same history in its first step, which is not timed, and then takes some steps that are: what is new
is read, an action is written. In a cell of the table, ways take turns, so that a machine that is busy for a while is so for all.
"""

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Literal

import torch
from transformers import PreTrainedModel

from dmr_pipeline.acting_bench.actors import BFLOAT16, CHEAP, CHEAP_INT8, Actor, forms, held_bytes, read_bytes
from dmr_pipeline.acting_bench.reading import Reading, episodes, history
from dmr_pipeline.acting_bench.record import ActingRecord, Row
from dmr_pipeline.agent.memory import free_memory
from dmr_pipeline.artifacts.run_record import git_state, this_device, this_machine
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.rollout.choosing import leads
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.choice import positions_of, shared_streams, token_streams
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.policy import Decision, DecisionContext, SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.rollout.writing import write
from dmr_pipeline.rollout_bench.generate import Generate
from dmr_pipeline.rollout_bench.run import new_record

log = logging.getLogger(__name__)

TIMED_STEPS = 4
_ROOM = 1000
"""Tokens that the timed steps may take."""
_SHARE_OF_MEMORY = 0.4
"""Of what is free, that the caches of a cell may take."""
DEAR, CHEAPER = "dear", "cheap"
Kind = Literal["writes", "1 by 1", "generate", "checks", "mixed"]
CACHES = ("separate", "shared")


@dataclass(frozen=True)
class Cell:
    """A part of the table."""

    at_once: int
    """Episodes."""
    history: int
    """Tokens, at most, that a transcript has before the steps that are timed; fewer where the model has not the positions."""
    repeats: int
    all_forms: bool = False
    """Whether every precision acts alone, or only those that are then checked or mixed."""


FULL = (
    Cell(1, 500, 3, all_forms=True),
    Cell(1, 2000, 2),
    Cell(8, 500, 2),
    Cell(64, 500, 1),
    Cell(1, 8000, 1),
    Cell(8, 2000, 1),
    Cell(64, 2000, 1),
    Cell(8, 8000, 1),
)
ON_A_GPU = (
    Cell(1, 500, 1, all_forms=True),
    Cell(64, 500, 1),
    Cell(1, 8000, 1),
    Cell(8, 2000, 1),
    Cell(64, 2000, 1),
    Cell(1, 2000, 1),
    Cell(8, 500, 1),
    Cell(8, 8000, 1),
)
"""The most different ones first, for those who have a GPU for seconds only."""
QUICK = (Cell(1, 60, 1, all_forms=True), Cell(2, 60, 1))


@dataclass(frozen=True)
class Way:
    kind: Kind
    dear: str
    """Name of a form; of the only one where one acts."""
    cheap: str | None = None
    cache: str = ""

    @property
    def name(self) -> str:
        if self.cheap is None:
            return f"{self.dear} {'' if self.kind == 'writes' else self.kind}".strip()
        cheap = self.cheap.removesuffix(" kernels")
        return f"{self.dear} checks {cheap}" if self.kind == "checks" else f"1/3 {self.dear}, else {cheap}"


@dataclass
class Acts:
    """A `RoutingPolicy` that notes when each step began, and how many passes the models had made by then."""

    kind: Kind
    passes: Counter[str]
    clock: Callable[[], float]
    begun: list[Counter[str]] = field(default_factory=list)
    """Passes so far, at the beginning of each step."""
    times: list[float] = field(default_factory=list)
    """By the clock, then."""
    steps: Counter[int] = field(default_factory=Counter)

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.steps[slot] = 0

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        self.begun.append(Counter(self.passes))
        self.times.append(self.clock())
        if self.kind == "mixed":
            return [Decision(DEAR if self.steps[slot] % 3 == 2 else CHEAPER, ()) for slot in slots]
        return [Decision(DEAR, (), drafter=CHEAPER if self.kind == "checks" else None)] * len(slots)

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self.steps[slot] += 1


def ways(cell: Cell, device: torch.device) -> list[Way]:
    """The first is what actions are compared with."""
    names = [form.name for form in forms(device)]
    alone = [name for name in names if cell.all_forms or name == CHEAP]
    found = [Way("writes", BFLOAT16)] + [Way("writes", name) for name in alone if name != BFLOAT16]
    if cell.at_once == 1:
        found += [Way("1 by 1", BFLOAT16), Way("1 by 1", CHEAP), Way("generate", BFLOAT16)]
    for cheap in [CHEAP_INT8, CHEAP] if cell.all_forms else [CHEAP]:
        found += [Way("checks", BFLOAT16, cheap, cache) for cache in CACHES]
    return found + [Way("mixed", BFLOAT16, CHEAP, cache) for cache in CACHES]


def prepare(device: torch.device) -> None:
    """On a CPU one thread acts, as in a process that plays."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second at which a tensor of `size` bytes is summed up, by as many threads as act."""
    numbers, times = torch.ones(size // 4, device=device), []
    for _ in range(7):
        started = now(device)
        numbers.sum().item()
        times.append(now(device) - started)
    return numbers.nbytes / min(times)  # what it can do, also where others are busy


def now(device: torch.device) -> float:
    """Seconds: of this process's one thread on a CPU, where others may be busy; else the wall's."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def new_acting_record(actor: Actor, device: torch.device) -> ActingRecord:
    """Of this machine, without rows."""
    known = new_record()
    return ActingRecord(
        date=known.date,
        git=git_state(),
        machine=this_machine(),
        versions=known.versions,
        model=actor.name,
        device=this_device(Runtime()).name if device.type == "cuda" else this_machine().cpu,
        bandwidth=bandwidth(device, 2**31 if device.type == "cuda" else 2**28),
    )


@dataclass(frozen=True)
class Acted:
    """The timed steps of some episodes."""

    seconds: list[float]
    """Of each step, all episodes together."""
    passes: Counter[str]
    """Form -> forward passes in all these steps."""
    segments: list[list[int]]
    """Of each step."""
    actions: list[list[int]]
    """Of each step, episode by episode."""
    drafted: int = 0
    accepted: int = 0


@dataclass
class Bench:
    actor: Actor
    device: torch.device
    read_at: float
    """Bytes a second."""
    deadline: float
    """On the monotonic clock: later nothing is begun."""
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    reads: dict[str, PassBytes] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    """Form -> bytes of all its weights in memory."""
    passes: Counter[str] = field(default_factory=Counter)
    """Form -> forward passes so far."""

    def model(self, name: str) -> PreTrainedModel:
        if name not in self.models:
            (form,) = [form for form in forms(self.device) if form.name == name]
            model = self.actor.acting(form, self.device)
            self.reads[name], self.held[name] = read_bytes(model), held_bytes(model)
            model.get_output_embeddings().register_forward_hook(lambda *_: self.passes.update([name]))
            self.models[name] = model
        return self.models[name]

    def rows(self, cell: Cell) -> list[Row]:
        """Of each way to act in this cell."""
        positions = positions_of(self.actor.model.config)
        capacity = min(cell.history + _ROOM, positions or cell.history + _ROOM)
        past = history(self.actor.prompter, capacity - _ROOM)
        streams: dict[tuple[str, ...], Mapping[str, TokenStreams]] = {}
        planned = ways(cell, self.device)
        acted: dict[Way, list[Acted]] = {way: [] for way in planned}
        problems: dict[Way, str] = {}
        for repeat in range(cell.repeats):
            for way in planned:
                if way in problems:
                    continue
                try:
                    acted[way].append(self._act(way, cell, capacity, past, repeat, streams))
                except (RuntimeError, UserError, NotImplementedError) as error:
                    problems[way] = " ".join(str(error).split())[:200]
        held = len(self.actor.prompter.opening(past, ""))
        return [self._row(way, cell, held, acted[way], acted[planned[0]], problems.get(way)) for way in planned]

    def _act(
        self,
        way: Way,
        cell: Cell,
        capacity: int,
        past: str,
        repeat: int,
        streams: dict[tuple[str, ...], Mapping[str, TokenStreams]],
    ) -> Acted:
        """
        Args:
            streams: of the ways before, which hold the history; others are added.
        """
        if time.monotonic() > self.deadline:
            raise UserError("left out: the time is over")
        readings = episodes(past, cell.at_once, repeat, 1 + TIMED_STEPS)
        if way.kind == "generate":
            return self._one_by_one(way, readings, None)
        agents = self._agents(way, cell, capacity, streams)
        if way.kind == "1 by 1":
            return self._one_by_one(way, readings, agents[DEAR])
        if cell.at_once > 1 and not any(agents[DEAR].lengths):  # one reads the history, the others copy it
            for precision in agents:
                alone, policy = {precision: agents[precision]}, SinglePrecision(precision)
                play([RolloutRequest(readings[0])], alone, self.actor.prompter, policy, 1)
        acts = Acts(way.kind, self.passes, partial(now, self.device))
        runs = [RolloutRequest(reading) for reading in readings]
        played = play(runs, agents, self.actor.prompter, acts, 1 + TIMED_STEPS)
        times = [*acts.times, now(self.device)]
        steps = [step for trajectory in played for step in trajectory.steps[1:]]
        return Acted(
            [end - begin for begin, end in pairwise(times[1:])],
            self.passes - acts.begun[1],
            [step.segment for step in steps],
            [step.action for step in steps],
            sum(step.drafted for step in steps),
            sum(step.accepted for step in steps),
        )

    def _one_by_one(self, way: Way, readings: Sequence[Reading], streams: TokenStreams | None) -> Acted:
        """One token a pass, without the guesses from what was written before, by which the engine saves passes.

        Args:
            streams: None has `generate` write, with the keys and values of the step before.
        """
        prompter = self.actor.prompter
        writer = Generate(self.model(way.dear), prompter.end_tokens, prompter.prompt.max_action_tokens, keep_cache=True)

        def act(slots: range, transcripts: list[list[int]]) -> list[list[int]]:
            if streams is None:
                return [writer.action(transcript) for transcript in transcripts]
            written = write(
                streams,
                slots,
                catch_up(streams, slots, transcripts),
                choose=lambda logits, _: list(logits.argmax(-1).tolist()),
                observe=leads,
                guess=lambda _: {},
                is_complete=prompter.is_complete,
            )
            return [action.tokens for action in written]

        transcripts: list[list[int]] = [[] for _ in readings]
        seconds, before = list[float](), Counter[str]()
        segments: list[list[list[int]]] = [[] for _ in readings]
        actions: list[list[list[int]]] = [[] for _ in readings]
        for step in range(1 + TIMED_STEPS):
            segment = prompter.turn if step else prompter.opening
            for slot, reading in enumerate(readings):
                segments[slot].append(segment(reading.observations[step], reading.instruction))
                transcripts[slot] += segments[slot][-1]
            if step == 1:
                before = Counter(self.passes)
            started = now(self.device)
            written = act(range(len(readings)), transcripts)
            seconds.append(now(self.device) - started)
            for slot, action in enumerate(written):
                actions[slot].append(action)
                transcripts[slot] += action
        timed = [[part for of_episode in parts for part in of_episode[1:]] for parts in (segments, actions)]
        return Acted(seconds[1:], self.passes - before, timed[0], timed[1])

    def _agents(
        self, way: Way, cell: Cell, capacity: int, streams: dict[tuple[str, ...], Mapping[str, TokenStreams]]
    ) -> Mapping[str, TokenStreams]:
        names = [way.dear] if way.cheap is None else [way.dear, way.cheap]
        models = {role: self.model(name) for role, name in zip((DEAR, CHEAPER), names, strict=False)}
        for key in [tuple(names)] if way.cache == "shared" else [(name,) for name in names]:
            if key not in streams:
                of_one = self.reads[way.dear].cached_numbers * models[DEAR].dtype.itemsize
                needed, free = cell.at_once * capacity * of_one, free_memory(self.device)
                if needed > _SHARE_OF_MEMORY * free:
                    raise UserError(f"left out: a cache of {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
                if len(key) > 1:
                    streams[key] = shared_streams(models, cell.at_once, capacity)
                else:
                    streams[key] = {key[0]: token_streams(self.models[key[0]], cell.at_once, capacity)}
        if way.cache == "shared":
            return streams[tuple(names)]
        return {role: streams[name,][name] for role, name in zip((DEAR, CHEAPER), names, strict=False)}

    def _row(
        self, way: Way, cell: Cell, held: int, acted: Sequence[Acted], reference: Sequence[Acted], problem: str | None
    ) -> Row:
        """
        Args:
            held: tokens of the history.
        """
        row = Row(way=way.name, cache=way.cache, at_once=cell.at_once, history=held, problem=problem)
        seconds = [second for one in acted for second in one.seconds]
        if not seconds:
            return row
        row.steps, row.ms_a_step = len(seconds), 1000 * median(seconds)
        names = [way.dear] if way.cheap is None else [way.dear, way.cheap]
        row.weight_bytes = sum(self.held[name] for name in names)
        passes = sum((one.passes for one in acted), Counter[str]())
        row.passes_of_dear = passes[way.dear] / len(seconds)
        row.passes_of_cheap = 0 if way.cheap is None else passes[way.cheap] / len(seconds)
        row.segment = mean(len(segment) for one in acted for segment in one.segments)
        row.action = mean(len(action) for one in acted for action in one.actions)
        row.drafted, row.accepted = sum(one.drafted for one in acted), sum(one.accepted for one in acted)
        pairs = [
            pair
            for ours, theirs in zip(acted, reference, strict=False)
            for pair in zip(ours.actions, theirs.actions, strict=False)
        ]
        row.compared, row.equal = len(pairs), sum(ours == theirs for ours, theirs in pairs)
        of_token = self.reads[way.dear].cached_numbers * self.models[way.dear].dtype.itemsize
        length = held + (1 + TIMED_STEPS) * (row.segment + row.action) / 2
        row.bytes_a_step = sum(
            count / len(seconds) * (self.reads[name].weights + cell.at_once * length * of_token)
            for name, count in passes.items()
        )
        row.limit_ms = 1000 * row.bytes_a_step / self.read_at
        caches = 1 if way.cache == "shared" else len(names)
        row.cache_bytes = int(caches * cell.at_once * of_token * (2 * length - held))
        return row


def bench_acting(
    actor: Actor, device: torch.device, read_at: float, cells: Sequence[Cell], seconds: float | None
) -> Iterator[Row]:
    """Rows of each cell once they are measured.

    Args:
        read_at: the memory's bandwidth, bytes a second.
        seconds: after which nothing is begun.
    """
    bench = Bench(actor, device, read_at, time.monotonic() + (seconds or 1e9))
    for cell in cells:
        log.info("%d at once, history of %d tokens", cell.at_once, cell.history)
        yield from bench.rows(cell)
        for name in bench.models.keys() - {BFLOAT16, CHEAP}:  # those that act in the first cell alone
            del bench.models[name]
        gc.collect()  # the caches of this cell
