"""Whole runs of the stages, in small: once a session."""

from pathlib import Path

import pytest
import torch

from dmr_pipeline.agent.checkpoint import save_causal_lm
from dmr_pipeline.artifacts.manifest import write_manifest
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.model import save_router
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks
from dmr_pipeline.stages.ingested_trajectories import ingested_trajectories
from dmr_pipeline.stages.quantized_checkpoints import quantized_checkpoints
from dmr_pipeline.stages.sensitivity_dataset import sensitivity_dataset
from dmr_pipeline.stages.trajectories import trajectories
from tests.helpers import grpo_router
from tests.helpers.grpo_router import tiny_recipe
from tests.helpers.kl_router import section
from tests.helpers.routers import TOKENIZER, random_model, random_router

# Threads that wait for each other on busy cores make these tiny models many times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    sizes = {"agent_train": 1, "router_train": 4, "validation": 4, "test": 1}
    small = {
        "benchmark": {"splits": sizes, "step_limit": 6},
        "kl_router": section(epochs=2).model_dump(),
        "sensitivity": {"quantile": 0.6},
        "runtime": {"device": "cpu", "batch_episodes": 4},
    }
    return Recipe.model_validate(load_recipe("alfworld-tiny").model_dump() | small)


@pytest.fixture(scope="session")
def inputs(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real stages up to the labels, with an agent that babbles."""
    folder = tmp_path_factory.mktemp("artifacts")
    save_causal_lm(random_model(7), TOKENIZER, folder / "agent" / "model", torch.float16)
    write_manifest(folder / "agent")
    done = {"agent": folder / "agent"}
    for stage in (
        benchmark_tasks,
        quantized_checkpoints,
        trajectories,
        ingested_trajectories,
        sensitivity_dataset,
    ):
        done[stage.__name__] = folder / stage.__name__
        done[stage.__name__].mkdir()
        stage(StageContext(recipe, done, done[stage.__name__], folder, incoming=folder / "incoming"))
        if stage is benchmark_tasks:
            write_manifest(done["benchmark_tasks"])
    return done


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    save_causal_lm(random_model(7), TOKENIZER, folder / "agent" / "model", torch.float16)
    write_manifest(folder / "agent")
    done = {"agent": folder / "agent"}
    for stage in (benchmark_tasks, quantized_checkpoints):
        done[stage.__name__] = folder / stage.__name__
        done[stage.__name__].mkdir()
        stage(StageContext(tiny_recipe(), done, done[stage.__name__], folder))
        if stage is benchmark_tasks:
            write_manifest(done["benchmark_tasks"])
    save_router(random_router(scale=0.5, offsets={"float": -1.0}, threshold=0.2), folder / "kl_router" / ROUTER_FOLDER)
    return folder


@pytest.fixture(scope="session")
def unbroken(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, grpo_router.run_stage(artifacts, folder)
