"""Recipe sections as assets: a change to a recipe's file makes the stages that read it stale, in that recipe's partition."""

import hashlib
import json
from collections.abc import Iterator, Sequence

import dagster as dg

from dmr_pipeline.defs.versions import DATA_VERSION_TAG, recorded_version
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import UNHASHED_SECTIONS, Recipe
from dmr_pipeline.recipe.reading import load_recipe, recipe_names


def section_key(section: str) -> dg.AssetKey:
    return dg.AssetKey(["recipe", section])


def build_sections(partitions: dg.PartitionsDefinition) -> list[dg.AssetSpec]:
    """One asset a section that stages read; nothing materialises it, the sensor below observes the file."""
    return [
        dg.AssetSpec(
            section_key(name),
            partitions_def=partitions,
            group_name="recipe",
            kinds={"yaml"},
            description=f"Section `{name}` of `recipes/<recipe>.yaml`. {field.description or ''}".strip(),
        )
        for name, field in Recipe.model_fields.items()
        if name not in UNHASHED_SECTIONS | {"name"}
    ]


def section_version(recipe: Recipe, section: str) -> str:
    """Hash of the section's content, defaults filled in: a comment in the file changes nothing."""
    content = getattr(recipe, section).model_dump(mode="json")
    return hashlib.md5(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_observations(
    instance: dg.DagsterInstance, recipe: Recipe, sections: Sequence[str]
) -> Iterator[dg.AssetObservation]:
    """One for each section whose content is not the one observed last."""
    for section in sections:
        key, version = section_key(section), section_version(recipe, section)
        if recorded_version(instance, key, recipe.name) != version:
            yield dg.AssetObservation(key, partition=recipe.name, tags={DATA_VERSION_TAG: version})


def observe(instance: dg.DagsterInstance, recipe: Recipe, sections: Sequence[str]) -> bool:
    """Report the sections whose content is new; False where none is."""
    observations = list(new_observations(instance, recipe, sections))
    for observation in observations:
        instance.report_runless_asset_event(observation)
    return bool(observations)


def build_section_sensor(sections: Sequence[str]) -> dg.SensorDefinition:
    @dg.sensor(
        name="recipe_files",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks at recipes/*.yaml, so that the graph shows what a change there has made stale. Starts no runs.",
    )
    def recipe_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        events: list[dg.AssetObservation] = []
        unreadable = []
        for name in recipe_names():
            try:
                recipe = load_recipe(name)
            except UserError as error:
                unreadable.append(str(error))
                continue
            events += new_observations(context.instance, recipe, sections)
        if events:
            return dg.SensorResult(asset_events=events)
        return dg.SkipReason("; ".join(unreadable) or "no recipe has changed")

    return recipe_files
