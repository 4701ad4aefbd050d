"""The official games: downloaded or taken from a folder, chosen by the official rules, packed into a Parquet file a split.

The official layout is `<folder>/json_2.1.1/<split>/<task>/<trial>/game.tw-pddl`, and `$ALFWORLD_DATA` names `<folder>`.
The rules are those of alfworld 0.4.2 (`AlfredTWEnv.collect_game_files`).
"""

import hashlib
import json
import shutil
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import polars as pl
from pydantic import ValidationError
from rich.progress import track

from dmr_pipeline.artifacts.folders import locked, published, recover
from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
from dmr_pipeline.download import download
from dmr_pipeline.environments.alfworld.game import Game, TaskType
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.environments.alfworld.store import read_games_file, write_games
from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

OFFICIAL_GAMES = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
ARCHIVE_URL = "https://github.com/alfworld/alfworld/releases/download/0.4.0/json_2.1.2_tw-pddl.zip"
ARCHIVE_SHA256: str | None = None
"""Of the archive at `ARCHIVE_URL`, in hexadecimal. ALFWorld publishes none, and nobody has told this project; whoever has
downloaded the archive has seen it printed. Put here, it refuses any other archive."""
PACK_FOLDER = Path("data/official/alfworld")
DOWNLOAD_FOLDER = PACK_FOLDER.with_name("alfworld.download")
CODE_VERSION = "1"
"""To be raised where `read_game` or `Game` changes: a pack of another version holds other games."""
_LAYOUT = "json_2.1.1"
_GAME_FILE = "game.tw-pddl"

Skip = Literal["unsolvable", "movable", "sliced", "other"]
"""Why a game is left out; `other`: its task type is not one of the six."""


class Archive(FrozenModel):
    """The zip file that games were downloaded as."""

    url: str
    sha256: str


class PackedSplit(FrozenModel):
    games: int
    official: int
    skipped: dict[Skip, int]
    sha256: str
    """Over a line '<task id> <sha256 of its game.tw-pddl>' a game, in sorted order."""


class Pack(FrozenModel):
    """What `pack.json` says: the splits that are there, and where they came from."""

    code_version: str
    splits: dict[str, PackedSplit]
    archive: Archive | None
    """None where the games came from a folder."""


def read_official(split: str, folder: Path = PACK_FOLDER) -> list[Game]:
    """The games of an official split, in sorted order of task id.

    Raises:
        UserError: the pack does not hold the split, is damaged, or was made by another code version.
    """
    recover(folder)
    path = folder / f"{split}.parquet"
    try:
        code_version = Pack.model_validate_json((folder / "pack.json").read_bytes()).code_version
        if code_version != CODE_VERSION:
            raise UserError(f"{folder} has code version {code_version}, not {CODE_VERSION}: run `dmr data alfworld`")
        return read_games_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: run `dmr data alfworld`") from error
    except (pl.exceptions.PolarsError, ValidationError) as error:
        raise UserError(f"{path} is damaged: run `dmr data alfworld`") from error


def known_checksum(url: str, folder: Path = PACK_FOLDER) -> str | None:
    """What the archive at this URL must have: what the project knows, or else what the pack in `folder` was made from."""
    if url == ARCHIVE_URL and ARCHIVE_SHA256 is not None:
        return ARCHIVE_SHA256
    recover(folder)
    try:
        archive = Pack.model_validate_json((folder / "pack.json").read_bytes()).archive
    except (FileNotFoundError, ValidationError):
        return None
    return archive.sha256 if archive is not None and archive.url == url else None


def download_games(url: str = ARCHIVE_URL, folder: Path = DOWNLOAD_FOLDER, sha256: str | None = None) -> Archive:
    """Download the archive and unpack its games into `folder`, in the official layout.

    Raises:
        UserError: the download failed (the message says how), or the archive is damaged or hostile.
    """
    # A name for each URL: what is left of another URL's download is not taken for this one's.
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}.zip"
    archive = Archive(url=url, sha256=download(url, path, sha256))
    shutil.rmtree(folder / _LAYOUT, ignore_errors=True)
    try:
        with disk_full_is_user_error(folder, folder.parent), zipfile.ZipFile(path) as file:
            members = [name for name in file.namelist() if PurePosixPath(name).name == _GAME_FILE]
            if not members:
                raise UserError(f"{url}: there is no {_GAME_FILE} in it: name an archive of ALFWorld games")
            for name in track(members, description="unpacking"):
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise UserError(f"{url}: {name} would be unpacked outside of {folder}: do not use this archive")
                file.extract(name, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        path.unlink()
        raise UserError(
            f"{url}: not a sound zip file ({error}): "
            "the file was deleted, run the same command again to download it anew"
        ) from error
    return archive


def pack(folder: Path, output: Path = PACK_FOLDER, archive: Archive | None = None) -> Pack:
    """Pack the splits that `folder` holds: `<split>.parquet` each, and `pack.json`. Takes about 3 ms a game.

    The old pack at `output` stays until the new one is complete. Equal games give equal Parquet files everywhere.

    Raises:
        UserError: no split is there, a game is malformed (the message names its file), or the disk is full.
    """
    splits = {split: _game_files(folder / _LAYOUT / split) for split in OFFICIAL_GAMES}
    if not any(splits.values()):
        raise UserError(
            f"{folder} has no {_LAYOUT}/<split>/<task>/<trial>/{_GAME_FILE} of a split {', '.join(OFFICIAL_GAMES)}: "
            "name another folder with --from, or give none and unset $ALFWORLD_DATA to download the games"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_user_error(output, output.parent), locked(output), published(output) as new:
        packed = Pack(
            code_version=CODE_VERSION,
            splits={split: _pack_split(split, files, new) for split, files in splits.items() if files},
            archive=archive,
        )
        (new / "pack.json").write_text(packed.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return packed


def _game_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*/{_GAME_FILE}"), key=_task_id)


def _task_id(path: Path) -> str:
    return "/".join(path.parent.parts[-2:])


def _pack_split(split: str, files: list[Path], output: Path) -> PackedSplit:
    games: list[Game] = []
    skipped: Counter[Skip] = Counter()
    source = hashlib.sha256()
    for path in track(files, description=f"games of {split}"):
        reason = _skip(path)
        if reason:
            skipped[reason] += 1
            continue
        games.append(read_game(path))
        source.update(f"{_task_id(path)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    write_games(games, output / f"{split}.parquet")
    return PackedSplit(
        games=len(games),
        official=OFFICIAL_GAMES[split],
        skipped={reason: skipped[reason] for reason in get_args(Skip)},
        sha256=source.hexdigest(),
    )


def _skip(path: Path) -> Skip | None:
    task_id = _task_id(path)
    if "movable" in task_id:
        return "movable"
    if "Sliced" in task_id:
        return "sliced"
    if task_id.partition("-")[0] not in get_args(TaskType):
        return "other"
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None  # `read_game` says what is wrong with it
    return "unsolvable" if isinstance(content, dict) and not content.get("solvable") else None
