"""Where steps run: on this machine, or each on the machine of a Ray cluster that has what its stage needs."""

import importlib.util
import os
from pathlib import Path

import dagster as dg

from dmr_pipeline.errors import UserError


def executor() -> dg.ExecutorDefinition | None:
    """The code location's executor, by the environment variable DMR_EXECUTOR.

    `local`, or unset: None, with which a run's config chooses between `in_process` and `multiprocess`. `ray`: every step is
    a job on the cluster at RAY_ADDRESS. Its config is left empty: resources given there would win over the stages' own.

    Raises:
        UserError: another value, or Ray is not installed.
    """
    chosen = os.environ.get("DMR_EXECUTOR", "local")
    if chosen == "local":
        return None
    if chosen != "ray":
        raise UserError(f"DMR_EXECUTOR is {chosen!r}: set it to 'local' or 'ray'")
    if any(importlib.util.find_spec(name) is None for name in ("ray", "dagster_ray")):
        raise UserError("DMR_EXECUTOR is 'ray', which is not installed: pip install 'dmr-pipeline[ray]'")
    from dagster_ray import ray_executor

    return ray_executor


def enter_home() -> None:
    """Make DMR_HOME, where it is set, the working directory: the project's checkout on this machine.

    A worker's jobs start where its `ray start` did, and see the environment that it was given.

    Raises:
        UserError: there is no project.
    """
    home = os.environ.get("DMR_HOME")
    if home is None:
        return
    if not (Path(home) / "dvc.yaml").is_file():
        raise UserError(
            f"DMR_HOME is {home}, which holds no dvc.yaml: set it to the project's checkout on this machine"
        )
    os.chdir(home)
