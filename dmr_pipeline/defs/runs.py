"""Runs in this process, for the command line: the same assets and the same record as a run from the UI."""

import logging
import os
import platform
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import psutil
from dagster._core.errors import DagsterAssetCheckFailedError  # not exported
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.executor import in_process
from dagster._core.instance.ref import InstanceRef  # the public API cannot override a part of dagster.yaml
from filelock import FileLock

from dmr_pipeline import interrupts
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.defs import exchange
from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.checks import build_checks
from dmr_pipeline.defs.versions import recorded_version
from dmr_pipeline.errors import UserError, causes
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.versioning import dvc_stages

log = logging.getLogger(__name__)

GOING_ON = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED]
PROCESS_TAG = "dmr/process"
POLL_SECONDS = 2.0


def materialize(stages: Sequence[Stage], recipe: str, selected: Sequence[str], *, force: bool = False) -> None:
    """Materialise the selected assets for one recipe, on the instance of `DAGSTER_HOME`.

    Raises:
        UserError: bad input, or a blocking check failed.
    """
    failed: BaseException | None = None
    with _open_instance() as instance:
        _end_killed_runs(instance)
        try:
            with interrupts.farewell(_end_own_runs):
                dg.materialize(
                    [*build_assets(stages), *build_checks([stage.name for stage in stages])],
                    instance=instance,
                    partition_key=recipe,
                    selection=dg.AssetSelection.assets(*selected),
                    # Dagster's daemon cannot start again what ran in this process.
                    tags={PROCESS_TAG: _this_process(), "dagster/max_retries": "0"},
                    run_config={
                        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                        "ops": {name: {"config": {"force": force}} for name in selected},
                    },
                )
        except DagsterAssetCheckFailedError as error:
            raise UserError(f"a blocking check failed: {' '.join(str(error).split())}") from error
        except dg.Failure as failure:
            failed = failure.__cause__ or failure
    if failed is not None:
        raise failed  # outside of the handler, where its own wrapper would become its context: a circle


def pull(stages: Sequence[Stage], recipe: Recipe) -> None:
    """Bring the artifacts that other machines have made here, at the versions that the instance records, and record them
    in this checkout's `dvc.lock`.

    Raises:
        UserError: an object is neither in DVC's cache nor in the remote.
    """
    with _open_instance() as instance:
        made = [stage for stage in stages if recorded_version(instance, dg.AssetKey(stage.name), recipe.name)]
        exchange.pull(instance, made, recipe)
    for stage in made:
        artifact = verify(artifact_folder(stage.name, recipe.name))
        dvc_stages.commit(stage, recipe.name, artifact=artifact, rebuilt=False)


class _PatientClaims(InstanceConcurrencyContext):
    """How a run waits for a slot of a pool. Dagster's own sleeps for the minimum of 0 and the time until it should ask again,
    and so keeps a processor's core busy; and it does not notice that who holds the slot was killed."""

    told = False

    def interval_to_next_pending_claim_check(self) -> float:
        if not self.has_pending_claims():
            return 0.0
        if not self.told:
            log.info("%s: another run holds its pool, waiting for it to end", ", ".join(self.pending_claim_steps()))
            self.told = True
        _end_killed_runs(self._instance)
        return POLL_SECONDS


in_process.InstanceConcurrencyContext = _PatientClaims  # type: ignore[attr-defined]


@contextmanager
def _open_instance() -> Iterator[dg.DagsterInstance]:
    """`DAGSTER_HOME`'s instance, but without capturing what steps print: that would swallow their progress bars.

    Raises:
        UserError: there is no such folder, or its database cannot be written meanwhile.
    """
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path("dagster_home").resolve())))
    if not home.is_dir():
        raise UserError(f"DAGSTER_HOME is {home}, which is no folder: run dmr in the project's folder, or set it")
    silent = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    try:
        with FileLock(home / ".dmr.lock"):  # two processes would make the tables of a new home at the same time
            instance = dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home), overrides={"compute_logs": silent}))
        with instance:
            yield instance
    except Exception as error:
        reasons = [str(seen) for seen in causes(error) if isinstance(seen, sqlite3.OperationalError)]
        if not reasons or isinstance(error, UserError):
            raise
        raise UserError(
            f"Dagster's database in {home}: {reasons[0]}: see that its disk has space and that this user may write there, then"
            " run the same command again; nothing is lost"
        ) from error


def _this_process() -> str:
    process = psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.0f}"


def _is_alive(tag: str) -> bool:
    """Whether the process still runs; one on another machine is taken to be alive."""
    node, pid, created = tag.rsplit(" ", maxsplit=2)
    if node != platform.node():
        return True
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" == created
    except psutil.NoSuchProcess:
        return False


def _end_killed_runs(instance: dg.DagsterInstance) -> None:
    """A killed process leaves its run 'started' and its pool slots taken, for which the next run would wait forever."""
    for run in instance.get_runs(dg.RunsFilter(statuses=GOING_ON)):
        if PROCESS_TAG in run.tags and not _is_alive(run.tags[PROCESS_TAG]):
            instance.report_run_failed(run, "the process that ran it was killed")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _end_own_runs() -> None:
    """This process ends: its run is no longer going on, and holds no slots."""
    with _open_instance() as instance:
        for run in instance.get_runs(dg.RunsFilter(statuses=GOING_ON, tags={PROCESS_TAG: _this_process()})):
            instance.report_run_canceled(run, "interrupted on the command line")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
