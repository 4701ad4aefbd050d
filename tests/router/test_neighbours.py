"""Neighbours that vote and factors that are multiplied: by hand, and through the stage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.kl_router import Probe, RouterModel
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import Router, RoutingSequence, load_router, new_router, routing_margins, save_router
from dmr_pipeline.router.neighbours import remember
from dmr_pipeline.router.policies import routing_policy
from tests.helpers.kl_router import run_stage, section
from tests.helpers.rollouts import LOW, PROMPTER, ROUTE, RUNS, THREE, roll, taken
from tests.helpers.routers import CPU

NEAREST = RouterModel(probe=Probe(layers=(), features=("margin",), neighbours=3))


def new(route=ROUTE, model: RouterModel = NEAREST) -> Router:
    router = new_router(model, route, PROMPTER.tokenizer, 0, CPU, LOW)
    return replace(router, model=router.model.eval())


def sequence(*xs: float) -> RoutingSequence:
    features = torch.tensor([[x, 0.0, 0.0] for x in xs])
    return RoutingSequence([0] * 2 * len(xs), list(range(0, 2 * len(xs), 2)), [0] * len(xs), features)


def votes(x: float, points: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the three nearest, by one over the distance: weighted means, and the sums of the weights."""
    distances = np.abs(points - x)
    nearest = np.argsort(distances)[:3]
    each = weights[nearest] / (distances[nearest] + 1e-3)[:, None]
    return (each * values[nearest]).sum(0) / each.sum(0)


def test_classes_by_hand() -> None:
    known, labels = [sequence(0.0, 1.0, 5.0), sequence(2.0), sequence(1.1)], [[0, 1, 2], [2], [0]]
    router = remember(new(THREE), known, [torch.tensor(y) for y in labels], "divergence", held={2})
    points, classes = np.array([0.0, 1.0, 5.0, 2.0]), np.eye(3)[[0, 1, 2, 2]]
    (found,) = routing_margins(router, [sequence(0.9, 4.0)], 1)
    for row, x in zip(found, (0.9, 4.0), strict=True):
        shares = (votes(x, points, classes, np.ones((4, 3))) + 1 / 9) / (1 + 1 / 3)
        assert shares.sum() == pytest.approx(1)
        assert row == pytest.approx(np.log(shares[1:] / shares[0]), abs=1e-4)


def test_effects_by_hand_and_what_is_not_known_does_not_vote() -> None:
    known = [sequence(0.0, 1.0, 2.0, 1.05, 6.0)]
    effects = [[1.0, 0.5], [-1.0, 0.0], [0.5, 1.0], [9.0, 9.0], [0.0, 0.0]]
    weights = [[1.0, 1.0], [2.0, 2.0], [1.0, 4.0], [0.0, 0.0], [1.0, 1.0]]
    rows = torch.stack([torch.tensor(effects), torch.tensor(weights)], dim=1)
    router = remember(new(THREE), known, [rows], "advantage")
    assert router.model.config.stored == 4
    kept = [0, 1, 2, 4]
    (found,) = routing_margins(router, [sequence(1.04)], 1)
    expected = votes(1.04, np.array([0.0, 1, 2, 6]), np.array(effects)[kept], np.array(weights)[kept])
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_saved_and_loaded_it_votes_the_same_and_pays_for_what_it_remembers(tmp_path: Path) -> None:
    router = remember(new(), [sequence(0.0, 1.0, 2.0)], [torch.tensor([0, 1, 0])], "divergence")
    router.model.mean.add_(0.5)
    save_router(router, tmp_path)
    loaded = load_router(tmp_path, CPU, LOW)
    assert routing_margins(loaded, [sequence(0.3)], 1)[0] == pytest.approx(
        routing_margins(router, [sequence(0.3)], 1)[0]
    )
    assert loaded.pass_bytes.weights == 2 * (2 * 3 + 3 * (3 + 2 * 2))


def test_it_acts_alike_in_any_batch() -> None:
    router = remember(new(), [sequence(0.0, 1.0, 2.0)], [torch.tensor([0, 1, 0])], "divergence")
    router = with_settings(router, scale=3.0)
    played = [roll(routing_policy(router, slots, sample=True, seed=1), slots, runs=RUNS[:3]) for slots in (3, 1)]
    assert taken(played[0]) == taken(played[1])
    assert len({step.precision for trajectory in played[0] for step in trajectory.steps}) == 2


def test_factors_are_a_product_of_matrices() -> None:
    """RouteLLM's score of a model for a query, w . (v_model * (W q + b)): of two rungs the margin is linear in the features."""
    router = new(THREE, RouterModel(probe=Probe(layers=(), features=("margin",), hidden=2, activation="none")))
    head = router.model
    features = torch.randn(5, 3)
    with torch.no_grad():
        vectors = features @ head.inner.weight.T + head.inner.bias
        scores = torch.stack([(vectors * head.outer.weight[k]).sum(1) + head.outer.bias[k] for k in range(3)], dim=1)
        torch.testing.assert_close(head(features), scores)
        middle = head((features[:1] + features[1:2]) / 2)
        torch.testing.assert_close(middle, (head(features[:1]) + head(features[1:2])) / 2)


@pytest.mark.parametrize("probe", [Probe(layers=(1,), neighbours=5), Probe(layers=(1,), hidden=4, activation="none")])
def test_the_stage_makes_it(probe: Probe, recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    changed = recipe.model_copy(update={"kl_router": section(RouterModel(probe=probe), epochs=2)})
    output, summary = run_stage(changed, inputs, tmp_path)
    model = load_router(output / "router", CPU, LOW).model
    assert model.config.stored == (summary["train_steps"] if probe.neighbours else 0)
    assert (summary["final_loss"] is None) == bool(probe.neighbours)


def test_what_cannot_be_is_refused_and_what_was_is_written_as_it_was() -> None:
    with pytest.raises(ValidationError, match="activation: there is no hidden layer"):
        Probe(layers=(1,), hidden=0, activation="none")
    assert Probe(layers=(1,)).model_dump().keys() == {"layers", "hidden"}
    written = new(model=load_recipe("alfworld-tiny").kl_router.model.model_copy(update={"probe": Probe(layers=(1,))}))
    assert not {"activation", "neighbours", "stored", "classes"} & written.model.config.to_diff_dict().keys()
