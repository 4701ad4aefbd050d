import re
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dvc.repo import Repo
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.definitions import defs
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import RECIPE_FOLDER, is_recipe_name, recipe_names
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc, write_fake_dmr

TABLE = {stage.name: set(stage.inputs) for stage in pipeline.STAGES}
ADDRESSES = {name: f"cached_agent@{RECIPE}" if name == "agent" else f"{name}@{RECIPE}" for name in TABLE}


def test_committed_dvc_yaml_is_what_the_table_renders():
    recipes = recipe_names(REPOSITORY / RECIPE_FOLDER)
    dvc_stages.check_rendered(pipeline.STAGES, recipes, REPOSITORY / "dvc.yaml")
    assert (REPOSITORY / dvc_stages.IGNORE_FILE).read_text() == dvc_stages.render_ignored(pipeline.STAGES)


@settings(deadline=None, max_examples=50)
@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True).filter(is_recipe_name))
def test_a_name_is_the_same_in_dvc_yaml(name: str) -> None:
    rendered = YAML(typ="safe").load(dvc_stages.render(pipeline.STAGES, [name]))
    assert all(stage["matrix"]["recipe"] == [name] for stage in rendered["stages"].values())


def test_a_dvc_yaml_that_is_no_text_is_not_what_the_table_renders(project: Recipe):
    dvc_stages.DVC_FILE.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="run `dmr render`"):
        dvc_stages.check_rendered(pipeline.STAGES, [RECIPE])
    with pytest.raises(UserError, match="run `dmr render`"):
        dvc_stages.check_recipe_rendered(pipeline.STAGES, RECIPE)


def test_dvc_reads_the_tables_edges(project: Recipe):
    stages = {stage.addressing: stage for stage in Repo().index.stages}
    assert set(stages) == {ADDRESSES[name] for name in TABLE}
    for row in pipeline.STAGES:
        stage = stages[ADDRESSES[row.name]]
        assert {Path(dep.def_path) for dep in stage.deps if dep not in stage.params} == {
            artifact_folder(name, RECIPE) for name in row.inputs
        }
        assert [Path(out.def_path) for out in stage.outs] == [artifact_folder(row.name, RECIPE)]
        assert [out.use_cache for out in stage.outs] == [True]
        assert [list(params.params) for params in stage.params] == [list(row.sections)]


def test_dagster_has_the_tables_edges(project: Recipe):
    graph = defs().resolve_asset_graph()
    edges = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    assert edges == {
        row.name: {*row.inputs, *(f"recipe/{section}" for section in row.sections)} for row in pipeline.STAGES
    }


def test_dagster_and_dvc_have_the_same_edges(project: Recipe):
    """Read off the two systems themselves; a recipe's sections are DVC's parameters and Dagster's assets."""
    graph = defs().resolve_asset_graph()
    stages = {stage.addressing: stage for stage in Repo().index.stages}
    for key in graph.materializable_asset_keys:
        stage = stages[ADDRESSES[key.to_user_string()]]
        upstream = {Path(dep.def_path).name for dep in stage.deps if dep not in stage.params}
        sections = {f"recipe/{name}" for params in stage.params for name in params.params}
        assert {parent.to_user_string() for parent in graph.get(key).parent_keys} == upstream | sections
    assert len(stages) == len(graph.materializable_asset_keys)


def test_a_code_version_makes_both_systems_stale(project: Recipe):
    changed = [replace(pipeline.STAGES[0], code_version="3"), *pipeline.STAGES[1:]]
    before = yaml.safe_load(dvc_stages.render(pipeline.STAGES, [RECIPE]))["stages"]
    after = yaml.safe_load(dvc_stages.render(changed, [RECIPE]))["stages"]
    differing = {name for name in before if before[name]["cmd"] != after[name]["cmd"]}
    assert differing == {"benchmark_tasks"}
    with pytest.raises(UserError, match="run `dmr render`"):
        dvc_stages.check_rendered(changed, [RECIPE])
    with pytest.raises(UserError, match="run `dmr render`"):
        dvc_stages.check_recipe_rendered(changed, RECIPE)


@pytest.mark.parametrize("recipes", [["another", RECIPE], [RECIPE], ["alfworld-tiny", RECIPE]])
def test_a_stage_asks_dvc_yaml_of_its_own_recipe_alone(project: Recipe, recipes: list[str]):
    """Another one may be written while a stage of this one runs, for hours."""
    dvc_stages.DVC_FILE.write_text(dvc_stages.render(pipeline.STAGES, recipes))
    dvc_stages.check_recipe_rendered(pipeline.STAGES, RECIPE)
    for name in set(recipes) - {RECIPE}:
        dvc_stages.DVC_FILE.write_text(dvc_stages.render(pipeline.STAGES, [name]))
        with pytest.raises(UserError, match=f"says of {RECIPE}: run `dmr render`"):
            dvc_stages.check_recipe_rendered(pipeline.STAGES, RECIPE)


def test_commit_records_what_dvc_then_calls_up_to_date(project: Recipe):
    stage = pipeline.STAGES[0]
    artifact = materialize_stage(stage, project).artifact
    assert not dvc_stages.is_committed(stage, RECIPE, artifact)
    assert dvc_stages.commit(stage, RECIPE, artifact=artifact, rebuilt=True)
    assert dvc_stages.is_committed(stage, RECIPE, artifact)
    assert not dvc_stages.commit(stage, RECIPE, artifact=artifact, rebuilt=False)
    out = yaml.safe_load(Path("dvc.lock").read_text())["stages"][f"benchmark_tasks@{RECIPE}"]["outs"][0]
    assert out["md5"] == artifact.hash
    assert "up to date" in dvc("status", f"benchmark_tasks@{RECIPE}")


