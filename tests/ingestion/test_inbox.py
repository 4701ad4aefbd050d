"""New trajectories: refused with a reason or taken in exactly once, whenever the process is killed."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts import materialize
from dmr_pipeline.artifacts.manifest import hash_files, verify
from dmr_pipeline.artifacts.materialize import Materialized, materialize_stage
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.alfworld.benchmark import GeneratedGames
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.game import TaskType
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.task_ids import KnownGames
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion import inbox as ingestion
from dmr_pipeline.ingestion import incoming
from dmr_pipeline.ingestion.inbox import archive, lying_files, misplaced_files, waiting_files
from dmr_pipeline.ingestion.rules import Rules, read_episodes
from dmr_pipeline.ingestion.schema import EXAMPLE, LoggedEpisode
from dmr_pipeline.ingestion.stored import read_ingested
from dmr_pipeline.ingestion.tables import INGESTED, ingested_tables, read_all_trajectories, routed
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.stages.ingested_trajectories import ingested_trajectories
from dmr_pipeline.training.examples import expert_example
from tests.helpers.fake_project import RECIPE_YAML, REPOSITORY, fake_run
from tests.helpers.rollouts import HALF, PROMPTER, ROUTE, RUNS, streams_of

REAL = pipeline.find_stage("ingested_trajectories", pipeline.STAGES)
BENCHMARK = replace(pipeline.find_stage("benchmark_tasks", pipeline.STAGES), run=fake_run)
CAPACITY = 500
RULES = Rules(TaskType.__args__, ("float", "int2"), 50, KnownGames(GeneratedGames, {"test-game": "test"}))
DATA = Path("data")
RECIPE = Recipe.model_validate({"name": "fake", **yaml.safe_load(RECIPE_YAML)})

Episode = dict[str, Any]


def logged(episode_id: str, **changes: Any) -> Episode:
    return {**EXAMPLE, "episode_id": episode_id, **changes}


def jsonl(*episodes: Episode) -> bytes:
    return "".join(json.dumps(episode) + "\n" for episode in episodes).encode()


def parquet(folder: Path, *episodes: Episode) -> bytes:
    pl.DataFrame(episodes).write_parquet(folder / "some")
    return (folder / "some").read_bytes()


def drop(data: Path, name: str, content: bytes) -> None:
    """As people are told to: whole or not at all."""
    incoming = data / "incoming" / "fake"
    incoming.mkdir(parents=True, exist_ok=True)
    (incoming / f"{name}.part").write_bytes(content)
    (incoming / f"{name}.part").rename(incoming / name)


def ingest(recipe: Recipe, data: Path = DATA, **options: bool) -> Materialized:
    return materialize_stage(REAL, recipe, data, **options)


def tree(data: Path) -> dict[str, bytes]:
    """Everything below the folder that people drop files into."""
    incoming = data / "incoming" / "fake"
    return {path.relative_to(incoming).as_posix(): path.read_bytes() for path in incoming.rglob("*") if path.is_file()}


def ids(data: Path) -> list[str]:
    """Read without any code of ours."""
    files = sorted((data / "fake" / "ingested_trajectories" / "episodes").glob("*.parquet"))
    return sorted(id_ for file in files for id_ in pl.read_parquet(file)["episode_id"])


def filed(folder: str, name: str, content: bytes) -> str:
    return f"{folder}/{hashlib.sha256(content).hexdigest()[:12]}-{name}"


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materialize_stage(BENCHMARK, RECIPE, tmp_path_factory.mktemp("games")).artifact.path


@pytest.fixture
def prepared(project: Recipe) -> Recipe:
    """A fake project whose games are known."""
    materialize_stage(BENCHMARK, project)
    return project


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": float("nan")}, "reward: Input should be a finite number"),
        ({"reward": float("inf")}, "reward: Input should be a finite number"),
        ({"reward": 1.5}, "reward: Input should be less than or equal to 1"),
        ({"reward": 1.0}, "success is False, but the reward is 1.0"),
        ({"success": "no"}, "success: Input should be a valid boolean"),
        ({"task_id": ""}, "task_id: String should have at least 1 character"),
        ({"task_id": " test-game"}, "task_id: String should match"),
        ({"observation": " "}, "observation: String should match"),
        ({"task_type": "juggle"}, "task_type: 'juggle' is none of the benchmark's .pick_and_place_simple, "),
        ({"steps": []}, "steps: List should have at least 1 item"),
        ({"steps": EXAMPLE["steps"] * 26}, "52 steps, but benchmark.step_limit of the recipe is 50"),
        ({"steps": [{"command": "look", "observation": "", "precision": "int8"}]}, "'int8' is not on .* ladder .float, int2"),
        ({"steps": [{"command": "look", "precision": "int2"}]}, "steps.0.observation: Field required"),
        ({"task_id": "test-game"}, "its game test-game is held out, in the split test"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"episode_id": "earlier"}, "an earlier file has brought"),
        ({"episode_id": "good"}, "its id is in this file twice"),
    ],
)  # fmt: skip
def test_a_bad_episode_is_named_with_its_place_and_the_reason(changes: dict[str, Any], said: str) -> None:
    bad = logged("bad") | changes
    good = [logged("good", success=True, reward=1.0), logged("other", reward=0.5)]
    _, problems = read_episodes(Path("x.jsonl"), jsonl(*good, bad), RULES, {"earlier"})
    assert len(problems) == 1
    assert re.match(rf"x\.jsonl: line 3: episode '{bad['episode_id']}': .*{said}", problems[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": float("nan")}, "reward: Input should be a finite number"),
        ({"episode_id": None}, "episode_id: Field required"),
        ({"steps": None}, "steps: Field required"),
        ({"task_id": "test-game"}, "its game test-game is held out, in the split test"),
        ({"precision": "int8"}, "precision: Extra inputs are not permitted"),
        ({"episode_id": "good"}, "its id is in this file twice"),
    ],
)
def test_parquet_is_held_to_the_same_schema(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    content = parquet(tmp_path, logged("good", reward=0.5), logged("bad", reward=0.0) | changes)
    _, problems = read_episodes(Path("x.parquet"), content, RULES, set())
    assert re.match(rf"x\.parquet: row 2: .*{said}", problems[-1])


def test_task_types_and_step_limit_are_the_benchmarks() -> None:
    shopping = {"environment": "webshop", "splits": RECIPE.benchmark.splits}
    rules = Rules.of(Recipe.model_validate({**RECIPE.model_dump(), "benchmark": shopping}), None)
    bought = logged("a", task_id="goal-1500", task_type="grocery")
    long = logged("b", task_id="goal-1501", task_type="beauty", steps=EXAMPLE["steps"] * 8)
    _, problems = read_episodes(Path("x.jsonl"), jsonl(bought, long, logged("c", task_id="goal-1502")), rules, set())
    assert problems == [
        "x.jsonl: line 2: episode 'b': 16 steps, but benchmark.step_limit of the recipe is 15",
        "x.jsonl: line 3: episode 'c': task_type: 'pick_and_place_simple' is none of the benchmark's (beauty, electronics,"
        " fashion, garden, grocery)",
    ]


def test_every_bad_line_is_listed() -> None:
    content = b'{"episode_id": \n\n[1]\n' + jsonl(logged(""), logged("a")) + b"\xff\n"
    episodes, problems = read_episodes(Path("x.jsonl"), content, RULES, set())
    assert [episode.episode_id for episode in episodes] == ["a"]
    places = [
        "line 1: not JSON",
        "line 3: Input should be a valid dictionary",
        "line 4: episode_id",
        "line 6: not JSON",
    ]
    assert len(problems) == 4
    assert all(place in problem for place, problem in zip(places, problems, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"\n", "it holds no episodes"),
        ("x.csv", b"a,b\n", "use .jsonl or .parquet"),
        ("x.parquet", jsonl(EXAMPLE), "not a Parquet file"),
        ("x.parquet", b"", "not a Parquet file"),
    ],
)
def test_a_file_that_holds_no_episodes_is_refused(name: str, content: bytes, said: str) -> None:
    episodes, problems = read_episodes(Path(name), content, RULES, set())
    assert episodes == []
    assert [said in problem for problem in problems] == [True]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_read_but_ends_nothing(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["x.jsonl", "x.parquet"]))
    whole = {"x.jsonl": jsonl(logged("a"), logged("b")), "x.parquet": parquet(tmp_path, logged("a"), logged("b"))}
    content = bytearray(whole[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    episodes, problems = read_episodes(Path(name), bytes(content), RULES, set())
    assert len(episodes) == 2 or problems


# What is taken in

names = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@st.composite
def episodes_of_any_kind(draw: st.DrawFn) -> list[Episode]:
    made = []
    for episode_id in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        success = draw(st.booleans())
        step = st.fixed_dictionaries(
            {
                "command": texts,
                "thought": texts,
                "observation": texts,
                "precision": st.sampled_from(["float", "int2"]),
                "probability": st.none() | st.floats(0, 1),
                "propensity": st.none() | st.floats(0, 1, exclude_min=True),
                "reason": st.none() | names,
                "release": st.none() | st.integers(1, 10**9),
            }
        )
        made.append(
            {
                "episode_id": episode_id,
                "task_id": f"game-{draw(names).replace('/', '')}",
                "task_type": draw(st.sampled_from(TaskType.__args__)),
                "task": draw(names),
                "observation": draw(texts) + draw(names),
                "steps": draw(st.lists(step, min_size=1, max_size=3)),
                "success": success,
                "reward": 1.0 if success else draw(st.floats(0, 1, exclude_max=True)),
            }
        )
    return made


@given(episodes_of_any_kind())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_formats_hold_the_same_and_so_does_the_artifact(
    games: Path, tmp_path: Path, episodes: list[Episode]
) -> None:
    by_json, problems = read_episodes(Path("x.jsonl"), jsonl(*episodes), RULES, set())
    assert problems == []
    assert [episode.model_dump() for episode in by_json] == episodes
    assert read_episodes(Path("x.parquet"), parquet(tmp_path, *episodes), RULES, set()) == (by_json, [])

    made = []
    for output in (tmp_path / "one", tmp_path / "two"):
        folders = {"output": output, "incoming": tmp_path / "incoming"}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (folders["incoming"] / "x.jsonl").write_bytes(jsonl(*episodes))
        ingested_trajectories(StageContext(RECIPE, {"benchmark_tasks": games}, scratch=tmp_path, **folders))
        assert read_ingested(output) == by_json
        made.append(hash_files(output))
    assert made[0] == made[1]


def test_a_null_in_parquet_is_a_field_left_out(tmp_path: Path) -> None:
    content = parquet(tmp_path, logged("a", reward=None), logged("b", reward=0.5))
    (first, second), problems = read_episodes(Path("x.parquet"), content, RULES, set())
    assert problems == []
    assert (first.reward, second.reward) == (None, 0.5)
    assert [step.thought for step in first.steps] == ["find apple", ""]


def test_nothing_was_ever_dropped(prepared: Recipe) -> None:
    done = ingest(prepared)
    assert done.artifact.manifest.summary == {"files": 0, "episodes": 0, "steps": 0}
    assert read_ingested(done.artifact.path) == []
    assert not (DATA / "incoming").exists()
    assert ingest(prepared).skipped


def test_without_a_folder_to_look_in_nothing_is_moved(
    games: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("README.md", "a.jsonl"):
        (tmp_path / name).write_bytes(jsonl(logged("a")))
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    result = ingested_trajectories(StageContext(RECIPE, {"benchmark_tasks": games}, Path("output"), tmp_path))
    assert result.summary["files"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a.jsonl", "output"]


def test_files_are_known_by_their_content(prepared: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    content, bad = jsonl(logged("a"), logged("b")), jsonl(logged("c"), logged("a"))
    held_out = parquet(Path(), logged("d", task_id="validation-game"))
    for name, dropped in (("1.jsonl", content), ("2.jsonl", content), ("3.jsonl", bad), ("4.parquet", held_out)):
        drop(DATA, name, dropped)
    drop(DATA, "5.txt", b"hello")
    drop(DATA, ".hidden", b"")
    (DATA / "incoming/fake/6.jsonl.part").write_bytes(b"half")
    assert [path.name for path in waiting_files(DATA, "fake")] == [
        "1.jsonl", "2.jsonl", "3.jsonl", "4.parquet", "5.txt",
    ]  # fmt: skip

    before = tree(DATA)
    archive(DATA, "fake")
    assert tree(DATA) == before  # nothing moves before it is published

    first = ingest(prepared).artifact
    assert first.manifest.summary == {"files": 1, "episodes": 2, "steps": 4}
    assert [path.stem for path in first.path.rglob("*.parquet")] == [hashlib.sha256(content).hexdigest()]
    after = tree(DATA)
    reasons = {path: said.decode() for path, said in after.items() if path.endswith(".reason.txt")}
    assert after.keys() - reasons.keys() == {
        ".hidden",
        "6.jsonl.part",
        filed("ingested", "1.jsonl", content),
        filed("ingested", "2.jsonl", content),
        filed("quarantine", "3.jsonl", bad),
        filed("quarantine", "4.parquet", held_out),
        filed("quarantine", "5.txt", b"hello"),
    }
    assert reasons == {
        filed("quarantine", "3.jsonl", bad) + ".reason.txt": (
            "3.jsonl: line 2: episode 'a': an earlier file has brought an episode of this id\n"
        ),
        filed("quarantine", "4.parquet", held_out) + ".reason.txt": (
            "4.parquet: row 1: episode 'd': its game validation-game is held out, in the split validation: trained on, it"
            " would falsify the report\n"
        ),
        filed("quarantine", "5.txt", b"hello") + ".reason.txt": "5.txt: use .jsonl or .parquet\n",
    }

    drop(DATA, "7.jsonl", content)  # the same again, much later
    assert waiting_files(DATA, "fake") == []
    assert ingest(prepared).skipped
    assert filed("ingested", "7.jsonl", content) in tree(DATA)

    drop(DATA, "1.jsonl", jsonl(logged("e")))  # other content under an old name
    grown = ingest(prepared).artifact
    assert ids(DATA) == ["a", "b", "e"]
    kept = {path: md5 for path, md5 in grown.manifest.files.items() if path in first.manifest.files}
    assert kept == first.manifest.files
    assert ingest(prepared, force=True).artifact.hash == grown.hash


@pytest.mark.parametrize("moment", ["before reading", "after reading"])
def test_a_file_that_another_process_moves_meanwhile_is_no_trouble(
    prepared: Recipe, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    content = jsonl(logged("a"))
    drop(DATA, "a.jsonl", content)
    ingest(prepared)
    drop(DATA, "b.jsonl", content)
    read, seen = incoming.read, []

    def moved(path: Path) -> bytes:
        seen.append(path.name)
        if moment == "before reading":
            path.unlink()
        found = read(path)
        path.unlink()
        return found

    monkeypatch.setattr(incoming, "read", moved)
    archive(DATA, "fake")
    assert seen == ["b.jsonl"]
    assert not (DATA / "incoming/fake/b.jsonl").exists()
    assert len(list((DATA / "incoming/fake/ingested").iterdir())) == 1


def test_all_that_is_wrong_with_an_episode_is_named() -> None:
    broken = logged("bad", success="no", reward=2, colour="red", steps=[{"command": 1}])
    forbidden = logged("held", task_id="TEST-GAME/", task_type="juggle", steps=EXAMPLE["steps"][:1] * 51)
    forbidden["steps"] = [*forbidden["steps"], {**EXAMPLE["steps"][0], "precision": "int8"}]
    _, problems = read_episodes(Path("x.jsonl"), jsonl(broken, forbidden), RULES, {"held"})
    found = [problem.split("': ", 1)[1] for problem in problems]
    fields = ["steps.0.command", "steps.0.observation", "steps.0.precision", "success", "reward", "colour"]
    assert [text.partition(":")[0] for text in found[:6]] == fields
    assert [
        text for text in found if "held out" in text or "juggle" in text or "52 steps" in text or "int8" in text
    ] == found[6:10]
    assert "an earlier file has brought" in found[10]
    assert len(found) == 11


def test_reasons_are_written_in_full_and_logged_in_short(prepared: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    drop(DATA, "a.jsonl", jsonl(*(logged(f"{n}", colour="red", success=None) for n in range(50))))
    ingest(prepared)
    (reason,) = (DATA / "incoming/fake/quarantine").glob("*.reason.txt")
    assert len(reason.read_text().splitlines()) == 100
    (line,) = [record.getMessage() for record in caplog.records if "quarantined" in record.getMessage()]
    assert line.endswith(f"(and 99 more, see {reason})")
    assert len(line) < 400


def test_a_thought_that_is_null_is_one_left_out() -> None:
    step = {"command": "look", "thought": None, "observation": "", "precision": "int2"}
    (episode,), problems = read_episodes(
        Path("x.jsonl"), b"\xef\xbb\xbf" + jsonl(logged("a", steps=[step])), RULES, set()
    )
    assert problems == []
    assert episode.steps[0].thought == ""


def test_a_game_that_no_split_holds_is_a_warning(prepared: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    episodes = [
        logged(name, task_id=game) for name, game in (("a", "mars/1"), ("b", "Router_Train-Game/".replace("_T", "_t")))
    ]
    drop(DATA, "a.jsonl", jsonl(*episodes))
    ingest(prepared)
    assert ids(DATA) == ["a", "b"]
    assert "1 of 2 episodes are of games that the recipe's splits do not hold (mars/1)" in caplog.text


# What lies there and is no sound file


def test_nothing_that_is_dropped_stops_the_ingestion(prepared: Recipe) -> None:
    """Each ends quarantined, or named; the sound file beside them is taken in, and then nothing is waited for."""
    incoming = DATA / "incoming" / "fake"
    drop(DATA, "zz.jsonl", jsonl(logged("a")))
    os.mkfifo(incoming / "pipe.jsonl")
    os.mkfifo(incoming / "ingested")
    (incoming / "link.jsonl").symlink_to("/proc/self/environ")
    (incoming / "nowhere.parquet").symlink_to("nowhere")
    (incoming / "large.jsonl").touch()
    os.truncate(incoming / "large.jsonl", 8 << 30)
    (incoming / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b"{}")
    (incoming / ("n" * 249 + ".jsonl")).write_bytes(b"[")
    (incoming / "quarantine").write_bytes(b"x")
    (incoming / "folder").mkdir()
    assert len(waiting_files(DATA, "fake")) == 9
    made = ingest(prepared)
    assert ids(DATA) == ["a"]
    assert waiting_files(DATA, "fake") == []
    assert [path.name for path in (incoming / "ingested").iterdir()] == [filed("", "zz.jsonl", jsonl(logged("a")))[1:]]
    assert len(list((incoming / "quarantine").glob("*.reason.txt"))) == 8
    assert lying_files(DATA, "fake") == [
        f"{incoming}/folder: it is a folder, no file: drop the files in it, and move it away"
    ]
    assert {path.name for path in incoming.iterdir()} == {"ingested", "quarantine", "folder"}
    assert ingest(prepared).skipped
    assert ingest(prepared, force=True).artifact.hash == made.artifact.hash


def test_a_refused_file_that_cannot_be_moved_is_named_with_what_to_do(prepared: Recipe) -> None:
    incoming = DATA / "incoming" / "fake"
    drop(DATA, "a.jsonl", b"x")
    drop(DATA, "b.jsonl", jsonl(logged("b")))
    (incoming / "quarantine").symlink_to("/proc/self")
    made = ingest(prepared)
    assert ids(DATA) == ["b"]
    assert waiting_files(DATA, "fake") == []
    assert ingest(prepared).skipped
    (line,) = lying_files(DATA, "fake")
    assert line.startswith(f"{incoming}/a.jsonl: it cannot be moved into quarantine/ (")
    assert "it was refused: a.jsonl: line 1: not JSON" in line
    assert "run `dmr materialize ingested_trajectories --recipe fake --force`" in line
    (incoming / "quarantine").unlink()
    assert ingest(prepared, force=True).artifact.hash == made.artifact.hash
    assert lying_files(DATA, "fake") == []
    assert filed("quarantine", "a.jsonl", b"x") in tree(DATA)


@pytest.mark.parametrize("content", [b"", b"{}", b"{"])
def test_a_damaged_record_of_the_run_is_as_good_as_none(prepared: Recipe, content: bytes) -> None:
    drop(DATA, "b.jsonl", jsonl(logged("b")))
    ingest(prepared)
    (DATA / "fake" / "ingested_trajectories.run.json").write_bytes(content)
    drop(DATA, "a.jsonl", jsonl(logged("a")))
    assert [path.name for path in waiting_files(DATA, "fake")] == ["a.jsonl"]
    assert lying_files(DATA, "fake") == []


def test_what_is_ingested_and_cannot_be_moved_is_named(prepared: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    drop(DATA, "a.jsonl", jsonl(logged("a")))
    (DATA / "incoming/fake/ingested").symlink_to("/proc/self")
    ingest(prepared)
    assert ids(DATA) == ["a"]
    assert waiting_files(DATA, "fake") == []
    assert "a.jsonl: it is ingested, but cannot be moved away" in caplog.text
    assert [
        "a.jsonl: it is ingested; `dmr run fake` moves it into ingested/" in line for line in lying_files(DATA, "fake")
    ] == [True]


def test_a_file_that_is_being_written_is_left_for_the_next_time(
    prepared: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drop(DATA, "a.jsonl", jsonl(logged("a")))
    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "read", lambda path: path.read_bytes() + b"more")
        ingest(prepared)
    assert ids(DATA) == []
    assert [path.name for path in waiting_files(DATA, "fake")] == ["a.jsonl"]
    assert "a.jsonl is being written: left for the next time" in caplog.text
    ingest(prepared)
    assert ids(DATA) == ["a"]


def test_a_disk_that_is_full_is_said(prepared: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    drop(DATA, "a.jsonl", b"x")
    monkeypatch.setattr(ingestion, "quarantine", full)
    with pytest.raises(UserError, match="no space left"):
        ingest(prepared)
    assert (DATA / "incoming/fake/a.jsonl").read_bytes() == b"x"


def test_misplaced_files(tmp_path: Path) -> None:
    right = ["fake/a.jsonl", "fake/ingested/b", "fake/quarantine/c", "other/.hidden", "d.jsonl.part"]
    wrong = ["a.jsonl", "fake/deeper/b.parquet", "fake/ingested/deeper/c", "nobody/d.jsonl"]
    for path in right + wrong:
        (tmp_path / "incoming" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "incoming" / path).touch()
    assert misplaced_files(tmp_path, ["fake", "other"]) == [tmp_path / "incoming" / path for path in wrong]
    assert misplaced_files(tmp_path / "nowhere", ["fake"]) == []


def test_an_episode_that_is_no_longer_allowed_is_kept_but_not_read(prepared: Recipe) -> None:
    """Its game becomes a test game, and stops being one."""
    drop(DATA, "a.jsonl", jsonl(logged("a", task_id="some-game"), logged("b")))
    before = ingest(prepared).artifact

    def other_games(context: StageContext) -> StageResult:
        result = fake_run(context)
        pl.DataFrame({"task_id": ["some-game"]}).write_parquet(context.output / "test.parquet")
        return result

    materialize_stage(replace(BENCHMARK, run=other_games), prepared, force=True)
    changed = ingest(prepared)
    assert not changed.skipped
    assert changed.artifact.manifest.summary == {"files": 1, "episodes": 1, "steps": 2}
    assert [episode.episode_id for episode in read_ingested(changed.artifact.path)] == ["b"]
    assert ids(DATA) == ["a", "b"]
    left_out = json.loads((changed.artifact.path / "left_out.json").read_text())
    assert left_out.keys() == {"a"}
    assert "held out, in the split test" in left_out["a"]
    drop(DATA, "c.jsonl", jsonl(logged("a")))  # still an id that was brought
    ingest(prepared)
    assert any("c.jsonl.reason" in path for path in tree(DATA))

    materialize_stage(BENCHMARK, prepared, force=True)
    assert ingest(prepared).artifact.hash == before.hash


@pytest.mark.parametrize("harm", ["twice", "schema"])
def test_the_artifact_is_checked_again_on_reading(prepared: Recipe, harm: str) -> None:
    drop(DATA, "a.jsonl", jsonl(logged("a")))
    folder = ingest(prepared).artifact.path
    (file,) = folder.rglob("*.parquet")
    if harm == "twice":
        shutil.copy(file, file.with_name("b.parquet"))
    else:
        pl.read_parquet(file).with_columns(task_id=pl.lit("")).write_parquet(file)
    said = {"twice": "'a' is in another file too", "schema": "'a': task_id: String should have"}[harm]
    with pytest.raises(
        UserError, match=rf"{said}.*; get it back with `dmr restore ingested_trajectories --recipe fake`"
    ):
        read_ingested(folder)
    with pytest.raises(UserError, match="get it back with `dmr restore ingested_trajectories --recipe fake`"):
        ingest(prepared)


# Killed at any moment


class Killed(BaseException):
    pass


class Power:
    """Counts what is done to files; goes off before the n-th, which a write then leaves half done, and stays off."""

    def __init__(self, operations: int) -> None:
        self.left = operations
        self.done = 0

    def spend(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.done += 1


@contextmanager
def power_for(operations: int) -> Iterator[Power]:
    """Everything that changes files on the way: renames, folders, deletions (one by one within a tree), writes."""
    power = Power(operations)

    def whole(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            power.spend()
            return real(*arguments, **options)

        return operation

    def torn(real: Callable[..., Any], target: int) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            power.spend()
            result = real(*arguments, **options)
            if power.left == 0:
                os.truncate(arguments[target], Path(arguments[target]).stat().st_size // 2)
            power.spend()
            return result

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, whole(getattr(os, name)))
        patch.setattr(Path, "write_text", torn(Path.write_text, 0))
        patch.setattr(shutil, "copyfile", torn(shutil.copyfile, 1))
        patch.setattr(pyarrow.parquet, "write_table", torn(pyarrow.parquet.write_table, 1))
        patch.setattr(materialize, "git_state", lambda: None)  # takes longer than all the rest
        yield power


DROPPED = {
    "1-good.jsonl": jsonl(logged("a"), logged("b")),
    "2-bad.jsonl": jsonl(logged("c", success="yes")),
    "3-again.jsonl": jsonl(logged("a"), logged("b")),
    "4-same-id.jsonl": jsonl(logged("d"), logged("b")),
    "5-good.jsonl": jsonl(logged("e")),
    "6-held-out.jsonl": jsonl(logged("f", task_id="test-game")),
    "7-earlier.jsonl": jsonl(logged("earlier")),
}
BAD = ("2-bad.jsonl", "4-same-id.jsonl", "6-held-out.jsonl")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which something was ingested and more was dropped."""
    data = tmp_path_factory.mktemp("template")
    materialize_stage(BENCHMARK, RECIPE, data)
    drop(data, "0.jsonl", jsonl(logged("earlier")))
    ingest(RECIPE, data)
    for name, content in DROPPED.items():
        drop(data, name, content)
    return data


