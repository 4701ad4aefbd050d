"""The tutorial, command by command as it is written, and the programs of the how-to pages; on a recipe that is small enough."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dmr_pipeline import pipeline
from tests.helpers.fake_project import REPOSITORY, make_project
from tests.helpers.micro_recipe import RECIPE_YAML
from tests.helpers.pages import blocks

DOCS = REPOSITORY / "docs"
INSTALL = ("make setup", "source .venv/bin/activate")
"""What this test has done before."""
SMALL = {"step_limit": 4, "splits": {"agent_train": 6, "router_train": 4, "validation": 4, "test": 4}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, as a reader has one; its recipe goes by the demo's name."""
    folder = tmp_path_factory.mktemp("tutorial")
    prompt = '  prompt: {thought_end: "<do>", max_action_tokens: 14}\n  training:\n'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.fake_project.RECIPE_YAML", RECIPE_YAML.replace("  training:\n", prompt))
        patch.setattr("tests.helpers.fake_project.RECIPE", "alfworld-tiny")
        make_project(folder, pipeline.STAGES)
    return folder


def run(project: Path, script: str) -> str:
    """By the shell, which ends with the first command that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        "COLUMNS": "200",
        "PATH": path,
        "PYTHONPATH": str(REPOSITORY),
        "DAGSTER_HOME": str(project / "dagster_home"),
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=project, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def follow(project: Path, page: str) -> list[str]:
    """What each block of commands says."""
    said = []
    for block in blocks(DOCS / page, "sh"):
        lines = [line for line in block.text.splitlines() if not line.startswith(INSTALL)]
        said.append(run(project, "\n".join(lines)))
    assert said
    return said


def write_own_recipe(project: Path) -> None:
    """As the page has it, with fewer and shorter games."""
    (block,) = [block for block in blocks(DOCS / "tutorial/own-llm.md", "yaml") if block.title]
    content = yaml.safe_load(block.text.replace("24", "4"))
    content["benchmark"] |= SMALL
    (project / block.title).write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.slow
def test_the_tutorial_works_word_by_word(project: Path) -> None:
    made, shown, again = follow(project, "tutorial/first-run.md")
    assert "report: " in made
    assert "always_high" in shown
    assert "nothing to do" in again
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", (DOCS / "tutorial/first-run.md").read_text("utf-8"), re.M)
    assert [name for name, _ in rows] == [stage.name for stage in pipeline.STAGES]
    for name, files in rows:
        folder = project / "data" / "alfworld-tiny" / name
        assert folder.is_dir()
        for file in set(re.findall(r"`([\w./]+)`", files)) - {"episodes/"}:
            assert (folder / file).exists(), (name, file)

    changed, _, history, back = follow(project, "tutorial/change-a-recipe.md")
    stale = set(re.findall(r"^ *(\w+) .* stale", changed, re.M))
    assert {"sensitivity_dataset", "kl_router", "grpo_router", "evaluation_report"} <= stale
    assert not {"benchmark_tasks", "agent", "quantized_checkpoints", "trajectories"} & stale
    assert "2" in history
    assert "stale" in back

    write_own_recipe(project)
    ladder, report = follow(project, "tutorial/own-llm.md")
    assert "Routing" in ladder
    assert "always_int4" in report

    (episode,) = blocks(DOCS / "how-to/trajectories-and-releases.md", "json")
    (project / episode.title).write_text(episode.text, encoding="utf-8")
    valid, ingested = follow(project, "how-to/trajectories-and-releases.md")
    assert "episodes" in valid
    assert "to be ingested: today.jsonl" in ingested

    for page, lines in (("how-to/own-router.md", 3), ("how-to/deploy.md", 2)):
        (program,) = blocks(DOCS / page, "python")
        (project / program.title).write_text(program.text, encoding="utf-8")
        said = run(project, f"python {program.title}").splitlines()
        assert len([line for line in said if re.match(r"always|first steps|True|False", line)]) == lines, said
