"""Kills of `dmr` at random and aimed moments, over all stages and ingestion: `dmr run` then ends with the artifacts of an
undisturbed run."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, incoming_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.interrupts import LINE
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY
from tests.helpers.warm_dmr import ANYTHING, REACHED, STACKS, Call, line_of

ROUNDS = 48
ROUNDS_A_PROJECT = 6
"""So that some kills hit what an earlier one has left."""
HANG_SECONDS = 90
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
INGESTION = "ingested_trajectories"
FEWEST = "kl_router"
"""No stage writes fewer files."""
FILING = "dmr_pipeline.ingestion.inbox:archive"
AIMS = (
    "dmr_pipeline.versioning.lock_file:record",
    ANYTHING,
    "dmr_pipeline.artifacts.folders:publish",
    FILING,
    "dmr_pipeline.versioning.dvc_stages:commit",
    ANYTHING,
    "dmr_pipeline.artifacts.materialize:_build",
)
"""Functions in whose midst a kill could do most harm; each second round is killed at any moment."""


class Warm:
    """A process that forks calls of `dmr`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm_dmr"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def answer(self, seconds: float) -> int | None:
        """None: there was none for so long."""
        assert self.server.stdout is not None
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        return int(self.server.stdout.readline()) if ready else None

    def begin(self, *arguments: str, within: str = ANYTHING, number: int = 0) -> int:
        for name in ("out", "err", "go", "moments"):
            (self.folder / name).unlink(missing_ok=True)
        assert self.server.stdin is not None
        self.server.stdin.write(line_of(Call([*arguments], str(self.folder), within, number)).encode())
        process = self.answer(600)
        assert process is not None
        return process

    def said(self) -> str:
        return (self.folder / "err").read_text()

    def end(self, process: int) -> str:
        """What the call had said, and where each of its threads was."""
        os.kill(process, STACKS)
        time.sleep(1)
        os.killpg(process, signal.SIGKILL)
        self.answer(HANG_SECONDS)
        return self.said()

    def undisturbed(self, *arguments: str, within: str = ANYTHING) -> int:
        """How many moments there were."""
        process = self.begin(*arguments, within=within)
        code = self.answer(2 * HANG_SECONDS)
        assert code is not None, self.end(process)
        assert code == 0, self.said()
        return int((self.folder / "moments").read_text())

    def kill(self, *arguments: str, signal_number: signal.Signals, within: str, number: int) -> tuple[str, str]:
        """How the call ended ("over": before it was killed), and its standard error."""
        process = self.begin(*arguments, within=within, number=number)
        out, code = self.folder / "out", None
        deadline = time.monotonic() + HANG_SECONDS
        while code is None and not (out.is_file() and REACHED in out.read_text()):
            code = self.answer(0.005)
            if time.monotonic() > deadline:
                return "hang", self.end(process)
        if code is not None:
            return ("lost" if code else "over"), f"exit code {code} before it was killed: {self.said()}"
        children = psutil.Process(process).children(recursive=True)
        if signal_number is signal.SIGINT:
            os.killpg(process, signal_number)  # as a terminal does
        else:
            os.kill(process, signal_number)
        (self.folder / "go").touch()
        code = self.answer(HANG_SECONDS)
        if code is None:
            return "hang", self.end(process)
        if psutil.wait_procs(children, timeout=10)[1]:
            return "hang", f"left children: {self.said()}"
        if "Traceback" in self.said():
            return "traceback", self.said()
        if signal_number is signal.SIGKILL:
            return ("killed" if code == -signal_number else "over"), self.said()
        if code == 0 and not self.said():
            return "over", ""
        interrupted = (code, self.said()) == (128 + signal_number, LINE)
        return ("killed" if interrupted else "silent"), f"exit code {code}: {self.said()}"


