"""Stage 2 in small: its recipe, and the stage run in a folder, whole or killed on the way."""

import os
import signal
import sys
from pathlib import Path

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.router.grpo import Session
from dmr_pipeline.router.grpo_trainer import Rollout
from dmr_pipeline.stages.grpo_router import grpo_router
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.kl_router import section as kl_section


def tiny_recipe(**changed: object) -> Recipe:
    """Agents that babble never win, so what can be learned is to cost less."""
    section = {"updates": 4, "games_per_update": 2, "group_size": 3, "learning_rate": 0.003, "reward": "difference"}
    changes = {
        "benchmark": {"splits": {"agent_train": 1, "router_train": 3, "validation": 3, "test": 1}, "step_limit": 5},
        "precisions": {
            "ladder": [{"name": "float", "weights": "float"}, {"name": "int2", "weights": "int2"}],
            "route": ["float", "int2"],
        },
        "kl_router": kl_section().model_dump(),
        "grpo_router": section
        | {"cost_weight": 1.0, "initial_ratio": 0.6, "validate_every": 2, "validation_games": 3}
        | changed,
        "runtime": {"device": "cpu", "threads": 1, "batch_episodes": 4},
    }
    return Recipe.model_validate(load_recipe("alfworld-tiny", REPOSITORY / "recipes").model_dump() | changes)


def run_stage(artifacts: Path, folder: Path, **changed: object) -> StageResult:
    """`changed`: keys of the recipe's section."""
    names = ("benchmark_tasks", "quantized_checkpoints", "kl_router")
    for name in ("output", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    inputs = {name: artifacts / name for name in names}
    return grpo_router(StageContext(tiny_recipe(**changed), inputs, folder / "output", folder / "scratch"))


def run_and_be_killed() -> None:
    rollouts = Session.rollouts

    def killed(session: Session, update: int, task_ids: list[str]) -> list[Rollout]:
        if update == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return rollouts(session, update, task_ids)

    Session.rollouts = killed  # type: ignore[method-assign]
    run_stage(Path(sys.argv[1]), Path(sys.argv[2]))
