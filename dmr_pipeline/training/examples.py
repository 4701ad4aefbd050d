"""Training sequences for the agent: transcripts with the expert's action as target at every step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout.trajectory import Trajectory

IGNORED = -100
"""Target of a token that is not trained on (the value that torch's cross-entropy skips)."""


@dataclass(frozen=True)
class Example:
    """One transcript. `targets[i]` is what should follow `tokens[i]`, or IGNORED."""

    tokens: list[int]
    targets: list[int]
    steps: int


class ExampleBuilder:
    """Grows an example step by step.

    Where the action taken is not the expert's, the expert's tokens are targets up to and including the first one that
    differs: what would follow it is not in the transcript.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.steps = 0

    def step(self, segment: list[int], taken: list[int], expert: list[int]) -> None:
        self.steps += 1
        self.tokens += segment
        self.targets += [IGNORED] * (len(segment) - 1)
        agreed = 0
        while agreed < min(len(taken), len(expert)) and taken[agreed] == expert[agreed]:
            agreed += 1
        labels = expert[: agreed + 1]
        self.tokens += taken
        self.targets += labels + [IGNORED] * (len(taken) + 1 - len(labels))
        # The target after the last token taken belongs to the next segment's first token: never trained.
        self.targets = [*self.targets[: len(self.tokens) - 1], IGNORED]

    def build(self) -> Example:
        return Example(self.tokens, self.targets, self.steps)


def expert_example(task: Task, prompter: Prompter, step_limit: int, mistake_rate: float, rng: random.Random) -> Example:
    """An episode in which the expert acts, but some steps are replaced by a random admissible one for it to repair."""
    episode, expert, builder = task.episode(), task.expert(), ExampleBuilder()
    observation = episode.reset()
    expert.observe(None, observation)
    segment = prompter.opening(observation, task.instruction, Moment(1, step_limit, episode.admissible_commands))
    for done in range(1, step_limit + 1):
        wanted, thought = expert.act(), expert.think()
        command = rng.choice(episode.admissible_commands()) if rng.random() < mistake_rate else wanted
        builder.step(segment, prompter.action(command, thought), prompter.action(wanted, thought))
        observation, _, over = episode.step(command)
        if over:
            break
        expert.observe(command, observation)
        moment = Moment(done + 1, step_limit - done, episode.admissible_commands)
        segment = prompter.turn(observation, task.instruction, moment)
    return builder.build()


def refuse_lost_commands(tasks: Sequence[Task], prompter: Prompter, step_limit: int, exact_words: bool) -> None:
    """Of the expert's episodes of these tasks: what its commands are once an agent of this tokenizer has written them.

    Args:
        exact_words: as of `Benchmark`.

    Raises:
        UserError: another command comes back, so that no agent could ever issue this one. Case and blanks at the ends are no
            difference.
    """
    for task in tasks:
        episode, expert = task.episode(), task.expert()
        expert.observe(None, episode.reset())
        for _ in range(step_limit):
            wanted = expert.act()
            written = prompter.command(prompter.action(wanted, expert.think()))
            if written.strip().casefold() != wanted.strip().casefold():
                remedy = (
                    "its words are not all in what `texts` returns" if exact_words else "set exact_words = True there"
                )
                raise UserError(
                    f"agent.training: the command {wanted!r} of task {task.task_id} would come back as {written!r} from the word"
                    f" tokenizer that is made of the benchmark's texts: {remedy}"
                )
            observation, _, over = episode.step(wanted)
            if over:
                break
            expert.observe(wanted, observation)


def demonstration_example(task: Task, prompter: Prompter, rng: random.Random) -> Example:
    """A single-step demonstration as a transcript of its own; where it has no command, the thought alone is a target."""
    shown, builder = task.demonstration(rng), ExampleBuilder()
    action = prompter.thought(shown.thought) if shown.command is None else prompter.action(shown.command, shown.thought)
    builder.step(prompter.opening(shown.observation, shown.instruction), action, action)
    return builder.build()


def relabelled_example(trajectory: Trajectory, prompter: Prompter) -> Example:
    """The agent's own episode with the expert's actions as targets (DAgger, Ross et al., 2011)."""
    expert, builder = trajectory.run.task.expert(), ExampleBuilder()
    expert.observe(None, trajectory.opening)
    for step in trajectory.steps:
        builder.step(step.segment, step.action, prompter.action(expert.act(), expert.think()))
        expert.observe(step.command, step.observation)
    return builder.build()
