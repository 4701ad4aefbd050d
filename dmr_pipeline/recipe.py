"""Recipes: one YAML file fixes one experiment, from the games to the report.

A recipe is made of sections. Each stage of the pipeline names the sections it reads, so that a change to one section makes
exactly those stages stale. Unknown keys are refused. Sizes in the field descriptions are the unit of the number.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from dmr_pipeline.errors import UserError

RECIPE_FOLDER = Path("recipes")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(gt=0)]


def _unset(value: object) -> bool:
    """Of a field that came after artefacts had been published: where it is not used it stays out of their provenance."""
    return not value


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Splits(Section):
    """Numbers of games in the four disjoint splits."""

    agent_train: Count = Field(description="games; the agent learns on these")
    router_train: Count = Field(
        description="games; labels and GRPO (an agent's confidence on its own training games is memorised)"
    )
    validation: Count = Field(description="games; every choice: threshold, rung, checkpoint, headline policy")
    test: Count = Field(description="games; touched once, by the evaluation report")


class Games(Section):
    """Which games are played, whatever the environment."""

    splits: Splits
    seed: int = Field(0, ge=0, description="decides which games there are, or which of them each split gets")
    step_limit: Count = Field(description="steps an episode may take")
    environment: str = Field(description="the benchmark, and who made its games: generated here, or the official ones")


class AlfWorld(Games):
    """ALFWorld, whoever made the games."""

    step_limit: Count = Field(50, description="steps an episode may take; 50 is ALFWorld's norm, ExpeL used 20")


class GeneratedAlfWorld(AlfWorld):
    """ALFWorld games made by the generator; each split draws its games from a seed range of its own."""

    environment: Literal["alfworld"] = "alfworld"


class OfficialAlfWorld(AlfWorld):
    """The official games, packed by `dmr data alfworld`. The official train split, shuffled, gives agent_train, router_train and
    validation; the test games are those of an official validation split."""

    environment: Literal["alfworld-official"] = "alfworld-official"
    test_split: Literal["valid_seen", "valid_unseen"] = Field(
        "valid_seen", description="rooms that the train split has (140 games), or others (134 games)"
    )


class WebShop(Games):
    """WebShop, whoever made the catalogue. Splits are as published: of the shuffled goals, test has its games from 0 to 499,
    validation from 500 to 1,499, agent_train and router_train from the rest."""

    step_limit: Count = Field(15, description="steps an episode may take; 15 is the norm for LLM agents")


class GeneratedWebShop(WebShop):
    """Goals in a catalogue made by the generator."""

    environment: Literal["webshop"] = "webshop"
    products: Count = Field(1000, description="products in the generated catalogue")


class OfficialWebShop(WebShop):
    """Goals in the official catalogue, packed by `dmr data webshop`."""

    environment: Literal["webshop-official"] = "webshop-official"
    goals: Literal["synthetic", "human"] = Field(
        "synthetic", description="synthetic: one for each combination of a product's options; human: people's own words"
    )
    price_seed: int = Field(1, ge=0, description="of the prices, which WebShop draws unseeded")
    nouns: Literal["installed", "spacy", "alphabetic"] = Field(
        "installed",
        description="nouns of titles, for the reward: spaCy's en_core_web_sm as in WebShop, or every word of letters;"
        " installed: spaCy where its model is installed. The report says which",
    )


def _environment(benchmark: Any) -> str:  # noqa: ANN401 - what a recipe file holds, or a section
    """Generated ALFWorld games where none is named."""
    if isinstance(benchmark, dict):
        return str(benchmark.get("environment", "alfworld"))
    return benchmark.environment if isinstance(benchmark, Games) else "alfworld"


Benchmark = Annotated[
    Annotated[GeneratedAlfWorld, Tag("alfworld")]
    | Annotated[OfficialAlfWorld, Tag("alfworld-official")]
    | Annotated[GeneratedWebShop, Tag("webshop")]
    | Annotated[OfficialWebShop, Tag("webshop-official")],
    Discriminator(_environment),
]


class Architecture(Section):
    """A Qwen3-architecture causal LM, made from nothing."""

    layers: Count
    width: Count = Field(description="hidden size; decides quanto's group size (see quantization.py)")
    heads: Count
    key_value_heads: Count
    head_width: Count
    feed_forward: Count = Field(description="intermediate size")


class Pretrained(Section):
    """An LLM that exists: a checkpoint folder, or a hub id with a pinned revision."""

    model: str = Field(
        description="folder with config, tokenizer and safetensors weights; or a hub id such as Qwen/Qwen3-1.7B"
    )
    revision: str | None = Field(None, description="commit hash; required for a hub id")


class Training(Section):
    """Behaviour cloning on the expert's actions, then DAgger rounds (Ross et al., 2011). All choices are ours."""

    architecture: Architecture
    updates: Count = Field(description="optimiser updates in all")
    episodes_per_update: Count = Field(description="expert episodes")
    learning_rate: float = Field(gt=0)
    warmup_updates: int = Field(ge=0)
    weight_decay: float = Field(0.1, ge=0)
    looks_per_update: int = Field(
        ge=0, description="single observations, each with what the expert makes of it; ALFWorld's teach thoughts"
    )
    looks_alone_until: int = Field(
        ge=0, description="update up to which there is nothing but looks; after it a quarter of them"
    )
    short_until: int = Field(
        ge=0, description="update up to which only games are used that the expert wins in `short_steps`"
    )
    short_steps: Count = Field(description="steps; short games teach sooner what the goal is")
    dagger_from: int = Field(ge=0, description="update from which on the agent's own episodes are added")
    dagger_every: Count = Field(description="updates between two collections of the agent's own episodes")
    dagger_episodes: Count = Field(description="episodes a collection")
    dagger_steps: Count = Field(
        description="steps that such an episode may take; a failing agent's last ones teach little"
    )
    dagger_tokens: Count = Field(
        description="tokens of the agent's own episodes in an update, which then has half the expert's"
    )
    mistake_rate: Share = Field(
        description="chance that the expert's step is replaced by a random admissible one before DAgger"
    )
    seed: int = Field(0, ge=0)


