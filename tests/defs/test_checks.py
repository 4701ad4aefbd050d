"""Each check passes on what is right and fails on what is not, and only what it is about stops a run."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.defs import checks, runs
from dmr_pipeline.defs.checks import CHECKS, Finding
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, SUMMARIES, fake_run, fake_rung


def found(name: str, recipe: Recipe, summary: dict[str, object] | None = None, stage: str | None = None) -> Finding:
    """What the check of this name finds in the finished fake project, with another summary if one is given."""
    (check,) = [check for check in CHECKS if check.name == name and stage in (None, check.stage)]
    artifact = verify(artifact_folder(check.stage, RECIPE))
    manifest = artifact.manifest if summary is None else artifact.manifest.model_copy(update={"summary": summary})
    return check.examine(artifact.path, manifest, recipe)


def test_every_stage_has_a_check_of_its_files_and_every_check_a_stage(finished_project: Recipe):
    names = {stage.name for stage in pipeline.STAGES}
    assert {check.stage for check in CHECKS} <= names
    keys = [key for check in checks.build_checks(sorted(names)) for key in check.check_keys]
    assert len(keys) == len(set(keys)) == len(names) + len(CHECKS)


def test_all_pass_on_a_finished_project(finished_project: Recipe):
    failures = {
        (check.stage, check.name): list(found(check.name, finished_project, stage=check.stage).failures)
        for check in CHECKS
    }
    assert not any(failures.values()), failures


@pytest.mark.parametrize(
    ("stage", "name"), [("trajectories", "steps_and_episodes_are_complete"), ("sensitivity_dataset", "labels_are_sane")]
)
def test_task_types_of_another_benchmark_are_found(finished_project: Recipe, stage: str, name: str):
    shopping = {"environment": "webshop", "splits": finished_project.benchmark.splits}
    recipe = Recipe.model_validate({**finished_project.model_dump(), "benchmark": shopping})
    (failure,) = found(name, recipe, stage=stage).failures
    assert "column=task_type" in failure
    assert "grocery" in failure


def test_a_game_in_two_splits_and_a_missing_game_are_found(finished_project: Recipe):
    folder = artifact_folder("benchmark_tasks", RECIPE)
    manifest = verify(folder).manifest
    (folder / "test.parquet").write_bytes((folder / "validation.parquet").read_bytes())
    (failure,) = checks.tasks_are_disjoint(folder, manifest, finished_project).failures
    assert failure == "1 games are both in test and in validation"
    pl.DataFrame({"task_id": []}, schema={"task_id": pl.String}).write_parquet(folder / "test.parquet")
    (failure,) = checks.tasks_are_disjoint(folder, manifest, finished_project).failures
    assert failure == "test: 0 different games, 1 asked for"


def test_rungs_that_reload_otherwise_or_are_missing_are_found(finished_project: Recipe):
    summary = copy.deepcopy(SUMMARIES["quantized_checkpoints"])
    summary["rungs"][1]["reloads_equal"] = False
    assert "int2: a reloaded model" in found("rungs_reload_equal", finished_project, summary).failures[0]
    del summary["rungs"][1]
    assert found("rungs_reload_equal", finished_project, summary).failures == ["int2: not on the ladder that was made"]


def test_a_rung_nearer_to_float_than_the_one_above_is_found(finished_project: Recipe):
    summary = copy.deepcopy(SUMMARIES["quantized_checkpoints"])
    summary["rungs"].append({**fake_rung("int2-mse", kl_to_float=0.2), "bytes": summary["rungs"][-1]["bytes"]})
    assert not found("divergence_grows_down_the_ladder", finished_project, summary).failures, "no smaller, and nearer"
    summary["rungs"].append({**fake_rung("int1", kl_to_float=0.1), "bytes": 1})
    (failure,) = found("divergence_grows_down_the_ladder", finished_project, summary).failures
    assert failure.startswith("int1 is nearer to the float model (0.100000")


@pytest.mark.parametrize(("ratio", "fine"), [(0.0, False), (0.005, False), (0.01, True), (0.99, True), (1.0, False)])
def test_collapsed_routers_are_found(finished_project: Recipe, ratio: float, fine: bool):
    for stage, summary in (
        ("kl_router", {"validation_spend": ratio}),
        ("grpo_router", {"validation_ratio": ratio}),
        ("grpo_router", {"validation_ratio": 0.5, "calibrated_validation_ratio": ratio}),
    ):
        assert (not found("router_has_not_collapsed", finished_project, summary, stage).failures) is fine


@pytest.mark.parametrize(
    ("policy", "change", "explained"),
    [
        ("confidence", None, "confidence is missing"),
        ("kl_router", {"ci95": [0.55, 0.6]}, "kl_router: success 0.5 with interval 0.55 to 0.6"),
        ("kl_router", {"success": 1.2, "ci95": [1.1, 1.3]}, "kl_router: success 1.2"),
        ("kl_router", {"high_ratio": -0.1}, "kl_router: high-precision ratio -0.1"),
        ("kl_router", {"spend": 1.1}, "kl_router: high-precision ratio 0.3, spend 1.1"),
        ("always_high", {"high_ratio": 0.9}, "always_high: high-precision ratio 0.9, which must be 1"),
        ("always_low", {"cost": 0.0}, "always_low: cost 0.0"),
        ("always_low", {"n": 2}, "not all policies played the same number"),
    ],
)
def test_an_evaluation_that_cannot_be_is_found(
    finished_project: Recipe, policy: str, change: dict[str, object] | None, explained: str
):
    path = artifact_folder("evaluation_report", RECIPE) / "metrics.json"
    manifest = verify(path.parent).manifest
    metrics = json.loads(path.read_text())
    if change is None:
        del metrics["policies"][policy]
    else:
        metrics["policies"][policy] |= change
    path.write_text(json.dumps(metrics))
    failures = checks.report_is_whole(path.parent, manifest, finished_project).failures
    assert len(failures) == 1
    assert failures[0].startswith(explained)


def latest_check(asset: str, name: str) -> dg.AssetCheckEvaluation:
    with dg.DagsterInstance.get() as instance:
        (record,) = instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(dg.AssetKey(asset), name), limit=1
        )
    assert record.event is not None
    assert record.event.dagster_event is not None
    return record.event.dagster_event.asset_check_evaluation_data


def test_files_that_change_behind_dagsters_back_are_found(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    """Between a stage's end and its checks."""
    genuine = checks.verify

    def harmed(folder: Path):
        if folder.name == "agent":
            (folder / "content.json").write_text("{}")
        return genuine(folder)

    monkeypatch.setattr(checks, "verify", harmed)
    with pytest.raises(UserError, match=r"blocking check.*agent"):
        runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks", "agent"])
    evaluation = latest_check("agent", "files_are_as_recorded")
    assert not evaluation.passed
    assert evaluation.partition == RECIPE
    assert "content.json was changed" in (evaluation.description or "")


@pytest.mark.parametrize(
    ("stage", "summary", "blocks"),
    [
        ("grpo_router", {"validation_ratio": 0.0}, False),
        ("quantized_checkpoints", {"rungs": [fake_rung("float", kl_to_float=0.0, reloads_equal=False)]}, True),
    ],
)
def test_only_what_makes_the_rest_wrong_blocks_it(
    project: Recipe, stage: str, summary: dict[str, object], blocks: bool
):
    def run(context: StageContext) -> StageResult:
        result = fake_run(context)
        return replace(result, summary={**result.summary, **summary})

    stages = [replace(row, run=run) if row.name == stage else row for row in pipeline.STAGES]
    names = [row.name for row in stages]
    if blocks:
        with pytest.raises(UserError, match=f"blocking check.*{stage}"):
            runs.materialize(stages, RECIPE, names)
    else:
        runs.materialize(stages, RECIPE, names)
        evaluation = latest_check(stage, "router_has_not_collapsed")
        assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert artifact_folder("released_router", RECIPE).exists() is not blocks
