"""Numbers that cost nothing: by hand, the same in acting and in training, and routers that decide on them alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import log1p
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.kl_router import Feature, Probe, RouterModel
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.features import Drafted, Past, width_of
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.labels import measure
from dmr_pipeline.router.model import load_router, save_router, sequence_of_trajectory, with_features, with_numbers
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.stages.grpo_router import grpo_router
from tests.helpers.after_routers import ALL, counting, informed, new
from tests.helpers.grpo_router import tiny_recipe
from tests.helpers.kl_router import run_stage, section
from tests.helpers.rollouts import LOW, PROMPTER, ROUTE, RUNS, THREE, rollouts_of
from tests.helpers.routers import CPU


def test_by_hand() -> None:
    past = Past(("float", "int2"))
    draft = Drafted("go", 4, 0.2, 0.6)
    assert past.numbers(ALL, [1, 2, 3], 1.0, draft) == [0, 0, log1p(3), log1p(3), 1.0, 0.2, 0.6, 0.4, 0, 0]
    past.act([1, 2, 3], "go", "int2", 5)
    past.act([7], "look", "float", 2)
    past.act([1, 2, 3], "go", "int2", 4)
    # 18 tokens and 2 new ones; float has read 10 of them and int2 17.
    assert past.numbers(("repeats", "behind"), [7, 7], 0.5, None) == [0, log1p(1), log1p(10), log1p(3)]
    assert past.numbers(("repeats",), [1, 2, 3], 0.5, None) == [log1p(2), log1p(1)]
    assert past.numbers(("draft_repeats", "margin"), [7], 0.5, Drafted("go", 1, 1, 1)) == [log1p(2), 0.0, 0.5]
    assert past.numbers(("draft_repeats",), [7], 0.5, Drafted("look", 1, 1, 1)) == [log1p(1), 1.0]
    for rungs, route in enumerate((ROUTE, THREE), start=2):
        assert len(Past(route).numbers(ALL, [1], 1.0, draft)) == width_of(ALL, rungs)


@pytest.mark.parametrize("decides", ["before", "after"])
@pytest.mark.parametrize("route", [ROUTE, THREE], ids=len)
def test_training_computes_what_acting_has_decided_on(decides: str, route: Sequence[str]) -> None:
    features: tuple[Feature, ...] = ALL if decides == "after" else ("margin", "behind", "repeats")
    model = RouterModel(probe=Probe(layers=(1,), features=features), decides=decides)  # type: ignore[arg-type]
    router, rollouts = new(model, route), rollouts_of(route)
    played = rollouts.play(RUNS[:4], routing_policy(router, 4, sample=True, seed=3), 0)
    acted = [sequence_of_trajectory(trajectory, router) for trajectory in played]
    episodes, steps = to_frames(played, "router")
    drafts = measure(rollouts, episodes, steps, "action").drafts
    again = with_features(router, [replace(s, features=None) for s in acted], 3)
    again = with_numbers(router, again, steps, drafts, PROMPTER.command)
    for one, other in zip(acted, again, strict=True):
        torch.testing.assert_close(one.features, other.features, atol=1e-4, rtol=1e-3)
    numbers = torch.cat([s.features for s in acted])[:, -width_of(features, len(route)) :]  # type: ignore[misc]
    assert (numbers.std(0) > 0).all(), "each of them tells something here"
    assert {step.precision for trajectory in played for step in trajectory.steps} == set(route)


def test_saved_and_loaded_a_regression_of_numbers_is_the_same_and_reads_nothing_of_the_agent(tmp_path: Path) -> None:
    router, width = counting(), 2 + width_of(ALL, 2)
    router.model.standardize(torch.randn(50, width) + 2)
    save_router(router, tmp_path)
    loaded = load_router(tmp_path, CPU, LOW)
    features = torch.randn(9, width)
    with torch.no_grad():
        assert torch.equal(loaded.model(features), router.model(features))
    assert loaded.settings == router.settings
    assert loaded.pass_bytes == PassBytes(weights=2 * (2 * width + 2 + 2 * width))
    plain = new(RouterModel(probe=Probe(layers=(1,))))
    save_router(plain, tmp_path / "plain")
    assert "features" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("make", [counting, informed])
def test_the_stage_learns_from_numbers(make, recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    config = make().model.config
    probe = Probe(layers=tuple(config.layers), features=ALL, hidden=config.hidden)
    model = RouterModel(probe=probe, decides="after")
    changed = recipe.model_copy(update={"kl_router": section(model, epochs=2)})
    output, summary = run_stage(changed, inputs, tmp_path / "one")
    again, _ = run_stage(changed, inputs, tmp_path / "two")
    for file in ("router/model.safetensors", "router/router.json", "training.parquet"):
        assert (output / file).read_bytes() == (again / file).read_bytes(), file
    loaded = load_router(output / "router", CPU, LOW)
    assert (loaded.settings.decides, tuple(loaded.model.config.features)) == ("after", ALL)
    assert np.isfinite(float(summary["auroc"]))  # type: ignore[arg-type]


def test_stage_2_goes_on_from_it(artifacts: Path, tmp_path: Path) -> None:
    router, inputs = (
        counting(scale=0.1),
        {name: artifacts / name for name in ("benchmark_tasks", "quantized_checkpoints")},
    )
    save_router(router, tmp_path / "stage_1" / ROUTER_FOLDER)
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    inputs["kl_router"] = tmp_path / "stage_1"
    grpo_router(StageContext(tiny_recipe(), inputs, tmp_path / "output", tmp_path / "scratch"))
    trained = load_router(tmp_path / "output" / ROUTER_FOLDER, CPU, LOW)
    assert trained.settings.decides == "after"
    log = pl.read_parquet(tmp_path / "output" / "training.parquet")
    assert log["divergence"][1] == pytest.approx(0.0, abs=1e-6)
    assert log["divergence"][-1] > 0  # from its start, after what it has learned
    assert log["ratio"][1] == pytest.approx(0.6, abs=0.25)  # its start is tilted to `initial_ratio`


def test_what_cannot_be_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="'draft' is of a draft, which there is only with decides: after"):
        RouterModel(probe=Probe(layers=(1,), features=("repeats", "draft")))
    with pytest.raises(ValueError, match="there is nothing to decide on"):
        Probe(layers=())
    model = RouterModel(probe=Probe(layers=(), features=("repeats", "margin")))
    agent = recipe.agent.model_copy(update={"temperature": 0.5})
    (problem,) = problems_across({"agent": agent, "kl_router": section(model)})
    assert "'margin' is learned from greedy actions" in problem
