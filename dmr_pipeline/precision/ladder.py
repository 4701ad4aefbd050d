"""Stage `quantized_checkpoints`: the precision ladder of one float checkpoint, measured; and loading it for acting."""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import Progress
from transformers import PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm, load_tokenizer, resolve_device
from dmr_pipeline.agent.memory import halving, in_pieces
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.tasks import read_tasks
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.quantization import RungSize, dequantize, load_rung, quantize_rung, rung_size, save_rung
from dmr_pipeline.recipe import Precisions, Recipe, Rung
from dmr_pipeline.rollout.cost import episode_cost
from dmr_pipeline.rollout.engine import Clock, RoutingPolicy, Run, Trajectory, play, play_alone, warn_of_outgrown
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.choice import rows_that_fit, token_streams, transcript_capacity
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.parallel import deal, gather, in_processes, processes_on
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.examples import Example, expert_example
from dmr_pipeline.training.train import trained_logits

log = logging.getLogger(__name__)

LADDER_FILE = "ladder.json"


class RungFacts(BaseModel):
    """One rung, measured."""

    model_config = ConfigDict(extra="forbid")

    name: str
    bytes: int
    """Of all weights, as stored."""
    bits_per_weight: float
    """Over all weights, the float ones among them."""
    quantized_share: float
    """Weights that are quantized, of all weights."""
    kl_to_float: float
    """KL(float || rung) over a whole action, teacher-forced on the expert's, mean over steps; nats."""
    greedy_disagreement: float
    """Share of action tokens whose greedy choice is not the float model's."""
    validation_success: float
    validation_steps: float
    reloads_equal: bool
    """Whether the saved weights, loaded again, give the logits of the model that was saved, bit by bit."""


class Gate(BaseModel):
    """Whether there is anything for a router to do: measured in closed loop, before any router is trained."""

    model_config = ConfigDict(extra="forbid")

    high: float
    low: float
    gap: float
    passed: bool
    verdict: str


