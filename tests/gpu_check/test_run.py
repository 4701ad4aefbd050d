"""`make gpu-check FLAGS=--tiny`: every part on a CPU."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.gpu_check.agents import RUNGS
from dmr_pipeline.gpu_check.record import Record
from dmr_pipeline.gpu_check.run import check_gpu

REPOSITORY = Path(__file__).parents[2]


def test_without_a_gpu_only_the_tiny_check_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "gpu", "--output", str(tmp_path / "found.json")])
    assert result.exit_code == 2
    assert "--tiny" in result.stderr
    assert not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "gpu", "--tiny", "--output", str(tmp_path / "new" / "found.json")])
    assert result.exit_code == 0, result.output
    record = Record.model_validate_json((tmp_path / "new" / "found.json").read_text())
    outcomes = {part.name: part.outcome for part in record.parts}
    assert list(outcomes.values()).count("passed") == 6
    assert outcomes["out of memory"] == "skipped"
    by_name = {part.name: part for part in record.parts}
    assert len([c for c in by_name["quantize, save, reload"].checks if "reloads equal" in c.what]) == 2 * len(RUNGS)
    assert all(row["steps_a_second"] > 0 for row in by_name["steps a second"].rows)
    assert not by_name["decoding at the shapes of real models"].left_out
    assert all(set(part.units) <= {name for row in part.rows for name in row} for part in record.parts if part.rows)
    assert record.date.endswith("Z")
    assert record.versions["torch"]


@pytest.mark.slow
def test_the_check_without_the_committed_agent_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    record = check_gpu(True, tmp_path / "found.json", tmp_path / "nowhere")
    outcomes = {part.name: part.outcome for part in record.parts}
    assert outcomes["quantize, save, reload"] == "failed"
    assert outcomes["low-bit kernels"] == "passed"
    assert Record.model_validate_json((tmp_path / "found.json").read_text()) == record