def test_commit_leaves_dvc_yaml_closed(project: Recipe):
    """DVC reads it twice, for longer than anything else of a commit takes, and `dvc.lock` as often."""
    stage = pipeline.STAGES[0]
    artifact = materialize_stage(stage, project).artifact
    Path("dvc.yaml").unlink()
    assert dvc_stages.commit(stage, RECIPE, artifact=artifact, rebuilt=True)
    assert dvc_stages.is_committed(stage, RECIPE, artifact)


def test_dvc_lock_is_not_read_while_dvc_writes_it(project: Recipe):
    """DVC writes it in place: half a file may be no YAML, or hide an entry."""
    stage = pipeline.STAGES[0]
    dvc_stages.commit(stage, RECIPE, artifact=materialize_stage(stage, project).artifact, rebuilt=True)
    whole, entry = dvc_stages.LOCK_FILE.read_text(), dvc_stages.lock_entry(stage, RECIPE)
    assert entry is not None
    with ThreadPoolExecutor(1) as reader:
        with Repo() as repo, repo.lock:
            dvc_stages.LOCK_FILE.write_text(whole[: whole.index("outs:")] + "ou")
            read = reader.submit(dvc_stages.lock_entry, stage, RECIPE)
            assert not wait([read], timeout=1).done
            dvc_stages.LOCK_FILE.write_text(whole)
        assert read.result(timeout=60) == entry


@pytest.mark.parametrize("change", ["output", "command", "params", "dependency"])
def test_whatever_dvc_lock_does_not_record_is_not_committed(project: Recipe, change: str):
    first, second = pipeline.STAGES[:2]
    for stage in (first, second):
        dvc_stages.commit(stage, RECIPE, artifact=materialize_stage(stage, project).artifact, rebuilt=True)
    artifact = verify(artifact_folder(second.name, RECIPE))
    assert dvc_stages.is_committed(second, RECIPE, artifact)
    if change == "output":
        artifact = replace(artifact, hash="0.dir")
    if change == "command":
        second = replace(second, code_version="3")
    if change == "params":
        recipe = RECIPE_FOLDER / f"{RECIPE}.yaml"
        recipe.write_text(recipe.read_text().replace("models/tiny", "models/other"))
    if change == "dependency":
        manifest = artifact.manifest.model_copy(update={"inputs": {first.name: "0.dir"}})
        artifact = replace(artifact, manifest=manifest)
    assert not dvc_stages.is_committed(second, RECIPE, artifact)


@pytest.mark.parametrize("number", range(8))
def test_an_entry_is_written_again_where_it_is_not_as_dvc_writes_it(finished_project: Recipe, number: int):
    """Sizes and counts too, which decide nothing but are shown."""
    whole = dvc_stages.LOCK_FILE.read_text()
    start = whole.index(f"  {dvc_stages.stage_address(pipeline.STAGES[1], RECIPE)}:")
    fields = r"(?<=version )\d|(?<= md5: )\w|(?<=size: )\d|(?<=nfiles: )\d|(?<=agent_train: )\d"
    where = start + list(re.finditer(fields, whole[start:]))[number].start()
    changed = "8" if whole[where] == "9" else "9"
    dvc_stages.LOCK_FILE.write_text(whole[:where] + changed + whole[where + 1 :])
    artifact = verify(artifact_folder("agent", RECIPE))
    assert dvc_stages.commit(pipeline.STAGES[1], RECIPE, artifact=artifact, rebuilt=False)
    assert dvc_stages.LOCK_FILE.read_text() == whole


def test_nothing_is_committed_inside_dvc_repro(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_STAGE", "benchmark_tasks@fake")
    artifact = materialize_stage(pipeline.STAGES[0], project).artifact
    assert not dvc_stages.commit(pipeline.STAGES[0], RECIPE, artifact=artifact, rebuilt=True)
    assert not Path("dvc.lock").exists()


def test_dvcs_refusal_is_one_line(project: Recipe):
    artifact = materialize_stage(pipeline.STAGES[0], project).artifact
    config = Path(".dvc/config")
    config.write_text(f"{config.read_text()}[no section]\n")
    with pytest.raises(UserError, match=r"^DVC: .*no section") as raised:
        dvc_stages.commit(pipeline.STAGES[0], RECIPE, artifact=artifact, rebuilt=True)
    assert "\n" not in str(raised.value)


def test_dvc_repro_leaves_dagsters_record_and_its_own(project: Recipe, tmp_path: Path):
    dvc("repro", f"cached_agent@{RECIPE}", scripts=write_fake_dmr(tmp_path))
    assert "up to date" in dvc("status", f"cached_agent@{RECIPE}")
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("agent"))
    assert event is not None
    materialization = event.asset_materialization
    assert materialization is not None
    assert materialization.partition == RECIPE
    artifact = verify(artifact_folder("agent", RECIPE))
    assert materialization.tags["dagster/data_version"] == artifact.hash
    assert dvc_stages.is_committed(pipeline.STAGES[1], RECIPE, artifact)
