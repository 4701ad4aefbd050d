import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.recipe.model import Lora, Pretrained
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.tables import read_trajectories
from dmr_pipeline.router import kl
from dmr_pipeline.router.calibration import auroc
from dmr_pipeline.router.kl import class_weights, labels_of_steps, play_games, routing_loss, train
from dmr_pipeline.router.labels import label, measure, read_sensitivity, threshold
from dmr_pipeline.router.model import (
    Router,
    load_router,
    new_router,
    routing_logits,
    routing_margins,
    routing_sequence,
    save_router,
)
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.stages import kl_router as the_stage
from dmr_pipeline.stages.ingested_trajectories import ingested_trajectories
from dmr_pipeline.stages.sensitivity_dataset import sensitivity_dataset
from tests.helpers.kl_router import Labelled, expert_episodes, flat, run_stage, section
from tests.helpers.routers import ARCHITECTURE, CPU, ROUTE, ROUTES, TOKENIZER, make_llm


def same_weights(first: Router, second: Router) -> bool:
    other = second.model.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.model.state_dict().items())


def new() -> Router:
    return new_router(RouterModel(architecture=ARCHITECTURE), ROUTE, TOKENIZER, 0, CPU)


@pytest.fixture(scope="module")
def episodes() -> Labelled:
    return expert_episodes(range(40), new())


@given(st.integers(1, 99))
def test_class_weights_shift_the_optimal_margin_by_what_is_undone(positives: int) -> None:
    """The stationary point of the weighted loss, less log(w1 / w0), is the log-odds of the class."""
    labels = [int(i < positives) for i in range(100)]
    weights = class_weights([labels[:30], labels[30:]], 2)
    assert np.mean([weights[y] for y in labels]) == pytest.approx(1.0)
    log_odds = math.log(positives / (100 - positives))
    margin = torch.tensor(log_odds + math.log(weights[1] / weights[0]), dtype=torch.double, requires_grad=True)
    logits = torch.stack([torch.zeros(100, dtype=torch.double), margin.expand(100)], dim=1)
    loss = routing_loss(logits, torch.tensor(labels), weights)
    loss.backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(0.0, abs=1e-7)
    by_hand = [weights[y] * math.log1p(math.exp(-margin.item() if y else margin.item())) for y in labels]
    assert loss.item() == pytest.approx(np.mean(by_hand))


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_class_weights_shift_every_rungs_optimal_margin_by_what_is_undone(counts: list[int]) -> None:
    """At margins log(n_k w_k / n_0 w_0) the gradient of the weighted loss vanishes."""
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    weights = class_weights([labels[:2], labels[2:]], 3)
    assert np.mean([weights[y] for y in labels]) == pytest.approx(1.0)
    best = torch.log(torch.tensor(counts, dtype=torch.double) * torch.tensor(weights, dtype=torch.double))
    margins = (best - best[0]).requires_grad_()
    routing_loss(margins.expand(len(labels), 3), torch.tensor(labels), weights).backward()
    assert margins.grad is not None
    assert margins.grad.tolist() == pytest.approx([0.0] * 3, abs=1e-7)


def test_a_class_that_no_step_has_counts_as_if_one_had_it() -> None:
    assert class_weights([[0, 0, 2], [2, 0, 0]], 3) == [6 / (3 * 4), 6 / 3, 6 / (3 * 2)]


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_labels_of_one_class_are_refused(rung: int) -> None:
    with pytest.raises(UserError, match=f"{4 if rung else 0} of 4 steps ask for more .* nothing to tell apart"):
        class_weights([[rung] * 3, [rung]], 3)


def test_labels_are_joined_by_episode_and_turn() -> None:
    steps = pl.DataFrame({"episode_id": ["b", "b", "a"], "turn": [0, 1, 0]})
    sensitivity = pl.DataFrame(
        {
            "episode_id": ["a", "b", "b", "c"] * 2,
            "turn": [0, 1, 0, 0] * 2,
            "precision": ["int2"] * 4 + ["int4"] * 4,
            "sensitive": [True, True, False, False, True, False, True, False],
        }
    )
    assert labels_of_steps(steps, sensitivity.head(4), ROUTE) == [[0, 1], [1]]
    assert labels_of_steps(steps, sensitivity, ROUTES[1]) == [[0, 1], [2]]
    with pytest.raises(UserError, match="1 of 3 steps"):
        labels_of_steps(steps, sensitivity.head(2), ROUTE)


