"""A shopper that knows what it is looking for: the teacher of agents that are trained here.

It knows which products are of the right kind, with the right attributes and price, which titles often tell, but not their
options, for which it has to open them: it searches for the instruction's own words, opens the products that may do one after
the other, goes back where an option is missing, and buys the first that has them all.
"""

from dmr_pipeline.environments.webshop.engine import BACK, BUY, NEXT, PAGE_SIZE, PREVIOUS, WebShopEpisode, search_words
from dmr_pipeline.environments.webshop.goals import ShoppingTask
from dmr_pipeline.environments.webshop.reward import (
    attribute_matches,
    option_matches,
    reward,
    type_score,
    wanted_options,
)

_PAGES = 3
"""Result pages that are looked at before another search."""


class ShoppingExpert:
    """Follows the episode in one of its own, so that any commands may come."""

    def __init__(self, task: ShoppingTask) -> None:
        self.task = task
        self._episode = WebShopEpisode(task)
        self._searches = 0
        self._opened: set[int] = set()
        self._best: dict[int, float] = {}

    def observe(self, command: str | None, observation: str) -> None:
        if command is None:
            self._episode.reset()
            self._searches = 0
            self._opened.clear()
        else:
            self._episode.step(command)
            self._searches += command.startswith("search[")
            if self._episode.state.row is not None:
                self._opened.add(self._episode.state.row)

    def think(self) -> str:
        """Nothing: pages say all that there is to know."""
        return ""

    def act(self) -> str:
        state = self._episode.state
        if state.page == "start":
            return f"search[{self._words()}]"
        if state.page == "results":
            return f"click[{self._from_results()}]"
        if state.page == "item" and (self._satisfies(self._row) or self._gives_up()):
            return f"click[{self._missing_value() or BUY}]"
        return f"click[{PREVIOUS}]"

    def can_be_satisfied(self) -> bool:
        """Whether the product that the goal was made from, with its options, earns the full reward."""
        row = self.task.shop.row(self.task.goal.asin)
        return row is not None and self._satisfies(row)

    def _words(self) -> str:
        """The whole instruction at first, without its options if that has not helped, then the kind of product."""
        goal = self.task.goal
        words = search_words(goal.instruction)
        first = words
        if isinstance(goal.options, dict) and goal.options:
            first = words.partition(f" with {next(iter(goal.options))}: ")[0]
        return (words, first, goal.query)[min(self._searches, 2)]

    def _from_results(self) -> str:
        """The first product that will do; or else the next page, and after some pages another search."""
        state, shop = self._episode.state, self.task.shop
        first = (state.number - 1) * PAGE_SIZE
        shown = state.results[first : first + PAGE_SIZE]
        for row in shown:
            if self.may_satisfy(row) and (row not in self._opened or self._satisfies(row)):
                return shop.product(row).asin.lower()
        if self._gives_up() and shown:
            return shop.product(max(shown, key=self._best_reward)).asin.lower()
        more = state.number < _PAGES and first + PAGE_SIZE < len(state.results)
        return NEXT if more else BACK

    @property
    def _row(self) -> int:
        row = self._episode.state.row
        assert row is not None
        return row

    def _gives_up(self) -> bool:
        """Takes the best of what it sees, once it has searched in every way."""
        return self._searches > 2

    def _satisfies(self, row: int) -> bool:
        return self._best_reward(row) == 1.0

    def may_satisfy(self, row: int) -> bool:
        """But for its options, which a results page does not show."""
        shop, goal = self.task.shop, self.task.goal
        product = shop.product(row)
        return (
            type_score(product, goal, shop.nouns) == 1.0
            and all(attribute_matches(product, attribute) for attribute in goal.attributes)
            and shop.prices[row] <= goal.price_upper
        )

    def _best_reward(self, row: int) -> float:
        """Of buying the product with the options that fit."""
        if row not in self._best:
            shop, goal = self.task.shop, self.task.goal
            chosen = {name: value for name, value in self._fitting(row) if value is not None}
            self._best[row] = reward(shop.product(row), shop.prices[row], chosen.values(), goal, shop.nouns)
        return self._best[row]

    def _fitting(self, row: int) -> list[tuple[str, str | None]]:
        """For each wanted option, the product's option and value that fit it best: equal names and values first."""
        options = self.task.shop.product(row).options
        offers = [(name, value) for name, values in options.items() for value in values]
        fitting: list[tuple[str, str | None]] = []
        for wanted in wanted_options(self.task.goal):
            name, value = wanted if isinstance(wanted, tuple) else ("", wanted)
            matches = [offer for offer in offers if option_matches(offer[1], wanted)]
            matches.sort(key=lambda offer: (offer != (name, value), offer[1] != value, offer[0] != name))
            fitting.append(matches[0] if matches else ("", None))
        return fitting

    def _missing_value(self) -> str | None:
        """The next value to choose."""
        chosen = dict(self._episode.state.options)
        fitting = {name: value for name, value in self._fitting(self._row) if value is not None}
        return next((value for name, value in fitting.items() if chosen.get(name) != value), None)


def shop_as_expert(task: ShoppingTask, step_limit: int) -> tuple[float, int]:
    """An episode of the expert alone: the reward, and the steps that it took."""
    episode, expert = WebShopEpisode(task), ShoppingExpert(task)
    expert.observe(None, episode.reset())
    for steps in range(1, step_limit + 1):
        command = expert.act()
        observation, reward, over = episode.step(command)
        if over:
            return reward, steps
        expert.observe(command, observation)
    return 0.0, step_limit
