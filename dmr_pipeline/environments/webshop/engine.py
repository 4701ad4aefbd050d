"""The shop as an agent sees it: pages as text, moves between them, and the reward at the end (WebShop's text mode).

Actions are `search[words]`, on every page, and `click[text]` of something that the page offers; anything else changes nothing.

Pages and moves are those of the original, its quirks included: where an option's value reads like a button, the button is
clicked ("attributes", whose button is hidden, too), and a title or bullet point of blanks alone is an empty part of its page.
"""

import json
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from dmr_pipeline.environments.base import SEPARATOR
from dmr_pipeline.environments.webshop.catalogue import Product
from dmr_pipeline.environments.webshop.goals import ShoppingTask
from dmr_pipeline.environments.webshop.reward import reward

PAGE_SIZE = 10
BACK, PREVIOUS, NEXT, BUY = "back to search", "< prev", "next >", "buy now"
SubPage = Literal["description", "features", "reviews"]
SUB_PAGES: tuple[SubPage, ...] = get_args(SubPage)
ATTRIBUTES: Literal["attributes"] = "attributes"
"""A page that nothing leads to but an option's value of this name."""
_HTML_BLANKS = " \t\n\f\r"
_ACTION = re.compile(r"(.+)\[(.+)\]")


class State(NamedTuple):
    """All that changes in an episode."""

    page: Literal["start", "results", "item", "done", "attributes"] | SubPage = "start"
    results: tuple[int, ...] = ()
    """Rows of the shop's products."""
    number: int = 1
    """Of the results page."""
    row: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    """Names and values that were chosen, in the order in which the names were chosen first."""
    reward: float = 0.0


