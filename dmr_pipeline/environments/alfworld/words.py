"""Every word that ALFWorld's texts can hold, for tokenizers that are made for it."""

from dmr_pipeline.environments.alfworld.engine import NOTHING
from dmr_pipeline.environments.alfworld.game import HELP
from dmr_pipeline.environments.alfworld.generator import SENTENCES
from dmr_pipeline.environments.alfworld.household import household

_TEXTS = (
    "You are in the middle of a room. Looking quickly around you, you see nothing.",
    "You are facing the X. Next to it, you see nothing.",
    "You arrive at X. The X is closed. The X is open. In it, you see. On the X, you see, and",
    "You open the X. You close the X. You pick up the X from the X. You move the X to the X. You put the X in/on the X.",
    "You clean heat cool the X using the X. You turn on the X. You sliced the X with the X.",
    "You are carrying: a X. You are not carrying anything. There's nothing special about X.",
    "This is a normal X. This is a hot cold cool clean and sliced X. This X is on off.",
    "look inventory help go to open close take from move to put in/on clean heat cool use slice with examine",
    "none",
)


def alfworld_texts() -> list[str]:
    """Texts that together hold every word, numbers apart."""
    table = household()
    kinds = {kind for room in (*table.receptacles.values(), *table.things.values()) for kind in room}
    kinds |= set(table.may_contain) | {thing for things in table.may_contain.values() for thing in things}
    sentences = [s.format(thing="", target="") for pair in SENTENCES.values() for s in pair]
    return [NOTHING, HELP, *_TEXTS, *sentences, " ".join(sorted(kinds))]
