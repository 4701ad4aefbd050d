"""Sections `retraining`, `versioning` and `runtime`: how a pipeline is run, not what it computes."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import Batch, Count, Section, Workers


class Retraining(Section):
    """When new trajectories start a retraining. Not part of any hash."""

    min_new_steps: Count = Field(
        2000, description="steps that were ingested since the last sensitivity dataset was made"
    )


class Versioning(Section):
    """What becomes of materialised artifacts besides DVC's cache and `dvc.lock`. Not part of any hash."""

    git: Literal["none", "commit"] = Field(
        "none",
        description="commit: each new entry of dvc.lock also becomes a commit on the branch retrain/<date, UTC>; what is"
        " checked out is never touched",
    )
    remote: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = Field(
        None,
        description="DVC remote over which machines exchange artifacts by hash: a worker pulls the inputs that Dagster's"
        " instance records and pushes what it made; without it all stages work on one data folder",
    )


class Runtime(Section):
    """How a stage runs, not what it computes. Not part of any hash; results on CPU are equal for fixed numbers
    of threads and processes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: Workers = Field(
        1, description="torch threads a process; an LLM is fine-tuned in one process with as many as all of them have"
    )
    processes: Workers = Field(2, description="processes that play episodes at once on a CPU; one on a GPU")
    batch_episodes: Batch = Field(
        64, description="episodes acted on at once in a process; fewer where a GPU runs out of memory"
    )
    reuse_actions: bool = Field(
        True,
        description="look up what a precision does at a transcript that it has met before; false computes it again",
        exclude_if=bool,
    )

    @property
    def all_threads(self) -> int:
        """Of all processes: what one has that works alone."""
        return self.threads * self.processes

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.threads > 1 and self.processes > 1:
            yield "threads", "torch's threads do not survive a fork; give more 'threads' or more 'processes'"