class WebShopEpisode:
    """One running episode of a shopping task."""

    def __init__(self, task: ShoppingTask) -> None:
        self.task, self.state = task, State()

    def reset(self) -> str:
        """Start anew; the start page, which has the instruction on it as every page but the last."""
        self.state = State()
        return self.observation()

    first_observation = reset

    def step(self, command: str) -> tuple[str, float, bool]:
        """Take one action; returns observation, reward and whether the product was bought."""
        if self.state.page == "done":
            raise RuntimeError("the episode has ended: call reset")
        verb, argument = _named(command)
        if verb == "search":
            self.state = State("results", self.find(argument))
        elif verb == "click" and argument in self.clickables() and argument != "search":
            self.state = self._clicked(argument)
        return self.observation(), self.state.reward, self.state.page == "done"

    def find(self, words: str) -> tuple[int, ...]:
        """Rows of what a search finds. A first word in angle brackets asks for products at random (`<r>`), of an attribute
        (`<a>`), of a category (`<c>`) or of a query (`<q>`)."""
        shop = self.task.shop
        first, _, rest = words.partition(" ")
        match first:
            case "<r>":
                return shop.at_random(self.task.task_id)
            case "<a>":
                return shop.with_attribute(rest.strip())
            case "<c>":
                return shop.rows_where("category", rest.partition(" ")[0].strip())
            case "<q>":
                return shop.rows_where("query", rest.strip())
            case _:
                return shop.search(words)

    def has_search_bar(self) -> bool:
        return self.state.page == "start"

    def clickables(self) -> tuple[str, ...]:
        """Texts that can be clicked, in the page's order."""
        state = self.state
        match state.page:
            case "start":
                return ("search",)
            case "done":
                return ()
            case "results":
                back = (BACK, PREVIOUS, NEXT) if state.number > 1 else (BACK, NEXT)
                return (*back, *(self._product(row).asin.lower() for row in self._shown()))
            case "item":
                values = [value for values in self._bought.options.values() for value in values]
                return tuple(dict.fromkeys((BACK, PREVIOUS, *SUB_PAGES, BUY, *values)))
            case _:
                return (BACK, PREVIOUS)

    def admissible_commands(self) -> tuple[str, ...]:
        """Every click; and where there is a search bar, of all searches the one for the instruction's own words.

        An option's value that no command can name (it is empty, "search", or has a bracket) is left out.
        """
        if self.has_search_bar():
            return (f"search[{search_words(self.task.instruction)}]",)
        clicks = {f"click[{text}]": ("click", text) for text in self.clickables() if text != "search"}
        return tuple(sorted(click for click, named in clicks.items() if _named(click) == named))

    def observation(self) -> str:
        return SEPARATOR.join(text.strip() for text in self._texts() if _is_part(text))

    def _clicked(self, text: str) -> State:
        state = self.state
        if state.page == "item":
            if text == BUY:
                return state._replace(page="done", reward=self._reward())
            for sub_page in (*SUB_PAGES, ATTRIBUTES):
                if text == sub_page:
                    return state._replace(page=sub_page)
            # Of equal values the last name counts.
            names = [name for name, values in self._bought.options.items() if text in values]
            if names and text not in (BACK, PREVIOUS):
                return state._replace(options=tuple((dict(state.options) | {names[-1]: text}).items()))
        if text == BACK:
            return State()
        if text == PREVIOUS:
            if state.page == "results":
                return state._replace(number=state.number - 1)
            return (
                State("results", state.results, state.number) if state.page == "item" else state._replace(page="item")
            )
        if text == NEXT:
            return state._replace(number=state.number + 1)
        return state._replace(page="item", row=self.task.shop.row(text))

    def _reward(self) -> float:
        shop, row = self.task.shop, self.state.row
        assert row is not None
        return reward(
            self._bought, shop.prices[row], list(dict(self.state.options).values()), self.task.goal, shop.nouns
        )

    @property
    def _bought(self) -> Product:
        """The product whose page this is."""
        assert self.state.row is not None
        return self._product(self.state.row)

    def _product(self, row: int) -> Product:
        return self.task.shop.product(row)

    def _shown(self) -> tuple[int, ...]:
        first = (self.state.number - 1) * PAGE_SIZE
        return self.state.results[first : first + PAGE_SIZE]

    def _texts(self) -> list[str]:
        """Texts between the tags of the page."""
        state = self.state
        instruction = ["Instruction:", self.task.instruction]
        match state.page:
            case "start":
                return ["WebShop", *instruction, "Search"]
            case "done":
                return _receipt(self._bought.asin, dict(state.options), state.reward)
            case "results":
                title = f"Page {state.number} (Total results: {len(state.results)})"
                previous = ["< Prev"] if state.number > 1 else []
                products = [self._product(row) for row in self._shown()]
                rows = [text for p in products for text in (p.asin, p.title, p.price_tag)]
                return [*instruction, "Back to Search", title, *previous, "Next >", *rows]
        top = [*instruction, "Back to Search", "< Prev"]
        product = self._bought
        match state.page:
            case "item":
                options = [text for name, values in product.options.items() for text in (name, *values)]
                buttons = ["Description", "Features", "Reviews", "Buy Now"]
                return [*top, *options, product.title, f"Price: {product.price_tag}", "Rating: N.A.", *buttons]
            case "description":
                return [*top, product.description]
            case "features":
                return [*top, *(f" {point}" for point in product.bullet_points)]
            case "attributes":
                attributes = [f" {attribute}" for attribute in product.attributes]
                return [*top, *attributes, product.category, product.query, product.product_category]
            case _:
                return top


def _named(command: str) -> tuple[str, str]:
    """Verb and lower-cased argument of a command; two empty ones where it is none."""
    match = _ACTION.match(command)
    return (match[1], match[2].lower()) if match else ("", "")


def _is_part(text: str) -> bool:
    """Whether WebShop shows a text between tags. Blanks with a line break it takes for the page's own, other blanks not (as
    BeautifulSoup tells them apart)."""
    return text != "" and not ("\n" in text and not text.strip(_HTML_BLANKS))


def search_words(instruction: str) -> str:
    """An instruction without its first words and its price: what one would search for."""
    return instruction.lower().partition(", and price lower than")[0].removeprefix("find me ")


def _receipt(asin: str, options: Mapping[str, str], score: float) -> list[str]:
    purchased = ["Purchased", "asin", asin, "options", _json(options), "attrs", "None", "category", "None"]
    purchased += ["query", "None", "product category", "None"]
    target = ["Target", "asin", "options", "attrs", "price upper", "instuction text", "category", "product category"]
    thanks = ["Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)"]
    result = ["Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details", "None"]
    return [*thanks, *purchased, *target, "query", "Goal", "None", *result]


def _json(options: Mapping[str, str]) -> str:
    """As the original's page template writes it: keys sorted, characters that HTML reserves escaped."""
    text = json.dumps(options, sort_keys=True)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
