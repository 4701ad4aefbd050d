"""Advantages from mixed episodes, on simulated ones whose answer is known, and through the stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.kl_router import KlRouter, Probe, RouterModel
from dmr_pipeline.rollout.tables import EPISODES, STEPS
from dmr_pipeline.router.advantage import (
    Estimator,
    advantage_loss,
    cross_fitted,
    differing,
    doubly_robust,
    folds,
    mixed,
    r_learner,
    spread,
    targets,
)
from dmr_pipeline.router.kl import fit, held_out
from dmr_pipeline.router.labels import DRAFTS
from dmr_pipeline.router.model import Router, RoutingSequence, load_router, routing_margins
from tests.helpers.after_routers import ALL, new
from tests.helpers.kl_router import run_stage, section
from tests.helpers.probes import new_probe
from tests.helpers.rollouts import LOW, ROUTE, THREE
from tests.helpers.routers import CPU

GAINS = {"float": (0.3, 0.2), "int4": (0.1, 0.0)}
"""Rung -> what it gains at x where it would act otherwise than the cheapest: the first, and the second times x."""
APART = {"float": 0.8, "int4": 0.5}
"""How often it would."""
Simulated = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, list[RoutingSequence]]


def simulated(route: Sequence[str], count: int, seed: int = 0) -> Simulated:
    """Steps, episodes, drafts and sequences of episodes of one step each, three of a game: won by chances of x and who acted."""
    rng = np.random.default_rng(seed)
    chances = np.array([0.5, 0.3, 0.2] if len(route) == 3 else [0.4, 0.6])  # dearest first
    episodes, steps, drafts, sequences = [], [], [], []
    for number in range(count):
        x, rung, name = rng.uniform(-1, 1), route[rng.choice(len(route), p=chances)], str(number)
        apart = {its: rng.random() < share for its, share in APART.items()}
        base, slope = GAINS[rung] if apart.get(rung) else (0.0, 0.0)
        won = bool(rng.random() < 0.4 + 0.1 * x + base + slope * x)
        episodes.append((name, f"game {number // 3}", "kind", "mixed", 0, "", won, float(won), 1))
        steps.append((name, 0, "go", "", rung, chances.cumsum()[:-1].tolist(), [1, 2], [3], 3))
        drafts += [(name, 0, its, [4 if apart.get(its) else 3], 1.0, 1.0) for its in route]
        features = torch.tensor([[x, 0.0, 0.0]], dtype=torch.float32)
        sequences.append(RoutingSequence([1, 2, 9], [1], [len(route) - 1 - route.index(rung)], features, [1]))
    tables = ((steps, STEPS), (episodes, EPISODES), (drafts, DRAFTS))
    found = [pl.DataFrame(rows, schema, orient="row") for rows, schema in tables]
    return found[0], found[1], found[2], sequences


def linear(route: Sequence[str]) -> Router:
    """A head of three features, without a hidden layer."""
    router = new(RouterModel(probe=Probe(layers=(), features=("margin",), hidden=0)), route)
    with torch.no_grad():
        router.model.outer.weight.zero_()
        router.model.outer.bias.zero_()
    return router


@pytest.mark.parametrize("estimator", ["r_learner", "doubly_robust"])
@pytest.mark.parametrize("route", [ROUTE, THREE], ids=len)
def test_it_finds_the_advantage_that_was_put_in(route: Sequence[str], estimator: Estimator, tmp_path: Path) -> None:
    steps, episodes, drafts, sequences = simulated(route, 4_000)
    its = targets(mixed(steps, episodes), episodes, drafts, route, sequences, 0, estimator)
    settings = section(epochs=10, batch_episodes=400, learning_rate=0.05)
    router, _ = fit(linear(route), sequences, its, advantage_loss, settings, tmp_path)
    (found,) = routing_margins(router, [at(-1, 0, 1)], 1)
    for column, rung in enumerate(router.settings.upper):
        base, slope = GAINS[rung]
        true = [APART[rung] * (base + slope * x) for x in (-1, 0, 1)]
        assert found[:, column] == pytest.approx(true, abs=0.08)


def at(*xs: float) -> RoutingSequence:
    features = torch.tensor([[x, 0.0, 0.0] for x in xs], dtype=torch.float32)
    return RoutingSequence([0] * 2 * len(xs), list(range(0, 2 * len(xs), 2)), [0] * len(xs), features)


def test_a_target_by_hand() -> None:
    """Two rungs: psi is (y - m) (a - e) / (e (1 - e)) where they differ, its weight e (1 - e)."""
    steps, episodes, drafts, sequences = simulated(ROUTE, 300)
    rows = torch.cat(targets(steps, episodes, drafts, ROUTE, sequences, 0)).numpy()
    assert rows[:, 1, 0] == pytest.approx(0.4 * 0.6)
    acted, apart = (steps["precision"] == "float").to_numpy(), differing(steps, drafts, ROUTE)[:, 0]
    assert 0.7 < apart.mean() < 0.9
    assert (rows[~apart, 0, 0] == 0).all()
    x = np.array([float(s.features[0, 0]) for s in sequences])  # type: ignore[index]
    fold = folds([f"game {n // 3}" for n in range(300)], [1] * 300, 0)
    expected = cross_fitted(np.column_stack([x, 0 * x, 0 * x]), episodes["success"].to_numpy().astype(float), fold)
    psi = (episodes["success"].to_numpy() - expected) * (acted - 0.4) / 0.24
    assert rows[apart, 0, 0] == pytest.approx(psi[apart], abs=1e-5)
    never = steps.with_columns(exceedance=pl.Series([[1.0]] * len(steps), dtype=pl.List(pl.Float64)))
    assert not torch.cat(targets(never, episodes, drafts, ROUTE, sequences, 0)).any()


def test_the_least_loss_is_the_weighted_mean() -> None:
    target = torch.tensor([[[0.5], [0.2]], [[-0.1], [0.6]]]).double()
    best = (0.2 * 0.5 - 0.6 * 0.1) / 0.8
    losses = {
        tau: advantage_loss(torch.tensor([[1.0, 1.0 + tau]]).double().expand(2, 2), target) for tau in (0, best, 0.2)
    }
    assert min(losses, key=lambda tau: float(losses[tau])) == best
    assert float(losses[0]) == pytest.approx((0.2 * 0.25 + 0.6 * 0.01) / 2)


def test_what_is_expected_of_a_game_comes_from_other_games() -> None:
    rng = np.random.default_rng(0)
    inputs, fold = rng.normal(size=(300, 4)), folds([str(n // 10) for n in range(100)], [3] * 100, 0)
    assert len({frozenset(fold[30 * n : 30 * n + 30]) for n in range(10)}) <= 5
    assert all(len(set(fold[30 * n : 30 * n + 30])) == 1 for n in range(10))
    outcomes = inputs @ [1.0, -2.0, 0.5, 0.0] + 3
    expected = cross_fitted(inputs, outcomes, fold)
    assert expected == pytest.approx(outcomes, abs=0.3)
    changed = np.where(fold == 0, -100.0, outcomes)
    assert cross_fitted(inputs, changed, fold)[fold == 0] == pytest.approx(expected[fold == 0])


def test_only_drawn_rungs_teach() -> None:
    steps, episodes, *_ = simulated(ROUTE, 9)
    certain = steps.with_columns(exceedance=pl.Series([[1.0]] * 3 + [[0.4]] * 6, dtype=pl.List(pl.Float64)))
    assert mixed(certain, episodes)["episode_id"].to_list() == list("345678")
    assert mixed(certain, episodes.tail(3))["episode_id"].to_list() == list("678")
    with pytest.raises(UserError, match="add such a policy"):
        mixed(certain.head(3), episodes)


def test_spread_margins_have_mean_0_and_deviation_1() -> None:
    margins = np.random.default_rng(0).normal([0.1, 0.3], 0.02, size=(500, 2))
    scale, offsets = spread(margins)
    scores = scale * margins + offsets
    assert scores.mean(0) == pytest.approx([0, 0], abs=1e-9)
    assert scores.std() == pytest.approx(1)


def test_the_epoch_that_is_best_on_games_held_out_is_kept(tmp_path: Path) -> None:
    """Outcomes are noise: all that is learned is overfitted, and the first epoch is best. Resumed, it is the same."""
    router = replace(new_probe(), agent=None)
    generator = torch.Generator().manual_seed(0)
    sequences = [RoutingSequence([1, 2], [0], [0], torch.randn(1, 66, generator=generator)) for _ in range(60)]
    noise = [torch.stack([torch.randn(1, 1, generator=generator), torch.ones(1, 1)], dim=1) for _ in sequences]
    held = held_out([str(n // 2) for n in range(60)], 0.3, 0)
    assert len(held) == 18
    assert len(held_out(["a", "a", "b"], 0.9, 0)) < 3
    with pytest.raises(UserError, match=r"held_out: 0\.3 of the games .* have 1"):
        held_out(["a", "a"], 0.3, 0)
    assert all((place ^ 1) in held for place in held)

    learned = [place for place in range(60) if place not in held]

    def loss_after(held_there: bool) -> float:
        folder = tmp_path / str(held_there)
        folder.mkdir()
        places = range(60) if held_there else learned
        start = replace(router, model=new_probe().model)
        settings = section(epochs=30, batch_episodes=60, learning_rate=0.05)
        given = [sequences[i] for i in places], [noise[i] for i in places]
        done, _ = fit(start, *given, advantage_loss, settings, folder, held if held_there else ())
        margins = routing_margins(done, [sequences[i] for i in sorted(held)], 9)
        return float(np.mean([(noise[i][0, 0, 0] - m[0, 0]) ** 2 for i, m in zip(sorted(held), margins, strict=True)]))

    assert loss_after(held_there=True) < 0.8 * loss_after(held_there=False)


def test_the_stage_learns_advantages(recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    model = RouterModel(probe=Probe(layers=(), features=ALL, hidden=0), decides="after")
    learning = section(model, epochs=2).model_copy(
        update={"target": "advantage", "held_out": 0.25, "weight_decay": 0.1}
    )
    changed = recipe.model_copy(update={"kl_router": learning})
    output, summary = run_stage(changed, inputs, tmp_path)
    router = load_router(output / "router", CPU, LOW)
    assert router.settings.scale > 0
    assert summary["train_steps"] == len(
        pl.read_parquet(inputs["trajectories"] / "steps.parquet").filter(pl.col("episode_id").str.starts_with("mixed"))
    )
    assert "brier" not in summary


def test_doubly_robust_by_hand() -> None:
    """Two rungs, cheapest first, at chances .6 and .4: the AIPW formula, term by term."""
    outcomes, acted = np.array([1.0, 0.0, 1.0]), np.array([1, 0, 0])
    likely, expected = np.tile([0.6, 0.4], (3, 1)), np.array([[0.2, 0.5], [0.3, 0.3], [0.1, 0.9]])
    psi, weights = doubly_robust(outcomes, acted, likely, expected)
    by_hand = [0.5 - 0.2 + (1 - 0.5) / 0.4, 0.3 - 0.3 - (0 - 0.3) / 0.6, 0.9 - 0.1 - (1 - 0.1) / 0.6]
    assert psi[:, 0] == pytest.approx(by_hand)
    assert weights.tolist() == [[1.0]] * 3
    assert not doubly_robust(outcomes, acted, np.tile([1.0, 0.0], (3, 1)), expected)[1].any(), "never drawn"


def test_doubly_robust_is_right_where_either_the_chances_or_the_expectations_are() -> None:
    """The chances depend on x, as the outcome does: who goes by neither is misled."""
    rng = np.random.default_rng(0)
    x, tau = rng.uniform(-1, 1, 200_000), 0.15
    dear = 0.5 + 0.4 * x
    acted = (rng.random(len(x)) < dear).astype(np.int64)
    right = np.stack([0.4 + 0.3 * x, 0.4 + 0.3 * x + tau], axis=1)
    outcomes = (rng.random(len(x)) < right[np.arange(len(x)), acted]).astype(float)
    chances, wrong = np.stack([1 - dear, dear], axis=1), np.full((len(x), 2), 0.5)
    found = {
        (known, modelled): doubly_robust(outcomes, acted, e, mu)[0].mean()
        for known, e in (("chances", chances), ("no chances", wrong))
        for modelled, mu in (("model", right), ("no model", 0 * right))
    }
    misled = found.pop(("no chances", "no model"))
    assert list(found.values()) == pytest.approx([tau] * 3, abs=0.015)
    assert abs(misled - tau) > 0.05
    assert r_learner(outcomes, acted, chances, right.mean(1))[0].mean() == pytest.approx(tau, abs=0.015)


def test_what_is_expected_of_a_rung_comes_from_the_steps_that_it_took() -> None:
    x = np.linspace(-1, 1, 200)
    fold, took = np.arange(200) % 5, np.arange(200) % 3 == 0
    expected = cross_fitted(x[:, None], np.where(took, 2 * x + 1, -5.0), fold, took)
    assert expected == pytest.approx(2 * x + 1, abs=0.05)


def test_an_estimator_is_of_advantages() -> None:
    content = section(epochs=1).model_dump()
    with pytest.raises(ValidationError, match="estimator: is of advantages, but target is 'divergence'"):
        KlRouter.model_validate(content | {"estimator": "doubly_robust"})
    assert "estimator" not in content
