"""Consequences of single steps: closed forms in a toy game, and branches by plain forward passes in real ones."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl
import pytest
import torch
from transformers import PreTrainedModel

from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.prompts import Moment
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.consequence import CONSEQUENCES, Branch, Branching, Player, consequences
from tests.helpers.rollouts import (
    ALL_HIGH,
    ALL_LOW,
    HALF,
    HIGH,
    LOW,
    PROMPTER,
    ROUTE,
    RUNS,
    STEPS,
    THREE,
    greedy_uncached,
    roll,
    rollouts_of,
    taken,
)

DECISIVE, LENGTH = 2, 5


@dataclass(frozen=True)
class Toy:
    """A game that is won, and over, by the right word at the decisive step, and lost otherwise."""

    task_id: str
    right: str
    task_type: str = "toy"
    instruction: str = "look"

    def episode(self) -> "ToyEpisode":
        return ToyEpisode(self)


class ToyEpisode:
    def __init__(self, toy: Toy) -> None:
        self.toy, self.state = toy, 0

    def reset(self) -> str:
        self.state = 0
        return "you see nothing"

    def step(self, command: str) -> tuple[str, float, bool]:
        won = self.state == DECISIVE and command == self.toy.right
        self.state += 1
        return "nothing happens", float(won), won

    def admissible_commands(self) -> Sequence[str]:
        return ["look", "use"]


def says(word: str) -> PreTrainedModel:
    """A model that always writes this word: what comes next depends on the last token alone."""
    act, said, end = PROMPTER.tokenizer.convert_tokens_to_ids(["<act>", word, "<end>"])
    model = copy.deepcopy(HIGH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                parameter.zero_()
        model.model.norm.weight.fill_(1)
        for place, (token, following) in enumerate(((act, said), (said, end))):
            model.model.embed_tokens.weight[token, place] = 1
            model.lm_head.weight[following, place] = 1
    return model


def toy_rollouts(high: str, low: str) -> Rollouts:
    """Of a float agent that always writes the one word, and an int2 agent that always writes the other."""
    plain = rollouts_of(ROUTE)
    acting = ActingModels({"float": says(high), "int2": says(low)}, plain.acting.pass_bytes, plain.device)
    return replace(plain, acting=acting, step_limit=LENGTH)


@pytest.fixture(scope="module")
def toy() -> pl.DataFrame:
    """Two games, of which the one is won by high's word and the other by low's; either plays them, and either goes on."""
    rollouts = toy_rollouts("look", "use")
    games = [Toy("high's", "look"), Toy("low's", "use")]
    players = Player("high", ALL_HIGH), Player("low", ALL_LOW)
    return pl.concat(
        consequences(rollouts, games, behaviour, players, "action", 0, Known()) for behaviour in reversed(players)
    )


def test_one_step_decides(toy: pl.DataFrame) -> None:
    assert toy.schema == CONSEQUENCES
    assert set(toy["label"]) == {"needed", "harmful", "neutral"}
    assert not toy["greedy_agree"].any()
    for row in toy.iter_rows(named=True):
        decisive = row["turn"] == DECISIVE
        expected = {"high's": "needed", "low's": "harmful"}[row["task_id"]] if decisive else "neutral"
        assert row["label"] == expected
        wins = {"high's": "high", "low's": "low"}[row["task_id"]]
        for side in ("high", "low"):
            at_the_step = side if decisive else row["continuation"] if row["turn"] < DECISIVE else row["policy"]
            won = at_the_step == wins
            steps = (DECISIVE + 1 if won else LENGTH) - row["turn"]
            others = (steps - 1) * (8 if row["continuation"] == "high" else 2)
            assert row[f"{side}_success"] is won
            assert row[f"{side}_steps"] == steps
            assert row[f"{side}_cost"] == 2 * (others + (8 if side == "high" else 2)), "two passes a step"


def test_where_all_agree_nothing_is_played() -> None:
    rollouts, low = toy_rollouts("look", "look"), Player("low", ALL_LOW)
    table = consequences(rollouts, [Toy("a game", "look")], low, [low], "action", 0, Known())
    assert table["turn"].to_list() == [0, 1, 2]
    assert table["greedy_agree"].all()
    assert set(table["label"]) == {"neutral"}
    assert table["high_steps"].null_count() == 3


def test_steps_are_those_of_the_played_episodes(toy: pl.DataFrame) -> None:
    for (game, policy), rows in toy.group_by("task_id", "policy"):
        won = {"high's": "high", "low's": "low"}[str(game)] == policy
        assert sorted(set(rows["turn"])) == list(range(DECISIVE + 1 if won else LENGTH))
        assert set(rows["success"]) == {won}
        assert set(rows["acted"]) == {"float" if policy == "high" else "int2"}


def test_a_branch_is_the_episode_up_to_its_step_and_goes_on_as_plain_passes_do() -> None:
    mixed = RandomMixing(HALF, seed=3)
    before = roll(mixed, known=(known := Known()))
    runs = [Branch(run.task, turn=i % STEPS, precision=ROUTE[i % 2]) for i, run in enumerate(RUNS)]
    branches = roll(Branching(mixed, ALL_LOW), runs=runs, known=known)
    assert taken(branches) != taken(before)
    for played, branch, run in zip(before, branches, runs, strict=True):
        episode = run.task.episode()
        opening = episode.reset()
        text = PROMPTER.opening(opening, run.task.instruction, Moment(1, STEPS, list))
        assert opening == branch.opening
        for turn, step in enumerate(branch.steps):
            rung = played.steps[turn].precision if turn < run.turn else run.precision if turn == run.turn else "int2"
            action = greedy_uncached({"float": HIGH, "int2": LOW}[rung], text)
            assert (step.precision, step.action) == (rung, action)
            kept = episode.state
            observation = episode.step(PROMPTER.command(action))[0]
            episode.state = kept  # a state is a value: to step again from it shows the same
            assert observation == episode.step(PROMPTER.command(action))[0] == step.observation
            text = text + action + PROMPTER.turn(observation, run.task.instruction, Moment(1, STEPS, list))
    assert taken(roll(mixed, known=known)) == taken(before), "the branches disturbed the episodes"


def test_up_to_the_branch_all_is_looked_up() -> None:
    roll(ALL_HIGH, known=(known := Known()))
    asked, looked_up = known.asked, known.looked_up
    roll(Branching(ALL_HIGH, ALL_HIGH), runs=[Branch(run.task, turn=3, precision="float") for run in RUNS], known=known)
    assert known.asked - asked == known.looked_up - looked_up > 0


def test_the_branch_that_changes_nothing_is_the_episode() -> None:
    rollouts, mixed, games = (
        rollouts_of(THREE),
        RandomMixing(dict.fromkeys(THREE, 1 / 3), 3),
        [run.task for run in RUNS],
    )
    table = consequences(rollouts, games, Player("mixed", mixed), [Player("mixed", mixed)], "action", 0, Known())
    played = rollouts.play([RolloutRequest(game) for game in games], mixed, 0)
    by_task = {trajectory.run.task.task_id: trajectory for trajectory in played}
    assert len(table) == 2 * sum(len(trajectory.steps) for trajectory in played)
    same = table.filter(pl.col("greedy_agree"))
    assert set(same["label"]) == {"neutral"}
    assert same["high_success"].null_count() == len(same) > 0
    checked = 0
    for row in table.filter(~pl.col("greedy_agree")).iter_rows(named=True):
        trajectory = by_task[row["task_id"]]
        rest = replace(trajectory, steps=trajectory.steps[row["turn"] :])
        for side, rung in (("high", "float"), ("low", row["precision"])):
            if row["acted"] == rung:
                checked += 1
                outcome = (trajectory.success, len(rest.steps), pytest.approx(rollouts.cost(rest).total))
                assert (row[f"{side}_success"], row[f"{side}_steps"], row[f"{side}_cost"]) == outcome
    assert checked > 10


def test_the_continuation_is_told_of_all_steps() -> None:
    told: list[tuple[int, str]] = []

    class Listening(SinglePrecision):
        def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
            told.append((slot, precision))

    played = roll(Branching(ALL_HIGH, Listening("int2")), runs=[Branch(RUNS[0].task, turn=2, precision="int2")])
    assert told == [(0, rung) for rung in ("float", "float", *["int2"] * (len(played[0].steps) - 2))]
