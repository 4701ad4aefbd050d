"""A project whose stages take no time: the real table's names, edges and sections, with functions of our own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.manifest import hash_files
from dmr_pipeline.artifacts.stage import Stage, StageContext, StageResult
from dmr_pipeline.evaluation.results import POLICIES
from dmr_pipeline.precision.ladder import RungPlayed
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.reading import RECIPE_FOLDER, load_recipe, recipe_names
from dmr_pipeline.versioning import dvc_stages

REPOSITORY = Path(__file__).parents[2]
RECIPE = "fake"
RECIPE_YAML = """\
benchmark: {splits: {agent_train: 1, router_train: 1, validation: 1, test: 1}}
agent: {pretrained: {model: models/tiny}}
precisions:
  ladder: [{name: float, weights: float}, {name: int2, weights: int2}]
  route: [float, int2]
trajectories: {behaviour: [{name: all_high, shares: {float: 1.0}}]}
sensitivity: {quantile: 0.5}
kl_router:
  model: {pretrained: {model: models/tiny}}
  epochs: 1
  batch_episodes: 1
  learning_rate: 0.001
  validation_games: 1
  target_ratio: 0.3
grpo_router:
  updates: 1
  games_per_update: 1
  group_size: 2
  learning_rate: 0.001
  cost_weight: 0.1
  validate_every: 1
  validation_games: 1
evaluation: {}
release: {}
"""


def fake_run(context: StageContext) -> StageResult:
    """Writes what the checks and the command line read; everything follows from recipe and inputs alone."""
    name = context.output.name.removeprefix(".").removesuffix(".new")
    content = {asset: hash_files(folder) for asset, folder in context.inputs.items()}
    (context.output / "content.json").write_text(json.dumps(content, sort_keys=True))
    steps = pl.DataFrame(
        {
            "episode_id": ["a", "a", "b"],
            "task_id": ["g", "g", "h"],
            "task_type": ["pick_and_place_simple"] * 3,
            "turn": [0, 1, 0],
            "precision": ["int2"] * 3,
            "kl_high_low": [0.0, 0.5, 0.1],
            "kl_low_high": [0.0, 0.4, 0.1],
            "js": [0.0, 0.1, 0.1],
            "sensitive": [False, True, False],
        }
    )
    if name == "benchmark_tasks":
        for split in Splits.model_fields:
            pl.DataFrame({"task_id": [f"{split}-game"]}).write_parquet(context.output / f"{split}.parquet")
    if name == "ingested_trajectories":
        (context.output / "left_out.json").write_text("{}")
    if name in ("trajectories", "sensitivity_dataset"):
        steps.write_parquet(context.output / "steps.parquet")
    if name == "trajectories":
        steps.select("episode_id", "task_type").unique(maintain_order=True).write_parquet(
            context.output / "episodes.parquet"
        )
    if name == "evaluation_report":
        metrics = {
            "recipe": context.recipe.name,
            "route": ["float", "int2"],
            "high": "always_high",
            "low": "always_low",
            "headline": "kl_router",
            "policies": {policy: fake_policy(policy) for policy in sorted(POLICIES)},
            "paired": [],
        }
        (context.output / "metrics.json").write_text(json.dumps(metrics))
        (context.output / "table.md").write_text("| policy |\n|---|\n| always_high |\n")
        (context.output / "plots").mkdir()
        Image.new("RGB", (2, 1)).save(context.output / "plots" / "cost.png")
    return StageResult(
        summary={"inputs": len(context.inputs), **SUMMARIES.get(name, {})}, measured={"seconds_a_step": 0.1}
    )


def fake_rung(name: str, kl_to_float: float, reloads_equal: bool = True) -> dict[str, object]:
    return RungPlayed(
        name=name,
        bytes=int(1000 / (1 + kl_to_float)),
        pass_bytes=1,
        bits_per_weight=2.0,
        quantized_share=0.5,
        kl_to_float=kl_to_float,
        greedy_disagreement=0.1,
        reloads_equal=reloads_equal,
        validation_success=0.5,
        success_low=0.4,
        success_high=0.6,
        validation_steps=3.0,
        parse_failures=0.0,
        cost=1.0,
        cost_cache=0.1,
        lost=0.0,
        lost_low=-0.1,
        lost_high=0.1,
        dominated_by="",
    ).model_dump(mode="json")


SUMMARIES: dict[str, dict[str, object]] = {
    "quantized_checkpoints": {
        "verdict": {
            "pays": True,
            "route": ["float", "int2"],
            "deploy": "float",
            "drafter": "",
            "text": "Routing can pay.",
        },
        "checked": [],
        "rungs": [fake_rung("float", kl_to_float=0.0), fake_rung("int2", kl_to_float=0.3)],
        "route": ["float", "int2"],
        "unit_bytes": 1.0,
        "games": 4,
        "confidence": 0.95,
    },
    "ingested_trajectories": {"files": 0, "episodes": 0, "steps": 0},
    "sensitivity_dataset": {"ingested_steps": 0},
    "kl_router": {"validation_spend": 0.3},
    "grpo_router": {"validation_ratio": 0.3},
}
"""What the real stages say of themselves and the checks look at."""


def fake_policy(name: str) -> dict[str, object]:
    ratio = {"always_high": 1.0, "always_low": 0.0}.get(name, 0.3)
    failures = {"parse_failures": 0.0, "failures": {"inadmissible": 0.1}}
    return {"success": 0.5, "ci95": [0.4, 0.6], "high_ratio": ratio, "spend": ratio, "cost": 0.5, "n": 1, **failures}


def fake_stages() -> tuple[Stage, ...]:
    """The table with functions of our own; nothing is waited for, and no report is rendered."""
    return tuple(replace(stage, run=fake_run, pending_inputs=None, on_published=None) for stage in pipeline.STAGES)


def make_project(folder: Path, stages: tuple[Stage, ...]) -> Recipe:
    """A Git and DVC project in `folder` with one recipe and a rendered dvc.yaml, to be the working directory."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / f"{RECIPE}.yaml").write_text(RECIPE_YAML)
    for file in (".dvc/config", ".dvcignore", "dagster_home/dagster.yaml"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / file, folder / file)
    (folder / ".dvc" / ".gitignore").write_text("/tmp\n/cache\n")
    (folder / "data").mkdir()
    (folder / dvc_stages.IGNORE_FILE).write_text(dvc_stages.render_ignored(stages))
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / "dvc.yaml").write_text(dvc_stages.render(stages, [RECIPE]))
    return load_recipe(RECIPE, folder / "recipes")


