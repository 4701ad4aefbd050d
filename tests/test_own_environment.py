"""The example of an own benchmark: its games by their rules, and the whole pipeline on it."""

import importlib.util
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dmr_pipeline import benchmarks, pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.benchmark import SPLITS, benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import load_recipe
from tests.helpers.fake_project import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "own_environment.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The script as a module; its benchmark is known as long as this module's tests run."""
    spec = importlib.util.spec_from_file_location("own_environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "_KNOWN", dict(benchmarks._KNOWN))
        patch.setitem(sys.modules, "own_environment", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def recipes(example: ModuleType, tmp_path: Path) -> Path:
    example.make_project(tmp_path)
    return tmp_path / "recipes"


def test_the_recipe_reads_its_own_section(example: ModuleType, recipes: Path) -> None:
    settings = load_recipe("corridor", recipes).benchmark
    assert type(settings) is example.Corridor
    assert settings.model_dump() == {
        "environment": "corridor",
        "rooms": 6,
        "step_limit": 16,
        "seed": 0,
        "splits": {"agent_train": 200, "router_train": 24, "validation": 24, "test": 40},
    }
    file = recipes / "corridor.yaml"
    for line, problem in (
        ("rooms: 2", "benchmark.rooms: Input should be greater"),
        ("walls: 2", "benchmark.walls: Extra"),
    ):
        file.write_text(example.RECIPE.replace("rooms: 6", line))
        with pytest.raises(UserError, match=problem):
            load_recipe("corridor", recipes)


def test_its_section_may_hold_lists(example: ModuleType) -> None:
    class Named(example.Corridor):
        names: list[str]
        pairs: tuple[str, ...]

    section = Named.model_validate({**yaml.safe_load(example.RECIPE)["benchmark"], "names": ["a", "b"], "pairs": ["c"]})
    assert (section.names, section.pairs) == (["a", "b"], ("c",))


def test_searches_are_forced_by_what_they_begin_with(
    example: ModuleType, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipes / "corridor.yaml"
    file.write_text(example.RECIPE.replace("kl_router:", "kl_router:\n  force_search: true"))
    of_its_own = benchmarks.find("corridor")
    for kinds in ({}, {"search": "look for "}):
        monkeypatch.setattr(of_its_own, "step_kinds", kinds)
        with pytest.raises(UserError, match=r"force_search: no command of corridor is a search \('search\[' \.\.\.\)"):
            load_recipe("corridor", recipes)
    monkeypatch.setattr(of_its_own, "step_kinds", {"search": "search["})
    assert load_recipe("corridor", recipes).kl_router.force_search


def test_tasks_are_read_as_they_were_made_and_no_two_splits_share_one(recipes: Path, tmp_path: Path) -> None:
    settings = load_recipe("corridor", recipes).benchmark
    benchmark = benchmark_of(settings)
    summary = benchmark.make_tasks(tmp_path)
    made = {split: benchmark.read_tasks(tmp_path, split) for split in SPLITS}
    for split, tasks in made.items():
        assert len(tasks) == getattr(settings.splits, split) == summary[split]["games"]
        assert {task.task_type for task in tasks} == set(benchmark.task_types)
        assert list(benchmark.read_tasks(tmp_path, split, 3)) == list(tasks[:3])
    ids = [task.task_id for tasks in made.values() for task in tasks]
    assert len(set(ids)) == len(ids)


def test_tasks_that_are_alike_but_for_their_ids_are_told(
    recipes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark = benchmark_of(load_recipe("corridor", recipes).benchmark)
    with caplog.at_level(logging.WARNING):
        benchmark.make_tasks(tmp_path)
    before, expected = set[tuple[int, ...]](), []
    for split in SPLITS:
        places = [task.places for task in benchmark.read_tasks(tmp_path, split)]
        expected.append((sum(its in before for its in places), len(places)))
        before |= set(places)
    told = [tuple(map(int, re.findall(r"\d+", record.message))) for record in caplog.records]
    assert told == [counts for counts in expected if counts[0]]
    assert expected[0][0] == 0 < expected[-1][0]


def test_the_expert_takes_the_shortest_way(example: ModuleType) -> None:
    rooms = range(5)
    for start, key, door in ((start, key, door) for start in rooms for key in rooms for door in rooms):
        task = example.Walk(task_id="a", task_type="corridor", instruction="open the door", places=(start, key, door))
        episode, expert = task.episode(), task.expert()
        observation, command, steps, over, reward = episode.reset(), None, 0, False, 0.0
        assert episode.first_observation() == f"{observation} Your task is to open the door."
        while not over:
            expert.observe(command, observation)
            command = expert.act()
            assert command in episode.admissible_commands()
            assert reward == 0.0
            observation, reward, over = episode.step(command)
            steps += 1
        assert reward == 1.0
        assert steps == abs(start - key) + 1 + abs(key - door) + 1


def test_what_cannot_be_done_changes_nothing_and_states_are_restored(example: ModuleType) -> None:
    task = example.Walk(task_id="a", task_type="corridor", instruction="open the door", places=(1, 3, 1))
    episode = task.episode()
    seen, before = episode.reset(), episode.state
    for command in ("open door", "take key", "sing", ""):
        assert episode.step(command) == (seen, 0.0, False)
        assert episode.state == before
    episode.step("go east")
    assert episode.observation() != seen
    episode.state = before
    assert episode.observation() == seen


def test_demonstrations_are_of_what_the_expert_would_do(example: ModuleType) -> None:
    task = example.Walk(task_id="a", task_type="corridor", instruction="open the door", places=(0, 2, 4))
    rng = random.Random(0)
    shown = {(d.observation, d.command) for d in (task.demonstration(rng) for _ in range(100))}
    assert shown == {
        ("The key is east. The door is east.", "go east"),
        ("The key is here. The door is east.", "take key"),
        ("The key is west. The door is here.", "go west"),
        ("The key is taken. The door is east.", "go east"),
        ("The key is taken. The door is here.", "open door"),
    }


def test_an_installed_package_brings_it_to_every_command(example: ModuleType, tmp_path: Path) -> None:
    example.make_project(tmp_path / "project")
    installed = tmp_path / "site" / "corridor-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: corridor\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[dmr_pipeline.benchmarks]\ncorridor = my_corridor:CorridorBenchmark\n")
    shutil.copy(SCRIPT, tmp_path / "site" / "my_corridor.py")
    for path, code, said in (
        ([tmp_path / "site"], 0, "corridor"),
        (
            [],
            2,
            "'webshop-official', or what an installed package brings (it is 'corridor')",
        ),
    ):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY])), "COLUMNS": "500"}
        command = [sys.executable, "-m", "dmr_pipeline", "recipe", "check", "corridor"]
        done = subprocess.run(
            command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_it_and_has_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in pipeline.STAGES:
        assert verify(artifact_folder(stage.name, "corridor", tmp_path / "data")).manifest.stage == stage.name
    table = {line.split()[0] for line in first.stdout.splitlines() if "%" in line and "[" in line}
    assert {"always_high", "always_low", "always_int4", "kl_router", "grpo_router", "disagreement"} <= table
    assert "every stage is up to date, nothing to do" in again.stdout
