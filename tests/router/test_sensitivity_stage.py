"""The stage that labels steps, broken off and run again."""

from pathlib import Path

import polars as pl
import pytest

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.tables import read_trajectories
from dmr_pipeline.router.labels import Measured, measure, read_sensitivity
from dmr_pipeline.stages import sensitivity_dataset as the_stage

FILES = ("steps.parquet", "drafts.parquet")


class Killed(Exception):
    pass


def test_a_run_that_was_broken_off_goes_on_and_writes_the_same(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"batch_episodes": 2})})
    measured: list[int] = []

    def watched(*arguments: object) -> Measured:
        if len(measured) == dies_after:
            raise Killed
        found = measure(*arguments)  # type: ignore[arg-type]
        measured.append(len(found.drafts))
        return found

    def run(name: str, scratch: str) -> dict[str, bytes]:
        (tmp_path / name).mkdir()
        the_stage.sensitivity_dataset(StageContext(small, inputs, tmp_path / name, tmp_path / scratch))
        return {file: (tmp_path / name / file).read_bytes() for file in FILES}

    monkeypatch.setattr(the_stage, "measure", watched)
    dies_after = -1
    whole = run("whole", "scratch-of-whole")
    sizes, dies_after = list(measured), 2
    assert len(sizes) > dies_after
    measured.clear()
    with pytest.raises(Killed):
        run("killed", "scratch")
    dies_after = -1
    assert run("again", "scratch") == whole
    assert measured == sizes, "no round twice"
    at_once = measure(
        Rollouts.load(inputs["quantized_checkpoints"], small),
        *read_trajectories(inputs["trajectories"]),
        small.sensitivity.tokens,
    )
    assert read_sensitivity(tmp_path / "again").select(at_once.steps.columns).equals(at_once.steps)
    assert pl.read_parquet(tmp_path / "again" / "drafts.parquet").equals(at_once.drafts)
