"""WebShop's reward (Yao et al., 2022): how well what was bought fits what was asked for.

total = r_type * (matched attributes + matched options + [price within the limit]) / (attributes + options + 1)

The original's quirks are kept, since published scores contain them: an option is replaced by the first colour word found
anywhere in it ('1877brown' and 'tan' in 'tank' too), but of a synthetic goal's option only where it is the whole value.
"""

import re
from collections.abc import Callable, Collection
from difflib import SequenceMatcher
from functools import lru_cache

from dmr_pipeline.environments.webshop.catalogue import Product
from dmr_pipeline.environments.webshop.goals import Goal

TYPE_SCORES = (0.0, 0.1, 0.5, 1.0)
_MATCH = 85
"""A match is a fuzzy ratio above this, of 100."""
_COLOURS = (  # noqa: SIM905 - a list would be a hundred lines
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel "
    "champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim "
    "eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki "
    "lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard "
    "natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver "
    "skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()
"""The colour words of WebShop, in its order: the first that is found counts."""
_DROPPED = dict.fromkeys(range(0x80, 0x100))
_NO_WORD = re.compile(r"\W")


def reward(
    product: Product, price: float, chosen: Collection[str], goal: Goal, nouns: Callable[[str], list[str]]
) -> float:
    """The reward, in [0, 1], of buying a product.

    Args:
        price: dollars.
        chosen: option values.
        nouns: of a title (see nouns.py).
    """
    return type_score(product, goal, nouns) * matched_share(product, price, chosen, goal)


def matched_share(product: Product, price: float, chosen: Collection[str], goal: Goal) -> float:
    """The second factor of the reward, which does not depend on the kind of product."""
    matched = (
        sum(attribute_matches(product, attribute) for attribute in goal.attributes)
        + sum(any(option_matches(value, wanted) for value in chosen) for wanted in wanted_options(goal))
        + (price <= goal.price_upper)
    )
    return matched / (len(goal.attributes) + len(goal.options) + 1)


def type_score(product: Product, goal: Goal, nouns: Callable[[str], list[str]]) -> float:
    """1 where the product is of the goal's kind; 0.5, 0.1 or 0 the less their titles have in common."""
    wanted = nouns(goal.name)
    common = len(set(nouns(product.title)) & set(wanted)) / len(wanted) if wanted else 0.2
    if common == 0.0:
        return 0.0
    if common < 0.1:
        return 0.1
    path, wanted_path = (
        {part.strip() for part in category.split("›")} for category in (product.product_category, goal.product_category)
    )
    return 1.0 if product.query == goal.query or len(path & wanted_path) >= 2 or common > 0.2 else 0.5


def attribute_matches(product: Product, attribute: str) -> bool:
    """One of the product's attributes is alike, or the text of its pages has it."""
    if any(token_set_ratio(own, attribute) > _MATCH for own in product.attributes):
        return True
    return any(
        attribute in text.lower() for text in (product.title, " ".join(product.bullet_points), product.description)
    )


def wanted_options(goal: Goal) -> list[str | tuple[str, str]]:
    """Names and values of a synthetic goal, values of a human one."""
    return list(goal.options.items()) if isinstance(goal.options, dict) else list(goal.options)


def option_matches(value: str, wanted: str | tuple[str, str]) -> bool:
    return token_set_ratio(_normalised(value), str(_normalised(wanted))) > _MATCH


def _normalised(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first colour that is in the text, or is one of the pair; or else the option itself."""
    return next((colour for colour in _COLOURS if colour in option), option)


@lru_cache(maxsize=200_000)
def token_set_ratio(first: str, second: str) -> int:
    """As thefuzz 0.19 has it, of 100: texts are compared as sets of words. Matching blocks are difflib's, which thefuzz uses
    where python-Levenshtein is not installed; WebShop's setup does not install it."""
    mine, theirs = set(_words(first)), set(_words(second))
    if not mine or not theirs:
        return 0
    common = sorted(mine & theirs)
    texts = [" ".join([*common, *sorted(own)]) for own in (mine - theirs, theirs - mine)]
    pairs = [(" ".join(common), text) for text in texts] if common else []
    return max(_ratio(*pair) for pair in [*pairs, (texts[0], texts[1])])


def _ratio(first: str, second: str) -> int:
    # Equal texts first: difflib takes characters that are frequent in a long text for noise, and would find nothing.
    return 100 if first == second else round(100 * SequenceMatcher(None, first, second).ratio())


def _words(text: str) -> list[str]:
    """Lower-cased, of letters, digits and underscores, without the characters from U+0080 to U+00FF (and no others)."""
    return _NO_WORD.sub(" ", text.translate(_DROPPED)).lower().split()
