import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts import materialize_stage
from dmr_pipeline.cli.trajectories import trajectories
from dmr_pipeline.ingestion import EXAMPLE
from dmr_pipeline.recipe import Recipe
from tests.fake_project import RECIPE, fake_run

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
        "high-precision ratio (float)": "80.0%",
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


@pytest.mark.parametrize("module", ["dmr_pipeline.cli.trajectories", "dmr_pipeline.ingestion"])
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'polars', 'pyarrow'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"
