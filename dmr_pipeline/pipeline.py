"""THE graph: the only place that knows which stage reads what. Dagster's assets and `dvc.yaml` are renderings of it.

A stage's function is the one of its name in the module of its name in `stages/`, imported when it runs, so that reading the table
costs nothing.
"""

import sys
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

from dmr_pipeline.artifacts.stage import Resources, Stage, StageContext, StageResult
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.model import Pretrained


def _later(function: str) -> Callable[..., Any]:
    """A function by its place, "module:name", whose module is imported when it is called."""

    def call(*arguments: object) -> Any:  # noqa: ANN401 - whatever it returns
        return resolve_name(f"dmr_pipeline.{function}")(*arguments)

    return call


def _stage(name: str) -> Callable[[StageContext], StageResult]:
    """The function that makes a stage's artifact, with as many of torch's threads as the recipe says."""

    def run(context: StageContext) -> StageResult:
        stage: Callable[[StageContext], StageResult] = resolve_name(f"dmr_pipeline.stages.{name}:{name}")
        torch = sys.modules.get("torch")  # which the stage's module has imported, if it computes with it
        if torch is not None:
            torch.set_num_threads(context.recipe.runtime.threads)
        return stage(context)

    return run


def _brought(*models: Pretrained | None) -> list[Pretrained]:
    return [model for model in models if model is not None]


