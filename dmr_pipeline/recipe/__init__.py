"""Recipes: one YAML file fixes one experiment, from the games to the report.

A recipe is made of sections. Each stage of the pipeline names the sections it reads, so that a change to one section makes
exactly those stages stale. Unknown keys are refused, and so is a value of another type than its key's ('24' and true are no
counts), or one that would only fail, or mean nothing, after hours of work. Sizes in the field descriptions are the unit of
the number.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny

from dmr_pipeline.recipe.agent import Agent
from dmr_pipeline.recipe.benchmark import Games, games_of_a_benchmark
from dmr_pipeline.recipe.evaluation import Evaluation
from dmr_pipeline.recipe.fields import Section
from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.recipe.kl_router import KlRouter
from dmr_pipeline.recipe.precisions import Precisions
from dmr_pipeline.recipe.release import Release
from dmr_pipeline.recipe.runtime import Retraining, Runtime, Versioning
from dmr_pipeline.recipe.sensitivity import Sensitivity
from dmr_pipeline.recipe.trajectories import Trajectories


class Recipe(Section):
    name: str
    benchmark: Annotated[SerializeAsAny[Games], BeforeValidator(games_of_a_benchmark)]
    agent: Agent
    precisions: Precisions
    trajectories: Trajectories = Field(default_factory=Trajectories)
    sensitivity: Sensitivity
    kl_router: KlRouter
    grpo_router: GrpoRouter
    evaluation: Evaluation
    release: Release
    retraining: Retraining = Field(default_factory=Retraining)
    versioning: Versioning = Field(default_factory=Versioning)
    runtime: Runtime = Field(default_factory=Runtime)

    def with_step_limit(self, steps: int) -> "Recipe":
        """The same with another one."""
        return self.model_copy(update={"benchmark": self.benchmark.model_copy(update={"step_limit": steps})})


UNHASHED_SECTIONS = frozenset({"retraining", "versioning", "runtime"})
"""Sections that say how a pipeline is run, not what it computes; no stage reads them into its provenance."""
