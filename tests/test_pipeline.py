import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.errors import UserError
from dmr_pipeline.pipeline import find_stage
from dmr_pipeline.recipe import UNHASHED_SECTIONS, Recipe


def test_each_stage_comes_after_its_inputs_and_reads_sections_that_exist():
    seen: set[str] = set()
    sections = set(Recipe.model_fields) - {"name"}
    for stage in pipeline.STAGES:
        assert set(stage.inputs) <= seen
        assert set(stage.sections) <= sections - UNHASHED_SECTIONS, "how a stage runs must not make it stale"
        seen.add(stage.name)
    assert len(seen) == len(pipeline.STAGES)


def test_every_hashed_section_is_read_by_a_stage():
    read = {section for stage in pipeline.STAGES for section in stage.sections}
    assert read == set(Recipe.model_fields) - {"name"} - UNHASHED_SECTIONS


def test_unknown_stage_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown stage 'nope' .*benchmark_tasks, agent"):
        find_stage("nope", pipeline.STAGES)


def test_a_stage_computes_with_as_many_threads_as_its_recipe_says(torch_threads: int, tmp_path: Path):
    import torch

    from dmr_pipeline.stages import ingested_trajectories

    asked, seen = torch_threads + 1, list[int]()
    runtime = SimpleNamespace(threads=asked)
    context = StageContext(SimpleNamespace(runtime=runtime), {}, tmp_path, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingested_trajectories, "ingested_trajectories", lambda _: seen.append(torch.get_num_threads()))
        find_stage("ingested_trajectories", pipeline.STAGES).run(context)
    assert seen == [asked]


def test_reading_the_table_imports_nothing_heavy():
    code = (
        "import sys, dmr_pipeline.pipeline; print(sorted({'torch', 'polars', 'dagster', 'dvc'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
