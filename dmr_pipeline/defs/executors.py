"""Where steps run: on this machine, or each on the machine of a Ray cluster that has what its stage needs."""

import importlib.util
import os
from pathlib import Path

import dagster as dg

from dmr_pipeline.errors import UserError

EXTRAS = {"ray": ("ray", "dagster_ray"), "kubernetes": ("dagster_k8s",)}
"""The executors for more machines, each with the packages of the extra of its name."""


def executor() -> dg.ExecutorDefinition | None:
    """The code location's executor, by the environment variable DMR_EXECUTOR.

    `local`, or unset: None, with which a run's config chooses between `in_process` and `multiprocess`. `ray`: every step is
    a job on the cluster at RAY_ADDRESS. `kubernetes`: every step is a job of the cluster that the run is in. Their config is
    left empty: resources given there would win over the stages' own.

    Raises:
        UserError: another value, or the extra that it needs is not installed.
    """
    chosen = os.environ.get("DMR_EXECUTOR", "local")
    if chosen == "local":
        return None
    if chosen not in EXTRAS:
        raise UserError(f"DMR_EXECUTOR is {chosen!r}: set it to 'local', {' or '.join(map(repr, EXTRAS))}")
    if any(importlib.util.find_spec(name) is None for name in EXTRAS[chosen]):
        raise UserError(f"DMR_EXECUTOR is {chosen!r}, which is not installed: pip install 'dmr-pipeline[{chosen}]'")
    if chosen == "kubernetes":
        from dagster_k8s import k8s_job_executor

        return k8s_job_executor
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
