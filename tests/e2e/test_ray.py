"""Two recipes at once on a Ray cluster of this machine: a head without a GPU, and two nodes with one each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
import pytest

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.defs.versions import recorded_version
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, RECIPE_YAML, REPOSITORY, fake_stages, make_project
from tests.helpers.ray_worker import NODE_VARIABLE, SHARED_VARIABLE, SLEEPER

pytestmark = pytest.mark.slow
ray_cluster = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'dmr-pipeline[ray]'")

RECIPES = [RECIPE, "other"]
STAGES = ["benchmark_tasks", "quantized_checkpoints", "trajectories"]
GPU_STAGES = ["quantized_checkpoints", "trajectories"]
OBJECT_STORE_BYTES = 100 << 20
STAGE_MEMORY_BYTES = 8 << 30


@contextmanager
def cluster(homes: dict[str, Path]) -> Iterator[str]:
    """Address of a cluster whose nodes are told these working directories: the head's, and those with a GPU."""
    # A short path, since it holds Unix sockets; Ray's processes may still write to it as they end.
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        nodes = ray_cluster.Cluster()
        stack.callback(nodes.shutdown)
        for number, (name, home) in enumerate(homes.items(), start=2):
            is_head = name == "head"
            where = (
                {"temp_dir": folder, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
                if is_head
                else {}
            )
            nodes.add_node(
                **where,
                node_ip_address=f"127.0.0.{number}",  # Ray replaces 127.0.0.1 by the machine's address
                num_cpus=0 if is_head else 3,
                num_gpus=0 if is_head else 1,
                memory=STAGE_MEMORY_BYTES + (2 << 30),
                object_store_memory=OBJECT_STORE_BYTES,
                env_vars={"DMR_HOME": str(home), NODE_VARIABLE: name},
            )
        yield f"http://{nodes.webui_url}"


def write_recipes(folder: Path, remote: Path | None) -> None:
    versioning = "" if remote is None else "versioning: {remote: shared}\n"
    for name in RECIPES:
        (folder / "recipes" / f"{name}.yaml").write_text(RECIPE_YAML + versioning)
    if remote is not None:
        with (folder / ".dvc" / "config").open("a") as config:
            config.write(f"['remote \"shared\"']\n    url = {remote}\n")
    (folder / "dvc.yaml").write_text(dvc_stages.render(fake_stages(), RECIPES))


def make_agents(folder: Path) -> None:
    """Git carries them, so that every clone starts with them."""
    for name in RECIPES:
        recipe, data = load_recipe(name, folder / "recipes"), folder / "data"
        for stage in fake_stages()[:2]:
            materialize_stage(stage, recipe, data)
        shutil.rmtree(artifact_folder("benchmark_tasks", name, data))


def start_run(recipe: str, home: Path, log: Path) -> subprocess.Popen[bytes]:
    selection = " or ".join(f'key:"{stage}"' for stage in [*STAGES, "agent"])
    command = [
        "dagster",
        "asset",
        "materialize",
        "-m",
        "tests.helpers.ray_worker",
        "--partition",
        recipe,
        "--select",
        selection,
    ]
    with log.open("wb") as output:
        return subprocess.Popen([sys.executable, "-m", *command], cwd=home, stdout=output, stderr=subprocess.STDOUT)


def wait_for(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize("own_folders", [False, True], ids=["one folder", "a folder a node"])
def test_two_recipes_share_two_gpus_and_a_killed_worker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_folders: bool
):
    shared, head = tmp_path / "shared", tmp_path / "head"
    shared.mkdir()
    head.mkdir()
    make_project(head, fake_stages())
    write_recipes(head, tmp_path / "remote" if own_folders else None)
    make_agents(head)
    homes = {"head": head, "first": head, "second": head}
    if own_folders:
        for name in ("first", "second"):
            homes[name] = tmp_path / name
            shutil.copytree(head, homes[name], ignore=shutil.ignore_patterns("dagster_home"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # steps are started as `dagster`
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("DAGSTER_HOME", str(head / "dagster_home"))
    monkeypatch.setenv("DMR_EXECUTOR", "ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv(SHARED_VARIABLE, str(shared))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    for recipe in RECIPES[1:]:  # of the first alone, a worker is killed
        (shared / f"{recipe}.pid").touch()
    with dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 2)

    with cluster(homes) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        runs = {recipe: start_run(recipe, head, tmp_path / f"{recipe}.log") for recipe in RECIPES}
        try:
            wait_for(shared / f"{RECIPE}.pid", 240)
            # The other recipe goes on meanwhile, and must do so on the other node.
            wait_for(shared / f"other.{STAGES[-1]}.json", 300)
            killed = int((shared / f"{RECIPE}.pid").read_text())
            killed_in = Path(f"/proc/{killed}/cwd").readlink()
            os.kill(killed, signal.SIGKILL)
            for recipe, run in runs.items():
                assert run.wait(300) == 0, (tmp_path / f"{recipe}.log").read_text()[-8000:]
        finally:
            for run in runs.values():
                run.kill()
                run.wait()

    records = [json.loads(path.read_text()) for path in shared.glob("*.json")]
    assert {(record["recipe"], record["stage"]) for record in records} == {
        (recipe, stage) for recipe in RECIPES for stage in STAGES
    }
    on_gpus = [record for record in records if record["stage"] in GPU_STAGES]
    assert {record["node"] for record in on_gpus} == {"first", "second"}
    assert all(record["gpus"] == "0" for record in on_gpus)
    assert all(record["gpus"] == "" for record in records if record not in on_gpus)
    assert all(record["folder"] == str(homes[record["node"]]) for record in records)
    assert killed_in in homes.values()
    for one, another in combinations(on_gpus, 2):
        apart = one["finished"] <= another["started"] or another["finished"] <= one["started"]
        assert apart or one["node"] != another["node"], "a GPU was given to two stages at once"

    with dg.DagsterInstance.get() as instance:
        assert {run.status for run in instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
        retried = [
            (run.tags["dagster/partition"], entry.dagster_event.step_key)
            for run in instance.get_runs()
            for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
        ]
        assert retried == [(RECIPE, SLEEPER)]
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0
        for record in records:
            monkeypatch.chdir(record["folder"])
            version = recorded_version(instance, dg.AssetKey(record["stage"]), record["recipe"])
            assert verify(artifact_folder(record["stage"], record["recipe"])).hash == version