class LadderFacts(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rungs: list[RungFacts]
    gate: Gate
    always_high_cost: float
    """Mean bytes read in an always-high episode on validation games: the unit of cost."""


def quantized_checkpoints(context: StageContext) -> StageResult:
    recipe = context.recipe
    device = resolve_device(recipe.runtime.device)
    torch.set_num_threads(recipe.runtime.threads)
    float_model, tokenizer = load_causal_lm(context.inputs["agent"] / "model", None, device)
    tokenizer.save_pretrained(context.output / "tokenizer")
    prompter = Prompter.of(tokenizer, recipe.agent.prompt, float_model.generation_config)
    games = read_tasks(context.inputs["benchmark_tasks"], "validation")
    capacity = transcript_capacity(float_model.config, recipe.agent.max_transcript_tokens)
    examples = expert_steps(games[: recipe.precisions.kl_episodes], prompter, recipe.benchmark.step_limit, capacity)
    facts, cost = [], 0.0
    with Progress() as progress:
        bar = progress.add_task("precision ladder", total=len(recipe.precisions.ladder) * len(games))
        for rung in recipe.precisions.ladder:
            progress.update(bar, description=f"{rung.name} plays validation games")
            acting, size, equal = _make_rung(float_model, rung, context.output / rung.name, examples, device)
            divergence, disagreement = divergence_to_float(float_model, acting, examples, device)
            played = _play_validation(acting, games, prompter, recipe, device, lambda n: progress.advance(bar, n))
            del acting  # before the next one is made
            facts.append(
                RungFacts(
                    name=rung.name,
                    bytes=size.bytes,
                    bits_per_weight=round(size.bits_per_weight, 4),
                    quantized_share=round(size.quantized_share, 4),
                    kl_to_float=round(divergence, 6),
                    greedy_disagreement=round(disagreement, 6),
                    validation_success=_mean([t.success for t in played]),
                    validation_steps=_mean([len(t.steps) for t in played]),
                    reloads_equal=equal,
                )
            )
            if rung.name == recipe.precisions.high:
                cost = mean_cost(played, size.bytes)
    ladder = LadderFacts(rungs=facts, gate=gate(facts, recipe.precisions), always_high_cost=cost)
    text = json.dumps(ladder.model_dump(), indent=2) + "\n"
    (context.output / LADDER_FILE).write_text(text, encoding="utf-8")
    return StageResult(summary=ladder.model_dump())


@torch.no_grad()
def _make_rung(
    float_model: PreTrainedModel, rung: Rung, folder: Path, examples: Sequence[Example], device: torch.device
) -> tuple[PreTrainedModel, RungSize, bool]:
    """Save a rung and load it again. Beside the float model there is never more than one other as large.

    Returns:
        What acts, the size of the weights, and whether the loaded ones give the saved ones' logits, bit by bit.
    """
    quantized = quantize_rung(float_model, rung, lambda model: trained_logits(model, examples, device))
    save_rung(quantized, folder)
    saved_logits, _ = trained_logits(quantized, examples[:1], device)
    del quantized
    model = load_rung(folder, device)
    equal = torch.equal(saved_logits, trained_logits(model, examples[:1], device)[0])
    size = rung_size(model)
    return float_model if rung.weights == "float" else acting_model(model, device), size, equal


def _play_validation(
    model: PreTrainedModel,
    games: Sequence[Task],
    prompter: Prompter,
    recipe: Recipe,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[Trajectory]:
    """One episode of each game by one rung."""
    capacity = transcript_capacity(model.config, recipe.agent.max_transcript_tokens)
    processes = processes_on(device, recipe.runtime)
    rows = rows_that_fit([model], capacity, recipe.runtime.batch_episodes, processes)

    def play_part(part: Sequence[Task], advance: Callable[[int], None]) -> list[Trajectory]:
        return play_alone(
            model,
            part,
            prompter,
            recipe.benchmark.step_limit,
            rows,
            recipe.agent.action,
            recipe.agent.temperature,
            capacity,
            advance,
        )

    played = gather(in_processes(play_part, deal(games, processes), advance))
    warn_of_outgrown(played, capacity)
    return played


def expert_steps(games: Sequence[Task], prompter: Prompter, step_limit: int, capacity: int) -> list[Example]:
    """The expert's flawless episodes, its actions as targets; those of more tokens than the capacity are left out.

    Raises:
        UserError: none is left.
    """
    whole = [expert_example(game, prompter, step_limit, mistake_rate=0.0, rng=random.Random(0)) for game in games]
    fitting = [example for example in whole if len(example.tokens) <= capacity]
    if not fitting:
        shortest = min(len(example.tokens) for example in whole)
        raise UserError(
            f"none of the expert's {len(whole)} episodes fits into a transcript of {capacity} tokens (the shortest has"
            f" {shortest}): set agent.max_transcript_tokens higher, or choose a model with more positions"
        )
    if len(fitting) < len(whole):
        log.warning(
            "%d of the expert's episodes are left out: longer than %d tokens", len(whole) - len(fitting), capacity
        )
    return fitting


@torch.no_grad()
def divergence_to_float(
    float_model: PreTrainedModel, model: PreTrainedModel, examples: Sequence[Example], device: torch.device
) -> tuple[float, float]:
    """Mean KL(float || model) of the expert's steps, in nats an action, and the share of tokens that are chosen otherwise."""

    def compare(piece: Sequence[Example]) -> list[tuple[float, int, int, int]]:
        p, wanted = trained_logits(float_model, piece, device)
        q, _ = trained_logits(model, piece, device)
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total = float((log_p.exp() * (log_p - log_q)).sum())
        different = int((p.argmax(-1) != q.argmax(-1)).sum())
        return [(total, different, len(wanted), sum(example.steps for example in piece))]

    compared = in_pieces(examples, 8, "expert episodes", compare)
    total, different, tokens, steps = (sum(column) for column in zip(*compared, strict=True))
    return total / steps, different / tokens


def gate(facts: Sequence[RungFacts], precisions: Precisions) -> Gate:
    """High rung strong enough, low rung far enough below it and not too far."""
    success = {rung.name: rung.validation_success for rung in facts}
    high, low = success[precisions.high], success[precisions.low]
    smallest, largest = precisions.gate_gap
    gap = round(high - low, 6)
    passed = high >= precisions.gate_high and smallest <= gap <= largest
    verdict = (
        f"{precisions.high} wins {high:.1%} of the validation games (asked: at least {precisions.gate_high:.0%}), "
        f"{precisions.low} {100 * gap:.1f} points fewer (asked: {100 * smallest:.0f} to {100 * largest:.0f})"
    )
    return Gate(high=high, low=low, gap=gap, passed=passed, verdict=verdict)


def mean_cost(played: Sequence[Trajectory], weight_bytes: int) -> float:
    return _mean([episode_cost(trajectory, {True: weight_bytes, False: weight_bytes}) for trajectory in played])


def acting_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """What computes when a rung acts: on a CPU the model with plain float layers, made in place: no low-bit kernels there."""
    return dequantize(model) if device.type == "cpu" else model


def read_ladder(checkpoints: Path) -> LadderFacts:
    """Raises: UserError: another version of the stage has written it."""
    path = checkpoints / LADDER_FILE
    try:
        return LadderFacts.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} is of another version of this stage: make quantized_checkpoints again") from error


@dataclass(frozen=True)
class PolicyRuns:
    """A policy and the episodes that it is to play."""

    policy: RoutingPolicy
    """Each process has a copy of its own; what it remembers of the episodes is lost."""
    runs: Sequence[Run]
    advance: Callable[[int], None] = lambda _: None
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
    clock: Clock


@dataclass(frozen=True)
class Ladder:
    """The two rungs that the router chooses from, loaded for acting."""

    models: Mapping[bool, PreTrainedModel]
    """Precision is high -> the model that acts."""
    weight_bytes: Mapping[bool, int]
    """Precision is high -> bytes of weights that one forward pass at batch 1 reads."""
    always_high_cost: float
    """Bytes read in a mean always-high episode on validation games: the unit of cost."""
    prompter: Prompter
    device: torch.device
    recipe: Recipe

    @classmethod
    def load(cls, checkpoints: Path, recipe: Recipe) -> "Ladder":
        """From the folder of the stage `quantized_checkpoints`."""
        return cls._of_rungs(checkpoints, recipe, recipe.precisions.high, recipe.precisions.low)

    @classmethod
    def of_rung(cls, checkpoints: Path, recipe: Recipe, rung: str) -> "Ladder":
        """As `load`, with one rung in the place of both, so that it acts whatever a policy says."""
        return cls._of_rungs(checkpoints, recipe, rung, rung)

    @classmethod
    def _of_rungs(cls, checkpoints: Path, recipe: Recipe, high: str, low: str) -> "Ladder":
        device = resolve_device(recipe.runtime.device)
        loaded = {rung: _load_acting(checkpoints / rung, device) for rung in dict.fromkeys((high, low))}
        models = {True: loaded[high][0], False: loaded[low][0]}
        sizes = {True: loaded[high][1], False: loaded[low][1]}
        tokenizer = load_tokenizer(checkpoints / "tokenizer")
        prompter = Prompter.of(tokenizer, recipe.agent.prompt, models[True].generation_config)
        return cls(models, sizes, read_ladder(checkpoints).always_high_cost, prompter, device, recipe)

    @property
    def processes(self) -> int:
        """Processes in which episodes are played at once."""
        return processes_on(self.device, self.recipe.runtime)

    @property
    def capacity(self) -> int:
        """Tokens that a transcript may have."""
        return transcript_capacity(self.models[True].config, self.recipe.agent.max_transcript_tokens)

    @cached_property
    def rows(self) -> int:
        """Episodes that a process may act on at once: as the recipe says, or as many as there is memory for."""
        models = list({id(model): model for model in self.models.values()}.values())
        return rows_that_fit(models, self.capacity, self.recipe.runtime.batch_episodes, self.processes)

    def slots(self, runs: int) -> int:
        """Episodes that are acted on at once in one process, of so many."""
        return min(self.rows, runs)

    def play(
        self,
        runs: Sequence[Run],
        policy: RoutingPolicy,
        seed: int,
        clock: Clock | None = None,
        advance: Callable[[int], None] = lambda _: None,
        known: Known | None = None,
    ) -> list[Trajectory]:
        """`rollout.play` with these two precisions and the recipe's way of acting, in the recipe's number of processes.

        Args:
            policy: each process has a copy of its own; what it remembers of the episodes is lost.
            seed: of the actions.
            clock: gets the seconds of all processes.
            known: what may be looked up, by and by what is found; by default what this call itself finds.
        """
        found: list[Trajectory] = []

        def keep(_: int, played: list[Trajectory], spent: Clock) -> None:
            found.extend(played)
            if clock is not None:
                clock.add(spent)

        self.play_each([PolicyRuns(policy, runs, advance)], seed, keep, known)
        return found

    def play_each(
        self,
        plays: Sequence[PolicyRuns],
        seed: int,
        on_played: Callable[[int, list[Trajectory], Clock], None],
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
        parts = deal_by_game([play.runs for play in plays], self.processes)

        def play_part(part: Sequence[Sequence[int]], tell: Callable[[_Ended | _Share], None]) -> Known:
            mine = known.copied()
            for index, runs in enumerate(part):
                tell(self._play_share(index, plays[index], runs, rows, seed, tell, mine))
            return mine.since(known)

        waiting = [len(parts)] * len(plays)
        found: list[dict[int, Trajectory]] = [{} for _ in plays]
        clocks = [Clock() for _ in plays]

        def told(message: _Ended | _Share) -> None:
            index = message.index
            if isinstance(message, _Ended):
                plays[index].advance(message.count)
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
    ) -> _Share:
        """One process's share of the runs, by their indices."""
        spent, done = Clock(), dict[int, Trajectory]()

        def attempt(slots: int) -> list[Trajectory]:
            return play(
                [plays.runs[i] for i in mine],
                self.streams(slots),
                self.prompter,
                plays.policy,
                self.recipe.benchmark.step_limit,
                self.recipe.agent.action,
                self.recipe.agent.temperature,
                seed,
                spent,
                lambda count: tell(_Ended(index, count)),
                done,
                known if self.recipe.runtime.reuse_actions else None,
            )

        played = halving(min(rows, len(mine)), "episodes", attempt) if mine else []
        return _Share(index, dict(zip(mine, played, strict=True)), spent)

    def streams(self, slots: int) -> dict[bool, TokenStreams]:
        """Fresh token streams of both precisions."""
        return {high: token_streams(model, slots, self.capacity) for high, model in self.models.items()}


def deal_by_game(plays: Sequence[Sequence[Run]], processes: int) -> list[list[list[int]]]:
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


def _load_acting(folder: Path, device: torch.device) -> tuple[PreTrainedModel, int]:
    """What computes when a rung acts, and the bytes of weights that it stands for."""
    model = load_rung(folder, device)
    size = rung_size(model).bytes
    return acting_model(model, device), size


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