@pytest.fixture
def warm(finished_project: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    found = Warm(tmp_path_factory.mktemp("calls"))
    yield found
    assert found.server.stdin is not None
    found.server.stdin.close()
    try:
        found.server.wait(timeout=60)
    finally:
        found.server.kill()


def hashes() -> Mapping[str, str]:
    return {stage.name: verify(artifact_folder(stage.name, RECIPE)).hash for stage in pipeline.STAGES}


def lost(expected: Mapping[str, str]) -> list[str]:
    """What is not as after an undisturbed run: artifacts, DVC's record of them, and the dropped files."""
    found, dropped = hashes(), incoming_folder(RECIPE)
    wrong = [name for name in expected if found[name] != expected[name]]
    for stage in pipeline.STAGES:
        if not dvc_stages.is_committed(stage, RECIPE, verify(artifact_folder(stage.name, RECIPE))):
            wrong.append(f"record of {stage.name}")
    filed = sorted(path.name.split("-", 1)[1] for path in (dropped / "ingested").iterdir())
    return wrong + ([] if filed == ["a.jsonl", "b.jsonl"] else [f"ingested {filed}"])


def again(warm: Warm, expected: Mapping[str, str]) -> tuple[str, str]:
    """What is wrong when all is run again, and the standard error."""
    process = warm.begin("run", RECIPE)
    code = warm.answer(2 * HANG_SECONDS)
    if code is None:
        return "hang", warm.end(process)
    if "Traceback" in warm.said():
        return "traceback", warm.said()
    missing = [f"exit code {code}"] if code else lost(expected)
    return ("lost" if missing else ""), f"{missing}: {warm.said()}"


def command(stage: str) -> list[str]:
    return ["materialize", stage, "--recipe", RECIPE, "--force"]


@pytest.mark.slow
def test_kills_lose_nothing(warm: Warm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, pick = incoming_folder(RECIPE), random.Random(0)
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({**EXAMPLE, "episode_id": name}) + "\n")
    pristine = tmp_path.parent / f"{tmp_path.name}-pristine"
    shutil.copytree(tmp_path, pristine)

    def renew() -> None:
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)

    moments = {}
    for aim in dict.fromkeys(AIMS):
        moments[aim] = warm.undisturbed(*command(INGESTION if aim == FILING else FEWEST), within=aim)
        renew()
    assert all(moments.values()), f"aims at nothing: {moments}"
    warm.undisturbed("run", RECIPE)
    expected = hashes()
    assert not lost(expected)
    renew()
    started = time.monotonic()
    counts, kinds = Counter(dict.fromkeys(("lost", "silent", "traceback", "hang"), 0)), Counter[str]()
    troubles: list[tuple[object, ...]] = []
    for turn in range(ROUNDS):
        number = SIGNALS[turn % len(SIGNALS)]
        aim = AIMS[turn % len(AIMS)]
        stage = INGESTION if aim == FILING else pipeline.STAGES[turn % len(pipeline.STAGES)].name
        # The last moments of a call are those of an interpreter that winds up, when all is done.
        moment = pick.randint(1, moments[aim] * 8 // 10 if aim == ANYTHING else moments[aim])
        outcome, said = warm.kill(*command(stage), signal_number=number, within=aim, number=moment)
        kinds[f"{number.name} {outcome}"] += 1
        if outcome in counts:
            counts[outcome] += 1
            troubles.append((turn, number.name, stage, aim, moment, outcome, said))
        if turn % ROUNDS_A_PROJECT == ROUNDS_A_PROJECT - 1:
            wrong, said = again(warm, expected)
            if wrong:
                counts[wrong] += 1
                troubles.append((turn, f"run again: {wrong}", said))
            renew()
    kills = sum(count for kind, count in kinds.items() if not kind.endswith("over"))
    with capsys.disabled():
        told = ", ".join(f"{what} {count}" for what, count in counts.items())
        sys.stdout.write(f"\nkills {kills} in {time.monotonic() - started:.0f} s: {told} ({dict(kinds)})\n")
    assert not troubles
    assert kills >= 40
