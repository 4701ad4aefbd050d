"""Are our pages, rewards and goals those of WebShop? Episodes recorded from the original are replayed.

The original's result lists take the place of our search, so that later clicks exist; how often our search finds the same is
counted apart.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import NonNegativeInt, ValidationError

from dmr_pipeline.environments.webshop.catalogue import Shop, draw_prices, open_shop, read_pricing, write_terms
from dmr_pipeline.environments.webshop.engine import BACK, NEXT, PAGE_SIZE, PREVIOUS, WebShopEpisode
from dmr_pipeline.environments.webshop.goals import Goal, Goals, ShoppingTask
from dmr_pipeline.environments.webshop.official.packing import pack
from dmr_pipeline.environments.webshop.reward import TYPE_SCORES, matched_share
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

_PRICE_SEED = 1
"""What Python's generator was seeded with before the recordings."""
_RESULTS = re.compile(r"Page (\d+) \(Total results: (\d{1,7})\)")


class Available(FrozenModel):
    has_search_bar: bool
    clickables: tuple[str, ...]


class RecordedStep(FrozenModel):
    """A step of a recorded episode; the first has no action, and the goal."""

    obs: str
    avail: Available
    action: str | None = None
    reward: float = 0.0
    done: bool = False
    goal_index: NonNegativeInt | None = None
    goal: dict[str, Any] | None = None


Kind = Literal["goal", "reward", "observation", "done", "available actions"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Difference(NamedTuple):
    kind: Kind
    where: str
    """Episode and step, from 0."""
    what: str


@dataclass
class Comparison:
    """What was compared, and how it came out."""

    episodes: int = 0
    steps: int = 0
    differences: list[Difference] = field(default_factory=list)
    nouns: list[Difference] = field(default_factory=list)
    """Rewards that differ only through the titles' nouns."""
    searches: int = 0
    same_top_10: int = 0

    @property
    def top_10(self) -> float:
        """Share of searches of ours with the recorded first page."""
        return self.same_top_10 / self.searches if self.searches else 0.0


def read_episodes(path: Path) -> list[list[RecordedStep]]:
    """Recorded episodes, one a line.

    Raises:
        UserError: it is missing, or a line is not a recorded episode.
    """
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


def recorded_shop(data: Path, folder: Path) -> tuple[Shop, Sequence[Goal]]:
    """The authors' files in `data` as a shop in `folder`, prices and goals drawn as for the recordings."""
    pack(data, folder)
    rng = random.Random(_PRICE_SEED)
    rng.getrandbits(32)  # one draw had been made before
    write_terms(draw_prices(read_pricing(folder), rng), "alphabetic", folder)
    shop = open_shop(folder)
    return shop, Goals(shop, rng)


def compare(shop: Shop, goals: Sequence[Goal], episodes: Iterable[Sequence[RecordedStep]]) -> Comparison:
    """Replay recorded episodes in the shop of `recorded_shop`."""
    found = Comparison()
    for number, recorded in enumerate(episodes):
        _compare_episode(shop, goals, recorded, f"episode {number}", found)
    return found


class _Replay(WebShopEpisode):
    """Finds what it is told to."""

    found: tuple[int, ...] = ()

    def find(self, words: str) -> tuple[int, ...]:
        return self.found


def _compare_episode(
    shop: Shop, goals: Sequence[Goal], recorded: Sequence[RecordedStep], name: str, found: Comparison
) -> None:
    first = recorded[0]
    assert first.goal_index is not None
    assert first.goal is not None
    found.episodes += 1
    if first.goal_index >= len(goals):
        found.differences.append(Difference("goal", name, f"goal {first.goal_index}, of {len(goals)}"))
        return
    goal = goals[first.goal_index]
    ours = _as_recorded(goal)
    if wrong := [key for key, value in first.goal.items() if ours.get(key) != value]:
        found.differences.append(Difference("goal", name, f"goal {first.goal_index} differs in {', '.join(wrong)}"))
        return
    episode = _Replay(ShoppingTask(goal, shop))
    for i, step in enumerate(recorded):
        found.steps += 1
        if step.action is None:
            observation, reward, done = episode.reset(), 0.0, False
        else:
            if step.action.startswith("search[") and _RESULTS.search(step.obs):
                episode.found = _recorded_results(shop, recorded[i:])
                found.searches += 1
                words = step.action.removeprefix("search[").removesuffix("]").lower()
                found.same_top_10 += shop.search(words)[:PAGE_SIZE] == episode.found[:PAGE_SIZE]
            observation, reward, done = episode.step(step.action)
        differ = partial(Difference, where=f"{name}, step {i}")
        if reward != step.reward:
            difference = differ("reward", what=f"{reward}, recorded {step.reward}")
            (found.nouns if _only_nouns_differ(episode, step) else found.differences).append(difference)
            # The receipt shows the reward: with the recorded one, is it the same?
            kept, episode.state = episode.state, episode.state._replace(reward=step.reward)
            observation, episode.state = episode.observation(), kept
        if observation != step.obs:
            found.differences.append(differ("observation", what=_first_difference(observation, step.obs)))
        if (episode.has_search_bar(), episode.clickables()) != (step.avail.has_search_bar, step.avail.clickables):
            found.differences.append(differ("available actions", what=_first_different_action(episode, step)))
        if done != step.done:
            found.differences.append(differ("done", what=f"{done}, recorded {step.done}"))
            return


def _as_recorded(goal: Goal) -> dict[str, Any]:
    """As the original names and writes a goal's fields."""
    fields = goal.model_dump(mode="json")
    return fields | {"instruction_text": fields["instruction"], "goal_options": fields["options"]}


def _recorded_results(shop: Shop, steps: Sequence[RecordedStep]) -> tuple[int, ...]:
    """Rows in the order of the result pages that the first step's search showed. The first product stands for what no page
    showed, and for what is not among ours: then pages differ."""
    rows: list[int] = []
    for step in steps:
        if rows and step.action and step.action.startswith("search["):
            break
        if match := _RESULTS.search(step.obs):
            number, total = map(int, match.groups())
            rows = rows or [0] * total
            shown = [text for text in step.avail.clickables if text not in (BACK, PREVIOUS, NEXT)]
            for place, asin in enumerate(shown, start=(number - 1) * PAGE_SIZE):
                if place < len(rows):
                    rows[place] = shop.row(asin) or 0
    return tuple(rows)


def _only_nouns_differ(episode: WebShopEpisode, step: RecordedStep) -> bool:
    """The recorded reward is that of the same matches and another kind of product."""
    state, shop = episode.state, episode.task.shop
    if state.page != "done" or not step.done:
        return False
    assert state.row is not None
    chosen = dict(state.options).values()
    share = matched_share(shop.product(state.row), shop.prices[state.row], chosen, episode.task.goal)
    return step.reward in [score * share for score in TYPE_SCORES]


def _first_different_action(episode: WebShopEpisode, step: RecordedStep) -> str:
    if episode.has_search_bar() != step.avail.has_search_bar:
        return f"search bar {episode.has_search_bar()}, recorded {step.avail.has_search_bar}"
    ours, recorded = episode.clickables(), step.avail.clickables
    pairs = zip_longest(ours, recorded)
    return next(f"{mine!r}, recorded {theirs!r}" for mine, theirs in pairs if mine != theirs)


def _first_difference(ours: str, recorded: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, recorded, strict=False)) if a != b), min(len(ours), len(recorded))
    )
    around = slice(max(0, place - 20), place + 40)
    return f"{ours[around]!r}, recorded {recorded[around]!r}"
