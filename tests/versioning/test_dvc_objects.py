import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import MANIFEST, Artifact, folder_hash, hash_files, verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_objects, dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc

CACHE = Path(".dvc/cache/files/md5")
TASKS = artifact_folder("benchmark_tasks", RECIPE)


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the DVC remote 'store' of the project in the working directory."""
    folder = tmp_path_factory.mktemp("store")
    dvc("remote", "add", "store", str(folder))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def object_in(objects: Path, oid: str) -> Path:
    return objects / oid[:2] / oid[2:]


def damage(path: Path) -> None:
    """As a bad disk does: other bytes, the same mode."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    path.chmod(mode)


def stage_called(name: str) -> Stage:
    return pipeline.find_stage(name, pipeline.STAGES)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_folder_comes_back_from_the_cache(finished_project: Recipe, tmp_path: Path):
    before, wanted = content(TASKS), verify(TASKS).hash
    dvc_objects.restore(wanted, tmp_path / "elsewhere" / "tasks")
    assert content(tmp_path / "elsewhere" / "tasks") == before
    assert not leftovers(tmp_path / "elsewhere")


def test_folder_that_is_there_is_replaced_whole_and_loses_the_record_of_its_run(finished_project: Recipe):
    before, wanted = content(TASKS), verify(TASKS).hash
    (TASKS / "stray").write_text("x")
    assert sidecar_path(TASKS).is_file()
    dvc_objects.restore(wanted, TASKS)
    assert content(TASKS) == before
    assert not sidecar_path(TASKS).exists()
    assert not leftovers(TASKS.parent)


def test_folder_of_that_hash_is_left_alone(finished_project: Recipe):
    shutil.rmtree(CACHE)
    dvc_objects.restore(verify(TASKS).hash, TASKS)
    assert sidecar_path(TASKS).is_file()


@pytest.mark.parametrize("lost", ["everything", "the list", "a file"])
def test_what_the_cache_lacks_comes_from_the_remote(finished_project: Recipe, store: Path, lost: str):
    before, wanted = content(TASKS), verify(TASKS).hash
    dvc_objects.push(wanted, "store")
    if lost == "everything":
        shutil.rmtree(CACHE)
    else:
        oid = wanted if lost == "the list" else verify(TASKS).manifest.files["content.json"]
        object_in(CACHE, oid).unlink()
    shutil.rmtree(TASKS)
    dvc_objects.restore(wanted, TASKS, "store")
    assert content(TASKS) == before


def test_default_remote_is_used_where_none_is_named(finished_project: Recipe, store: Path):
    wanted = verify(TASKS).hash
    dvc("remote", "default", "store")
    dvc_objects.push(wanted)
    shutil.rmtree(CACHE)
    shutil.rmtree(TASKS)
    dvc_objects.restore(wanted, TASKS)
    assert verify(TASKS).hash == wanted


def test_push_sends_each_object_once_and_what_dvc_itself_finds(finished_project: Recipe, store: Path):
    artifact = verify(TASKS)
    objects = set(hash_files(TASKS).values()) | {artifact.hash}
    assert dvc_objects.push(artifact.hash, "store") == len(objects)
    sent = {path.parent.name + path.name for path in store.rglob("*") if path.is_file()}
    assert sent == objects
    assert dvc_objects.push(artifact.hash, "store") == 0
    shutil.rmtree(CACHE)
    shutil.rmtree(TASKS)
    dvc("pull", "-r", "store", f"benchmark_tasks@{RECIPE}")
    assert verify(TASKS).hash == artifact.hash


def test_push_mends_a_remote_that_has_the_list_but_lost_a_file(finished_project: Recipe, store: Path):
    artifact = verify(TASKS)
    dvc_objects.push(artifact.hash, "store")
    object_in(store / "files/md5", artifact.manifest.files["content.json"]).unlink()
    assert dvc_objects.push(artifact.hash, "store") == 1


