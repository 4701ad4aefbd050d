"""Episodes: a policy picks the precision before each step, the agent at that precision acts, the environment answers.

Many episodes run at once; a finished episode's slot goes to the next task. An episode whose transcript has no room left for
another step ends there and counts as lost, whatever its last reward was. That is ours; an agent that is cut off in the middle has
not done its task.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from dmr_pipeline.agent.memory import halving
from dmr_pipeline.environments.base import Episode, Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.rollout.batch import Batch, Timings
from dmr_pipeline.rollout.failures import Failure
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.kv_cache.choice import token_streams, transcript_capacity
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.policy import RoutingPolicy, SinglePrecision
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory


def play(
    runs: Sequence[RolloutRequest],
    agents: Mapping[str, TokenStreams],
    prompter: Prompter,
    policy: RoutingPolicy,
    step_limit: int,
    action: Literal["generate", "score"] = "generate",
    temperature: float = 0.0,
    seed: int = 0,
    clock: Timings | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    done: dict[int, Trajectory] | None = None,
    known: Known | None = None,
    speculative: Speculative | None = None,
    prompt_lookup: PromptLookup | None = None,
) -> list[Trajectory]:
    """Play all runs, each until it ends, has taken `step_limit` steps or has no room for another; results are in the order of
    `runs` and do not depend on how many slots there are (but for rounding).

    Args:
        agents: precision -> its token streams, dearest first; `SharedStreams` where they have one cache. What they hold of
            other episodes need not be read again.
        action: `generate` writes it token by token; `score` chooses among the admissible commands by their probability,
            each scored in full, the end included.
        temperature: 0 acts greedily; otherwise tokens (or commands) are drawn, seeded by (seed, task, member, turn).
        advance: called with the number of episodes that have just ended (progress).
        done: episodes that were played before, by their index in `runs`; those that end are added, so that where this breaks
            off another call can go on.
        known: greedy actions of these agents, which are looked up, and those that are found are added. Without it everything
            is computed.
        speculative: how long drafts are, where a policy lets one precision draft and another check.
        prompt_lookup: how actions are looked up in the transcript; what they read is then of the passes that they take. Without
            it of one a token, whatever spares some.

    Raises:
        UserError: a step is to be checked where commands are scored, or by a model whose cache cannot be cut; or actions are to
            be looked up there.
    """
    clock = clock if clock is not None else Timings()
    known, speculative = known if temperature == 0 else None, speculative or Speculative()
    batch = Batch(agents, prompter, policy, action, temperature, seed, clock, known, speculative, prompt_lookup)
    playing: dict[int, _Played] = {}
    done = done if done is not None else {}
    queue = [(index, run) for index, run in enumerate(runs) if index not in done][::-1]
    free = list(range(min(len(streams.lengths) for streams in agents.values())))[::-1]
    order: dict[int, int] = {}
    while queue or playing:
        while queue and free:
            index, run = queue.pop()
            slot = free.pop()
            order[slot] = index
            playing[slot] = _start(batch, slot, run, step_limit)
        ended = _step(batch, playing, step_limit)
        for slot in ended:
            batch.end(slot)
            done[order.pop(slot)] = playing.pop(slot).trajectory
            free.append(slot)
        if ended:
            on_progress(len(ended))
    return [done[i] for i in range(len(runs))]


@dataclass(frozen=True)
class _Played:
    """An episode that runs now."""

    run: RolloutRequest
    episode: Episode
    trajectory: Trajectory


def _start(batch: "Batch", slot: int, run: RolloutRequest, step_limit: int) -> _Played:
    episode = run.task.episode()
    opening = episode.reset()
    moment = Moment(1, step_limit, episode.admissible_commands)
    segment = batch.prompter.opening(opening, run.task.instruction, moment)
    batch.begin(slot, run, segment, episode.admissible_commands)
    return _Played(run, episode, Trajectory(run, opening))


def _step(batch: "Batch", playing: Mapping[int, _Played], step_limit: int) -> list[int]:
    """One step of every running episode; returns the slots whose episode has ended."""
    slots = sorted(playing)
    steps = batch.step(slots)
    acted = time.perf_counter()
    ended = []
    for slot, taken in zip(slots, steps, strict=True):
        run, episode, trajectory = playing[slot].run, playing[slot].episode, playing[slot].trajectory
        action = taken.draft.action
        command = batch.prompter.command(action)
        before = episode.state
        observation, reward, over = episode.step(command)
        failure: Failure | None = batch.prompter.parse_failure(action)
        # Where nothing has changed, what is admissible now was so before.
        idle = failure is None and not over and episode.state == before
        if idle and command not in episode.admissible_commands():
            failure = "inadmissible"
        trajectory.steps.append(taken.carried_out(command, observation, failure))
        done = len(trajectory.steps)
        if over or done >= step_limit:
            if not 0 <= reward <= 1:
                raise UserError(
                    f"task {run.task.task_id}: its reward is {reward}, and rewards are in [0, 1], where 1 is success"
                )
            trajectory.reward = reward
            ended.append(slot)
            continue
        moment = Moment(done + 1, step_limit - done, episode.admissible_commands)
        if not batch.go_on(slot, batch.prompter.turn(observation, run.task.instruction, moment)):
            trajectory.outgrown = True
            ended.append(slot)
    batch.clock.environment += time.perf_counter() - acted
    return ended


ALONE = "alone"
"""The precision's name where one model plays that is no rung."""


def play_alone(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    prompter: Prompter,
    step_limit: int,
    slots: int,
    action: Literal["generate", "score"] = "generate",
    temperature: float = 0.0,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    prompt_lookup: PromptLookup | None = None,
) -> list[Trajectory]:
    """One episode of each task, in which one model acts at every step; arguments as in `play`.

    Args:
        slots: episodes at once; halved where a GPU's memory does not suffice.
        max_tokens: that a transcript may have; by default what `transcript_capacity` says.

    Raises:
        UserError: the model has positions for fewer tokens, or a first step does not fit.
    """
    capacity = transcript_capacity(model.config, max_tokens)
    runs, done = [RolloutRequest(task) for task in tasks], dict[int, Trajectory]()

    def attempt(slots: int) -> list[Trajectory]:
        agents, policy = {ALONE: token_streams(model, slots, capacity)}, SinglePrecision(ALONE)
        return play(
            runs,
            agents,
            prompter,
            policy,
            step_limit,
            action,
            temperature,
            on_progress=on_progress,
            done=done,
            prompt_lookup=prompt_lookup,
        )

    return halving(min(slots, len(tasks)), "episodes", attempt)
