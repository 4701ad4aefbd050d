"""Episodes in which nothing is won: what an agent reads is fixed, a long history first, then what ALFWorld shows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.base import Demonstration, Expert
from dmr_pipeline.rollout.prompts import Prompter


@dataclass(frozen=True)
class Reading:
    """A `Task`: whatever is done, the next observation follows."""

    task_id: str
    instruction: str
    observations: tuple[str, ...]
    """The first holds the history."""
    task_type: str = "reading"

    def episode(self) -> "_Episode":
        return _Episode(self.observations)

    def expert(self) -> Expert:
        raise NotImplementedError("nothing is won here")

    def demonstration(self, rng: random.Random) -> Demonstration:
        raise NotImplementedError("nothing is won here")


@dataclass
class _Episode:
    observations: Sequence[str]
    state: int = 0

    def reset(self) -> str:
        self.state = 0
        return self.observations[0]

    first_observation = reset

    def step(self, command: str) -> tuple[str, float, bool]:
        self.state += 1
        return self.observations[self.state], 0.0, False

    def admissible_commands(self) -> Sequence[str]:
        return ("look",)


@cache
def _played(seed: int) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The task sentence of a generated game, and of the expert's episode each observation and the command after it."""
    game, _ = generate_game(seed)
    episode, expert = game.episode(), game.expert()
    observation, command, over, steps = episode.reset(), None, False, list[tuple[str, str]]()
    while not over:
        expert.observe(command, observation)
        command = expert.act()
        steps.append((observation, command))
        observation, _, over = episode.step(command)
    return game.instruction, tuple(steps)


def history(prompter: Prompter, tokens: int) -> str:
    """Of the expert's episodes, one after another, as many steps as there is room for, written as the prompt has them: what
    stands in the place of the first observation.

    Args:
        tokens: that the opening may have.
    """
    prompt, text = prompter.prompt, ""
    for seed in count():
        task, steps = _played(seed)
        before, after = prompt.turn.replace("{task}", task).split("{observation}")
        for observation, command in steps:
            longer = f"{text}{observation}{after}{command}{prompt.action_end}{before}"
            if len(prompter.opening(longer, task)) > tokens:
                return text
            text = longer
    raise AssertionError("there are games without end")


def episodes(past: str, number: int, repeat: int, steps: int) -> list[Reading]:
    """So many episodes of so many steps with one history; after it, no two read the same.

    Args:
        past: as `history` returns it.
        repeat: other observations for each.
    """
    task, seen = _played(0)
    readings = []
    for slot in range(number):
        rng = random.Random(f"{repeat}/{slot}")
        others = cycle(rng.sample(range(1, 40), 8))
        shown = [rng.choice(_played(seed)[1])[0] for seed, _ in zip(others, range(steps + 1), strict=False)]
        readings.append(Reading(f"{repeat}/{slot}", task, (past + seen[0][0] + shown[0], *shown[1:])))
    return readings
