"""ALFWorld games of our own making: generated ones, and odd ones."""

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game


def in_old_wording(game: Game) -> Game:
    places = 1 + max(receptacle.place for receptacle in game.receptacles)
    # The agent starts at a place without receptacles, which bears a number too.
    names = [f"loc {places + 1 - place}" for place in range(places)]
    return game.model_copy(update={"put_wording": "put", "arrival": "place", "help": None, "place_names": tuple(names)})


def generated(seed: int) -> Game:
    """Every other one in the wording of ALFWorld before 0.4."""
    game, _ = generate_game(seed)
    return in_old_wording(game) if seed % 2 else game


ODD = Game.model_validate(
    {
        "task_id": "odd/game",
        "task_type": "pick_two_obj_and_place",
        "instruction": "put two mug in desk",
        "receptacles": [
            {"name": "bathtubbasin 1", "kind": "sinkbasin", "place": 0, "openable": False},
            {"name": "desk 3", "kind": "desk", "place": 1, "openable": False},
            {"name": "desk 1", "kind": "desk", "place": 1, "openable": True},
        ],
        "things": [
            {"name": "bowl 1", "kind": "bowl", "inside": [1], "abilities": ["receptacle"], "holds": ["spoon 2"]},
            {"name": "bread 1", "kind": "bread", "inside": [], "abilities": ["sliceable"], "lying": [1]},
            {"name": "knife 2", "kind": "knife", "inside": [1, 0], "abilities": ["pickupable", "cleanable"]},
            {"name": "mug 12", "kind": "mug", "inside": [0], "abilities": ["pickupable", "cleanable"], "lying": []},
            {"name": "mug 9", "kind": "mug", "inside": [0], "abilities": ["pickupable"], "starts_cool": True},
            {"name": "mug 1", "kind": "", "inside": [1], "abilities": ["pickupable"], "lying": [0, 1]},
        ],
        "may_contain": [("desk", "mug"), ("desk", "knife"), ("sinkbasin", "knife")],
        "goal": {"kind": "mug", "receptacle_kind": "desk", "count": 2},
    }
)
"""What the generator never makes, but official games have: lacking numbers, names of another kind, things in two receptacles
or in none, things without a kind."""


ODD_GAMES = [
    ODD,
    ODD.model_copy(update={"task_id": "odd/start", "start": 1}),
    ODD.model_copy(update={"task_id": "odd/places", "arrival": "place", "place_names": ("loc 7", "loc 2")}),
    ODD.model_copy(
        update={
            "task_id": "odd/states",
            "task_type": "pick_clean_then_place_in_recep",
            "goal": ODD.goal.model_copy(update={"states": frozenset({"clean"})}),
        }
    ),
]


PROBLEM = """(define (problem p) (:objects)
(:init (receptacleType Desk_bar_1 DeskType) (receptacleType Bed_bar_1 BedType)
(receptacleAtLocation Desk_bar_1 loc_1) (receptacleAtLocation Bed_bar_1 loc_2)
(objectType Book_bar_1 BookType) (inReceptacle Book_bar_1 Bed_bar_1) (pickupable Book_bar_1)
(canContain DeskType BookType))
(:goal (and (exists (?r - receptacle) (exists (?o - object)
 (and (inReceptacle ?o ?r) (objectType ?o BookType) (receptacleType ?r DeskType)))))))"""