@pytest.mark.parametrize("damaged", ["a file", "the list"])
def test_damaged_object_of_the_cache_is_fetched_again(finished_project: Recipe, store: Path, damaged: str):
    before, artifact = content(TASKS), verify(TASKS)
    dvc_objects.push(artifact.hash, "store")
    oid = artifact.hash if damaged == "the list" else artifact.manifest.files["content.json"]
    damage(object_in(CACHE, oid))
    shutil.rmtree(TASKS)
    dvc_objects.restore(artifact.hash, TASKS, "store")
    assert content(TASKS) == before
    assert hashlib.md5(object_in(CACHE, oid).read_bytes()).hexdigest() == oid.removesuffix(".dir")


def test_damaged_object_that_is_nowhere_else_is_named_and_removed(finished_project: Recipe):
    artifact = verify(TASKS)
    oid = artifact.manifest.files["content.json"]
    damage(object_in(CACHE, oid))
    shutil.rmtree(TASKS)
    with pytest.raises(UserError, match=f"{oid} was damaged in DVC's cache .* there is no remote"):
        dvc_objects.restore(artifact.hash, TASKS)
    assert not object_in(CACHE, oid).exists()
    assert not TASKS.exists()
    assert not leftovers(TASKS.parent)


@pytest.mark.parametrize("damaged", ["a file", "the list"])
def test_damaged_object_of_the_remote_is_named_and_never_used(finished_project: Recipe, store: Path, damaged: str):
    artifact = verify(TASKS)
    dvc_objects.push(artifact.hash, "store")
    oid = artifact.hash if damaged == "the list" else artifact.manifest.files["content.json"]
    broken = object_in(store / "files/md5", oid)
    damage(broken)
    shutil.rmtree(CACHE)
    shutil.rmtree(TASKS)
    with pytest.raises(UserError, match=f"{broken} in the DVC remote 'store' is damaged.*remove it"):
        dvc_objects.restore(artifact.hash, TASKS, "store")
    assert not TASKS.exists()
    assert not object_in(CACHE, oid).exists()


def test_missing_object_unknown_remote_and_no_project_are_user_errors(
    finished_project: Recipe, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"0\.dir is not in DVC's cache, and there is no remote"):
        dvc_objects.restore("0.dir", Path("target"))
    with pytest.raises(UserError, match="remote 'typo' doesn't exist"):
        dvc_objects.restore("0.dir", Path("target"), "typo")
    with pytest.raises(UserError, match="no remote"):
        dvc_objects.push(verify(TASKS).hash)
    wanted = verify(TASKS).hash
    monkeypatch.chdir(tmp_path_factory.mktemp("bare"))
    with pytest.raises(UserError, match="DVC: you are not inside of a DVC repository"):
        dvc_objects.restore(wanted, Path("target"))