def assert_settled(data: Path) -> None:
    assert ids(data) == ["a", "b", "e", "earlier"]
    folder = verify(data / "fake" / "ingested_trajectories").path
    assert sorted(episode.episode_id for episode in read_ingested(folder)) == ids(data)
    after = tree(data)
    earlier = filed("ingested", "0.jsonl", DROPPED["7-earlier.jsonl"])
    places = {
        filed("quarantine" if name in BAD else "ingested", name, content): content for name, content in DROPPED.items()
    }
    for name in BAD:
        reason = after.pop(filed("quarantine", name, DROPPED[name]) + ".reason.txt").decode()
        assert reason.startswith(f"{name}: line ")
    assert after == {earlier: DROPPED["7-earlier.jsonl"], **places}


def test_power_may_go_off_at_every_operation_on_files(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "whole")
    with power_for(10_000) as power:
        ingest(RECIPE, tmp_path / "whole")
    assert_settled(tmp_path / "whole")
    assert power.done > 50
    for moment in range(power.done):
        data = tmp_path / str(moment)
        shutil.copytree(template, data)
        with power_for(moment), pytest.raises(Killed):
            ingest(RECIPE, data)
        assert set(DROPPED.values()) <= set(tree(data).values())
        with power_for(10_000):
            ingest(RECIPE, data)
        assert_settled(data)
        shutil.rmtree(data)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_kills_while_more_arrives(template: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the order: each file ends in one place unchanged, and what is ingested is in the artifact once."""
    root = tmp_path / "data"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    contents = dict(DROPPED)
    for life in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            made = jsonl(
                *(logged(id_) for id_ in data.draw(st.sets(st.sampled_from("abcxyz"), min_size=1, max_size=2)))
            )
            contents[f"{life}-later.jsonl"] = made
            drop(root, f"{life}-later.jsonl", made)
        with power_for(data.draw(st.integers(0, 120))):
            try:
                ingest(RECIPE, root)
            except Killed:
                continue
    with power_for(10_000):
        ingest(RECIPE, root)
    after = tree(root)
    taken = {"earlier"}
    for name, content in contents.items():
        good, bad = filed("ingested", name, content), filed("quarantine", name, content)
        assert (good in after) != (bad in after)
        assert (bad in after) == (f"{bad}.reason.txt" in after)
        assert after[good if good in after else bad] == content
        own = {json.loads(line)["episode_id"] for line in content.splitlines()}
        taken |= own if good in after else set()
        assert good in after or name in ("2-bad.jsonl", "6-held-out.jsonl") or own & set(ids(root))
    assert ids(root) == sorted(taken)
    assert not any("/" not in path for path in after)
    verify(root / "fake" / "ingested_trajectories")


CHILD = """
import os, signal, sys
from pathlib import Path
from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.recipe.reading import load_recipe

moment, renames, rename = int(sys.argv[1]), 0, Path.rename
def counted(self, target):
    global renames
    renames += 1
    if renames == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = counted
stage = pipeline.find_stage("ingested_trajectories", pipeline.STAGES)
materialize_stage(stage, load_recipe("fake", Path(sys.argv[2])), Path(sys.argv[3]))
"""


def child(recipes: Path, data: Path, moment: int = 0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(moment), str(recipes), str(data)], env=environment)


@pytest.mark.parametrize(
    "moment", [2, 4, 5, 7], ids=["quarantine", "before publishing", "half published", "filing away"]
)
def test_a_real_kill(project: Recipe, template: Path, tmp_path: Path, moment: int) -> None:
    data = tmp_path / "killed"
    shutil.copytree(template, data)
    assert child(tmp_path / "recipes", data, moment).wait() == -signal.SIGKILL
    assert child(tmp_path / "recipes", data).wait() == 0
    assert_settled(data)


def test_two_processes_at_once_while_a_third_files_away(project: Recipe, template: Path, tmp_path: Path) -> None:
    data = tmp_path / "shared"
    shutil.copytree(template, data)
    processes = [child(tmp_path / "recipes", data) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        archive(data, "fake")
        waiting_files(data, "fake")
    assert [process.wait() for process in processes] == [0, 0]
    assert_settled(data)


# Read as if the agent had played it


def log_of(trajectory: Trajectory) -> Episode:
    """A played episode in the documented schema."""
    task = trajectory.run.task
    return {
        "episode_id": f"{task.task_id}/{trajectory.run.member}",
        "task_id": task.task_id,
        "task_type": task.task_type,
        "task": task.instruction,
        "observation": trajectory.opening,
        "steps": [
            {
                "command": s.command,
                "observation": s.observation,
                "precision": s.precision,
                "probability": s.exceedance[0],
            }
            for s in trajectory.steps
        ],
        "success": trajectory.success,
        "reward": trajectory.reward,
    }


@pytest.fixture(scope="module")
def played() -> list[Trajectory]:
    return play(RUNS[:3], streams_of(ROUTE, 3), PROMPTER, RandomMixing(HALF, seed=3), 4, action="score")


def test_a_played_episode_that_was_logged_gives_the_same_tables(prepared: Recipe, played: list[Trajectory]) -> None:
    drop(DATA, "a.jsonl", jsonl(*map(log_of, played)))
    folder = ingest(prepared).artifact.path
    episodes, steps = ingested_tables(read_ingested(folder), ROUTE, ROUTE, PROMPTER, CAPACITY)
    wanted_episodes, wanted_steps = to_frames(played, INGESTED)
    assert set(wanted_steps["precision"]) == set(ROUTE)
    assert set(wanted_steps["exceedance"].explode()) == {0.5}
    known = wanted_steps.with_columns(tokens_read=pl.lit(0, pl.Int64))
    assert episodes.equals(wanted_episodes)
    assert steps.equals(known)

    given_folder = folder.parent / "trajectories"
    given_folder.mkdir()
    own_episodes, own_steps = to_frames(played, "own")
    own_episodes.write_parquet(given_folder / "episodes.parquet")
    own_steps.write_parquet(given_folder / "steps.parquet")
    inputs = {"trajectories": given_folder, "ingested_trajectories": folder}
    union = read_all_trajectories(inputs, ROUTE, ROUTE, PROMPTER, CAPACITY)
    assert union.episodes.equals(pl.concat([own_episodes, wanted_episodes]))
    assert union.steps.equals(pl.concat([own_steps, known]))
    assert union.ingested_steps == len(known)


def test_a_probability_that_was_not_logged_is_what_acted(prepared: Recipe) -> None:
    """And the artifact of a file that holds none has no column of them."""
    steps = [{"command": "look", "observation": "", "precision": rung} for rung in ("float", "int2")]
    drop(DATA, "a.jsonl", jsonl(logged("a", steps=steps)))
    drop(DATA, "b.jsonl", jsonl(logged("b", steps=[steps[0] | {"probability": 0.125}, steps[1]])))
    folder = ingest(prepared).artifact.path
    stored = {path.stem: pyarrow.parquet.read_schema(path) for path in folder.rglob("*.parquet")}
    columns = {stem: [field.name for field in schema.field("steps").type.value_type] for stem, schema in stored.items()}
    without = ["command", "thought", "observation", "precision"]
    assert sorted(columns.values()) == [without, [*without, "probability"]]
    _, table = ingested_tables(read_ingested(folder), ROUTE, ROUTE, PROMPTER, CAPACITY)
    found = {row["episode_id"]: [] for row in table.iter_rows(named=True)}
    for row in table.iter_rows(named=True):
        found[row["episode_id"]].append(row["exceedance"])
    assert found == {"ingested/a": [[1.0], [0.0]], "ingested/b": [[0.125], [0.0]]}


LADDER = ("float", "int8", "int4", "int2-mse", "int2")


@pytest.mark.parametrize(
    ("route", "counts_as"),
    [
        (("float", "int2"), ("float", "int2", "int2", "int2", "int2")),
        (("int8", "int2-mse"), ("int8", "int8", "int2-mse", "int2-mse", "int2-mse")),
        (("float", "int4", "int2"), ("float", "int4", "int4", "int2", "int2")),
        (LADDER, LADDER),
    ],
)
def test_a_step_counts_as_the_dearest_routed_rung_that_is_no_dearer(
    route: tuple[str, ...], counts_as: tuple[str, ...]
) -> None:
    """Below the cheapest one it counts as that one. A probability that was logged is of the dearer of two."""
    assert tuple(routed(rung, LADDER, route) for rung in LADDER) == counts_as
    steps = [{"command": "look", "observation": "", "precision": rung, "probability": 0.25} for rung in LADDER]
    episode = LoggedEpisode.model_validate(logged("a", steps=steps))
    _, table = ingested_tables([episode], LADDER, route, PROMPTER, CAPACITY)
    assert tuple(table["precision"]) == counts_as
    certainly = [[float(route.index(rung) <= k) for k in range(len(route) - 1)] for rung in counts_as]
    assert table["exceedance"].to_list() == ([[0.25]] * len(LADDER) if len(route) == 2 else certainly)


def test_thoughts_are_tokenized_as_the_agent_writes_them() -> None:
    """Against the transcript of the expert's example, which the agent is trained on."""
    prompter = Prompter.of(PROMPTER.tokenizer, Prompt(thought_end="<do>"))
    game, _ = generate_game(3)
    example = expert_example(game, prompter, 12, mistake_rate=0.0, rng=random.Random(0))
    episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
    opening = observation = episode.reset()
    expert.observe(None, observation)
    steps, over = [], False
    while not over and len(steps) < 12:
        command, thought = expert.act(), expert.think()
        observation, _, over = episode.step(command)
        expert.observe(command, observation)
        steps.append({"command": command, "thought": thought, "observation": observation, "precision": "float"})
    whole = logged("a", task=game.instruction, observation=opening, steps=steps)
    _, table = ingested_tables([LoggedEpisode.model_validate(whole)], ROUTE, ROUTE, prompter, CAPACITY)
    assert any(step["thought"] for step in steps)
    assert [token for row in table.iter_rows(named=True) for token in row["segment"] + row["action"]] == example.tokens


def test_an_episode_that_is_too_long_for_the_agent_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def with_words(number: int) -> LoggedEpisode:
        step = {"command": "look", "observation": "apple " * number, "precision": "int2"}
        return LoggedEpisode.model_validate(logged(f"{number}", steps=[step, step]))

    empty = ingested_tables([with_words(0)], ROUTE, ROUTE, PROMPTER, CAPACITY)[1]
    taken = sum(empty["segment"].list.len()) + sum(empty["action"].list.len())
    fits = CAPACITY - PROMPTER.prompt.max_action_tokens - taken
    episodes, steps = ingested_tables([with_words(fits), with_words(fits + 1)], ROUTE, ROUTE, PROMPTER, CAPACITY)
    assert episodes["episode_id"].to_list() == [f"{INGESTED}/{fits}"]
    assert steps["episode_id"].unique().to_list() == [f"{INGESTED}/{fits}"]
    assert "1 ingested episodes are left out: too long" in caplog.text
