"""Many episodes at once, with the conventions of `gymnasium.vector`.

A slot whose episode has ended starts the next task on the step after, whose command is not looked at (gymnasium's `NEXT_STEP`
autoreset): `terminations` says that an episode ended by itself, `truncations` that it reached the step limit; both can be
true at once.
"""

import string
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Text
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dmr_pipeline.environments.base import Episode, Task

_TEXT = Text(max_length=100_000, min_length=0, charset=frozenset(string.printable))

Step = tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class SlotState(NamedTuple):
    task: int
    """Index among the environment's tasks."""
    episode: Hashable
    steps: int
    ended: bool


class VectorState(NamedTuple):
    """All that changes in a vector environment: can be pickled, kept, and set again in any environment of the same tasks."""

    slots: tuple[SlotState, ...]
    queue: tuple[int, ...]
    random: Mapping[str, Any]


class TextVectorEnv(VectorEnv[tuple[str, ...], Sequence[str], Any]):
    """Observations and actions are texts; an info dictionary holds an array for each key, an entry a slot:

    `admissible_commands` (lists, sorted), `won` (bool), `task_id`.

    Tasks are dealt in an order drawn from the seed, all of them before any comes again. Which slot gets which follows from who
    ends first, so equal seeds and commands give equal episodes.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, tasks: Sequence[Task], num_envs: int, step_limit: int) -> None:
        self.tasks, self.num_envs, self.step_limit = tasks, num_envs, step_limit
        self.single_observation_space = self.single_action_space = _TEXT
        self.observation_space = self.action_space = batch_space(_TEXT, num_envs)
        self._queue: list[int] = []
        self._task = [0] * num_envs
        self._episodes: list[Episode] = []
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=np.bool_)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Start a task in every slot. Without a seed, dealing goes on from where it is."""
        if options:
            raise ValueError(f"reset takes no options, got {sorted(options)}")
        if seed is not None:
            super().reset(seed=seed)
            self._queue = []
        self._episodes = [self.tasks[self._deal(slot)].episode() for slot in range(self.num_envs)]
        self._steps[:] = 0
        self._ended[:] = False
        return tuple(episode.first_observation() for episode in self._episodes), self._infos(self._ended)

    def step(self, actions: Sequence[str]) -> Step:
        """One command for each slot.

        Raises:
            RuntimeError: before the first `reset`.
            ValueError: another number of commands than slots.
        """
        if not self._episodes:
            raise RuntimeError("call reset before step")
        observations = []
        rewards = np.zeros(self.num_envs)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        for slot, (command, starts) in enumerate(zip(actions, self._ended.tolist(), strict=True)):
            if starts:
                self._episodes[slot] = self.tasks[self._deal(slot)].episode()
                self._steps[slot] = 0
                observations.append(self._episodes[slot].first_observation())
            else:
                observation, rewards[slot], terminations[slot] = self._episodes[slot].step(command)
                self._steps[slot] += 1
                observations.append(observation)
        truncations = self._steps >= self.step_limit
        self._ended = terminations | truncations
        return tuple(observations), rewards, terminations, truncations, self._infos(terminations & (rewards >= 1))

    @property
    def state(self) -> VectorState:
        slots = [
            SlotState(task, episode.state, int(steps), bool(ended))
            for task, episode, steps, ended in zip(self._task, self._episodes, self._steps, self._ended, strict=True)
        ]
        return VectorState(tuple(slots), tuple(self._queue), self.np_random.bit_generator.state)

    @state.setter
    def state(self, state: VectorState) -> None:
        """Go back to a state.

        Raises:
            ValueError: it is of another number of slots.
        """
        if len(state.slots) != self.num_envs:
            raise ValueError(f"a state of {len(state.slots)} slots, but the environment has {self.num_envs}")
        if not self._episodes:
            self._episodes = [self.tasks[slot.task].episode() for slot in state.slots]
        for i, slot in enumerate(state.slots):
            if slot.task != self._task[i]:
                self._episodes[i] = self.tasks[slot.task].episode()
            self._task[i], self._steps[i], self._ended[i] = slot.task, slot.steps, slot.ended
            self._episodes[i].state = slot.episode
        self._queue = list(state.queue)
        self.np_random.bit_generator.state = state.random

    def _deal(self, slot: int) -> int:
        if not self._queue:
            self._queue = self.np_random.permutation(len(self.tasks)).tolist()
        self._task[slot] = self._queue.pop()
        return self._task[slot]

    def _infos(self, won: NDArray[np.bool_]) -> dict[str, Any]:
        commands, task_ids = np.empty(self.num_envs, dtype=object), np.empty(self.num_envs, dtype=object)
        for slot, episode in enumerate(self._episodes):
            commands[slot] = episode.admissible_commands()
            task_ids[slot] = self.tasks[self._task[slot]].task_id
        return {"admissible_commands": commands, "won": won.copy(), "task_id": task_ids}
