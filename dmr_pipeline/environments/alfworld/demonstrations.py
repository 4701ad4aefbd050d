"""Single observations of a receptacle, for an agent to learn whether what it wants is there."""

import random

from dmr_pipeline.environments.alfworld.engine import listing
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import SENTENCES
from dmr_pipeline.environments.alfworld.household import household
from dmr_pipeline.environments.base import Demonstration


def receptacle_shown(game: Game, rng: random.Random) -> Demonstration:
    """One look into a receptacle with random contents, and the thought that follows: is what is wanted there, and which?

    Whether a word of the task stands in an observation is what the agent finds hardest to learn, and an episode asks it but a
    few times. Numbers are random, so that they have to be read.
    """
    receptacle = rng.choice(game.receptacles)
    kinds = sorted(household().abilities)
    shown = sorted(rng.sample(kinds, rng.randint(1, 8)))
    names = [f"{kind} {rng.randint(1, 4)}" for kind in shown]
    wanted = rng.choice(shown if rng.random() < 0.5 else kinds)
    instruction = rng.choice(SENTENCES[game.task_type]).format(
        thing=wanted, target=game.goal.receptacle_kind or game.goal.lamp
    )
    observation = f"On the {receptacle.name}, you see {listing(names)}."
    if wanted not in shown:  # where to go next cannot be known from one look
        return Demonstration(observation, instruction, None, f"{wanted} none")
    thing = names[shown.index(wanted)]
    return Demonstration(observation, instruction, f"take {thing} from {receptacle.name}", thing)