class PageView(Section):
    """What the agent is shown of a page. A page's segments are what ' [SEP] ' separates; limits are in words, which blanks
    separate. What is cut or hidden is lost to the agent alone: environment and expert have the whole page."""

    hide: tuple[str, ...] = Field(
        (), description="segments that are not shown, each named in full; {task} stands for the task sentence"
    )
    segment_words: Count | None = Field(
        None,
        description="words of a segment that are shown; the rest is lost, and with it the end of long titles, descriptions"
        " and options, which cannot be clicked then (their name must be written in full)",
    )
    observation_words: Count | None = Field(
        None,
        description="words of a whole observation that are shown; the rest is lost, with what stands last on a page, such as"
        " the title and 'Buy Now' below many options",
    )


class Prompt(Section):
    """The append-only transcript. Every segment is tokenized by itself, so that nothing before it ever changes."""

    opening: str = Field("<task> {task} <obs> {observation} <act>", description="first segment")
    turn: str = Field("<task> {task} <obs> {observation} <act>", description="segment after each action")
    thought_end: str | None = Field(
        None, description="a single token; what an action holds before it is thought, not command"
    )
    action_end: str = Field("<end>", description="a single token that ends the action")
    max_action_tokens: Count = Field(12, description="tokens generated for one action at most, its thought included")
    page: PageView | None = Field(
        None,
        exclude_if=_unset,
        description="how pages are shown; without it, observations are shown as they are",
    )


class Agent(Section):
    """The float LLM: trained here from nothing (`training`) or brought along (`pretrained`)."""

    pretrained: Pretrained | None = None
    training: Training | None = None
    prompt: Prompt = Prompt()
    action: Literal["generate", "score"] = Field(
        "generate", description="generate the action, or score the admissible ones"
    )
    temperature: float = Field(0.0, ge=0, description="acting temperature; 0 is greedy")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.action == "score" and self.prompt.thought_end is not None:
            raise ValueError("agent: an agent that thinks first must generate its actions")
        if (self.pretrained is None) == (self.training is None):
            raise ValueError("agent: give exactly one of 'pretrained' and 'training'")
        return self


