"""What the stage `quantized_checkpoints` is given in tests: an agent that knows nothing, and a few games."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dmr_pipeline.agent.checkpoint import save_causal_lm
from dmr_pipeline.artifacts.manifest import write_manifest
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.environments.base import Task
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.training.train import new_model
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.rollouts import PROMPTER


def ladder_recipe(ladder: Sequence[dict[str, object]], agent_train: int = 1, **precisions: object) -> Recipe:
    """Routed between the ladder's ends, of a game in each of the other splits, and three steps an episode."""
    splits = {"agent_train": agent_train, "router_train": 1, "validation": 1, "test": 1}
    changes = {
        "benchmark": {"splits": splits, "step_limit": 3},
        "precisions": {
            "ladder": ladder,
            "route": [ladder[0]["name"], ladder[-1]["name"]],
            "kl_episodes": 1,
            **precisions,
        },
        "runtime": {"device": "cpu", "threads": 1, "processes": 1},
    }
    return Recipe.model_validate(load_recipe("alfworld-tiny", REPOSITORY / "recipes").model_dump() | changes)


def write_inputs(folder: Path, **splits: Sequence[Task]) -> dict[str, Path]:
    """The artifacts that the stage reads, in the folder: by name."""
    architecture = Architecture(layers=2, width=64, heads=4, key_value_heads=2, head_width=16, feed_forward=96)
    model = new_model(architecture, len(PROMPTER.tokenizer), 0)
    inputs = {name: folder / name for name in ("agent", "benchmark_tasks")}
    save_causal_lm(model, PROMPTER.tokenizer, inputs["agent"] / "model", torch.float16)
    inputs["benchmark_tasks"].mkdir()
    for split, games in splits.items():
        write_games(games, inputs["benchmark_tasks"] / f"{split}.parquet")
    for artifact in inputs.values():
        write_manifest(artifact)
    return inputs
