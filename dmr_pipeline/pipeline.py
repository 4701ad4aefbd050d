"""THE graph: the only place that knows which stage reads what. Dagster's assets and `dvc.yaml` are renderings of it.

Each function imports its stage's module when it runs, so that reading the table costs nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from dmr_pipeline.artifacts import artifact_folder
from dmr_pipeline.errors import UserError
from dmr_pipeline.stage import Resources, Stage, StageContext, StageResult


def _benchmark_tasks(context: StageContext) -> StageResult:
    from dmr_pipeline.environments.tasks import benchmark_tasks

    return benchmark_tasks(context)


def _agent(context: StageContext) -> StageResult:
    from dmr_pipeline.agent.train import agent

    return agent(context)


def _quantized_checkpoints(context: StageContext) -> StageResult:
    from dmr_pipeline.ladder import quantized_checkpoints

    return quantized_checkpoints(context)


def _trajectories(context: StageContext) -> StageResult:
    from dmr_pipeline.trajectories import trajectories

    return trajectories(context)


def _ingested_trajectories(context: StageContext) -> StageResult:
    from dmr_pipeline.ingestion import ingested_trajectories

    return ingested_trajectories(context)


def _waiting_files(data_root: Path, recipe: str) -> Sequence[Path]:
    from dmr_pipeline.ingestion import waiting_files

    return waiting_files(data_root, recipe)


def _file_away(data_root: Path, recipe: str) -> None:
    from dmr_pipeline.ingestion import file_away

    file_away(data_root, recipe)


def _sensitivity_dataset(context: StageContext) -> StageResult:
    from dmr_pipeline.sensitivity import sensitivity_dataset

    return sensitivity_dataset(context)


def _kl_router(context: StageContext) -> StageResult:
    from dmr_pipeline.router.kl import kl_router

    return kl_router(context)


def _grpo_router(context: StageContext) -> StageResult:
    from dmr_pipeline.router.grpo import grpo_router

    return grpo_router(context)


def _evaluation_report(context: StageContext) -> StageResult:
    from dmr_pipeline.evaluation.evaluate import evaluation_report

    return evaluation_report(context)


def _render_report(data_root: Path, recipe: str) -> None:
    from dmr_pipeline.evaluation.report import render_beside

    render_beside(artifact_folder("evaluation_report", recipe, data_root))


def _released_router(context: StageContext) -> StageResult:
    from dmr_pipeline.release import released_router

    return released_router(context)


ONE_GPU = Resources(cpus=2, gpus=1, memory_gb=8)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="benchmark_tasks",
        inputs=(),
        sections=("benchmark",),
        code_version="2",
        run=_benchmark_tasks,
        group="agent",
        kinds=frozenset({"python"}),
        description="Games and goals in four disjoint splits: agent_train, router_train, validation, test.",
    ),
    Stage(
        name="agent",
        inputs=("benchmark_tasks",),
        sections=("benchmark", "agent"),
        code_version="2",
        run=_agent,
        group="agent",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The float LLM: trained here by behaviour cloning and DAgger, or brought along.",
        committed=True,
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="quantized_checkpoints",
        inputs=("benchmark_tasks", "agent"),
        sections=("benchmark", "agent", "precisions"),
        code_version="2",
        run=_quantized_checkpoints,
        group="agent",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The precision ladder of one float checkpoint, and the gate: is there a gap between high and low?",
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="trajectories",
        inputs=("benchmark_tasks", "quantized_checkpoints"),
        sections=("benchmark", "agent", "precisions", "trajectories"),
        code_version="1",
        run=_trajectories,
        group="labels",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Episodes on the router_train games by the behaviour policies that the recipe names.",
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="ingested_trajectories",
        inputs=("benchmark_tasks",),
        sections=("benchmark", "precisions"),
        code_version="1",
        run=_ingested_trajectories,
        group="labels",
        kinds=frozenset({"parquet"}),
        description="Episodes that people dropped into data/incoming/<recipe>/, from an agent at work. It only grows.",
        keeps_history=True,
        waiting=_waiting_files,
        after=_file_away,
    ),
    Stage(
        name="sensitivity_dataset",
        inputs=("quantized_checkpoints", "trajectories", "ingested_trajectories"),
        sections=("agent", "precisions", "sensitivity"),
        code_version="2",
        run=_sensitivity_dataset,
        group="labels",
        kinds=frozenset({"pytorch", "parquet"}),
        description="One row a step: how far the precisions' action distributions diverge on a prefix, and the label.",
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="kl_router",
        inputs=(
            "benchmark_tasks",
            "quantized_checkpoints",
            "trajectories",
            "ingested_trajectories",
            "sensitivity_dataset",
        ),
        sections=("benchmark", "agent", "precisions", "sensitivity", "kl_router"),
        code_version="2",
        run=_kl_router,
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="Stage 1 of the router: class-weighted cross-entropy on the sensitivity labels.",
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="grpo_router",
        inputs=("benchmark_tasks", "quantized_checkpoints", "kl_router"),
        sections=("benchmark", "agent", "precisions", "grpo_router"),
        code_version="1",
        run=_grpo_router,
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="Stage 2 of the router: GRPO on success and cost.",
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="evaluation_report",
        inputs=("benchmark_tasks", "quantized_checkpoints", "sensitivity_dataset", "kl_router", "grpo_router"),
        sections=("benchmark", "agent", "precisions", "evaluation"),
        code_version="1",
        run=_evaluation_report,
        group="evaluation",
        kinds=frozenset({"pytorch", "matplotlib"}),
        description="Every policy on the test games: success, high-precision ratio and cost, with intervals.",
        pool="gpu",
        resources=ONE_GPU,
        after=_render_report,
    ),
    Stage(
        name="released_router",
        inputs=("benchmark_tasks", "quantized_checkpoints", "grpo_router"),
        sections=("benchmark", "agent", "precisions", "release"),
        code_version="1",
        run=_released_router,
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The router in use, and the history of releases: a new one takes its place only if it is not worse.",
        pool="gpu",
        resources=ONE_GPU,
        keeps_history=True,
    ),
)
"""In an order in which each stage comes after its inputs."""


def find_stage(name: str, stages: Sequence[Stage]) -> Stage:
    """Raises: UserError: there is no such stage."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise UserError(f"unknown stage {name!r} (stages: {', '.join(stage.name for stage in stages)})")
