"""What every benchmark offers to the agent, the router and the evaluation."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SEPARATOR = " [SEP] "
"""Between the parts of an observation, where a benchmark shows pages made of parts."""


class Task(Protocol):
    """One game or goal: immutable, cheap to hold in thousands."""

    @property
    def task_id(self) -> str: ...

    @property
    def task_type(self) -> str: ...

    @property
    def instruction(self) -> str:
        """The task sentence, without the observation around it."""
        ...

    def episode(self) -> "Episode":
        """A new episode of it."""
        ...

    def expert(self) -> "Expert":
        """The teacher of agents that are trained here."""
        ...

    def demonstration(self, rng: random.Random) -> "Demonstration":
        """A single step of a task like it, drawn at random."""
        ...


class Episode(Protocol):
    """One running episode of a task."""

    @property
    def state(self) -> Hashable:
        """All that changes in it. Immutable and picklable: to clone it is to keep it, to restore it is to assign it."""
        ...

    @state.setter
    def state(self, state: Any) -> None: ...  # noqa: ANN401 - a state of the same environment

    def reset(self) -> str:
        """Start anew; returns the first observation, without the task sentence."""
        ...

    def first_observation(self) -> str:
        """Start anew; returns what the benchmark's own environment says then, the task included."""
        ...

    def step(self, command: str) -> tuple[str, float, bool]:
        """Take one action; returns observation, reward in [0, 1] and whether the episode has ended by itself."""
        ...

    def admissible_commands(self) -> Sequence[str]:
        """Commands that do something here, sorted."""
        ...


class Expert(Protocol):
    """A hand-written policy that agents learn from: it goes on from whatever the transcript says."""

    def observe(self, command: str | None, observation: str) -> None:
        """Take note of what `command` (None at the start) showed. Any commands may come, not only the expert's own."""
        ...

    def think(self) -> str:
        """A few words on what the next command is about, for agents that learn to think."""
        ...

    def act(self) -> str:
        """The next command."""
        ...


@dataclass(frozen=True)
class Demonstration:
    """A single step: one observation by itself and what the expert makes of it, a lesson shorter than an episode."""

    observation: str
    instruction: str
    command: str | None
    """The next command; None where it cannot be known from one observation."""
    thought: str
