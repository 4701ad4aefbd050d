"""The whole circle with real stages: served, logged, ingested, trained again, released, served."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import openai
import pytest

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.defs import runs
from dmr_pipeline.defs.automation import build_trajectory_sensor
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.ingestion.stored import read_ingested
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.release.history import read_releases
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.serve import release
from dmr_pipeline.serve.run import running
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from tests.helpers.fake_project import make_project
from tests.helpers.micro_recipe import RECIPE_YAML
from tests.helpers.serving import play_by_client

GAMES = 20
YAML = RECIPE_YAML.replace("router_train: 4", f"router_train: {GAMES}").replace(
    "release: {bootstrap: 50}",
    # Any router that is trained anew takes over: two games can show so large a margin.
    "release: {bootstrap: 50, games: 2, success_margin: 0.9, cost_increase: 1000.0}\n"
    "retraining: {min_new_steps: 3}\n"
    "runtime: {device: cpu, threads: 1, processes: 1}",
)


def tick(instance: dg.DagsterInstance) -> str:
    """The job that the sensor asks for."""
    result = build_trajectory_sensor(["micro"])(dg.build_sensor_context(instance=instance))
    assert isinstance(result, dg.SensorResult), result
    (request,) = result.run_requests or []
    assert request.partition_key == "micro"
    return str(request.job_name)


@pytest.mark.slow
def test_what_is_served_is_learned_from_and_the_next_release_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE_YAML", YAML)
    monkeypatch.setattr("tests.helpers.fake_project.RECIPE", "micro")
    make_project(tmp_path, pipeline.STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    names = [stage.name for stage in pipeline.STAGES]
    runs.materialize(pipeline.STAGES, "micro", names)
    recipe = load_recipe("micro")
    games = benchmark_of(recipe.benchmark).read_tasks(artifact_folder("benchmark_tasks", "micro"), "router_train")
    rollouts = Rollouts.load(artifact_folder("quantized_checkpoints", "micro"), recipe)
    router = release.load(release.released("micro")[0], rollouts)
    played = rollouts.play([RolloutRequest(game) for game in games], routing_policy(router, GAMES), 0)

    with running(Service(ServeSettings(recipe="micro", port=0))) as address, dg.DagsterInstance.get() as instance:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(8) as threads:
            found = list(
                threads.map(
                    lambda i: play_by_client(client, games[i], "dmr/micro", stream=i % 2 == 0, step_limit=4),
                    range(GAMES),
                )
            )
        assert found == [[(step.command, step.precision) for step in trajectory.steps] for trajectory in played]

        assert tick(instance) == "ingest"
        runs.materialize(pipeline.STAGES, "micro", ["ingested_trajectories"])
        ingested = read_ingested(artifact_folder("ingested_trajectories", "micro"))
        assert sorted(episode.task_id for episode in ingested) == sorted(game.task_id for game in games)
        assert all(step.release == 1 for episode in ingested for step in episode.steps)
        assert tick(instance) == "retrain"
        runs.materialize(pipeline.STAGES, "micro", names[names.index("sensitivity_dataset") :])
        assert read_releases(artifact_folder("released_router", "micro")).current == 2

        again = client.chat.completions.with_raw_response.create(
            model="dmr/micro", messages=[{"role": "user", "content": games[0].episode().first_observation()}]
        )
        assert again.headers["x-dmr-release"] == "2"