def test_unwritable_remote_is_a_user_error(finished_project: Recipe, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    dvc("remote", "add", "blocked", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the DVC remote at .*file.* failed: .*Not a directory"):
        dvc_objects.push(verify(TASKS).hash, "blocked")


def test_restore_leaves_the_old_folder_where_the_disk_is_full(finished_project: Recipe, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    wanted = verify(TASKS).hash
    (TASKS / "stray").write_text("x")
    monkeypatch.setattr("dvc_data.hashfile.checkout.checkout", full)
    with pytest.raises(UserError, match="no space left"):
        dvc_objects.restore(wanted, TASKS)
    assert (TASKS / "stray").is_file()
    assert not leftovers(TASKS.parent)


def test_recorded_hash_is_that_of_dvc_lock(finished_project: Recipe):
    lock = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
    for stage in pipeline.STAGES:
        assert (
            dvc_objects.recorded_hash(stage, RECIPE) == lock[dvc_stages.stage_address(stage, RECIPE)]["outs"][0]["md5"]
        )
    assert dvc_objects.recorded_hash(pipeline.STAGES[0], "other") is None
    Path("dvc.lock").unlink()
    assert dvc_objects.recorded_hash(pipeline.STAGES[0], RECIPE) is None


def test_artifacts_that_dvc_lock_records_pass(finished_project: Recipe):
    for stage in pipeline.STAGES:
        dvc_objects.check(stage, RECIPE, verify(artifact_folder(stage.name, RECIPE)))


def change_manifest(folder: Path, key: str = "summary") -> Artifact:
    """The one file that no manifest guards: what it says under `key`."""
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text())
    content[key] = {**content[key], "changed": "5"} if isinstance(content[key], dict) else "99"
    if key == "files":
        content["files"] = {name: md5 for name, md5 in content["files"].items() if name != "changed"}
        manifest.write_text(json.dumps(content))
    else:
        manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return verify(folder)


@pytest.mark.parametrize("name", ["benchmark_tasks", "agent", "ingested_trajectories", "evaluation_report"])
@pytest.mark.parametrize("key", ["summary", "sections", "inputs", "code_version", "stage", "recipe", "files"])
def test_changed_manifest_is_damage_whatever_it_then_says(finished_project: Recipe, name: str, key: str):
    changed = change_manifest(artifact_folder(name, RECIPE), key)
    with pytest.raises(UserError, match=f"{changed.hash}, but dvc.lock records .*dmr restore {name} ") as raised:
        dvc_objects.check(stage_called(name), RECIPE, changed)
    assert "\n" not in str(raised.value)


def test_changed_manifest_without_an_entry_is_found_by_the_run_record(finished_project: Recipe):
    changed = change_manifest(TASKS)
    Path("dvc.lock").unlink()
    with pytest.raises(UserError, match=f"{changed.hash}, but its run record says"):
        dvc_objects.check(stage_called("benchmark_tasks"), RECIPE, changed)


def test_artifact_that_was_built_and_not_yet_committed_is_no_damage(finished_project: Recipe):
    """As after a kill between the two: `dvc.lock` has the one before."""
    stage = stage_called("benchmark_tasks")
    recipe = finished_project.model_copy(
        update={"benchmark": finished_project.benchmark.model_copy(update={"seed": 1})}
    )
    built = materialize_stage(stage, recipe).artifact
    assert dvc_objects.recorded_hash(stage, RECIPE) != built.hash
    dvc_objects.check(stage, RECIPE, built)


def test_artifact_of_another_commit_is_no_damage(finished_project: Recipe):
    """`dvc.lock` and the run record are of the newer one; what is there came out of the cache."""
    stage, old = stage_called("benchmark_tasks"), verify(TASKS).hash
    recipe = finished_project.model_copy(
        update={"benchmark": finished_project.benchmark.model_copy(update={"seed": 1})}
    )
    new = materialize_stage(stage, recipe).artifact
    dvc_stages.commit(stage, RECIPE, artifact=new, rebuilt=True)
    record = sidecar_path(TASKS).read_text()
    dvc_objects.restore(old, TASKS)
    sidecar_path(TASKS).write_text(record)
    assert dvc_objects.recorded_hash(stage, RECIPE) == new.hash
    dvc_objects.check(stage, RECIPE, verify(TASKS))


def test_committed_artifact_that_git_has_is_no_damage(finished_project: Recipe):
    stage, folder = replace(stage_called("agent"), committed_recipes=(RECIPE,)), artifact_folder("agent", RECIPE)
    changed = change_manifest(folder)
    subprocess.run(["git", "add", "--force", str(folder)], check=True)
    dvc_objects.check(stage, RECIPE, changed)
    dvc_objects.check(stage, RECIPE, verify(folder.resolve()))
    (folder / "stray").write_text("x")
    with pytest.raises(UserError, match="dmr restore agent"):
        dvc_objects.check(stage, RECIPE, changed)


def test_restore_gets_a_committed_artifact_from_git(finished_project: Recipe):
    stage, folder = replace(stage_called("agent"), committed_recipes=(RECIPE,)), artifact_folder("agent", RECIPE)
    before = content(folder)
    with pytest.raises(UserError, match=r"Git has no data/fake/agent: make it with `dmr materialize agent .* --force`"):
        dvc_objects.restore_recorded(stage, RECIPE)
    subprocess.run(["git", "add", "--force", str(folder)], check=True)
    change_manifest(folder)
    (folder / "stray").write_text("x")
    (folder / "content.json").unlink()
    dvc_objects.restore_recorded(stage, RECIPE)
    assert content(folder) == before
    assert not leftovers(folder.parent)
    shutil.rmtree(folder)
    dvc_objects.restore_recorded(stage, RECIPE)
    assert content(folder) == before


def test_manifest_that_came_damaged_out_of_the_cache_is_refused_and_the_remedy_helps(
    finished_project: Recipe, store: Path
):
    stage, wanted = stage_called("benchmark_tasks"), verify(TASKS).hash
    dvc("remote", "default", "store")
    dvc_objects.push(wanted)
    cached = object_in(CACHE, hash_files(TASKS)[MANIFEST])
    text = cached.read_text()
    cached.chmod(0o644)
    cached.write_text(text.replace('"inputs": ', '"inputs":  '))
    cached.chmod(0o444)
    shutil.rmtree(TASKS)
    dvc("checkout", str(TASKS))
    with pytest.raises(UserError, match="came damaged out of DVC's cache"):
        dvc_objects.check(stage, RECIPE, verify(TASKS))
    dvc_objects.restore_recorded(stage, RECIPE)
    assert verify(TASKS).hash == wanted
    assert cached.read_text() == text


def test_history_comes_back_on_a_clone(finished_project: Recipe, store: Path):
    stage = stage_called("ingested_trajectories")
    folder = artifact_folder(stage.name, RECIPE)
    wanted = verify(folder).hash
    dvc_objects.push(wanted, "store")
    shutil.rmtree(CACHE)
    shutil.rmtree(folder)
    assert dvc_objects.ensure_history(stage, RECIPE) == wanted
    assert not folder.exists()
    assert dvc_objects.ensure_history(stage, RECIPE, remote="store") is None
    assert verify(folder).hash == wanted


def test_lost_history_is_made_anew_only_if_it_comes_out_the_same(finished_project: Recipe):
    stage = stage_called("ingested_trajectories")
    folder = artifact_folder(stage.name, RECIPE)
    wanted = verify(folder).hash
    shutil.rmtree(folder)
    assert materialize_stage(stage, finished_project, expected=wanted).artifact.hash == wanted
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"must not start anew: `dmr restore {stage.name} --recipe {RECIPE}`"):
        materialize_stage(stage, finished_project, expected="0" * 32 + ".dir")
    assert not folder.exists()


def test_history_that_is_there_is_left_alone(finished_project: Recipe):
    stage = stage_called("ingested_trajectories")
    folder = artifact_folder(stage.name, RECIPE)
    (folder / "grown").write_text("x")
    before = folder_hash(hash_files(folder))
    dvc_objects.ensure_history(stage, RECIPE)
    assert folder_hash(hash_files(folder)) == before


def test_nothing_is_restored_without_a_record_or_a_history(project: Recipe):
    dvc_objects.ensure_history(stage_called("ingested_trajectories"), RECIPE)
    assert not artifact_folder("ingested_trajectories", RECIPE).exists()
    stage = stage_called("benchmark_tasks")
    dvc_stages.commit(stage, RECIPE, artifact=materialize_stage(stage, project).artifact, rebuilt=True)
    shutil.rmtree(TASKS)
    dvc_objects.ensure_history(stage, RECIPE)
    assert not TASKS.exists()


def test_importing_it_does_not_import_dvc():
    code = "import sys; from dmr_pipeline.versioning import dvc_objects, git_branch; print('dvc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "False\n"
