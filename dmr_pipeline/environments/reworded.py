"""The same games in other words: what an observation lists comes in another order. Nothing else changes, and every word stays one
that an agent knows, so that what differs in a policy's success is due to the wording alone (a test of robustness, ours)."""

import random
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dmr_pipeline.environments.base import Demonstration, Episode, Expert, Task

_LISTED = re.compile(r"(?<=you see )an? [^.]*?(?=\.)")
_BETWEEN = re.compile(r", and |, | and ")


def reworded(text: str, seed: int) -> str:
    """Each list that follows "you see" in an order drawn by the seed and the list itself: what is seen again reads the same."""

    def in_another_order(found: re.Match[str]) -> str:
        items = _BETWEEN.split(found[0])
        separators = _BETWEEN.findall(found[0])
        random.Random(f"{seed} {found[0]}").shuffle(items)
        return items[0] + "".join(between + item for between, item in zip(separators, items[1:], strict=True))

    return _LISTED.sub(in_another_order, text)


@dataclass(frozen=True)
class RewordedTask:
    """A task whose episodes tell what they list in another order."""

    task: Task
    seed: int

    @property
    def task_id(self) -> str:
        return self.task.task_id

    @property
    def task_type(self) -> str:
        return self.task.task_type

    @property
    def instruction(self) -> str:
        return self.task.instruction

    def episode(self) -> "RewordedEpisode":
        return RewordedEpisode(self.task.episode(), self.seed)

    def expert(self) -> Expert:
        return self.task.expert()

    def demonstration(self, rng: random.Random) -> Demonstration:
        return self.task.demonstration(rng)


class RewordedEpisode:
    def __init__(self, episode: Episode, seed: int) -> None:
        self._episode, self._seed = episode, seed

    @property
    def state(self) -> Hashable:
        return self._episode.state

    @state.setter
    def state(self, state: Hashable) -> None:
        self._episode.state = state

    def reset(self) -> str:
        return reworded(self._episode.reset(), self._seed)

    def first_observation(self) -> str:
        return reworded(self._episode.first_observation(), self._seed)

    def step(self, command: str) -> tuple[str, float, bool]:
        observation, reward, over = self._episode.step(command)
        return reworded(observation, self._seed), reward, over

    def admissible_commands(self) -> Sequence[str]:
        return self._episode.admissible_commands()
