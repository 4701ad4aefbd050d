"""The stage that plays behaviours, broken off and run again."""

import logging
from pathlib import Path

import polars as pl
import pytest

from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.stages import trajectories as the_stage

FILES = ("episodes.parquet", "steps.parquet")
OF_EACH = 3
"""Tables that are kept of a behaviour."""


class Killed(Exception):
    pass


@pytest.mark.parametrize("writes", [1, OF_EACH + 1, 2 * OF_EACH, 3 * OF_EACH])
def test_a_run_that_was_broken_off_goes_on_after_the_behaviour_that_was_played_last(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, writes: int
) -> None:
    def run(name: str, scratch: str) -> tuple[StageResult, dict[str, bytes]]:
        (tmp_path / name).mkdir()
        result = the_stage.trajectories(StageContext(recipe, inputs, tmp_path / name, tmp_path / scratch))
        return result, {file: (tmp_path / name / file).read_bytes() for file in FILES}

    result, whole = run("whole", "scratch-of-whole")
    names = list(result.summary)
    assert names == ["all-float", "all-int2", "mixed"]
    assert [of["steps"] for of in result.summary.values()] == [  # type: ignore[index, call-overload]
        len(
            pl.read_parquet(tmp_path / "whole" / "steps.parquet").filter(
                pl.col("episode_id").str.starts_with(f"{name}/")
            )
        )
        for name in names
    ]
    write, done = KeptTables.write, []

    def killed_at(kept: KeptTables, table: pl.DataFrame, **facts: str) -> None:
        if len(done) == writes:
            raise Killed
        done.append(facts)
        write(kept, table, **facts)

    def killed_at_the_end(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptTables, "write", killed_at)
        patch.setattr(the_stage, "_told", killed_at_the_end)
        with pytest.raises(Killed):
            run("killed", "scratch")
    played: list[str] = []
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(KeptTables, "write", lambda _, table, **facts: played.append(facts["behaviour"]))
        again = run("again", "scratch")
    assert (again[0].summary, again[1]) == (result.summary, whole)
    before = names[: writes // OF_EACH]
    assert list(dict.fromkeys(played)) == names[len(before) :]
    said = [record.message for record in caplog.records if "broken off" in record.message]
    assert said == ([f"played before a run was broken off: {', '.join(before)}"] if before else [])
