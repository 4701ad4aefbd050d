"""LLMs that exist go through every stage, on a few games: fine-tuned here, by their own chat templates, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dmr_pipeline import pipeline
from dmr_pipeline.agent.checkpoint import save_causal_lm
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.model_cache import fetched
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.reading import RECIPE_FOLDER, load_recipe
from dmr_pipeline.training.train import new_model
from tests.helpers.chat_templates import CHATML, templated
from tests.helpers.fake_project import REPOSITORY, make_project
from tests.helpers.installed_dmr import dmr
from tests.helpers.micro_recipe import RECIPE_YAML

SMOLLM2 = "smollm2-135m"
FINETUNE = {
    "lora": {"rank": 4, "alpha": 8},
    "updates": 2,
    "episodes_per_update": 2,
    "learning_rate": 0.001,
    "warmup_updates": 1,
    "dagger_from": 1,
    "dagger_every": 1,
    "dagger_episodes": 2,
    "dagger_steps": 3,
    "dagger_tokens": 100,
    "mistake_rate": 0.05,
}
CHAT = {
    "chat": {"system": "You act in a household. Answer with one command."},
    "opening": "{observation}\nYour task is to: {task}",
    "turn": "{observation}",
    "max_action_tokens": 12,
}


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, agent: dict[str, Any]) -> dict[str, Any]:
    """`dmr report --json` of the smallest recipe with this agent, after all its stages."""
    recipe = yaml.safe_load(RECIPE_YAML) | {"agent": agent}
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE_YAML", yaml.safe_dump(recipe))
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE", "micro")
    folder.mkdir(exist_ok=True)
    make_project(folder, pipeline.STAGES)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DAGSTER_HOME", str(folder / "dagster_home"))
    done = dmr("run", "micro")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(dmr("report", "micro", "--json").stdout)
    return report


def assert_all_acted(report: dict[str, Any]) -> None:
    policies = report["policies"]
    assert {"always_high", "always_low", "always_int4", "kl_router", "grpo_router"} <= policies.keys()
    assert all(policy["n"] == 4 and 0 <= policy["parse_failures"] <= 1 for policy in policies.values())
    checked, written = policies["speculative:float<int2"], policies["always_high"]
    assert (checked["success"], checked["steps"]) == (written["success"], written["steps"])


@pytest.mark.slow
def test_a_random_qwen3_is_fine_tuned_and_goes_through_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of its own, and the kind of chat template that SmolLM2 has."""
    tokenizer = templated("qwen", CHATML)
    shape = Architecture(layers=5, width=64, heads=2, key_value_heads=1, head_width=32, feed_forward=64)
    save_causal_lm(new_model(shape, len(tokenizer), 0), tokenizer, tmp_path / "qwen3", torch.bfloat16)
    agent = {
        "pretrained": {"model": str(tmp_path / "qwen3")},
        "finetune": FINETUNE,
        "prompt": CHAT,
        "dtype": "bfloat16",
    }
    assert_all_acted(run(tmp_path / "project", monkeypatch, agent))
    files = verify(artifact_folder("agent", "micro")).manifest.files
    assert "model/adapter_model.safetensors" in files
    assert "model/model.safetensors" not in files


@pytest.mark.slow
@pytest.mark.skipif(fetched(SMOLLM2) is None, reason=f"the weights are not here: dmr models fetch {SMOLLM2}")
def test_the_fine_tuned_smollm2_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That whose adapter lies in Git: nearly all that it writes are commands."""
    recipe = load_recipe("alfworld-smollm2", REPOSITORY / RECIPE_FOLDER)
    agent = {
        "pretrained": {"model": str(REPOSITORY / "data" / "alfworld-smollm2" / "agent" / "model")},
        "prompt": recipe.agent.prompt.model_dump(exclude_unset=True),
        "dtype": "bfloat16",
    }
    report = run(tmp_path, monkeypatch, agent)
    assert_all_acted(report)
    assert report["policies"]["always_high"]["parse_failures"] == 0
