"""Routers that learn from steps that were swapped: targets by hand, and through the stages."""

from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.consequence import SWAPPED, label_recorded, swap_chances
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.kl_router import KlRouter, Probe, RouterModel
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.recipe.sensitivity import Consequences
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.advantage import advantage_loss
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.consequence import CONSEQUENCES, Player, consequences
from dmr_pipeline.router.kl import fit
from dmr_pipeline.router.labels import label, measure
from dmr_pipeline.router.model import RoutingSequence, load_router, routing_margins
from dmr_pipeline.router.swapped import read_swapped, steps_of, targets
from dmr_pipeline.stages.sensitivity_dataset import sensitivity_dataset
from tests.helpers.after_routers import ALL, new
from tests.helpers.kl_router import run_stage, section
from tests.helpers.rollouts import LOW, ROUTE, RUNS, THREE, rollouts_of
from tests.helpers.routers import CPU

GAMES = [run.task for run in RUNS[:4]]


def swapped(tmp_path: Path, settings: Consequences, route=THREE) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of mixed episodes that were recorded, and the steps themselves."""
    rollouts, mixed = rollouts_of(route), RandomMixing(dict.fromkeys(route, 1 / len(route)), settings.seed)
    played = rollouts.play([RolloutRequest(game) for game in GAMES], mixed, 0)
    episodes, steps = to_frames(played, "mixed")
    rows = label(measure(rollouts, episodes, steps, "action").steps, load_recipe("alfworld-tiny").sensitivity, 1.0)
    found, spent = label_recorded(rollouts, settings, GAMES, episodes, steps, rows, tmp_path)
    assert spent.actions > spent.looked_up > 0
    return found, steps


def test_recorded_episodes_have_the_consequences_of_those_that_are_played(tmp_path: Path) -> None:
    """`dmr sensitivity analyse` plays the behaviour itself."""
    settings = Consequences(continuation="high", seed=3)
    found, _ = swapped(tmp_path, settings)
    rollouts, mixed = rollouts_of(THREE), Player("mixed", RandomMixing(dict.fromkeys(THREE, 1 / 3), 3))
    other = consequences(
        rollouts, GAMES, mixed, [Player("high", SinglePrecision("float", THREE))], "action", 0, Known()
    )
    key = ["episode_id", "turn", "precision"]
    assert found.schema == SWAPPED
    assert (~found["greedy_agree"]).sum() > 5
    columns = [
        name for name in CONSEQUENCES if name not in ("kl_high_low", "kl_low_high", "js", "entropy_low", "margin_low")
    ]
    assert_frame_equal(found.select(columns).sort(key), other.select(columns).sort(key))
    assert set(found["propensity"]) == {1.0}
    calls = list(tmp_path.iterdir())
    again, _ = swapped(tmp_path, settings)
    assert again.equals(found)
    assert list(tmp_path.iterdir()) == calls, "nothing was played again"


def test_steps_are_drawn_whole_and_where_nothing_differs_all_are_kept() -> None:
    rows = pl.DataFrame(
        {
            "episode_id": [str(n // 20) for n in range(2000)],
            "turn": [n % 20 // 2 for n in range(2000)],
            "precision": ["int4", "int2"] * 1000,
            "greedy_agree": [n // 2 % 5 > 0 or n % 2 == 0 for n in range(2000)],
        }
    )
    chances = swap_chances(rows, Consequences(share=0.3, seed=1))
    assert chances.equals(swap_chances(rows, Consequences(share=0.3, seed=1)))
    assert not chances.equals(swap_chances(rows, Consequences(share=0.3, seed=2)))
    counted = chances.group_by("propensity").len().sort("propensity")
    assert counted["propensity"].to_list() == [0.3, 1.0]
    drawn, same = counted["len"].to_list()
    assert same == 800
    assert 40 < drawn < 80
    assert len(swap_chances(rows, Consequences())) == 1000


TABLE = pl.DataFrame(
    [
        ("a", 0, "int4", True, None, None, 1.0),
        ("a", 0, "int2", True, None, None, 1.0),
        ("a", 1, "int4", False, True, False, 0.5),
        ("a", 1, "int2", False, True, True, 0.5),
        ("b", 0, "int4", True, None, None, 0.5),
        ("b", 0, "int2", False, False, True, 0.5),
    ],
    schema=["episode_id", "turn", "precision", "greedy_agree", "high_success", "low_success", "propensity"],
    orient="row",
)
STEPS = pl.DataFrame({"episode_id": ["b", "b", "a", "a", "c"], "turn": [0, 1, 0, 1, 0]})


def test_targets_by_hand() -> None:
    """Of int4, then of float, against int2: int4 gains what int2 loses against float, less what it loses itself."""
    steps = steps_of(STEPS, TABLE)
    assert steps["episode_id"].to_list() == ["b", "b", "a", "a"]
    b, a = targets(steps, TABLE, THREE, 0.25)
    assert b.tolist() == [[[-1.0, -1.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], "its second step was not drawn"
    assert a.tolist() == [[[0.0, 0.0], [0.25, 0.25]], [[-1.0, 0.0], [2.0, 2.0]]]


def test_drawn_steps_stand_for_those_that_were_not(tmp_path: Path) -> None:
    """A router that sees nothing finds the mean effect over all steps, though few of those with one were drawn."""
    generator = torch.Generator().manual_seed(0)
    rows, sequences = [], []
    for episode in range(400):
        for turn in range(4):
            differs = turn == 0
            if differs and torch.rand(1, generator=generator) > 0.25:
                continue
            won = bool(torch.rand(1, generator=generator) < 0.4)
            outcome = (won, False, 0.25) if differs else (None, None, 1.0)
            rows.append((str(episode), turn, "int2", not differs, *outcome))
        features = torch.zeros(4, 3)
        sequences.append(RoutingSequence([0] * 8, [0, 2, 4, 6], [0] * 4, features))
    table = pl.DataFrame(rows, schema=TABLE.schema, orient="row")
    steps = pl.DataFrame({"episode_id": [str(n // 4) for n in range(1600)], "turn": [n % 4 for n in range(1600)]})
    its = targets(steps, table, ROUTE, 1.0)
    router = new(RouterModel(probe=Probe(layers=(), features=("margin",), hidden=0)), ROUTE)
    settings = section(epochs=60, batch_episodes=400, learning_rate=0.1)
    trained, _ = fit(router, sequences, its, advantage_loss, settings, tmp_path)
    (found,) = routing_margins(trained, sequences[:1], 1)
    assert found.mean() == pytest.approx(0.4 / 4, abs=0.03)


def test_the_stages_swap_and_learn(recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    sensitivity = recipe.sensitivity.model_copy(update={"consequences": Consequences(games=3)})
    model = RouterModel(probe=Probe(layers=(), features=ALL, hidden=0), decides="after")
    learning = section(model, epochs=2).model_copy(update={"target": "consequence"})
    changed = recipe.model_copy(update={"sensitivity": sensitivity, "kl_router": learning})
    output, scratch = tmp_path / "sensitivity_dataset", tmp_path / "scratch"
    output.mkdir()
    told = sensitivity_dataset(StageContext(changed, inputs, output, scratch)).summary["consequences"]
    for file in ("steps.parquet", "drafts.parquet"):
        assert (output / file).read_bytes() == (inputs["sensitivity_dataset"] / file).read_bytes()
    table = pl.read_parquet(output / "consequences.parquet")
    assert table.schema == SWAPPED
    assert told["episodes"] == table["episode_id"].n_unique() == 9, "three behaviours on three games"
    assert told["branches"] == 2 * (~table["greedy_agree"]).sum() > 0
    made, summary = run_stage(changed, {**inputs, "sensitivity_dataset": output}, tmp_path / "kl")
    assert summary["train_steps"] == len(table)
    assert load_router(made / "router", CPU, LOW).settings.scale > 0


def test_what_is_missing_is_said(inputs: dict[str, Path], recipe: Recipe) -> None:
    with pytest.raises(UserError, match="sensitivity_dataset has none; give"):
        read_swapped(inputs["sensitivity_dataset"])
    content = recipe.model_dump()
    content["kl_router"]["target"] = "consequence"
    problems = problems_across(dict(Recipe.model_validate(content)))
    assert any(line.startswith("kl_router.target: consequence needs") for line in problems)
    content["sensitivity"]["consequences"] = {}
    content["agent"]["temperature"] = 0.5
    assert any(
        line.startswith("sensitivity.consequences: ") for line in problems_across(dict(Recipe.model_validate(content)))
    )
    assert "consequences" not in recipe.sensitivity.model_dump()
    assert KlRouter.model_fields["agreeing_weight"].default == 1
