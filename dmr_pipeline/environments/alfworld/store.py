"""Games in a Parquet file."""

from pathlib import Path

import polars as pl

from dmr_pipeline.environments.alfworld.game import Game


def to_json(game: Game) -> str:
    """What has its default is left out."""
    return game.model_dump_json(exclude_defaults=True)


def write_games(games: list[Game], path: Path) -> None:
    """One row a game: id, task type, instruction, and the game itself as JSON."""
    pl.DataFrame(
        {
            "task_id": [game.task_id for game in games],
            "task_type": [game.task_type for game in games],
            "instruction": [game.instruction for game in games],
            "game": [to_json(game) for game in games],
        }
    ).write_parquet(path, compression="zstd")


def read_games_file(path: Path, limit: int | None = None) -> list[Game]:
    """The first `limit` games of a file, all of them by default."""
    rows = pl.read_parquet(path, columns=["game"], n_rows=limit)
    return [Game.model_validate_json(game) for game in rows["game"]]
