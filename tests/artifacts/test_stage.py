import pickle
import warnings

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.artifacts.stage import DeclaredSections, Stage, StageContext, StageResult
from dmr_pipeline.recipe import UNHASHED_SECTIONS, Recipe
from dmr_pipeline.recipe.evaluation import Evaluation

SECTIONS = Recipe.model_fields.keys() - {"name"}


@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.name)
def test_a_stage_reads_its_sections_and_no_other(project: Recipe, stage: Stage):
    seen = DeclaredSections.of(project, stage.sections)
    assert seen.name == project.name
    for name in SECTIONS:
        if name in (*stage.sections, "runtime"):
            assert getattr(seen, name) == getattr(project, name)
        else:
            with pytest.raises(AttributeError, match=f"section '{name}', which it does not declare in pipeline.py"):
                getattr(seen, name)


def test_what_a_stage_can_dump_of_its_recipe_is_what_its_provenance_has(project: Recipe):
    stage = pipeline.find_stage("evaluation_report", pipeline.STAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dumped = DeclaredSections.of(project, stage.sections).model_dump(mode="json", exclude={"name", "runtime"})
    assert dumped == provenance(stage, project, {}).sections


def test_the_view_survives_a_process_and_a_changed_copy(project: Recipe):
    seen = DeclaredSections.of(project, ["agent"])
    assert pickle.loads(pickle.dumps(seen)) == seen
    with pytest.raises(AttributeError, match="does not declare"):
        pickle.loads(pickle.dumps(seen)).model_copy().release  # noqa: B018
    assert seen.model_copy(update={"evaluation": Evaluation(seed=7)}).evaluation.seed == 7


def test_a_stage_that_runs_is_given_the_view(project: Recipe):
    given: list[Recipe] = []

    def run(context: StageContext) -> StageResult:
        given.append(context.recipe)
        return StageResult({})

    stage = Stage("one", (), ("benchmark",), "1", run, "group", frozenset(), "A stage.", "Read it.")
    materialize_stage(stage, project)
    assert given[0].benchmark == project.benchmark
    for name in UNHASHED_SECTIONS - {"runtime"}:
        with pytest.raises(AttributeError, match="does not declare"):
            getattr(given[0], name)
