import json
from dataclasses import replace

import dagster as dg
import polars as pl
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import Stage, StageContext, StageResult
from dmr_pipeline.definitions import defs
from dmr_pipeline.defs import runs
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, SUMMARIES, fake_run

NAMES = [stage.name for stage in pipeline.STAGES]


@pytest.fixture(autouse=True)
def without_dvc(monkeypatch: pytest.MonkeyPatch, project: Recipe) -> None:
    """As inside `dvc repro`: these tests are about Dagster alone."""
    monkeypatch.setenv("DVC_STAGE", "any")


def with_run(name: str, run: object) -> list[Stage]:
    return [replace(stage, run=run) if stage.name == name else stage for stage in pipeline.STAGES]


def latest(asset: str) -> dg.AssetMaterialization | None:
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    return event.asset_materialization if event else None


def test_every_row_of_the_table_is_an_asset_and_recipes_are_its_partitions(project: Recipe):
    graph = defs().resolve_asset_graph()
    for stage in pipeline.STAGES:
        node = graph.get(dg.AssetKey(stage.name))
        assert node.partitions_def.get_partition_keys() == [RECIPE]
        assert (node.group_name, node.code_version, node.description) == (
            stage.group,
            stage.code_version,
            f"{stage.description}\n\n{stage.reading}",
        )
        assert node.kinds == stage.kinds
        assert node.pools == ({stage.pool} if stage.pool else set())
        assert node.owners
    assert {node.group_name for node in graph.asset_nodes} == {"recipe", *(stage.group for stage in pipeline.STAGES)}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (
            "+kl_router",
            {
                "kl_router",
                "benchmark_tasks",
                "quantized_checkpoints",
                "trajectories",
                "ingested_trajectories",
                "sensitivity_dataset",
            },
        ),
        ("kl_router+", {"kl_router", "grpo_router", "evaluation_report"}),
        ("kl_router++", {"kl_router", "grpo_router", "evaluation_report", "released_router"}),
        ("group:labels", {"trajectories", "ingested_trajectories", "sensitivity_dataset"}),
        ('key:"agent" or kind:python', {"agent", "benchmark_tasks"}),
        ("*", set(NAMES)),
    ],
)
def test_string_selections_resolve_beside_dvc(project: Recipe, selection: str, expected: set[str]):
    """They die with the antlr runtime that stable hydra-core and omegaconf, which DVC brings, pin."""
    import hydra
    import omegaconf

    assert hydra.__version__
    assert omegaconf.__version__
    keys = dg.AssetSelection.from_string(selection).resolve(defs().resolve_asset_graph())
    assert {key.to_user_string() for key in keys} == expected


def test_materialisation_records_hash_summary_table_and_picture(project: Recipe):
    runs.materialize(pipeline.STAGES, RECIPE, NAMES)
    artifact = verify(artifact_folder("evaluation_report", RECIPE))
    record = latest("evaluation_report")
    assert record is not None
    assert record.tags["dagster/data_version"] == artifact.hash
    assert record.tags["dagster/code_version"] == pipeline.find_stage("evaluation_report", pipeline.STAGES).code_version
    shown = {key: value.value for key, value in record.metadata.items()}
    assert shown["hash"] == artifact.hash
    assert shown["size_bytes"] == artifact.size
    assert shown["summary/inputs"] == 5
    assert shown["run/measured"] == {"seconds_a_step": 0.1}
    assert isinstance(record.metadata["table"], dg.MarkdownMetadataValue)
    assert "always_high" in shown["table"]
    assert shown["picture/cost"].startswith("![cost](data:image/png;base64,iVBORw")
    ladder = latest("quantized_checkpoints")
    assert ladder is not None
    assert ladder.metadata["summary/verdict/text"].value == "Routing can pay."
    rungs = ladder.metadata["summary/rungs"]
    assert isinstance(rungs, dg.TableMetadataValue), "a table, not JSON"
    assert [row.data["name"] for row in rungs.records] == ["float", "int2"]


def test_second_run_skips_unless_forced(project: Recipe):
    for force, skipped in ((False, False), (False, True), (True, False)):
        runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"], force=force)
        record = latest("benchmark_tasks")
        assert record is not None
        assert record.metadata["was_up_to_date"].value is skipped


@pytest.mark.parametrize(
    ("asset", "harm"),
    [
        ("trajectories", lambda steps: pl.concat([steps, steps])),
        ("sensitivity_dataset", lambda steps: steps.with_columns(kl_high_low=pl.lit(-1.0))),
    ],
)
def test_a_bad_table_blocks_what_comes_after(project: Recipe, asset: str, harm: object):
    def run(context: StageContext) -> StageResult:
        result = fake_run(context)
        harm(pl.read_parquet(context.output / "steps.parquet")).write_parquet(context.output / "steps.parquet")
        return result

    with pytest.raises(UserError, match=f"blocking check.*{asset}"):
        runs.materialize(with_run(asset, run), RECIPE, NAMES)
    assert latest(asset) is not None
    assert latest("kl_router") is None
    assert not artifact_folder("kl_router", RECIPE).exists()


@pytest.mark.parametrize("pays", [True, False])
def test_the_verdict_is_shown_and_does_not_block(project: Recipe, pays: bool):
    def run(context: StageContext) -> StageResult:
        fake_run(context)
        summary = SUMMARIES["quantized_checkpoints"]
        return StageResult(summary={**summary, "verdict": {**summary["verdict"], "pays": pays}})

    runs.materialize(with_run("quantized_checkpoints", run), RECIPE, NAMES)
    assert latest("evaluation_report") is not None
    key = dg.AssetCheckKey(dg.AssetKey("quantized_checkpoints"), "routing_can_pay")
    with dg.DagsterInstance.get() as instance:
        (check,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    evaluation = check.event.dagster_event.asset_check_evaluation_data
    assert evaluation.passed is pays
    assert evaluation.partition == RECIPE
    assert evaluation.metadata["text"].value == "Routing can pay."


def test_a_user_error_in_a_stage_comes_out_as_itself(project: Recipe):
    def run(context: StageContext) -> StageResult:
        raise UserError("the game folder is empty: give another")

    with pytest.raises(UserError, match=r"^the game folder is empty: give another$"):
        runs.materialize(with_run("benchmark_tasks", run), RECIPE, NAMES)


def test_a_stale_dvc_yaml_stops_a_run_before_it_works(project: Recipe):
    changed = [replace(pipeline.STAGES[0], code_version="3"), *pipeline.STAGES[1:]]
    with pytest.raises(UserError, match="run `dmr render`"):
        runs.materialize(changed, RECIPE, ["benchmark_tasks"])
    assert not artifact_folder("benchmark_tasks", RECIPE).exists()


def test_instance_settings_are_read(project: Recipe):
    with dg.DagsterInstance.get() as instance:
        assert not instance.telemetry_enabled
        assert instance.global_op_concurrency_default_limit == 1
        assert instance.run_monitoring_settings["free_slots_after_run_end_seconds"] > 0
        assert instance.managed_python_loggers == ["dmr_pipeline"]


def test_what_stages_log_is_in_the_runs_log(project: Recipe):
    runs.materialize(pipeline.STAGES, RECIPE, ["benchmark_tasks"])
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
        messages = [json.dumps(entry.user_message) for entry in instance.all_logs(run.run_id)]
    assert any("benchmark_tasks: started" in message for message in messages)
