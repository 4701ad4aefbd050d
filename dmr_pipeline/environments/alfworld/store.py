"""Games in a Parquet file."""

from pathlib import Path

from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.task_files import read_tasks, write_tasks


def to_json(game: Game) -> str:
    """What has its default is left out."""
    return game.model_dump_json(exclude_defaults=True)


def write_games(games: list[Game], path: Path) -> None:
    """One row a game."""
    write_tasks(games, path, column="game")


def read_games_file(path: Path, limit: int | None = None) -> list[Game]:
    """The first `limit` games of a file, all of them by default."""
    return read_tasks(Game, path, limit, column="game")