class Rung(Section):
    """One rung of the precision ladder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    weights: Literal["float", "int8", "int4", "int2"]
    activations: Literal["none", "int8"] = "none"
    keep_float: tuple[str, ...] = Field(
        ("lm_head",), description="modules left in float, as glob patterns of module names"
    )
    ranges: Literal["mse"] | None = Field(
        None,
        exclude_if=_unset,
        description="of int4 and int2: what a group's integers span. Without it, quanto's choice, from the group's least weight"
        " to its greatest (min-max); mse: the part of that with the least squared error (both: Nagel et al., 2021, 3.1)",
    )

    @model_validator(mode="after")
    def _ranges_of_groups(self) -> Self:
        if self.ranges is not None and self.weights not in ("int4", "int2"):
            raise ValueError(f"rung {self.name!r}: ranges is for int4 and int2 weights, these are {self.weights}")
        return self


class Precisions(Section):
    """The precision ladder, highest first, and the two rungs that the router chooses from."""

    ladder: tuple[Rung, ...] = Field(min_length=2)
    high: str
    low: str
    gate_high: Share = Field(0.85, description="success of the high rung on validation games that the gate asks for")
    gate_gap: tuple[Share, Share] = Field((0.20, 0.50), description="high minus low success that the gate asks for")
    kl_episodes: Count = Field(
        50, description="validation games whose expert steps give the mean KL to the float model"
    )

    @model_validator(mode="after")
    def _known_rungs(self) -> Self:
        names = [rung.name for rung in self.ladder]
        if len(set(names)) != len(names):
            raise ValueError(f"precisions.ladder: names are not unique: {names}")
        for field in ("high", "low"):
            if getattr(self, field) not in names:
                raise ValueError(f"precisions.{field}: {getattr(self, field)!r} is not on the ladder {names}")
        return self


class BehaviourPolicy(Section):
    """Who acts while trajectories are collected."""

    name: str
    high_ratio: Share = Field(
        description="chance that a step is taken at high precision: 1 all-high, 0 all-low, else random mixing"
    )


class Trajectories(Section):
    behaviour: tuple[BehaviourPolicy, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0)


class Sensitivity(Section):
    """Labels. The paper's label is KL >= tau; direction, tokens, teacher forcing and tau are ours to choose."""

    direction: Literal["high_low", "low_high", "js"] = Field(
        "high_low", description="KL(high||low), KL(low||high), or Jensen-Shannon"
    )
    tau: float | None = Field(None, gt=0, description="absolute threshold in nats")
    quantile: Share | None = Field(None, description="threshold as a quantile of the KL over all steps")
    won_only: bool = Field(
        False,
        description="ours: only steps of episodes that were won can be sensitive. In a lost episode the precisions diverge"
        " the most, but high precision no longer helps there",
    )
    label_share: tuple[Share, Share] = Field(
        (0.02, 0.6), description="bounds for the share of sensitive steps; outside them the check fails"
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.tau is None) == (self.quantile is None):
            raise ValueError("sensitivity: give exactly one of 'tau' and 'quantile'")
        return self


class Lora(Section):
    rank: Count = 8
    alpha: Count = 16


class Probe(Section):
    """A head on the hidden states of the low-precision agent, which has read the transcript."""

    layers: tuple[Count, ...] = Field(min_length=1, description="decoder layers, from 1, whose outputs are read")
    hidden: Count = Field(32, description="width of the head's hidden layer")


class RouterModel(Section):
    """A probe; or a small causal LM over the transcript whose next token at a routing position is a precision."""

    probe: Probe | None = None
    architecture: Architecture | None = None
    pretrained: Pretrained | None = None
    lora: Lora | None = Field(None, description="train adapters only (needs 'pretrained')")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.probe, self.architecture, self.pretrained].count(None) != 2:
            raise ValueError("router: give exactly one of 'probe', 'architecture' and 'pretrained'")
        if self.lora is not None and self.pretrained is None:
            raise ValueError("router.lora: needs 'pretrained'")
        return self


class KlRouter(Section):
    """Stage 1: class-weighted cross-entropy on the sensitivity labels."""

    model: RouterModel
    epochs: Count
    batch_episodes: Count
    learning_rate: float = Field(gt=0)
    validation_games: Count = Field(description="validation games for Platt scaling and for the closed-loop threshold")
    target_ratio: Share = Field(description="high-precision ratio that the threshold is calibrated to, in closed loop")
    force_search: bool = Field(
        False,
        exclude_if=_unset,
        description="WebShop: high precision at every step whose page has a search bar, without asking the router, if the mean"
        " divergence of the labelled searches is at least tau; the paper's special case, as far as it is known",
    )
    seed: int = Field(0, ge=0)


class GrpoRouter(Section):
    """Stage 2: GRPO on success and cost."""

    updates: Count
    games_per_update: Count
    group_size: int = Field(ge=2, description="episodes of one game in a group")
    iterations: Count = Field(1, description="optimizer steps on the same episodes (GRPO's mu)")
    clip: float = Field(0.2, gt=0, description="GRPO's epsilon: bounds the importance ratio to 1 - clip and 1 + clip")
    learning_rate: float = Field(gt=0)
    reward: Literal["gated", "difference"] = Field(
        "gated",
        description="gated: success * (1 - cost_weight * cost), ours; difference: success - cost_weight * cost, the paper's",
    )
    cost_weight: float = Field(ge=0, description="lambda")
    beta: float = Field(0.0, ge=0, description="KL penalty to the stage-1 router")
    initial_ratio: Share = Field(
        0.4, description="mean routing probability that the tempered stage-1 router starts from"
    )
    validate_every: Count = Field(description="updates between two validations; the best checkpoint is kept")
    validation_games: Count
    target_ratio: Share | None = Field(
        None,
        description="high-precision ratio that the threshold is calibrated to, in closed loop; without it, it is 0.5",
    )
    seed: int = Field(0, ge=0)


