"""Runs in this process, for the command line: the same assets and the same record as a run from the UI."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import psutil
from dagster._core.errors import DagsterAssetCheckFailedError  # not exported
from dagster._core.instance.ref import InstanceRef  # the public API cannot override a part of dagster.yaml

from dmr_pipeline.defs.assets import build_assets
from dmr_pipeline.defs.checks import build_checks
from dmr_pipeline.errors import UserError
from dmr_pipeline.stage import Stage

PROCESS_TAG = "dmr/process"


def materialize(stages: Sequence[Stage], recipe: str, selected: Sequence[str], *, force: bool = False) -> None:
    """Materialise the selected assets for one recipe, on the instance of `DAGSTER_HOME`.

    Raises:
        UserError: bad input, or a blocking check failed.
    """
    with _open_instance() as instance:
        _end_killed_runs(instance)
        try:
            dg.materialize(
                [*build_assets(stages), *_checks_of(stages)],
                instance=instance,
                partition_key=recipe,
                selection=dg.AssetSelection.assets(*selected),
                tags={PROCESS_TAG: _this_process()},
                run_config={
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                    "ops": {name: {"config": {"force": force}} for name in selected},
                },
            )
        except DagsterAssetCheckFailedError as error:
            raise UserError(f"a blocking check failed: {' '.join(str(error).split())}") from error


def _checks_of(stages: Sequence[Stage]) -> list[dg.AssetChecksDefinition]:
    names = {dg.AssetKey(stage.name) for stage in stages}
    return [check for check in build_checks() if {key.asset_key for key in check.check_keys} <= names]


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
