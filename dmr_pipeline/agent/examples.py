"""Training sequences for the agent: transcripts with the expert's action as target at every step."""

import random
from dataclasses import dataclass

from dmr_pipeline.agent.prompts import Prompter
from dmr_pipeline.agent.rollout import Trajectory
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode, listing
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import SENTENCES
from dmr_pipeline.environments.alfworld.household import household

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


def expert_example(game: Game, prompter: Prompter, step_limit: int, mistake_rate: float, rng: random.Random) -> Example:
    """An episode in which the expert acts, but some steps are replaced by a random admissible one for it to repair."""
    episode, expert, builder = AlfWorldEpisode(game), ExploringExpert(game.instruction), ExampleBuilder()
    observation = episode.reset()
    expert.observe(None, observation)
    segment = prompter.opening(observation, game.instruction)
    for _ in range(step_limit):
        wanted, thought = expert.act(), expert.think()
        command = rng.choice(episode.admissible_commands()) if rng.random() < mistake_rate else wanted
        builder.step(segment, prompter.action(command, thought), prompter.action(wanted, thought))
        observation, _, over = episode.step(command)
        if over:
            break
        expert.observe(command, observation)
        segment = prompter.turn(observation, game.instruction)
    return builder.build()


def look_example(game: Game, prompter: Prompter, rng: random.Random) -> Example:
    """One look into a receptacle with random contents, and the thought that follows: is what is wanted there, and which?

    Whether a word of the task stands in an observation is what the agent finds hardest to learn, and an episode asks it but a
    few times. Numbers are random, so that they have to be read.
    """
    receptacle = rng.choice(game.receptacles)
    kinds = sorted(household().abilities)
    shown = sorted(rng.sample(kinds, rng.randint(1, 8)))
    names = [f"{kind} {rng.randint(1, 4)}" for kind in shown]
    wanted = rng.choice(shown if rng.random() < 0.5 else kinds)
    task = rng.choice(SENTENCES[game.task_type]).format(
        thing=wanted, target=game.goal.receptacle_kind or game.goal.lamp
    )
    segment = prompter.turn(f"On the {receptacle.name}, you see {listing(names)}.", task)
    builder = ExampleBuilder()
    if wanted in shown:
        thing = names[shown.index(wanted)]
        action = prompter.action(f"take {thing} from {receptacle.name}", thing)
        builder.step(segment, action, action)
    else:  # where to go next cannot be known from one look: the thought alone is a target
        thought = prompter.action("", f"{wanted} none")[:-1]
        builder.step(segment, thought, thought)
    return builder.build()


def relabelled_example(trajectory: Trajectory, game: Game, prompter: Prompter) -> Example:
    """The agent's own episode with the expert's actions as targets (DAgger, Ross et al., 2011)."""
    expert, builder = ExploringExpert(game.instruction), ExampleBuilder()
    expert.observe(None, trajectory.opening)
    for step in trajectory.steps:
        builder.step(step.segment, step.action, prompter.action(expert.act(), expert.think()))
        expert.observe(step.command, step.observation)
    return builder.build()
