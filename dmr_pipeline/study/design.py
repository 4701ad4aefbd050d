"""A study: routers of one recipe, each trained in several ways and with several seeds, and played at several budgets on games
that nothing was chosen on; on its precisions or on others. One YAML file says all of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, SerializeAsAny, ValidationError

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.benchmark import Games, games_of_a_benchmark
from dmr_pipeline.recipe.evaluation import OracleName, RuleName
from dmr_pipeline.recipe.fields import Count, Name, Ratio, Section, Seed
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.recipe.text import read_mapping

STUDY_FOLDER = Path("studies")
CHANGEABLE = ("trajectories", "sensitivity", "kl_router", "grpo_router")
"""Sections that variants may change: with the others they would play other games, or other precisions."""
SEEDED = ("kl_router", "grpo_router")
GAMES = "games"
"""What the recipe is called whose benchmark is a study's own."""
LADDER = "ladder"
"""What the recipe is called whose precisions are."""


class Variant(Section):
    """One way to train a router."""

    stage: Literal["kl_router", "grpo_router"] = Field("kl_router", description="whose router plays")
    changes: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="section -> keys that differ from the recipe's, and of a mapping in it those that are named",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        for section, changes in self.changes.items():
            if section not in CHANGEABLE:
                yield "changes", f"{section!r}: a variant may change {', '.join(CHANGEABLE)}"
            elif section == "grpo_router" and self.stage == "kl_router":
                yield "changes", "'grpo_router' changes nothing of the router of stage 1: set stage to grpo_router"
            if section in SEEDED and "seed" in changes:
                yield "changes", f"{section}.seed is each of the study's `seeds` in turn: leave it out"


def _games_or_none(content: Any) -> Section | None:  # noqa: ANN401 - what a file holds
    return None if content is None else games_of_a_benchmark(content)


class Study(Section):
    """A file in `studies/`."""

    recipe: str = Field(description="whose artifacts the study starts from")
    routers: dict[Name, Variant] = Field(
        default_factory=dict,
        description="name -> how it is trained; without any the study is of rules, and trains nothing",
    )
    precisions: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="keys of that section that differ from the recipe's: the study makes and measures that ladder of the"
        " recipe's agent first",
    )
    rules: tuple[RuleName, ...] = Field((), description="that play (router/rules.py); all of them by default")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="of each router's training")
    budgets: tuple[Ratio, ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.6),
        min_length=1,
        description="spend on validation games, of two rungs the high-precision ratio, that each policy is tuned to stay within",
    )
    planned: tuple[Ratio, ...] = Field(
        (0.2, 0.4),
        min_length=1,
        description="budgets at which each router is compared with the best rule; Holm's correction is over all of these",
    )
    oracles: tuple[OracleName, ...] = Field(
        (), description="that are tuned to the budgets too: what is left to win (router/oracles.py)"
    )
    games: Annotated[int, Field(gt=0)] = Field(
        1000,
        description="of seeds that no split uses; of benchmarks whose tasks are a list, the test split's, as many as it has",
    )
    first_game: Annotated[int, Field(ge=0)] = Field(
        0,
        exclude_if=lambda first: first == 0,
        description="of the fresh games; those before it are passed over, since another study has played them: what was found on"
        " some games is confirmed on others",
    )
    benchmark: Annotated[SerializeAsAny[Games] | None, BeforeValidator(_games_or_none)] = Field(
        None,
        description="whose test games these are, where nothing was trained or tuned on its like: as a recipe's section of that"
        " name; by default fresh games of the recipe's own",
    )
    reworded: Seed | None = Field(
        None,
        description="of the order in which these games tell what they list: another one than in the games that all was trained"
        " and tuned on; as they are by default",
    )
    step_limit: Count | None = Field(
        None, description="of these games: another one than all was trained and tuned at; the recipe's by default"
    )
    validation_games: Count | None = Field(None, description="that policies are tuned on; all by default")

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("seeds", "budgets", "planned", "rules"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                yield field, f"{list(values)} are not all different"
        if self.benchmark is not None and self.first_game:
            yield (
                "first_game",
                "is of fresh games, and those of the benchmark that is named here are played; leave it out",
            )
        if self.benchmark is not None and self.step_limit is not None:
            yield "step_limit", "the benchmark that is named here has its own"
        for budget in self.planned if self.routers else ():
            if budget not in self.budgets:
                yield "planned", f"{budget} is none of the budgets, {', '.join(map(str, self.budgets))}"


def load_study(path: Path) -> Study:
    """
    Raises:
        UserError: it is not there or malformed, or the recipe does not take its precisions or a variant's changes; or games are
            to be passed over that the recipe's benchmark has not.
    """
    if not path.exists():
        known = ", ".join(sorted(map(str, STUDY_FOLDER.glob("*.yaml")))) or "none"
        raise UserError(f"{path}: there is no such file (known studies: {known})")
    try:
        study = Study.model_validate(read_mapping(path))
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(problems_of(error))}") from error
    recipe = ladder_recipe(study)
    if study.first_game and not has_fresh_games(study, recipe):
        raise UserError(
            f"{path}: first_game: the tasks of {recipe.benchmark.environment} are a list, and none is fresh; leave it out"
        )
    for name in study.routers:
        variant_recipe(study, name, study.seeds[0])
    return study


def has_fresh_games(study: Study, recipe: Recipe) -> bool:
    """Whether its games are made of seeds that no split uses; else they are a test split's."""
    return study.benchmark is None and bool(benchmark_of(recipe.benchmark).fresh_tasks(1))


def ladder_recipe(study: Study) -> Recipe:
    """The study's recipe, with the study's precisions and under a name of its own where it has any.

    Raises:
        UserError: it does not take them.
    """
    base = load_recipe(study.recipe)
    if not study.precisions:
        return base
    content = base.model_dump(mode="json")
    content["precisions"] = _merged(content["precisions"], study.precisions)
    return _recipe(content | {"name": LADDER})


def games_recipe(study: Study) -> Recipe | None:
    """The recipe whose test games are played, where the study names a benchmark; the other sections are those of its recipe."""
    if study.benchmark is None:
        return None
    return load_recipe(study.recipe).model_copy(update={"name": GAMES, "benchmark": study.benchmark})


def variant_recipe(study: Study, name: str, seed: int) -> Recipe:
    """The recipe of one router, under a name of its own.

    Raises:
        UserError: it does not take the changes.
    """
    variant, base = study.routers[name], ladder_recipe(study)
    content = base.model_dump(mode="json")
    for section, changes in variant.changes.items():
        content[section] = _merged(content[section], changes)
    for section in SEEDED:
        content[section]["seed"] = seed
    where = f"routers.{name}.changes: "
    recipe = _recipe(content | {"name": f"{name}-{seed}"}, where)
    # In what was dumped and read again every number counts as written by somebody, those that are defaults too.
    old = set(problems_across(dict(Recipe.model_validate(load_recipe(study.recipe).model_dump(mode="json")))))
    if new := [line for line in problems_across(dict(recipe)) if line not in old]:
        raise UserError(f"{where}{'; '.join(new)}")
    return recipe


def _recipe(content: dict[str, JsonValue], where: str = "") -> Recipe:
    """
    Args:
        where: what was changed stands in the study's file, if not where the recipe has it.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}{'; '.join(problems_of(error))}") from error


def _merged(old: JsonValue, new: JsonValue) -> JsonValue:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return new