def enter_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DAGSTER_HOME", str(folder / "dagster_home"))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(pipeline, "STAGES", fake_stages())


def commit_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project in the working directory becomes one that commits its agent to Git."""
    stages = [
        replace(stage, committed_recipes=(RECIPE,)) if stage.name == "agent" else stage for stage in fake_stages()
    ]
    monkeypatch.setattr(pipeline, "STAGES", tuple(stages))
    dvc_stages.DVC_FILE.write_text(dvc_stages.render(stages, recipe_names()))
    dvc_stages.IGNORE_FILE.write_text(dvc_stages.render_ignored(stages))


def write_fake_dmr(folder: Path) -> Path:
    """A folder with the real command line on the fake stages, for DVC to find."""
    command = folder / "bin" / "dmr"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from dmr_pipeline import pipeline\nfrom dmr_pipeline.__main__ import main\n"
        "from tests.helpers.fake_project import fake_stages\n"
        "pipeline.STAGES = fake_stages()\nmain()\n"
    )
    command.chmod(0o755)
    return command.parent


def make_recipe(name: str) -> None:
    """Another recipe like the first, in the working directory."""
    (RECIPE_FOLDER / f"{name}.yaml").write_text(RECIPE_YAML)
    dvc_stages.DVC_FILE.write_text(dvc_stages.render(pipeline.STAGES, recipe_names()))


def dvc(*arguments: str, scripts: Path | None = None) -> str:
    """Run the real DVC in the working directory; its stages find `dmr` in `scripts`, or in this environment."""
    environment = Path(sys.executable).parent
    path = os.pathsep.join([str(scripts or environment), str(environment), os.environ["PATH"]])
    done = subprocess.run(
        ["dvc", *arguments], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
