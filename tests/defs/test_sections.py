"""What Dagster calls stale after a recipe has changed, beside what DVC does."""

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from dvc.repo import Repo

from dmr_pipeline import pipeline
from dmr_pipeline.definitions import defs
from dmr_pipeline.defs import runs
from dmr_pipeline.defs.sections import build_section_sensor, observe, section_version
from dmr_pipeline.recipe import UNHASHED_SECTIONS, Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, dvc, make_recipe

SECTIONS = sorted(Recipe.model_fields.keys() - UNHASHED_SECTIONS - {"name"})
CHANGES = {
    "benchmark": ("agent_train: 1", "agent_train: 2"),
    "agent": ("agent: {pretrained: {model: models/tiny}}", "agent: {pretrained: {model: models/other}}"),
    "precisions": ("{name: int2, weights: int2}]", "{name: int2, weights: int4}]"),
    "trajectories": ("shares: {float: 1.0}", "shares: {float: 0.5, int2: 0.5}"),
    "sensitivity": ("quantile: 0.5", "quantile: 0.4"),
    "kl_router": ("batch_episodes: 1", "batch_episodes: 2"),
    "grpo_router": ("cost_weight: 0.1", "cost_weight: 0.2"),
    "evaluation": ("evaluation: {}", "evaluation: {seed: 1}"),
    "release": ("release: {}", "release: {seed: 1}"),
}


def change(section: str, recipe: str = RECIPE) -> None:
    path = Path(f"recipes/{recipe}.yaml")
    before, after = CHANGES[section]
    assert path.read_text().count(before) == 1
    path.write_text(path.read_text().replace(before, after))


def stale(recipe: str) -> set[str]:
    """Assets that Dagster's own resolver calls stale by themselves, in the recipe's partition."""
    with dg.DagsterInstance.get() as instance:
        resolver = CachingStaleStatusResolver(
            instance=instance,
            asset_graph=defs().resolve_asset_graph(),
            loading_context=LoadingContextForTest(instance),
        )
        return {
            stage.name
            for stage in pipeline.STAGES
            if resolver.get_status(dg.AssetKey(stage.name), recipe) is StaleStatus.STALE
        }


def changed_in_dvc(recipe: str) -> set[str]:
    """Stages whose parameters DVC finds changed."""
    return {
        address.partition("@")[0]
        for address, reasons in Repo().status().items()
        if address.endswith(f"@{recipe}")
        and any("changed deps" in reason for reason in reasons if isinstance(reason, dict))
    }


@pytest.mark.parametrize("section", CHANGES)
def test_a_changed_section_makes_exactly_those_stages_stale_that_read_it(finished_project: Recipe, section: str):
    assert stale(RECIPE) == set()
    change(section)
    with dg.DagsterInstance.get() as instance:
        observe(instance, load_recipe(RECIPE), SECTIONS)
    readers = [stage for stage in pipeline.STAGES if section in stage.sections]
    assert stale(RECIPE) == {stage.name for stage in readers}
    assert changed_in_dvc(RECIPE) == {dvc_stages.group_name(stage, RECIPE) for stage in readers}


def test_sections_that_nothing_reads_and_comments_make_nothing_stale(finished_project: Recipe):
    path = Path("recipes/fake.yaml")
    path.write_text(f"# a comment\n{path.read_text()}runtime: {{threads: 1}}\nretraining: {{min_new_steps: 5}}\n")
    with dg.DagsterInstance.get() as instance:
        observe(instance, load_recipe(RECIPE), SECTIONS)
    assert stale(RECIPE) == set()
    assert changed_in_dvc(RECIPE) == set()


def test_other_recipes_partitions_stay_as_they_are(finished_project: Recipe):
    make_recipe("other")
    runs.materialize(pipeline.STAGES, "other", [stage.name for stage in pipeline.STAGES])
    change("kl_router", "other")
    with dg.DagsterInstance.get() as instance:
        for name in (RECIPE, "other"):
            observe(instance, load_recipe(name), SECTIONS)
    assert stale(RECIPE) == set()
    assert stale("other") == {"kl_router", "grpo_router"}  # the latter may begin anew, with that model
    assert changed_in_dvc(RECIPE) == set()


def test_a_materialisation_makes_an_asset_fresh_again_although_the_sensor_never_ran(finished_project: Recipe):
    change("evaluation")
    runs.materialize(pipeline.STAGES, RECIPE, ["evaluation_report"])
    assert stale(RECIPE) == set()
    assert "up to date" in dvc("status", f"evaluation_report@{RECIPE}")


def test_the_sensor_reports_what_has_changed_once(finished_project: Recipe):
    sensor = build_section_sensor(SECTIONS)
    with dg.DagsterInstance.get() as instance:

        def tick() -> list[dg.AssetObservation]:
            result = sensor(dg.build_sensor_context(instance=instance))
            return list(result.asset_events) if isinstance(result, dg.SensorResult) else []

        assert tick() == []
        change("kl_router")
        (observation,) = tick()
        assert observation.asset_key == dg.AssetKey(["recipe", "kl_router"])
        assert observation.partition == RECIPE
        assert observation.tags["dagster/data_version"] == section_version(load_recipe(RECIPE), "kl_router")
        instance.report_runless_asset_event(observation)
        assert tick() == []


def test_an_unreadable_recipe_does_not_stop_the_sensor(finished_project: Recipe):
    Path("recipes/broken.yaml").write_text("benchmark: 1\n")
    with dg.DagsterInstance.get() as instance:
        skipped = build_section_sensor(SECTIONS)(dg.build_sensor_context(instance=instance))
    assert isinstance(skipped, dg.SkipReason)
    assert "broken.yaml" in (skipped.skip_message or "")
