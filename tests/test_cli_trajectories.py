import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.cli import app, stages
from dmr_pipeline.cli.trajectories import trajectories
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.recipe import Recipe
from tests.helpers.fake_project import RECIPE, fake_run

REAL = pipeline.find_stage("ingested_trajectories", pipeline.STAGES)
BENCHMARK = replace(pipeline.find_stage("benchmark_tasks", pipeline.STAGES), run=fake_run)


def dmr(*arguments: str) -> Result:
    return CliRunner().invoke(trajectories, list(arguments))


def write(*episodes: dict[str, object], name: str = "new.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return name


def test_the_schema_is_json_and_the_example_follows_it() -> None:
    done = dmr("schema")
    assert done.exit_code == 0
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    example = json.loads(done.stderr.splitlines()[-1])
    jsonschema.validate(example, schema)
    with pytest.raises(jsonschema.ValidationError, match="'colour' was unexpected"):
        jsonschema.validate({**example, "colour": "red"}, schema)
    models = [schema, *schema["$defs"].values()]
    assert all("description" in field for model in models for field in model["properties"].values())


def test_a_good_file_is_summed_up(project: Recipe) -> None:
    won = EXAMPLE | {"episode_id": "b", "success": True, "steps": EXAMPLE["steps"][:1] * 3}
    file = write(EXAMPLE, won)
    without_games = dmr("validate", file, "--recipe", RECIPE)
    assert without_games.exit_code == 0, without_games.output
    found = dict(re.findall(r"^\s*(\S.*?)\s{2,}(\S+)\s*$", without_games.output, re.MULTILINE))
    assert found == {
        "episodes": "2",
        "steps": "5",
        "success rate": "50.0%",
        "steps at float": "80.0%",
        "steps at int2": "20.0%",
    }
    assert "Not checked: whether its games are held out" in without_games.output

    materialize_stage(BENCHMARK, project)
    with_games = dmr("validate", file, "--recipe", RECIPE)
    assert with_games.exit_code == 0
    assert "Not checked" not in with_games.output
    assert not Path("data/incoming").exists()


def test_a_bad_file_gives_every_reason_and_exit_code_2(project: Recipe) -> None:
    materialize_stage(BENCHMARK, project)
    incoming = Path("data/incoming/fake")
    incoming.mkdir(parents=True)
    write(EXAMPLE, name=str(incoming / "old.jsonl"))
    materialize_stage(REAL, project)
    held_out = EXAMPLE | {"episode_id": "h", "task_id": "validation-game"}
    done = dmr("validate", write(EXAMPLE, held_out, {"episode_id": "x"}), "--recipe", RECIPE)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert [line.partition(": episode ")[0] for line in lines] == [
        f"error: new.jsonl: line {n}" for n in (1, 2, 3, 3, 3, 3, 3, 3)
    ]
    assert "an earlier file has brought" in lines[0]
    assert "held out, in the split validation" in lines[1]
    missing = ("task_id", "task_type", "task", "observation", "steps", "success")
    assert [line.removeprefix("error: new.jsonl: line 3: episode 'x': ") for line in lines[2:]] == [
        f"{field}: Field required" for field in missing
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing.jsonl", "--recipe", RECIPE), "nothing.jsonl is no file"),
        (("recipes/fake.yaml", "--recipe", RECIPE), "fake.yaml: use .jsonl or .parquet"),
        (("recipes/fake.yaml", "--recipe", "mars"), "unknown recipe 'mars'"),
    ],
)
def test_trouble_is_one_line(project: Recipe, arguments: tuple[str, ...], said: str) -> None:
    done = dmr("validate", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["dmr_pipeline.cli.trajectories", "dmr_pipeline.ingestion.inbox"])
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'polars', 'pyarrow'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


def test_what_comes_from_outside_is_shown_as_it_is(project: Recipe) -> None:
    """No markup of a file's name is followed, and no control character reaches the terminal."""
    held = EXAMPLE | {"\x1b[31m[/]": 1}
    bad = dmr("validate", write(held, name="[red]\x1b[2J[.jsonl"), "--recipe", RECIPE)
    assert bad.exit_code == 2
    assert r"error: [red]\x1b[2J[.jsonl: line 1: " in bad.stderr
    assert r"\x1b[31m[/]: Extra inputs are not permitted" in bad.stderr
    good = dmr("validate", write(EXAMPLE, name="[bold]\x1b[2J[.jsonl"), "--recipe", RECIPE)
    assert good.exit_code == 0
    assert r"[bold]\x1b[2J[.jsonl for fake" in good.stdout

    incoming = Path("data/incoming/fake")
    (incoming / "[red]\x1b[2J").mkdir(parents=True)
    write(EXAMPLE, name=str(incoming / "[link=x]\n.jsonl"))
    write(EXAMPLE, name="data/incoming/[/].jsonl".replace("/]", "]"))
    materialize_stage(BENCHMARK, project)
    for _ in range(2):
        shown = CliRunner().invoke(app, ["status", RECIPE])
        assert shown.exit_code == 0, shown.output
        assert shown.output.replace("\n", "").isprintable()
        assert r"[red]\x1b[2J: it is a folder, no file" in shown.output
        assert "data/incoming/[].jsonl is in no recipe's folder" in shown.output
        materialize_stage(REAL, project)
        (incoming / "[link=x]\n.jsonl").write_bytes(b"x")


@pytest.mark.parametrize("kind", ["pipe", "folder", "large"])
def test_what_is_no_file_is_not_read(project: Recipe, kind: str) -> None:
    path = Path("new.jsonl")
    {"pipe": os.mkfifo, "folder": Path.mkdir, "large": Path.touch}[kind](path)
    if kind == "large":
        os.truncate(path, 8 << 30)
    done = dmr("validate", str(path), "--recipe", RECIPE)
    assert done.exit_code == 2
    assert ("split it" if kind == "large" else "new.jsonl is no file") in done.stderr


def test_a_run_with_nothing_to_do_files_away_what_was_dropped_again(
    project: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    materialize_stage(BENCHMARK, project)
    incoming = Path("data/incoming/fake")
    incoming.mkdir(parents=True)
    write(EXAMPLE, name=str(incoming / "a.jsonl"))
    materialize_stage(REAL, project)
    write(EXAMPLE, name=str(incoming / "again.jsonl"))
    shown = CliRunner().invoke(app, ["status", RECIPE])
    assert "again.jsonl: it is ingested; `dmr run fake` moves it into ingested/" in shown.output
    monkeypatch.setattr(stages, "up_to_date", lambda *_: True)
    for shown_after in ("_show_report", "_show_verdict"):
        monkeypatch.setattr(stages, shown_after, lambda _: None)
    done = CliRunner().invoke(app, ["run", RECIPE])
    assert done.exit_code == 0, done.output
    assert sorted(path.name[13:] for path in (incoming / "ingested").iterdir()) == ["a.jsonl", "again.jsonl"]
    assert "again.jsonl" not in CliRunner().invoke(app, ["status", RECIPE]).output