ONE_GPU = Resources(cpus=2, gpus=1, memory_gb=8)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="benchmark_tasks",
        inputs=(),
        sections=("benchmark",),
        code_version="2",
        run=_stage("benchmark_tasks"),
        group="agent",
        kinds=frozenset({"python"}),
        description="Games and goals in four disjoint splits: agent_train, router_train, validation, test.",
        reading=(
            "`<split>.parquet` has a row a game. What is chosen (thresholds, checkpoints, releases) is chosen on "
            "validation; the test games are played once, by `evaluation_report`."
        ),
    ),
    Stage(
        name="agent",
        inputs=("benchmark_tasks",),
        sections=("benchmark", "agent"),
        code_version="2",
        run=_stage("agent"),
        group="agent",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The float LLM: trained here by behaviour cloning and DAgger, or brought along.",
        reading=(
            "`model/` is a Hugging Face checkpoint. `training.parquet` shows whether it has learned: the success of "
            "its own episodes should have levelled off."
        ),
        committed_recipes=("alfworld-smollm2", "alfworld-tiny", "webshop-smollm2", "webshop-tiny"),
        pool="gpu",
        resources=ONE_GPU,
        pretrained=lambda recipe: _brought(recipe.agent.pretrained),
    ),
    Stage(
        name="quantized_checkpoints",
        inputs=("benchmark_tasks", "agent"),
        sections=("benchmark", "agent", "precisions"),
        code_version="7",
        run=_stage("quantized_checkpoints"),
        group="agent",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The precision ladder of one float checkpoint, measured, and the verdict: can routing pay, and between what?",
        reading=(
            "A folder a rung. `summary/verdict` says between which rungs routing can pay, and how much at most, or which "
            "one to deploy; `summary/rungs` what each wins and costs, and how far it is from the float model (KL in nats an "
            "action)."
        ),
        pool="gpu",
        resources=ONE_GPU,
        pretrained=lambda recipe: _brought(*(rung.checkpoint for rung in recipe.precisions.ladder)),
    ),
    Stage(
        name="trajectories",
        inputs=("benchmark_tasks", "quantized_checkpoints"),
        sections=("benchmark", "agent", "precisions", "trajectories"),
        code_version="3",
        run=_stage("trajectories"),
        group="labels",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Episodes on the router_train games by the behaviour policies that the recipe names.",
        reading=(
            "`episodes.parquet` has a row an episode, `steps.parquet` a row a step. The success of each behaviour "
            "policy is in the summary: the cheapest rung alone should lose some games that the dearest wins."
        ),
        pool="gpu",
        resources=ONE_GPU,
    ),
    Stage(
        name="ingested_trajectories",
        inputs=("benchmark_tasks",),
        sections=("benchmark", "precisions"),
        code_version="2",
        run=_stage("ingested_trajectories"),
        group="labels",
        kinds=frozenset({"parquet"}),
        description="Episodes that people dropped into data/incoming/<recipe>/, from an agent at work. It only grows.",
        reading=(
            "`episodes/` has a file for each file that was ingested. Bad ones are in "
            "`data/incoming/<recipe>/quarantine/`, the reason beside them."
        ),
        append_only=True,
        pending_inputs=_later("ingestion.inbox:waiting_files"),
        on_published=_later("ingestion.inbox:archive"),
    ),
    Stage(
        name="sensitivity_dataset",
        inputs=("quantized_checkpoints", "trajectories", "ingested_trajectories"),
        sections=("benchmark", "agent", "precisions", "sensitivity"),
        code_version="7",
        run=_stage("sensitivity_dataset"),
        group="labels",
        kinds=frozenset({"pytorch", "parquet"}),
        description="One row a step and cheaper rung: how far its action distribution is from the dearest's, and the label.",
        reading=(
            "`summary/label_share` is the share of rows (a step and a cheaper rung) that are sensitive, "
            "`summary/greedy_disagreement` that of rows where the two precisions would act differently."
        ),
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
        code_version="8",
        run=_stage("kl_router"),
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="Stage 1 of the router: class-weighted cross-entropy on the sensitivity labels.",
        reading=(
            "`summary/auroc` says how well it tells sensitive steps apart on validation games (0.5 is chance), "
            "`summary/validation_success` what it wins at `summary/validation_high_ratio`."
        ),
        pool="gpu",
        resources=ONE_GPU,
        pretrained=lambda recipe: _brought(recipe.kl_router.model.pretrained),
    ),
    Stage(
        name="grpo_router",
        inputs=("benchmark_tasks", "quantized_checkpoints", "kl_router"),
        sections=("benchmark", "agent", "precisions", "kl_router", "grpo_router"),
        code_version="8",
        run=_stage("grpo_router"),
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="Stage 2 of the router: GRPO on success and cost.",
        reading=(
            "`training.parquet` has a row an update: the reward on validation should rise above that of update 0, "
            "which is stage 1. Where all groups tie (`summary/tied_groups`), nothing is learned."
        ),
        pool="gpu",
        resources=ONE_GPU,
        pretrained=lambda recipe: _brought(recipe.kl_router.model.pretrained),
    ),
    Stage(
        name="evaluation_report",
        inputs=("benchmark_tasks", "quantized_checkpoints", "sensitivity_dataset", "kl_router", "grpo_router"),
        sections=("benchmark", "agent", "precisions", "sensitivity", "grpo_router", "evaluation"),
        code_version="16",
        run=_stage("evaluation_report"),
        group="evaluation",
        kinds=frozenset({"pytorch", "matplotlib"}),
        description="Every policy on the test games: success, high-precision ratio and cost, with intervals.",
        reading=(
            "The table and the pictures below; `report` is a page that opens offline. A router is worth its name "
            "where it beats random mixing at its own ratio, and the best static policy at its cost."
        ),
        pool="gpu",
        resources=ONE_GPU,
        on_published=_later("evaluation.report:render_beside"),
    ),
    Stage(
        name="released_router",
        inputs=("benchmark_tasks", "quantized_checkpoints", "grpo_router"),
        sections=("benchmark", "agent", "precisions", "release"),
        code_version="5",
        run=_stage("released_router"),
        group="router",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="The router in use, and the history of releases: a new one takes its place only if it is not worse.",
        reading=(
            "`router/` is what to deploy; `releases.json` has every decision with the paired comparison behind it. "
            "`dmr router history` shows it, `dmr router promote` and `dmr router rollback` overrule it."
        ),
        pool="gpu",
        resources=ONE_GPU,
        append_only=True,
    ),
)
"""In an order in which each stage comes after its inputs."""


def find_stage(name: str, stages: Sequence[Stage]) -> Stage:
    """The stage of this name.

    Raises:
        UserError: there is no such stage.
    """
    for stage in stages:
        if stage.name == name:
            return stage
    raise UserError(f"unknown stage {name!r} (stages: {', '.join(stage.name for stage in stages)})")
