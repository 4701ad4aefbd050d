"""A job whose only asset fails as it is told, for processes that load it by its name."""

import os
import signal
from pathlib import Path

import dagster as dg

from dmr_pipeline.defs import faults
from dmr_pipeline.errors import UserError


class Fault(dg.Config):
    """What the asset does, and where it counts its tries."""

    tries: str
    kind: str
    times: int


def faulty_job() -> dg.JobDefinition:
    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=faults.RETRIES.max_retries, delay=0))
    def faulty(context: dg.AssetExecutionContext, config: Fault) -> None:
        with faults.as_dagster_failures(context):
            with Path(config.tries).open("a") as file:
                file.write(f"{context.retry_number}\n")
            if context.retry_number < config.times:
                fail(config.kind)

    job = dg.define_asset_job("faulty_job", selection=[faulty])
    return dg.Definitions(assets=[faulty], jobs=[job]).resolve_job_def("faulty_job")


def fail(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "lost connection":
        raise ConnectionResetError("the other side hung up")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "bad input":
        raise UserError("the game folder is empty: give another")
    raise AssertionError(kind)
