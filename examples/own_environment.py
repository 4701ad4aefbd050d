"""A benchmark of your own: a corridor with a key and a door. An example to start from.

    python examples/own_environment.py           # every stage in build/corridor, then the table

The classes from `Corridor` to `CorridorBenchmark` are all of it. What follows makes a folder with one recipe and calls `dmr run`
there. For a package that is installed no program is needed: its pyproject.toml names the benchmark,

    [project.entry-points."dmr_pipeline.benchmarks"]
    corridor = "your_package.corridor:CorridorBenchmark"

and recipes may say `benchmark: {environment: corridor, ...}` wherever `dmr` finds the package.
"""

import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dmr_pipeline.benchmarks import register
from dmr_pipeline.environments.base import Demonstration
from dmr_pipeline.environments.seeded import SeededBenchmark, TaskModel
from dmr_pipeline.recipe.benchmark import Games


class Corridor(Games):
    environment: Literal["corridor"] = "corridor"
    rooms: int = Field(6, ge=3, description="rooms in a row")


class Walk(TaskModel, frozen=True):
    places: tuple[int, int, int]  # rooms of the start, the key and the door

    def episode(self) -> "WalkEpisode":
        return WalkEpisode(self)

    def expert(self) -> "Guide":
        return Guide()

    def demonstration(self, rng: random.Random) -> Demonstration:
        episode, guide = self.episode(), self.expert()
        episode.state = rng.choice(self.places), rng.random() < 0.5
        guide.observe(None, episode.observation())
        return Demonstration(episode.observation(), self.instruction, guide.act(), guide.think())


class WalkEpisode:
    def __init__(self, task: Walk) -> None:
        self.task = task
        self.state: Any = (task.places[0], False)  # the room, and whether the key is in the hand

    def reset(self) -> str:
        self.state = (self.task.places[0], False)
        return self.observation()

    def first_observation(self) -> str:
        return f"{self.reset()} Your task is to {self.task.instruction}."

    def observation(self) -> str:
        (room, has_key), (_, key, door) = self.state, self.task.places
        way = {place: "here" if place == room else "west" if place < room else "east" for place in (key, door)}
        return f"The key is {'taken' if has_key else way[key]}. The door is {way[door]}."

    def admissible_commands(self) -> list[str]:
        (room, has_key), (_, key, door) = self.state, self.task.places
        return ["go east", "go west"] + ["open door"] * (room == door and has_key) + ["take key"] * (room == key)

    def step(self, command: str) -> tuple[str, float, bool]:
        if command not in self.admissible_commands():
            return self.observation(), 0.0, False
        room, has_key = self.state
        self.state = (room + {"go east": 1, "go west": -1}.get(command, 0), has_key or command == "take key")
        return self.observation(), float(command == "open door"), command == "open door"


class Guide:  # the expert: it goes by what it has just seen
    def observe(self, command: str | None, observation: str) -> None:
        self.key, self.door = re.findall(r" is (\w+)", observation)

    def think(self) -> str:
        return ""

    def act(self) -> str:
        goal, way = ("open door", self.door) if self.key == "taken" else ("take key", self.key)
        return goal if way == "here" else f"go {way}"


@register
class CorridorBenchmark(SeededBenchmark[Corridor, Walk]):
    section, task_class, task_types = Corridor, Walk, ("corridor",)

    def draw(self, seed: int) -> Walk:
        start, key, door = random.Random(seed).choices(range(self.settings.rooms), k=3)
        return Walk(
            task_id=f"corridor/{seed}", task_type="corridor", instruction="open the door", places=(start, key, door)
        )

    def texts(self, folder: Path) -> list[str]:
        return ["open the door take key go east west is here taken"]


RECIPE = """\
benchmark: {environment: corridor, rooms: 6, step_limit: 16,
            splits: {agent_train: 200, router_train: 24, validation: 24, test: 40}}
agent:
  prompt: {max_action_tokens: 4}
  training:
    architecture: {layers: 2, width: 32, heads: 2, key_value_heads: 1, head_width: 16, feed_forward: 32}
    updates: 150
    episodes_per_update: 8
    learning_rate: 0.004
    warmup_updates: 10
    looks_per_update: 32
    looks_alone_until: 60
    short_until: 0
    short_steps: 16
    dagger_from: 100
    dagger_every: 20
    dagger_episodes: 16
    dagger_steps: 16
    dagger_tokens: 500
    mistake_rate: 0.1
precisions:
  ladder: [{name: float, weights: float}, {name: int4, weights: int4}, {name: int2, weights: int2}]
  route: [float, int2]
  kl_episodes: 8
trajectories:
  behaviour:
    - {name: all-high, shares: {float: 1}}
    - {name: all-low, shares: {int2: 1}}
    - {name: mixed, shares: {float: 0.5, int2: 0.5}}
sensitivity: {quantile: 0.7}
kl_router:
  model: {probe: {layers: [1, 2], hidden: 8}}
  epochs: 4
  batch_episodes: 8
  learning_rate: 0.003
  validation_games: 24
  target_ratio: 0.4
grpo_router:
  updates: 2
  games_per_update: 8
  group_size: 4
  learning_rate: 0.001
  cost_weight: 0.3
  validate_every: 1
  validation_games: 24
evaluation: {confidence_games: 24, random_draws: 1, bootstrap: 200}
release: {}
"""


def make_project(folder: Path) -> None:
    """What `dmr` needs of a folder: a recipe, and where DVC and Dagster keep their own."""
    repository = Path(__file__).resolve().parent.parent
    for file in (".dvc/config", ".dvcignore", "dagster_home/dagster.yaml"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / file, folder / file)
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "corridor.yaml").write_text(RECIPE, encoding="utf-8")


if __name__ == "__main__":
    from dmr_pipeline.cli import app

    project = Path(sys.argv[1] if len(sys.argv) > 1 else "build/corridor")
    make_project(project)
    os.chdir(project)
    os.environ["DAGSTER_HOME"] = str(Path("dagster_home").resolve())
    app(["render"], standalone_mode=False)
    app(["run", "corridor"])