def test_the_router_learns_what_the_observation_tells(episodes: Labelled, tmp_path: Path) -> None:
    sequences, labels = episodes
    router, log = train(new(), sequences[:30], labels[:30], section(), tmp_path)
    held_out = flat(routing_margins(router, sequences[30:], 4))
    assert auroc(held_out, flat(labels[30:]).astype(bool)) > 0.9
    assert log["update"].to_list() == list(range(1, 121))
    assert log["loss"].tail(10).mean() < 0.5 * log["loss"].head(3).mean()
    weights = class_weights(labels[:30], 2)
    assert router.settings.offsets == {"float": pytest.approx(-math.log(weights[1] / weights[0]))}
    margins = torch.tensor(flat(routing_margins(router, sequences[:30], 4)))
    probabilities = torch.sigmoid(router.settings.scale * margins + router.settings.offsets["float"])
    assert float(probabilities.mean()) == pytest.approx(flat(labels[:30]).mean(), abs=0.05)


def test_a_killed_training_resumes_with_the_same_result(
    episodes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, labels = (rows[:6] for rows in episodes)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, log = train(new(), sequences, labels, section(epochs=3), tmp_path / "whole")

    batches, epochs = kl.batches_by_length, []

    def killed(*arguments: object) -> list[list[int]]:
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return batches(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kl, "batches_by_length", killed)
    with pytest.raises(KeyboardInterrupt):
        train(new(), sequences, labels, section(epochs=3), tmp_path / "broken")
    resumed, resumed_log = train(new(), sequences, labels, section(epochs=3), tmp_path / "broken")
    assert len(epochs) == 4  # two epochs, the kill, and the third alone
    assert same_weights(resumed, whole)
    assert resumed_log.equals(log)
    assert not same_weights(whole, new())


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_adapters_and_routing_tokens_only_and_is_merged(tmp_path: Path, tied: bool) -> None:
    """Sensitive where the segment holds the word `apple`; everything else is noise."""
    llm = make_llm(tmp_path / "llm", ["take", "go", "apple", *"abcdefgh"], tied=tied)
    model = RouterModel(pretrained=Pretrained(model=str(llm.folder)), lora=Lora(rank=4, alpha=8))
    start = new_router(model, ROUTE, llm.tokenizer, 0, CPU)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    apple = llm.tokenizer.convert_tokens_to_ids("apple")
    rng = random.Random(0)
    sequences, labels = [], []
    for _ in range(60):
        segments = [[rng.randrange(2, 13) for _ in range(4)] for _ in range(6)]
        actions = [[rng.randrange(2, 13), 1] for _ in segments]
        acted = [rng.choice(ROUTE) for _ in segments]
        sequences.append(routing_sequence(segments, actions, acted, start.settings))
        labels.append([int(apple in segment) for segment in segments])
    (tmp_path / "scratch").mkdir()
    lora = section(model, epochs=5, batch_episodes=4, learning_rate=0.02)
    router, _ = train(start, sequences[:50], labels[:50], lora, tmp_path / "scratch")
    assert auroc(flat(routing_margins(router, sequences[50:], 4)), flat(labels[50:]).astype(bool)) > 0.9

    after = router.model.state_dict()
    assert after.keys() == before.keys()  # merged: no adapters are left
    routing = router.settings.columns
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (after[name] != before[name]).any(-1).nonzero().flatten().tolist()
        assert changed == routing
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])

    save_router(router, tmp_path / "router")
    loaded = load_router(tmp_path / "router", CPU)
    with torch.no_grad():
        logits = [routing_logits(r.model, sequences[50:], r.settings) for r in (router, loaded)]
    assert torch.equal(*logits)


def test_the_stage_is_deterministic_and_its_numbers_hold(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path
) -> None:
    output, summary = run_stage(recipe, inputs, tmp_path / "one")
    again, _ = run_stage(recipe, inputs, tmp_path / "two")
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert {str(file) for file in files} >= {
        "router/model.safetensors",
        "router/router.json",
        "training.parquet",
        "validation.parquet",
        "calibration.parquet",
    }
    for file in files:
        assert (output / file).read_bytes() == (again / file).read_bytes(), file

    rollouts = Rollouts.load(inputs["quantized_checkpoints"], recipe)
    router = load_router(output / "router", CPU)
    assert summary["threshold"] == router.settings.threshold
    assert router.settings.target_ratio == 0.3
    games = benchmark_of(recipe.benchmark).read_tasks(inputs["benchmark_tasks"], "validation", 4)
    played = play_games(games, routing_policy(router, 4), rollouts, 0, "", kl.Timings())
    high = [step.precision == "float" for trajectory in played for step in trajectory.steps]
    assert summary["validation_spend"] == pytest.approx(np.mean(high), abs=1e-5)
    assert summary["offsets"] == router.settings.offsets
    tried = pl.read_parquet(output / "calibration.parquet")
    assert (
        router.settings.threshold
        in tried.filter(spend=tried.filter(pl.col("spend") <= 0.3)["spend"].max())["threshold"]
    )

    validation = pl.read_parquet(output / "validation.parquet")
    probabilities, sensitive = validation["probability"].to_numpy(), validation["sensitive"].to_numpy()
    assert validation["episode_id"].n_unique() == 4
    assert probabilities.mean() == pytest.approx(sensitive.mean(), abs=0.06)  # what Platt scaling makes equal
    assert summary["auroc"] == pytest.approx(auroc(probabilities, sensitive), abs=1e-5)


