"""What is measured is what the figures say, and an engine that acts otherwise is noticed."""

import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.rollout_bench import agents, record, run
from dmr_pipeline.rollout_bench.agents import Way
from dmr_pipeline.rollout_bench.record import Figure, RolloutRecord
from dmr_pipeline.rollout_bench.run import Measured, Measurement

ROOT = Path(__file__).parents[2]
FIGURE = Figure(
    agent="someone",
    way=Way.ENGINE,
    at_once=16,
    episodes=32,
    steps=300,
    tokens=2400,
    cpu_seconds=1.5,
    wall_seconds=9.0,
    memory_bytes=50_000_000,
    compared=12,
    equal=12,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    run.make_tasks("alfworld-tiny", 3, folder / "alfworld-tiny")
    return folder


@pytest.fixture(scope="module")
def planned(tasks: Path) -> list[Measurement]:
    reread, kept, *_ = run.measurements(run.QUICK, ROOT / "data", tasks)[0]
    return [reread, kept, replace(reread, way=Way.ENGINE, at_once=2, episodes=2)]


@pytest.fixture(scope="module")
def reference(planned: list[Measurement]) -> Measured:
    return planned[0].run()


def test_the_engine_acts_as_generate_does(
    planned: list[Measurement], reference: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_in_own_process", lambda each: reference if each == planned[0] else each.run())
    reread, kept, engine = run.figures(planned)
    assert reread.steps == kept.steps == reread.compared > 3
    assert engine.steps > reread.steps
    for figure in (reread, kept, engine):
        assert figure.equal == figure.compared == reread.steps
        assert figure.tokens > figure.steps
        assert figure.cpu_seconds > 0


def test_an_engine_that_acts_otherwise_is_noticed(
    planned: list[Measurement], reference: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doctored(*args, **named):
        played = play_alone(*args, **named)
        played[0].steps[1].action.append(7)
        del played[0].steps[-1]
        return played

    play_alone = agents.play_alone
    monkeypatch.setattr(agents, "play_alone", doctored)
    figure = run.figure(planned[2], planned[2].run(), reference.actions)
    steps = len(reference.actions[0])
    assert (figure.equal, figure.compared) == (steps - 2, steps)


def test_steps_a_second_are_actions_by_cpu_seconds() -> None:
    measurement = Measurement(Sleeper(), Way.ENGINE, 2, 2)
    actions = [[[1, 2], [3]], [[4], [5], [6, 7]]]
    figure = run.figure(measurement, Measured(actions, 0.25, 4.0, 10), [[[1, 2], [9], [8]]])
    assert (figure.steps, figure.tokens, figure.steps_a_second) == (5, 7, 20.0)
    assert (figure.compared, figure.equal) == (3, 1)  # the second action differs, the third is missing


@dataclass(frozen=True)
class Sleeper:
    """Sleeps, works a while, holds memory; its actions say in which process."""

    name: str = "sleeper"

    def player(self, way: Way):
        def play(episodes, at_once):
            time.sleep(0.5)
            until = time.process_time() + 0.2
            held = np.ones(20_000_000)  # 160 MB
            while time.process_time() < until:
                pass
            return [[[os.getpid(), int(held[0])]] for _ in episodes]

        return play


def test_a_measurement_has_a_process_of_its_own() -> None:
    pids, memory = set(), []
    for _ in range(2):
        measured = run._in_own_process(Measurement(Sleeper(), Way.ENGINE, 1, 1))
        pids.add(measured.actions[0][0][0])
        memory.append(measured.memory_bytes)
        assert 0.2 <= measured.cpu_seconds < measured.wall_seconds - 0.4  # asleep it takes none
    assert len(pids | {os.getpid()}) == 3
    assert all(150e6 < most < 250e6 for most in memory)  # what the first one held is not the second one's


def test_the_baseline_is_of_the_same_measurements() -> None:
    baseline = record.read_baseline()
    assert baseline.git is not None
    assert baseline.git.commit.startswith("61ddc79")
    assert baseline.machine.cpu
    assert baseline.equal
    planned = [measurement for of_agent in run.measurements(run.FULL, Path(), Path()) for measurement in of_agent]
    for measurement in planned:
        like = FIGURE.model_copy(
            update={
                "agent": measurement.agent.name,
                "way": measurement.way.value,
                "at_once": measurement.at_once,
                "episodes": measurement.episodes,
            }
        )
        assert baseline.like(like) is not None, measurement
    assert len(baseline.figures) == len(planned)


def bench(figures: list[Figure], baseline: list[Figure], monkeypatch: pytest.MonkeyPatch, *options: str):
    before = record.read_baseline().model_copy(update={"figures": baseline})
    monkeypatch.setattr(record, "read_baseline", lambda: before)
    monkeypatch.setattr(run, "bench_rollout", lambda sizes, data: iter(figures))
    return CliRunner().invoke(app, ["bench", "rollout", *options], env={"COLUMNS": "120"})


def test_the_command_shows_figure_and_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = FIGURE.model_copy(update={"cpu_seconds": 6.0, "memory_bytes": 70_000_000})
    alone = FIGURE.model_copy(update={"at_once": 1})
    result = bench([FIGURE, alone], [before], monkeypatch, "--json", str(tmp_path / "made" / "figures.json"))
    assert result.exit_code == 0, result.output
    assert re.search(r"engine +16 +300 +200 +50 +4\.00 +50 +70 +12/12", result.stdout)
    assert re.search(r"engine +1 +300 +200 +50 +12/12", result.stdout)
    assert "61ddc79" in result.stdout
    written = RolloutRecord.model_validate_json((tmp_path / "made" / "figures.json").read_text(encoding="utf-8"))
    assert written.figures == [FIGURE, alone]


def test_the_command_fails_where_actions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"equal": 11}, {"compared": 0, "equal": 0}):
        assert bench([FIGURE.model_copy(update=wrong)], [], monkeypatch).exit_code == 1


def test_without_agents_the_command_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "rollout", "--quick"])
    assert result.exit_code == 2
    assert "no agent in data/alfworld-tiny/agent" in result.stderr


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "rollout", "--quick", "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    written = RolloutRecord.model_validate_json((tmp_path / "figures.json").read_text(encoding="utf-8"))
    planned = run.measurements(run.QUICK, Path(), Path())
    assert len(written.figures) == sum(map(len, planned))
    for figure in written.figures:
        assert f"{figure.equal}/{figure.compared}" in result.stdout
