"""Forced search steps, in a stub of a shop: ALFWorld's rooms, with a search bar at every other step."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import expit, softmax

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.policies import search_entries
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.rollout.cost import episode_cost
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import RoutingPolicy
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.reading import NOTHING
from dmr_pipeline.rollout.tables import read_trajectories
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.grpo import Scorer, Session, settings_at_ratio
from dmr_pipeline.router.grpo_trainer import as_completions
from dmr_pipeline.router.kl import search_summary
from dmr_pipeline.router.labels import read_sensitivity
from dmr_pipeline.router.model import Router, routing_margins, sequence_of_trajectory, with_features
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.search_steps import opens_at_search_bar, with_searches_forced
from tests.helpers.grpo_router import tiny_recipe
from tests.helpers.kl_router import run_stage, section
from tests.helpers.probes import by_hand, greedy, new_probe, transcripts
from tests.helpers.routers import AGENTS, ROUTE, ROUTES, TOKENIZER, random_router, streams

GAMES = [generate_game(number, 50)[0] for number in range(4)]


def at_bar(task_id: str, turn: int) -> bool:
    """The games are not in step, so that only some of the episodes that are played at once are at a search bar."""
    return (turn + sum(map(ord, task_id))) % 2 == 0


class Shop(AlfWorldEpisode):
    turn = 0

    def reset(self) -> str:
        self.turn = 0
        return super().reset()

    def step(self, command: str) -> tuple[str, float, bool]:
        self.turn += 1
        return super().step(command)

    def admissible_commands(self) -> Sequence[str]:
        return ("search[apple]",) if at_bar(self.game.task_id, self.turn) else super().admissible_commands()


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Game, "episode", lambda game: Shop(game))


def play_with(policy: RoutingPolicy, slots: int = 3, route: Sequence[str] = ROUTE) -> list[Trajectory]:
    runs = [RolloutRequest(game) for game in GAMES]
    return play(runs, streams(route, slots), Prompter.of(TOKENIZER, Prompt()), policy, step_limit=6)


def new_router(kind: str, route: Sequence[str] = ROUTE) -> Router:
    make = new_probe if kind == "probe" else random_router
    offsets = {"float": 0.1, "int4": -1.0}
    return make(route=route, scale=3.0, offsets={rung: offsets[rung] for rung in route[:-1]}, force_search=True)


@torch.no_grad()
def uncached_exceedance(router: Router, trajectory: Trajectory, turn: int) -> list[float]:
    """From one plain forward pass over all that came before."""
    settings = router.settings
    if settings.kind == "probe":
        logits = router.model(by_hand(router, transcripts(trajectory)[turn], turn)[None])[0].flip(0)
    else:
        sequence = sequence_of_trajectory(trajectory, router)
        before = sequence.tokens[: sequence.positions[turn] + 1]
        logits = router.model(torch.tensor([before])).logits[0, -1, list(settings.tokens.values())]
    offsets = [settings.offsets.get(rung, 0.0) for rung in settings.route]
    return softmax(settings.scale * logits.numpy() + offsets).cumsum()[:-1].tolist()


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("kind", ["probe", "lm"])
@pytest.mark.parametrize(("slots", "route"), [(1, ROUTE), (3, ROUTE), (3, ROUTES[1])])
def test_a_router_is_not_asked_at_search_steps_and_decides_the_others_as_ever(
    kind: str, slots: int, route: tuple[str, ...]
) -> None:
    router, sizes = new_router(kind, route), {"float": 1000, "int4": 300, "int2": 100}
    taken = set()
    for trajectory in play_with(routing_policy(router, slots, sample=True, seed=5), slots, route):
        for turn, (step, prefix) in enumerate(zip(trajectory.steps, transcripts(trajectory), strict=True)):
            assert step.forced == at_bar(trajectory.run.task.task_id, turn)
            if step.forced:
                assert (step.precision, step.exceedance, step.besides) == ("float", (1.0,) * (len(route) - 1), {})
                assert step.router == NOTHING
            else:
                assert step.exceedance == pytest.approx(uncached_exceedance(router, trajectory, turn), abs=1e-3)
                thrown = {rung: reading.passes for rung, reading in step.besides.items()}
                assert thrown == ({"int2": 1} if kind == "probe" and step.precision != "int2" else {})
                assert step.router.passes == 1
                # Everything before, a routing token for each step before, and nothing else.
                assert step.router.cached == (0 if kind == "probe" else len(prefix) + turn)
            assert step.action == greedy(AGENTS[step.precision], prefix)
            taken.add((step.forced, step.precision))
        passes = sum(len(s.action) * sizes[s.precision] + 100 * len(s.besides) for s in trajectory.steps)
        asked = sum(not s.forced for s in trajectory.steps)
        rungs = {rung: PassBytes(sizes[rung]) for rung in route}
        assert episode_cost(trajectory, rungs, 16, PassBytes(7)) == (passes + 7 * asked, 0)
    assert taken == {(True, "float"), *((False, rung) for rung in route)}


@pytest.mark.usefixtures("shop")
def test_nothing_is_forced_unless_the_settings_say_so() -> None:
    router = new_router("probe")
    router = replace(
        router, settings=router.settings.model_copy(update={"force_search": False, "offsets": {"float": -99.0}})
    )
    steps = [step for trajectory in play_with(routing_policy(router, 3)) for step in trajectory.steps]
    assert not any(step.forced or step.precision == "float" for step in steps)


@pytest.mark.usefixtures("shop")
def test_the_evaluation_switches_it_and_plays_searches_alone() -> None:
    forcing = new_router("lm")
    plain = replace(forcing, settings=forcing.settings.model_copy(update={"force_search": False, "threshold": 1.0}))
    files = {"kl_router": {"model.safetensors": "a"}, "grpo_router": {"model.safetensors": "b"}}
    routers = {"kl_router": forcing, "grpo_router": plain}
    found = {entry.name: entry for entry in search_entries(ROUTE, routers, files, 3)}
    assert {name: entry.kind for name, entry in found.items()} == {
        "search_only": "baseline", "kl_router-search": "ablation", "grpo_router+search": "ablation",
    }  # fmt: skip
    assert [found[name].variant_of for name in ("search_only", "kl_router-search", "grpo_router+search")] == [
        "",
        *routers,
    ]
    assert found["search_only"].router is None
    assert found["kl_router-search"].router == forcing.pass_bytes
    assert not any(s.forced for t in play_with(found["kl_router-search"].policy) for s in t.steps)
    for name in ("search_only", "grpo_router+search"):  # this router's threshold is never reached
        for trajectory in play_with(found[name].policy):
            bars = [at_bar(trajectory.run.task.task_id, turn) for turn in range(len(trajectory.steps))]
            assert [step.precision == "float" for step in trajectory.steps] == bars
            assert [step.forced for step in trajectory.steps] == bars
    assert [opens_at_search_bar(game) for game in GAMES] == [at_bar(game.task_id, 0) for game in GAMES]


def test_alfworld_has_no_search_bar() -> None:
    assert not any(map(opens_at_search_bar, GAMES))


def as_searches(inputs: dict[str, Path], folder: Path, share: float) -> dict[str, Path]:
    """The same inputs, where the commands of this share of the labelled steps, those of highest divergence, are searches."""
    episodes, steps = read_trajectories(inputs["trajectories"])
    labelled = read_sensitivity(inputs["sensitivity_dataset"]).select("episode_id", "turn", "kl_high_low")
    steps = steps.join(labelled, on=["episode_id", "turn"], maintain_order="left")
    chosen = pl.col("kl_high_low").rank("ordinal", descending=True) <= share * pl.len()
    searches = pl.when(chosen).then(pl.lit("search[apple]")).otherwise("command")
    folder.mkdir()
    episodes.write_parquet(folder / "episodes.parquet")
    steps.with_columns(command=searches).drop("kl_high_low").write_parquet(folder / "steps.parquet")
    return inputs | {"trajectories": folder}


@pytest.mark.parametrize("direction", ["high_low", "js"])
def test_searches_are_forced_where_their_mean_divergence_reaches_tau(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path, direction: str
) -> None:
    sensitivity = read_sensitivity(inputs["sensitivity_dataset"])
    _, steps = read_trajectories(as_searches(inputs, tmp_path / "trajectories", 0.1)["trajectories"])
    column = "js" if direction == "js" else "kl_high_low"
    values = {(row["episode_id"], row["turn"]): row[column] for row in sensitivity.to_dicts()}
    rows = steps.select("episode_id", "turn", "command").rows()
    search, other = (
        float(
            np.mean(
                [values[episode, turn] for episode, turn, command in rows if (command == "search[apple]") == chosen]
            )
        )
        for chosen in (True, False)
    )

    def summary(force: bool, tau: float) -> dict[str, object]:
        asked = recipe.model_copy(
            update={
                "kl_router": recipe.kl_router.model_copy(update={"force_search": force}),
                "sensitivity": recipe.sensitivity.model_copy(update={"direction": direction}),
            }
        )
        return search_summary(steps, sensitivity, asked, tau)

    found = summary(force=True, tau=0.99 * search)
    assert found["mean_divergence_of_searches"] == pytest.approx(search, abs=1e-5)
    assert found["mean_divergence_of_other_steps"] == pytest.approx(other, abs=1e-5)
    assert found["search_forced"] is True
    assert summary(force=True, tau=1.01 * search)["search_forced"] is False
    assert summary(force=False, tau=0.99 * search)["search_forced"] is False


def test_a_benchmark_without_searches_has_none_to_force(recipe: Recipe, inputs: dict[str, Path]) -> None:
    sensitivity, (_, steps) = read_sensitivity(inputs["sensitivity_dataset"]), read_trajectories(inputs["trajectories"])
    assert search_summary(steps, sensitivity, recipe, 0.1) == {}
    forcing = recipe.model_copy(update={"kl_router": section(force_search=True)})
    with pytest.raises(UserError, match=f"none of the {len(steps)} labelled steps is a search"):
        search_summary(steps, sensitivity, forcing, 0.1)


@pytest.mark.usefixtures("shop")
def test_stage_1_calibrates_at_the_other_steps_and_hands_the_rule_on(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path
) -> None:
    forcing = recipe.model_copy(update={"kl_router": section(epochs=2, force_search=True)})
    output, summary = run_stage(forcing, as_searches(inputs, tmp_path / "trajectories", 0.1), tmp_path / "stage")
    assert summary["search_forced"] is True
    assert json.loads((output / "router" / "router.json").read_text())["force_search"] is True
    validation = pl.read_parquet(output / "validation.parquet")
    games = {
        game.task_id for game in benchmark_of(recipe.benchmark).read_tasks(inputs["benchmark_tasks"], "validation", 4)
    }
    asked = {(f"validation/{game}/0", turn) for game in games for turn in range(6) if not at_bar(game, turn)}
    assert set(validation.select("episode_id", "turn").rows()) == asked
    # Half of the steps are forced, so that no threshold gets to a ratio below.
    assert 0.5 <= summary["validation_spend"] < 0.7


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("kind", ["probe", "lm"])
def test_stage_2_learns_from_the_other_steps_alone(artifacts: Path, tmp_path: Path, kind: str) -> None:
    recipe = tiny_recipe()
    rollouts = Rollouts.load(artifacts / "quantized_checkpoints", recipe)
    router = replace(new_router(kind), agent=rollouts.acting.models["int2"])
    games = benchmark_of(recipe.benchmark).read_tasks(artifacts / "benchmark_tasks", "validation")
    scorer = Scorer(rollouts, router.pass_bytes, recipe.grpo_router)
    settings = settings_at_ratio(router, scorer, games, tmp_path)
    assert settings.force_search
    mixing = with_searches_forced(RandomMixing({"float": 0.6, "int2": 0.4}, 0), ROUTE)
    mixed = rollouts.play([RolloutRequest(game) for game in games], mixing, 0)
    sequences = with_features(router, [sequence_of_trajectory(t, router) for t in mixed], 16)
    margins = np.concatenate(routing_margins(router, sequences, 16))[:, 0]
    asked = [not step.forced for trajectory in mixed for step in trajectory.steps]
    assert 0 < sum(asked) < len(asked)
    assert expit(settings.scale * margins + settings.offsets["float"])[asked].mean() == pytest.approx(0.6, abs=1e-6)

    tempered = replace(router, settings=settings)
    session = Session(tempered, tempered, scorer, games, games)
    played = session.rollouts(1, [game.task_id for game in games for _ in range(3)])
    assert session.rows[0]["divergence"] == pytest.approx(0.0, abs=1e-6)  # 1.0 is no probability of the router's
    for rollout, mask in zip(played, as_completions(played)["env_mask"], strict=True):
        positions, acted = rollout.sequence.positions, rollout.sequence.acted
        assert 0 < len(rollout.forced) < len(positions)
        assert all(acted[turn] == 1 for turn in rollout.forced)  # the dearest of two
        learned = [i + positions[0] + 1 for i, trained in enumerate(mask) if trained]
        assert learned == [position + 1 for turn, position in enumerate(positions) if turn not in rollout.forced]