class Evaluation(Section):
    random_draws: Count = Field(3, description="draws of random routing at each router's ratio")
    confidence_ratio: Share = Field(
        0.3, description="high-precision ratio that the confidence cascade is calibrated to on validation games"
    )
    confidence_games: Count = Field(60, description="validation games for that")
    confidence: Share = 0.95
    bootstrap: Count = Field(2000, description="bootstrap resamples, of games")
    seed: int = Field(0, ge=0)


class Release(Section):
    """When a newly trained router takes the place of the released one. The rule and its numbers are ours."""

    success_margin: Share = Field(
        0.05,
        description="promoted only if the lower bound of the paired difference in success, new minus released, is above"
        " minus this",
    )
    cost_increase: float = Field(
        0.0, ge=0, description="mean cost of an episode may rise by this share of the released router's at most"
    )
    games: Count | None = Field(None, description="validation games that both play; all of them by default")
    confidence: Share = 0.95
    bootstrap: Count = Field(2000, description="bootstrap resamples, of games")
    seed: int = Field(0, ge=0, description="of the resamples, and of actions drawn at a temperature")


class Retraining(Section):
    """When new trajectories start a retraining. Not part of any hash."""

    min_new_steps: Count = Field(
        2000, description="steps that were ingested since the last sensitivity dataset was made"
    )


class Versioning(Section):
    """What becomes of materialised artefacts besides DVC's cache and `dvc.lock`. Not part of any hash."""

    git: Literal["none", "commit"] = Field(
        "none",
        description="commit: each new entry of dvc.lock also becomes a commit on the branch retrain/<date, UTC>; what is"
        " checked out is never touched",
    )
    remote: str | None = Field(
        None,
        description="DVC remote over which machines exchange artefacts by hash: a worker pulls the inputs that Dagster's"
        " instance records and pushes what it made; without it all stages work on one data folder",
    )


class Runtime(Section):
    """How a stage runs, not what it computes. Not part of any hash; results on CPU are equal for fixed numbers
    of threads and processes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = Field(1, description="torch threads a process")
    processes: Count = Field(2, description="processes that play episodes at once on a CPU; one on a GPU")
    batch_episodes: Count = Field(64, description="episodes acted on at once in a process")

    @model_validator(mode="after")
    def _threads_or_processes(self) -> Self:
        if self.threads > 1 and self.processes > 1:
            raise ValueError("runtime: torch's threads do not survive a fork; give more 'threads' or more 'processes'")
        return self


class Recipe(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    benchmark: Benchmark
    agent: Agent
    precisions: Precisions
    trajectories: Trajectories
    sensitivity: Sensitivity
    kl_router: KlRouter
    grpo_router: GrpoRouter
    evaluation: Evaluation
    release: Release
    retraining: Retraining = Retraining()
    versioning: Versioning = Versioning()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _reference_model(self) -> Self:
        if self.grpo_router.beta and self.kl_router.model.probe:
            raise ValueError(
                "grpo_router.beta: trl reloads the reference as a causal LM, which a probe is not; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _thoughts_of_looks(self) -> Self:
        training, thinks = self.agent.training, self.agent.prompt.thought_end is not None
        if isinstance(self.benchmark, AlfWorld) and training and training.looks_per_update and not thinks:
            raise ValueError("agent: ALFWorld's looks teach thoughts, so they need 'prompt.thought_end'")
        return self


UNHASHED_SECTIONS = frozenset({"retraining", "versioning", "runtime"})
"""Sections that say how a pipeline is run, not what it computes; no stage reads them into its provenance."""


def load_recipe(name: str, folder: Path = RECIPE_FOLDER) -> Recipe:
    """Read `<folder>/<name>.yaml`.

    Raises:
        UserError: there is no such recipe, or it is malformed; the message names the file, the key and what to do.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(recipe_names(folder)) or "none"
        raise UserError(f"unknown recipe {name!r}: there is no {path} (known recipes: {known})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    try:
        recipe = Recipe.model_validate({"name": name, **content})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {problems}") from error
    if recipe.name != name:
        raise UserError(f"{path}: its name is {recipe.name!r}, but the file is called {name!r}")
    return recipe


def recipe_names(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))