def test_with_nothing_ingested_the_labels_are_those_of_the_played_steps_alone(
    recipe: Recipe, inputs: dict[str, Path]
) -> None:
    rollouts = Rollouts.load(inputs["quantized_checkpoints"], recipe)
    rows, _ = measure(rollouts, *read_trajectories(inputs["trajectories"]), recipe.sensitivity.tokens)
    alone = label(rows, recipe.sensitivity, threshold(rows, recipe.sensitivity))
    assert read_sensitivity(inputs["sensitivity_dataset"]).equals(alone)


def test_ingested_steps_are_labelled_and_learned_from(recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    """Played episodes that come back as logs; the one whose game is a test game by then is used by neither stage."""
    episodes, steps = read_trajectories(inputs["trajectories"])
    task_of = {
        game.task_id: game.instruction
        for game in benchmark_of(recipe.benchmark).read_tasks(inputs["benchmark_tasks"], "router_train")
    }
    (tmp_path / "incoming").mkdir()
    lines = []
    for episode in episodes.filter(pl.col("policy") == "all-float").iter_rows(named=True):
        taken = steps.filter(pl.col("episode_id") == episode["episode_id"])
        log = {"episode_id": episode["episode_id"], "task": task_of[episode["task_id"]]}
        log |= {"observation": episode["opening"]} | {
            name: episode[name] for name in ("task_id", "task_type", "success")
        }
        shown = taken.select("command", "observation", precision=pl.lit(ROUTE[0]))
        lines.append(json.dumps(log | {"steps": shown.to_dicts()}))
    (tmp_path / "incoming" / "logs.jsonl").write_text("\n".join(lines))
    done, games = dict(inputs), tmp_path / "games"
    for name in ("before", "ingested", "labels"):
        (tmp_path / name).mkdir()
    ingested_trajectories(StageContext(recipe, done, tmp_path / "before", tmp_path, None, tmp_path / "incoming"))
    shutil.copytree(inputs["benchmark_tasks"], games)
    pl.read_parquet(games / "router_train.parquet").head(1).write_parquet(games / "test.parquet")
    done["benchmark_tasks"] = games
    ingested_trajectories(
        StageContext(recipe, done, tmp_path / "ingested", tmp_path, tmp_path / "before", tmp_path / "none")
    )
    done["ingested_trajectories"] = tmp_path / "ingested"
    result = sensitivity_dataset(StageContext(recipe, done, tmp_path / "labels", tmp_path))
    done["sensitivity_dataset"] = tmp_path / "labels"

    table = read_sensitivity(tmp_path / "labels")
    new = table.filter(pl.col("policy") == "ingested")
    assert result.summary["ingested_steps"] == len(new) == 3 * 6
    assert len(table) == len(steps) + len(new)
    assert new["task_id"].unique().sort().to_list() == sorted(task_of)[1:]
    # The transcript up to the first action is that of the played episode, whatever becomes of the tokens it babbled.
    first = {
        row["task_id"]: row for row in table.filter(pl.col("turn") == 0, pl.col("policy") == "all-float").to_dicts()
    }
    for row in new.filter(pl.col("turn") == 0).to_dicts():
        assert row["kl_high_low"] == pytest.approx(first[row["task_id"]]["kl_high_low"], rel=1e-3)
    _, summary = run_stage(recipe, done, tmp_path / "router")
    assert summary["train_steps"] == len(table)


def test_a_training_that_does_not_fit_a_gpu_names_its_knob(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(the_stage, "train", out_of_memory)
    with pytest.raises(UserError, match=r"make kl_router\.batch_episodes smaller"):
        run_stage(recipe, inputs, tmp_path)
