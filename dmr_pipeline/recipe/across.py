"""What is wrong between sections that are right by themselves."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from inspect import signature

from dmr_pipeline import benchmarks
from dmr_pipeline.recipe.agent import Agent
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.evaluation import Evaluation
from dmr_pipeline.recipe.fields import Section
from dmr_pipeline.recipe.grpo_router import GrpoRouter
from dmr_pipeline.recipe.kl_router import KlRouter
from dmr_pipeline.recipe.precisions import Precisions
from dmr_pipeline.recipe.release import Release
from dmr_pipeline.recipe.sensitivity import Sensitivity
from dmr_pipeline.recipe.text import shown
from dmr_pipeline.recipe.trajectories import Trajectories


def problems_across(sections: Mapping[str, Section]) -> Iterator[str]:
    """What is wrong between sections that are right by themselves, a line each. Checks of sections that are not given are
    left out."""
    for check in _ACROSS:
        wanted = signature(check).parameters
        if wanted.keys() <= sections.keys():
            yield from check(**{name: sections[name] for name in wanted})


def _games_asked_for(
    benchmark: Games,
    precisions: Precisions,
    kl_router: KlRouter,
    grpo_router: GrpoRouter,
    evaluation: Evaluation,
    release: Release,
    sensitivity: Sensitivity,
) -> Iterator[str]:
    """What a field has by default is as many as there are at most; a number that somebody wrote is meant."""
    asked: list[tuple[str, Section, str, str]] = [
        ("precisions", precisions, "kl_episodes", "validation"),
        ("kl_router", kl_router, "validation_games", "validation"),
        ("grpo_router", grpo_router, "validation_games", "validation"),
        ("grpo_router", grpo_router, "games_per_update", "router_train"),
        ("evaluation", evaluation, "confidence_games", "validation"),
        ("evaluation", evaluation, "budget_games", "validation"),
        ("release", release, "games", "validation"),
    ]
    if precisions.gptq is not None:
        asked.append(("precisions.gptq", precisions.gptq, "episodes", "agent_train"))
    if sensitivity.consequences is not None:
        asked.append(("sensitivity.consequences", sensitivity.consequences, "games", "router_train"))
    for name, section, field, split in asked:
        wanted, there = getattr(section, field), getattr(benchmark.splits, split)
        if field in section.model_fields_set and wanted is not None and wanted > there:
            yield f"{name}.{field}: {wanted:,} games, but benchmark.splits.{split} has {there:,}"


def _behaviour_on_the_route(precisions: Precisions, trajectories: Trajectories) -> Iterator[str]:
    if precisions.route == "auto":
        if trajectories.behaviour:
            yield "trajectories.behaviour: which rungs are routed is not known with precisions.route: auto; leave it out"
        return
    for i, policy in enumerate(trajectories.behaviour):
        for rung in policy.shares:
            if rung not in precisions.route:
                yield f"trajectories.behaviour.{i}.shares: {shown(rung)} is none of precisions.route {list(precisions.route)}"


def _reference_model(kl_router: KlRouter, grpo_router: GrpoRouter) -> Iterator[str]:
    model = kl_router.model
    if grpo_router.beta and (model.probe or model.encoder):
        kind = "a probe" if model.probe else "an encoder"
        yield f"grpo_router.beta: trl reloads the reference as a causal LM, which {kind} is not; set it to 0"
    if grpo_router.beta and grpo_router.start == "untrained":
        yield "grpo_router.beta: a penalty to the router of stage 1, in whose place new weights start; set it to 0"


def _branches_of_all_rungs(agent: Agent, precisions: Precisions, grpo_router: GrpoRouter) -> Iterator[str]:
    if grpo_router.branch_groups and agent.temperature > 0:
        yield (
            "grpo_router.branch_groups: members that branch go the same way up to there, and actions are drawn; set"
            " agent.temperature to 0"
        )
    if precisions.route != "auto":  # else it is known once the ladder is made
        yield from grpo_router.too_small_to_branch(len(precisions.route))


def _played_advantages(agent: Agent, kl_router: KlRouter) -> Iterator[str]:
    if kl_router.target == "advantage" and agent.temperature > 0:
        yield (
            "kl_router.target: advantages are of the steps at which the rungs' greedy actions differ, and actions are drawn;"
            " set agent.temperature to 0"
        )


def _drawn_advantages(trajectories: Trajectories, kl_router: KlRouter) -> Iterator[str]:
    shares = [[share for share in policy.shares.values() if share > 0] for policy in trajectories.behaviour]
    if kl_router.target == "advantage" and shares and all(len(of) == 1 for of in shares):
        yield (
            "kl_router.target: advantage learns from episodes in which rungs are drawn at each step; add a policy with shares of"
            " several rungs to trajectories.behaviour"
        )


def _greedy_features(agent: Agent, kl_router: KlRouter) -> Iterator[str]:
    """What is recorded of drafts and margins for training is of greedy actions."""
    greedy = agent.action == "generate" and agent.temperature == 0
    probe = kl_router.model.probe
    wanted = [name for name in (probe.features if probe else ()) if name not in ("repeats", "behind")]
    if wanted and not greedy:
        yield (
            f"kl_router.model.probe.features: {wanted[0]!r} is learned from greedy actions; set agent.action to generate and"
            " agent.temperature to 0, or leave it out"
        )


def _swapped_steps(agent: Agent, sensitivity: Sensitivity, kl_router: KlRouter) -> Iterator[str]:
    if kl_router.target == "consequence" and sensitivity.consequences is None:
        yield "kl_router.target: consequence needs steps that were swapped: give sensitivity.consequences too"
    if sensitivity.consequences is not None and agent.action == "score":
        yield "sensitivity.consequences: steps are told apart by the actions that rungs write; set agent.action to generate"
    if sensitivity.consequences is not None and agent.temperature > 0:
        yield "sensitivity.consequences: where actions are drawn no outcome is due to one step; set agent.temperature to 0"


def _thoughts_of_looks(benchmark: Games, agent: Agent) -> Iterator[str]:
    thinks = agent.prompt.thought_end is not None
    teaches_thoughts = benchmarks.find(benchmark.environment).demonstrations_think
    if teaches_thoughts and agent.imitation and agent.imitation.looks_per_update and not thinks:
        yield f"agent: the looks of {benchmark.environment} teach thoughts, so they need 'prompt.thought_end'"


def _forced_searches(benchmark: Games, kl_router: KlRouter) -> Iterator[str]:
    if not kl_router.force_search:
        return
    there, wanted = (benchmarks.find(name).step_kinds.get("search") for name in (benchmark.environment, "webshop"))
    if there != wanted:
        yield f"kl_router.force_search: no command of {benchmark.environment} is a search ({wanted!r} ...); leave it out"


def _short_games(agent: Agent) -> Iterator[str]:
    imitation = agent.imitation
    if imitation and imitation.short_until and imitation.short_steps < 3:
        where = "training" if agent.training else "finetune"
        yield f"agent.{where}.short_steps: {imitation.short_steps}, but no game can be won in fewer than 3 steps"


def _probe_layers(agent: Agent, kl_router: KlRouter) -> Iterator[str]:
    if agent.training is None or kl_router.model.probe is None:
        return
    layers, there = kl_router.model.probe.layers, agent.training.architecture.layers
    if max(layers, default=0) > there:
        yield f"kl_router.model.probe.layers: {list(layers)}, but the agent has {there}"


def _drafts_of_commands(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if agent.action == "score":
        for name, section in (("speculative", precisions.speculative), ("prompt_lookup", precisions.prompt_lookup)):
            if section is not None:
                yield f"precisions.{name}: with agent.action: score nothing is written, so nothing is drafted; leave it out"


def _kernels_of_bfloat16(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if precisions.kernels is not None and agent.dtype != "bfloat16":
        yield "precisions.kernels: low-bit kernels compute with bfloat16: set agent.dtype to that, or leave kernels out"


def _kept_in_float(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if agent.training is None:
        return
    layers = agent.training.architecture.linear_layers()
    for rung in precisions.ladder:
        if rung.weights == "float":
            continue
        where = f"precisions.ladder: rung {rung.name!r}: keep_float"
        for pattern in rung.keep_float:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                yield f"{where}: {shown(pattern)} fits no linear layer of the agent, which has {layers[0]}, {layers[1]} ..."
        if all(any(fnmatchcase(layer, pattern) for pattern in rung.keep_float) for layer in layers):
            yield f"{where}: {list(rung.keep_float)} leave every linear layer in float, so nothing is quantized"


_ACROSS: tuple[Callable[..., Iterator[str]], ...] = (
    _games_asked_for,
    _behaviour_on_the_route,
    _reference_model,
    _branches_of_all_rungs,
    _played_advantages,
    _drawn_advantages,
    _greedy_features,
    _swapped_steps,
    _thoughts_of_looks,
    _forced_searches,
    _short_games,
    _probe_layers,
    _drafts_of_commands,
    _kernels_of_bfloat16,
    _kept_in_float,
)
"""Their parameters are the sections that they look at."""
