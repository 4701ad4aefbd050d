"""`deploy/postgres/dagster.yaml`: the project's instance on a real PostgreSQL, written to by two processes at once."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.doctor import postgres_server
from dmr_pipeline.versioning import dvc_stages
from tests.helpers.fake_project import RECIPE, REPOSITORY, fake_stages, make_project

INSTANCE_FILE = REPOSITORY / "deploy" / "postgres" / "dagster.yaml"
OTHER_RECIPE = "other"
SERVER_USER = "nobody"
STAGES = ["benchmark_tasks", "agent", "quantized_checkpoints", "trajectories"]
MATERIALIZE = f"""\
import sys
from dmr_pipeline.defs import runs
from tests.helpers.fake_project import fake_stages
runs.materialize(fake_stages(), sys.argv[1], {STAGES})
"""


def postgres_command(name: str) -> str | None:
    """A PostgreSQL server's program, also where Debian puts it, which is not on the PATH."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: int(folder.parent.name),
    )
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, reversed(folders))]))


def as_server_user(*command: str) -> list[str]:
    """PostgreSQL refuses to run as root, which continuous integration often is."""
    return ["runuser", "-u", SERVER_USER, "--", *command] if os.geteuid() == 0 else list(command)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A private server with an empty database, which the variables of `INSTANCE_FILE` lead to."""
    initdb, pg_ctl, createdb = (postgres_command(name) for name in ("initdb", "pg_ctl", "createdb"))
    if initdb is None or pg_ctl is None or createdb is None:
        pytest.skip("PostgreSQL is not installed (no initdb on the PATH or under /usr/lib/postgresql)")
    # Not below pytest's own folder, which every other run of pytest closes to the server's user.
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), str(free_port())
        if os.geteuid() == 0:
            shutil.chown(folder, SERVER_USER)
        cluster = ["-D", str(folder / "cluster")]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        for command in (
            [initdb, *cluster, "-U", "dagster", "-A", "trust", "--no-sync"],
            [pg_ctl, *cluster, "-l", str(folder / "log"), "-w", "-o", options, "start"],
        ):
            subprocess.run(as_server_user(*command), check=True, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            subprocess.run([createdb, "-h", "127.0.0.1", "-p", port, "-U", "dagster", "dagster"], check=True)
            for key, value in {"HOST": "127.0.0.1", "PORT": port, "USERNAME": "dagster", "DB": "dagster"}.items():
                monkeypatch.setenv(f"DAGSTER_PG_{key}", value)
            monkeypatch.setenv("DAGSTER_PG_PASSWORD", "unused")
            yield
        finally:
            subprocess.run(
                as_server_user(pg_ctl, *cluster, "-m", "immediate", "stop"),
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=folder,
            )


def test_differs_from_the_project_s_instance_in_storage_alone() -> None:
    ours = yaml.safe_load(INSTANCE_FILE.read_text(encoding="utf-8"))
    assert ours.pop("storage").keys() == {"postgres"}
    assert ours == yaml.safe_load((REPOSITORY / "dagster_home" / "dagster.yaml").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.usefixtures("postgres")
def test_two_processes_share_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(tmp_path, fake_stages())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    shutil.copy(INSTANCE_FILE, "dagster_home/dagster.yaml")
    shutil.copy(f"recipes/{RECIPE}.yaml", f"recipes/{OTHER_RECIPE}.yaml")
    dvc_stages.DVC_FILE.write_text(dvc_stages.render(fake_stages(), sorted([RECIPE, OTHER_RECIPE])))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # Both find the database empty, so that they also race for its tables.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MATERIALIZE, recipe],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for recipe in (RECIPE, OTHER_RECIPE)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    with dg.DagsterInstance.get() as instance:
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        assert postgres_server().found
        runs = instance.get_runs()
        assert {run.tags["dagster/partition"] for run in runs} == {RECIPE, OTHER_RECIPE}
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        for stage in STAGES:
            records = instance.fetch_materializations(dg.AssetKey(stage), limit=10).records
            recorded = {}
            for record in records:
                materialization = record.asset_materialization
                assert materialization is not None
                recorded[materialization.partition] = materialization.metadata["hash"].value
            assert recorded == {
                recipe: verify(artifact_folder(stage, recipe)).hash for recipe in (RECIPE, OTHER_RECIPE)
            }
        instance.event_log_storage.set_concurrency_slots("gpu", 2)
    with dg.DagsterInstance.get() as instance:
        assert {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()} == {"gpu": 2}
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0
    assert not list(Path("dagster_home").rglob("*.db")), "nothing may lie in SQLite beside PostgreSQL"
