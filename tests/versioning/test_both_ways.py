"""One pipeline, two ways in: what Dagster has made DVC does not make again, and the reverse."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.defs import runs
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import recipe_names
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY, dvc, enter_project, make_recipe, write_fake_dmr

NAMES = [stage.name for stage in pipeline.STAGES]


def descendants(name: str) -> set[str]:
    """The stage and all that are made from it, worked out from the table."""
    found = {name}
    for stage in pipeline.STAGES:
        if found & set(stage.inputs):
            found.add(stage.name)
    return found


def hashes(recipe: str = RECIPE) -> dict[str, str]:
    return {name: verify(artifact_folder(name, recipe)).hash for name in NAMES}


def were_up_to_date() -> dict[str, bool]:
    """What the last materialisation of each asset says."""
    with dg.DagsterInstance.get() as instance:
        events = {name: instance.get_latest_materialization_event(dg.AssetKey(name)) for name in NAMES}
    return {
        name: event.asset_materialization.metadata["was_up_to_date"].value
        for name, event in events.items()
        if event is not None and event.asset_materialization is not None
    }


def test_what_dagster_made_dvc_does_not_make_again(finished_project: Recipe, tmp_path: Path):
    lock = dvc_stages.LOCK_FILE.read_text()
    said = dvc("repro", scripts=write_fake_dmr(tmp_path))
    assert "Running stage" not in said
    assert said.count("didn't change, skipping") == len(NAMES)
    assert dvc_stages.LOCK_FILE.read_text() == lock


def test_what_dvc_made_dagster_does_not_make_again(finished_project: Recipe, tmp_path: Path, monkeypatch):
    """From a change of the recipe on: DVC makes what is stale, Dagster then finds it made; and in a copy, Dagster alone
    makes the same."""
    recipe = Path(f"recipes/{RECIPE}.yaml")
    recipe.write_text(recipe.read_text().replace("sensitivity: {quantile: 0.5}", "sensitivity: {quantile: 0.4}"))
    copy = tmp_path / "copy"
    shutil.copytree(Path(), copy, ignore=shutil.ignore_patterns("copy"))

    said = dvc("repro", scripts=write_fake_dmr(tmp_path))
    assert set(re.findall(rf"Running stage '(\w+)@{RECIPE}'", said)) == descendants("sensitivity_dataset")
    lock, made = dvc_stages.LOCK_FILE.read_text(), hashes()
    runs.materialize(pipeline.STAGES, RECIPE, NAMES)
    assert were_up_to_date() == dict.fromkeys(NAMES, True)
    assert dvc_stages.LOCK_FILE.read_text() == lock

    enter_project(copy, monkeypatch)
    runs.materialize(pipeline.STAGES, RECIPE, NAMES)
    assert {name for name, was in were_up_to_date().items() if not was} == descendants("sensitivity_dataset")
    assert hashes() == made
    assert dvc_stages.LOCK_FILE.read_text() == lock


def test_two_recipes_at_once_commit_both(project: Recipe):
    make_recipe("other")
    with dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 2)
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.helpers.fake_project import fake_stages; from dmr_pipeline.defs import runs\n"
        "runs.materialize(fake_stages(), sys.argv[1], [stage.name for stage in fake_stages()])\n"
    )
    recipes = recipe_names()
    assert len(recipes) == 2
    started = [
        subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True) for name in recipes
    ]
    for process in started:
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
    for name in recipes:
        for stage in pipeline.STAGES:
            assert dvc_stages.is_committed(stage, name, verify(artifact_folder(stage.name, name))), (name, stage.name)
    assert "up to date" in dvc("status")
