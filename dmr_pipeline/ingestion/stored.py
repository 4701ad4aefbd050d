"""The artifact: `episodes/<sha256 of the dropped file>.parquet`, one row an episode, and `left_out.json`: episodes that the
recipe no longer allows, since it has changed, and why. They stay in the artifact, but nothing reads them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.rows import parquet_rows
from dmr_pipeline.ingestion.schema import LoggedEpisode, LoggedStep, NoEpisode, parse_episode

STAGE = "ingested_trajectories"
EPISODES_FOLDER = "episodes"
LEFT_OUT_FILE = "left_out.json"


def read_ingested(folder: Path) -> list[LoggedEpisode]:
    """The artifact's episodes but those left out, checked again, in the order of their files' hashes.

    Raises:
        UserError: an episode does not follow the schema, or its id is there twice.
    """
    left_out = json.loads((folder / LEFT_OUT_FILE).read_text(encoding="utf-8"))
    return [episode for episode in read_stored(folder) if episode.episode_id not in left_out]


def stored_ids(folder: Path) -> set[str]:
    """Ids of all episodes that the artifact holds, those left out too."""
    return {episode.episode_id for episode in read_stored(folder)}


def store_episodes(episodes: Sequence[LoggedEpisode], path: Path) -> None:
    """One row an episode. Equal episodes give equal bytes. What no step tells of how it was decided has no column."""
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.string()
    decided = {"probability": pa.float64(), "propensity": pa.float64(), "reason": text, "release": pa.int64()}
    known = {
        name
        for name in decided
        if any(getattr(step, name) is not None for episode in episodes for step in episode.steps)
    }
    step = pa.struct(
        [(name, decided.get(name, text)) for name in LoggedStep.model_fields if name not in decided or name in known]
    )
    others = {"steps": pa.list_(step), "success": pa.bool_(), "reward": pa.float64()}
    schema = pa.schema([(name, others.get(name, text)) for name in LoggedEpisode.model_fields])
    table = pa.Table.from_pylist([episode.model_dump() for episode in episodes], schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_stored(artifact: Path) -> list[LoggedEpisode]:
    """The artifact's episodes, checked again, in the order of their files' hashes.

    Raises:
        UserError: an episode does not follow the schema, or its id is there twice.
    """
    remedy = f"get it back with `dmr restore {STAGE} --recipe {artifact.parent.name}`"
    episodes: dict[str, LoggedEpisode] = {}
    for path in stored_files(artifact):
        for row in parquet_rows(path.read_bytes(), limit=None):
            try:
                episode = parse_episode(row)
            except NoEpisode as error:
                raise UserError(f"{path}: {error}; {remedy}") from error
            if episode.episode_id in episodes:
                raise UserError(f"{path}: episode {episode.episode_id!r} is in another file too; {remedy}")
            episodes[episode.episode_id] = episode
    return list(episodes.values())


def stored_files(artifact: Path) -> list[Path]:
    return sorted((artifact / EPISODES_FOLDER).glob("*.parquet"))
