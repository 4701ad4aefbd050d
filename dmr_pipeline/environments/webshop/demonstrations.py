"""Single results pages, for an agent to learn which product is worth a click."""

import random

from dmr_pipeline.environments.base import Demonstration
from dmr_pipeline.environments.webshop.engine import PAGE_SIZE, State, WebShopEpisode
from dmr_pipeline.environments.webshop.expert import ShoppingExpert
from dmr_pipeline.environments.webshop.goals import ShoppingTask

_SAME_KIND = 6
"""Products of the wanted kind that a page has at most, besides the one that is wanted."""


def results_shown(task: ShoppingTask, rng: random.Random) -> Demonstration:
    """A page of products drawn at random, the goal's own among them, and the click on the first that may do.

    A search puts that one first most of the time, so that episodes alone teach little of reading titles.
    """
    shop, goal = task.shop, task.goal
    own = shop.row(goal.asin)
    assert own is not None
    kind = [row for row in shop.rows_where("query", goal.query) if row != own]
    rows = {own: None} | dict.fromkeys(rng.sample(kind, min(len(kind), rng.randint(1, _SAME_KIND))))
    rows |= dict.fromkeys(rng.sample(range(len(shop)), min(len(shop), PAGE_SIZE)))
    page = list(rows)[:PAGE_SIZE]
    rng.shuffle(page)
    episode, expert = WebShopEpisode(task), ShoppingExpert(task)
    episode.state = State("results", tuple(page))
    chosen = next(row for row in page if row == own or expert.may_satisfy(row))
    return Demonstration(episode.observation(), task.instruction, f"click[{shop.product(chosen).asin.lower()}]", "")
