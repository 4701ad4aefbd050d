"""Are our pages, rewards and goals those of WebShop? Episodes recorded from the original are replayed.

The original's result lists take the place of our search, so that later clicks exist; how often our search finds the same is
counted apart.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmr_pipeline.environments.webshop.catalogue import Shop
from dmr_pipeline.environments.webshop.engine import BACK, NEXT, PAGE_SIZE, PREVIOUS, WebShopEpisode
from dmr_pipeline.environments.webshop.goals import Goal, ShoppingTask
from dmr_pipeline.errors import UserError

PRICE_SEED = 1
"""What Python's generator was seeded with before the recordings."""
_TOTAL = "(Total results: "
_KINDS = (0.0, 0.1, 0.5, 1.0)
"""What the kind of product can multiply a reward by."""


class Available(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    has_search_bar: bool
    clickables: tuple[str, ...]


class RecordedStep(BaseModel):
    """A step of a recorded episode; the first has no action, and the goal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    obs: str
    avail: Available
    action: str | None = None
    reward: float = 0.0
    done: bool = False
    goal_index: int | None = None
    goal: dict[str, Any] | None = None


@dataclass
class Comparison:
    """What was compared, and how it came out."""

    episodes: int = 0
    steps: int = 0
    differences: list[str] = field(default_factory=list)
    """Each names its episode and step, and says what differs."""
    nouns: list[str] = field(default_factory=list)
    """Steps whose reward differs only through the titles' nouns."""
    searches: int = 0
    same_top_10: int = 0

    @property
    def top_10(self) -> float:
        """Share of searches of ours with the recorded first page."""
        return self.same_top_10 / self.searches if self.searches else 0.0


def read_episodes(path: Path) -> list[list[RecordedStep]]:
    """Raises: UserError: it is missing, or a line is not a recorded episode."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: name a file of recorded WebShop episodes") from error
    episodes = []
    for number, line in enumerate(lines, start=1):
        try:
            steps = [RecordedStep.model_validate(step) for step in json.loads(line)]
        except (ValueError, TypeError, ValidationError) as error:
            raise UserError(
                f"{path}, line {number}: not a recorded episode ({' '.join(str(error).split())})"
            ) from error
        if (
            not steps
            or steps[0].goal is None
            or steps[0].goal_index is None
            or any(s.action is None for s in steps[1:])
        ):
            raise UserError(f"{path}, line {number}: its first step must have a goal, and the others an action")
        episodes.append(steps)
    return episodes


def compare(shop: Shop, goals: Sequence[Goal], episodes: Sequence[Sequence[RecordedStep]]) -> Comparison:
    """Replay recorded episodes. Prices and goals are to be drawn from `recorded_generator`."""
    found = Comparison()
    for number, recorded in enumerate(episodes):
        _compare_episode(shop, goals, recorded, f"episode {number}", found)
    return found


class _Replay(WebShopEpisode):
    """Finds what was recorded."""

    def __init__(self, task: ShoppingTask, results: Iterator[tuple[int, ...]]) -> None:
        super().__init__(task)
        self._results = results

    def find(self, words: str) -> tuple[int, ...]:
        return next(self._results)


def _compare_episode(
    shop: Shop, goals: Sequence[Goal], recorded: Sequence[RecordedStep], name: str, found: Comparison
) -> None:
    first = recorded[0]
    assert first.goal_index is not None
    assert first.goal is not None
    found.episodes += 1
    goal = goals[first.goal_index]
    if wrong := [key for key, value in first.goal.items() if _field(goal, key) != value]:
        found.differences.append(f"{name}: goal {first.goal_index} differs in {', '.join(wrong)}")
        return
    searches = [i for i, step in enumerate(recorded) if step.action and step.action.startswith("search[")]
    lists = {i: _recorded_results(shop, recorded[i : _next(searches, i, len(recorded))]) for i in searches}
    episode = _Replay(ShoppingTask(goal, shop), iter(lists.values()))
    for i, step in enumerate(recorded):
        where = f"{name}, step {i}"
        found.steps += 1
        if step.action is None:
            observation, reward, done = episode.reset(), 0.0, False
        else:
            observation, reward, done = episode.step(step.action)
        if reward != step.reward and _only_kind_differs(reward, step.reward):
            found.nouns.append(f"{where}: reward {reward}, recorded {step.reward}")
            observation = observation.replace(str(reward), str(step.reward))
        elif reward != step.reward:
            found.differences.append(f"{where}: reward {reward}, recorded {step.reward}")
        if observation != step.obs:
            found.differences.append(f"{where}: observation {_first_difference(observation, step.obs)}")
        elif done != step.done:
            found.differences.append(f"{where}: done is {done}, recorded {step.done}")
        elif (episode.has_search_bar(), episode.clickables()) != (step.avail.has_search_bar, step.avail.clickables):
            found.differences.append(f"{where}: other things can be clicked, or the search bar differs")
    for i in searches:
        action = recorded[i].action
        assert action is not None
        words = action.removeprefix("search[").removesuffix("]").lower()
        found.searches += 1
        found.same_top_10 += shop.search(words)[:PAGE_SIZE] == lists[i][:PAGE_SIZE]


def _field(goal: Goal, key: str) -> Any:  # noqa: ANN401 - what the recording holds under the key
    """As the original names and writes it."""
    names = {"instruction_text": "instruction", "goal_options": "options"}
    value = getattr(goal, names.get(key, key))
    return list(value) if isinstance(value, tuple) else value


def _next(searches: Sequence[int], current: int, end: int) -> int:
    return next((i for i in searches if i > current), end)


def _recorded_results(shop: Shop, steps: Sequence[RecordedStep]) -> tuple[int, ...]:
    """Rows in the order of the result pages that were shown; what no page showed is filled with the first product."""
    total = int(steps[0].obs.partition(_TOTAL)[2].partition(")")[0])
    rows = [0] * total
    for step in steps:
        if _TOTAL not in step.obs:
            continue
        page = int(step.obs.partition(_TOTAL)[0].rsplit("Page ", 1)[1])
        shown = [text for text in step.avail.clickables if text not in (BACK, PREVIOUS, NEXT)]
        for place, asin in enumerate(shown, start=(page - 1) * PAGE_SIZE):
            row = shop.row(asin)
            if row is None:
                raise UserError(f"the recorded product {asin} is not among the data: name the data they were made on")
            rows[place] = row
    return tuple(rows)


def _only_kind_differs(first: float, second: float) -> bool:
    """Two rewards of equal matches, whose products are of different kinds."""
    return any(abs(first * a - second * b) < 1e-9 for a in _KINDS for b in _KINDS if a * b) or 0.0 in (first, second)


def _first_difference(ours: str, recorded: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, recorded, strict=False)) if a != b), min(len(ours), len(recorded))
    )
    around = slice(max(0, place - 20), place + 40)
    return f"{ours[around]!r}, recorded {recorded[around]!r}"


def recorded_generator() -> random.Random:
    """The generator that prices and goals of the recordings were drawn from: one draw had been made before them."""
    rng = random.Random(PRICE_SEED)
    rng.getrandbits(32)
    return rng
