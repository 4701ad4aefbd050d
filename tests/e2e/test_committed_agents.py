"""The trained agents that lie in Git: a clone makes the very tasks that they were trained on, takes them as current, and wins."""

from pathlib import Path

import pytest
import torch

from dmr_pipeline import pipeline
from dmr_pipeline.agent.checkpoint import load_causal_lm
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.engine import play_alone
from dmr_pipeline.rollout.prompts import Prompter

REPOSITORY = Path(__file__).parents[2]
GAMES = 16


@pytest.mark.parametrize("name", ["alfworld-tiny", "webshop-tiny"])
def test_a_committed_agent_is_current_and_wins(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, REPOSITORY / "recipes")
    agent = verify(artifact_folder("agent", name, REPOSITORY / "data"))
    tasks = materialize_stage(pipeline.find_stage("benchmark_tasks", pipeline.STAGES), recipe, tmp_path).artifact
    wanted = provenance(
        pipeline.find_stage("agent", pipeline.STAGES), recipe, {"benchmark_tasks": tasks.hash}
    ).difference(agent.manifest)
    assert wanted is None, f"{name}'s agent is stale: {wanted}"
    assert sum(path.stat().st_size for path in agent.path.rglob("*") if path.is_file()) < 10e6

    model, tokenizer = load_causal_lm(agent.path / "model", None, torch.device("cpu"))
    games = benchmark_of(recipe.benchmark).read_tasks(tasks.path, "validation", GAMES)
    prompter = Prompter.of(tokenizer, recipe.agent.prompt)
    played = play_alone(model, games, prompter, recipe.benchmark.step_limit, GAMES)
    won = sum(trajectory.success for trajectory in played)
    # Both win 93% of all validation games: of 16 such, fewer than ten once in some ten thousand draws.
    assert won >= 10, f"{won} of {GAMES}"
