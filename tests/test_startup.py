"""What a command may import: by names, since a clock would measure the machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from ruamel.yaml import YAML

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.evaluation.metrics import compute_metrics
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.evaluations import make_episodes
from tests.helpers.fake_project import RECIPE, REPOSITORY, fake_run

HEAVY = {
    *("torch", "transformers", "trl", "peft", "great_expectations", "matplotlib", "PIL", "scipy", "sklearn"),
    *("dagster", "ray", "sqlalchemy", "numpy", "pandas", "polars", "pyarrow"),
    *("dvc.repo", "dvc.stage", "dvc_data", "scmrepo"),
}
"""Each takes a tenth of a second or more."""
COMMAND = """
import sys
from dmr_pipeline.cli import app
try:
    app(sys.argv[1:])
finally:
    print(*sys.modules.keys(), file=sys.stderr)
"""


def run_with_metrics(context: StageContext) -> StageResult:
    """The fake evaluation with the metrics of a whole one, so that the real report can be shown."""
    done = fake_run(context)
    wins = np.arange(10)[None] < 9
    episodes = make_episodes(
        {"always_high": ("single", wins), "always_low": ("single", ~wins), "kl_router": ("router", wins)},
        {"always_high": 1.0, "always_low": 0.0, "kl_router": 0.4},
        {"always_high": 1.0, "always_low": 0.2, "kl_router": 0.5},
    )
    metrics = compute_metrics(
        episodes, recipe=RECIPE, route=("float", "int2"), high="always_high", low="always_low", headline="kl_router"
    )
    (context.output / "metrics.json").write_text(json.dumps(metrics))
    return done


@pytest.mark.parametrize(
    ("arguments", "further", "said"),
    [
        (["--help"], ["jinja2", "dvc", "dmr_pipeline.ingestion.inbox"], "materialize"),
        (["status", RECIPE], ["jinja2"], "released_router"),
        (["report", RECIPE], [], "kl_router *"),
        (["run", RECIPE], [], "nothing to do"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_a_command_that_looks_imports_nothing_heavy(
    finished_project: Recipe, arguments: list[str], further: list[str], said: str
):
    stage = pipeline.find_stage("evaluation_report", pipeline.STAGES)
    done = materialize_stage(replace(stage, run=run_with_metrics), finished_project, force=True)
    dvc_stages.commit(stage, RECIPE, artifact=done.artifact, rebuilt=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert said in shown.stdout, shown.stdout
    assert ("report.html" in shown.stdout) == (arguments[0] in ("report", "run"))
    assert "dmr_pipeline.cli" in shown.stderr.split()
    assert sorted({*HEAVY, *further} & set(shown.stderr.split())) == []


def test_a_run_parses_yaml_at_most_twice_a_stage(project: Recipe, monkeypatch: pytest.MonkeyPatch):
    """What `dvc.lock` has become, and little else: parsed for each question, it would be most of a run's overhead."""
    from dmr_pipeline.defs import runs

    load, parsed = YAML.load, []

    def counted(reader: YAML, stream: object) -> object:
        parsed.append(stream)
        return load(reader, stream)

    monkeypatch.setattr(YAML, "load", counted)
    runs.materialize(pipeline.STAGES, RECIPE, [stage.name for stage in pipeline.STAGES])
    assert (
        0 < len(parsed) <= 2 * len(pipeline.STAGES)
    )  # fewer where an earlier test of the process read the same content
    parsed.clear()
    runs.materialize(pipeline.STAGES, RECIPE, [stage.name for stage in pipeline.STAGES])
    assert parsed == []
