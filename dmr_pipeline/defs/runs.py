"""Runs in this process, for the command line: the same assets and the same record as a run from the UI."""

import logging
import os
import platform
import time
from collections.abc import Sequence, Set
from pathlib import Path

import dagster as dg
import psutil
from dagster._core.errors import DagsterAssetCheckFailedError  # not exported
from dagster._core.instance.ref import InstanceRef  # the public API cannot override a part of dagster.yaml

from dmr_pipeline.artifacts import artifact_folder, verify
from dmr_pipeline.defs import exchange
from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.checks import build_checks
from dmr_pipeline.defs.versions import recorded_version
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.stage import Stage
from dmr_pipeline.versioning import dvc_stages

log = logging.getLogger(__name__)

PROCESS_TAG = "dmr/process"
POLL_SECONDS = 2.0


def materialize(stages: Sequence[Stage], recipe: str, selected: Sequence[str], *, force: bool = False) -> None:
    """Materialise the selected assets for one recipe, on the instance of `DAGSTER_HOME`.

    Raises:
        UserError: bad input, or a blocking check failed.
    """
    with _open_instance() as instance:
        _end_killed_runs(instance)
        _wait_for_slots(instance, {stage.pool for stage in stages if stage.name in selected and stage.pool})
        try:
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
            if failure.__cause__ is None:
                raise
            raise failure.__cause__ from failure


def pull(stages: Sequence[Stage], recipe: Recipe) -> None:
    """Bring the artefacts that other machines have made here, at the versions that the instance records, and record them
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


def _wait_for_slots(instance: dg.DagsterInstance, pools: Set[str]) -> None:
    """Return once every pool has a slot to give. Dagster's in-process executor waits for one at full CPU (it takes the
    minimum of 0 and the time until it should ask again) and deaf to SIGTERM; here a run sleeps before it starts."""
    told = False
    while any(_is_full(instance, pool) for pool in pools):
        if not told:
            log.info("another run holds the pool %s, waiting for it to end", ", ".join(sorted(pools)))
            told = True
        time.sleep(POLL_SECONDS)
        _end_killed_runs(instance)


def _is_full(instance: dg.DagsterInstance, pool: str) -> bool:
    info = instance.event_log_storage.get_concurrency_info(pool)
    return info.slot_count > 0 and info.active_slot_count >= info.slot_count


def _open_instance() -> dg.DagsterInstance:
    """`DAGSTER_HOME`'s instance, but without capturing what steps print: that would swallow their progress bars."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(Path("dagster_home").resolve())))
    if not home.is_dir():
        raise UserError(f"DAGSTER_HOME is {home}, which is no folder: run dmr in the project's folder, or set it")
    silent = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home), overrides={"compute_logs": silent}))


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
    started = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED]
    )
    for run in instance.get_runs(started):
        if PROCESS_TAG in run.tags and not _is_alive(run.tags[PROCESS_TAG]):
            instance.report_run_failed(run, "the process that ran it was killed")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
