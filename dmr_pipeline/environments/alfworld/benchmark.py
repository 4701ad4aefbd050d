"""ALFWorld, its games generated here or the official ones."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import Field

from dmr_pipeline.environments.alfworld.game import Game, TaskType
from dmr_pipeline.environments.benchmark import Benchmark, fresh_seeds, split_summary
from dmr_pipeline.recipe.benchmark import Games
from dmr_pipeline.recipe.fields import StepLimit

if TYPE_CHECKING:
    from dmr_pipeline.environments.alfworld.tasks import Dealt

_TRIAL = re.compile(r"trial_t\d{8}_\d{6}_\d+")
"""The part of an official game's name that no other game has."""
_GENERATED = re.compile(r"generated[\W_]*0*(\d{1,18})|^0*(\d{1,18})$")


class AlfWorld(Games):
    """ALFWorld, whoever made the games."""

    step_limit: StepLimit = Field(50, description="steps an episode may take; 50 is ALFWorld's norm, ExpeL used 20")


class GeneratedAlfWorld(AlfWorld):
    """ALFWorld games made by the generator; each split draws its games from a seed range of its own."""

    environment: Literal["alfworld"] = "alfworld"


class OfficialAlfWorld(AlfWorld):
    """The official games, packed by `dmr data alfworld`. The official train split, shuffled, gives agent_train, router_train and
    validation; the test games are those of an official validation split."""

    environment: Literal["alfworld-official"] = "alfworld-official"
    test_split: Literal["valid_seen", "valid_unseen"] = Field(
        "valid_seen", description="rooms that the train split has (140 games), or others (134 games)"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        games, there = self.splits, {"valid_seen": 140, "valid_unseen": 134}[self.test_split]
        if games.test > there:
            yield "splits.test", f"{games.test:,} games, but official {self.test_split} has {there}"
        if (train := games.agent_train + games.router_train + games.validation) > 3553:
            yield (
                "splits",
                f"agent_train, router_train and validation ask for {train:,} games, official train has 3,553",
            )


A = TypeVar("A", bound=AlfWorld)


class AlfWorldGames(Benchmark[A]):
    task_types = get_args(TaskType)
    demonstrations_think = True

    @abstractmethod
    def deal(self) -> "Dealt":
        """The games of each split."""

    def make_tasks(self, folder: Path) -> dict[str, Any]:
        from dmr_pipeline.environments.alfworld.store import write_games

        summary = {}
        for split, (games, facts) in self.deal().items():
            write_games(games, folder / f"{split}.parquet")
            summary[split] = split_summary([game.task_type for game in games], **facts)
        return summary

    def read_tasks(self, folder: Path, split: str, limit: int | None = None) -> Sequence[Game]:
        from dmr_pipeline.environments.alfworld.store import read_games_file

        return read_games_file(folder / f"{split}.parquet", limit)

    def texts(self, folder: Path) -> list[str]:
        from dmr_pipeline.environments.alfworld.words import alfworld_texts

        return alfworld_texts()

    @classmethod
    def names_in(cls, text: str) -> list[str]:
        """Of generated games by their number, of official ones by their trial."""
        return [f"generated/{int(''.join(number))}" for number in _GENERATED.findall(text)] + _TRIAL.findall(text)


class GeneratedGames(AlfWorldGames[GeneratedAlfWorld]):
    section = GeneratedAlfWorld

    def deal(self) -> "Dealt":
        from dmr_pipeline.environments.alfworld.tasks import generated_games

        return generated_games(self.settings)

    def fresh_tasks(self, count: int) -> Sequence[Game]:
        from dmr_pipeline.environments.alfworld.generator import generate_game

        return [generate_game(seed, self.settings.step_limit)[0] for seed in fresh_seeds(self.settings, count)]


class OfficialGames(AlfWorldGames[OfficialAlfWorld]):
    section = OfficialAlfWorld

    def deal(self) -> "Dealt":
        from dmr_pipeline.environments.alfworld.tasks import official_games

        return official_games(self.settings)
