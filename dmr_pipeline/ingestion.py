"""Stage `ingested_trajectories`: episodes that an agent logged at work, dropped as files into `data/incoming/<recipe>/`.

A file is known by its content (sha256), never by its name or time, and is taken in whole or not at all. It moves once: a bad
one into `quarantine/`, the reasons beside it; a good one into `ingested/`, after the artefact that holds it was published. So a
kill at any moment loses no file, and no content is taken in twice.

The artefact is `episodes/<sha256 of the dropped file>.parquet`, one row an episode, and `left_out.json`: episodes that the
recipe no longer allows, since it has changed, and why. They stay in the artefact, but nothing reads them.
"""

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import from_json

from dmr_pipeline.artifacts import artifact_folder, incoming_folder
from dmr_pipeline.environments.task_types import task_types
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.stage import StageContext, StageResult

log = logging.getLogger(__name__)

STAGE = "ingested_trajectories"
EPISODES_FOLDER = "episodes"
LEFT_OUT_FILE = "left_out.json"
INGESTED_FOLDER = "ingested"
QUARANTINE_FOLDER = "quarantine"
HELD_OUT_SPLITS = ("validation", "test")

EXAMPLE: dict[str, JsonValue] = {
    "episode_id": "kitchen-robot-2026-11-24-0001",
    "task_id": "kitchen/17",
    "task_type": "pick_and_place_simple",
    "task": "put some apple on sidetable.",
    "observation": "You are in the middle of a room. Looking quickly around you, you see a fridge 1, and a sidetable 1.",
    "steps": [
        {
            "command": "go to fridge 1",
            "thought": "find apple",
            "observation": "You arrive at fridge 1. The fridge 1 is closed.",
            "precision": "float",
        },
        {
            "command": "open fridge 1",
            "observation": "You open the fridge 1. In it, you see nothing.",
            "precision": "int2",
        },
    ],
    "success": False,
}

Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]
"""One line without white space around it."""


class LoggedStep(BaseModel):
    """One step of a logged episode."""

    model_config = ConfigDict(extra="forbid", strict=True)

    command: str = Field(description="what the agent did, as the environment was given it")
    thought: str = Field("", description="what the agent thought before the command, if it is one that thinks")
    observation: str = Field(description="what the command showed")
    precision: Name = Field(description="rung of the recipe's precision ladder that acted, such as float or int2")


class LoggedEpisode(BaseModel):
    """One logged episode: a line of NAME.jsonl, or a row of NAME.parquet, whose `steps` are a list of structs. A null in
    Parquet is a field that was left out."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})

    episode_id: Name = Field(description="unique over all files that were ever ingested for the recipe")
    task_id: Name = Field(description="the game or goal, named as the benchmark names it; none of a held-out split")
    task_type: Name = Field(
        description="the benchmark's kind of task: in ALFWorld such as pick_and_place_simple, in WebShop the category"
    )
    task: Name = Field(description="the instruction sentence")
    observation: str = Field(pattern=r"\S", description="the first observation, without the instruction")
    steps: list[LoggedStep] = Field(min_length=1, description="in order; at most benchmark.step_limit of the recipe")
    success: bool = Field(description="whether the task was solved")
    reward: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="1 where the task was solved, else less; success by default"
    )

    @model_validator(mode="after")
    def _reward_of_success(self) -> Self:
        if self.reward is not None and self.success != (self.reward >= 1):
            raise ValueError(f"success is {self.success}, but the reward is {self.reward}; 1 means success")
        return self


@dataclass(frozen=True)
class Rules:
    """What a recipe asks of an episode."""

    task_types: tuple[str, ...]
    """The benchmark's."""
    precisions: tuple[str, ...]
    """Names of the ladder's rungs."""
    step_limit: int
    held_out: Mapping[str, str]
    """Task id -> the split that must never be trained on."""

    @classmethod
    def of(cls, recipe: Recipe, benchmark_tasks: Path | None) -> "Rules":
        """Args: benchmark_tasks: that stage's folder; without it no game is known to be held out."""
        return cls(
            task_types(recipe.benchmark),
            tuple(rung.name for rung in recipe.precisions.ladder),
            recipe.benchmark.step_limit,
            {} if benchmark_tasks is None else _held_out_games(benchmark_tasks),
        )

    def objection(self, episode: LoggedEpisode) -> str | None:
        """Why the episode must not be trained on; None where it may."""
        if episode.task_id in self.held_out:
            return (
                f"its game {episode.task_id} is held out, in the split {self.held_out[episode.task_id]}: trained on, it"
                " would falsify the report"
            )
        if episode.task_type not in self.task_types:
            known = ", ".join(self.task_types)
            return f"task_type: {episode.task_type!r} is none of the benchmark's ({known})"
        if len(episode.steps) > self.step_limit:
            return f"{len(episode.steps)} steps, but benchmark.step_limit of the recipe is {self.step_limit}"
        for turn, step in enumerate(episode.steps):
            if step.precision not in self.precisions:
                known = ", ".join(self.precisions)
                return f"steps.{turn}.precision: {step.precision!r} is not on the recipe's ladder ({known})"
        return None


def ingested_trajectories(context: StageContext) -> StageResult:
    """Takes in what was dropped since the artefact before; counts in the summary are without the episodes left out."""
    rules = Rules.of(context.recipe, context.inputs["benchmark_tasks"])
    folder = context.output / EPISODES_FOLDER
    folder.mkdir()
    episodes = [] if context.previous is None else _read_stored(context.previous)
    for path in [] if context.previous is None else _stored_files(context.previous):
        shutil.copyfile(path, folder / path.name)
    ids = {episode.episode_id for episode in episodes}
    dropped = () if context.incoming is None else _dropped(context.incoming)
    for path, content in dropped:
        digest = hashlib.sha256(content).hexdigest()
        stored = folder / f"{digest}.parquet"
        if stored.exists():
            continue
        new, problems = read_episodes(path, content, rules, ids)
        if problems:
            _quarantine(path, digest, problems)
            log.warning("%s: quarantined: %s", path, problems[0])
        else:
            _store(new, stored)
            episodes += new
            ids |= {episode.episode_id for episode in new}
            log.info("%s: %d episodes", path, len(new))
    left_out = {episode.episode_id: why for episode in episodes if (why := rules.objection(episode)) is not None}
    if left_out:
        log.warning("%d of %d ingested episodes are left out, see %s", len(left_out), len(episodes), LEFT_OUT_FILE)
    text = json.dumps(left_out, indent=2, sort_keys=True) + "\n"
    (context.output / LEFT_OUT_FILE).write_text(text, encoding="utf-8")
    used = [episode for episode in episodes if episode.episode_id not in left_out]
    return StageResult(
        summary={
            "files": len(_stored_files(context.output)),
            "episodes": len(used),
            "steps": sum(len(episode.steps) for episode in used),
        }
    )


def waiting_files(data_root: Path, recipe: str) -> Sequence[Path]:
    """Dropped files whose content the published artefact does not hold yet, sorted by name."""
    held = _held(data_root, recipe)
    dropped = _dropped(incoming_folder(recipe, data_root))
    return [path for path, content in dropped if hashlib.sha256(content).hexdigest() not in held]


def file_away(data_root: Path, recipe: str) -> None:
    """Move dropped files that the published artefact holds into `ingested/`. Any number of processes may do so at once."""
    held = _held(data_root, recipe)
    for path, content in _dropped(incoming_folder(recipe, data_root)):
        digest = hashlib.sha256(content).hexdigest()
        if digest in held:
            _move(path, path.parent / INGESTED_FOLDER, digest)


def misplaced_files(data_root: Path, recipes: Sequence[str]) -> list[Path]:
    """Files under `data/incoming/` that no recipe will ever ingest, sorted: not directly in the folder of one."""
    root = incoming_folder("", data_root)
    return [
        path
        for path in sorted(root.rglob("*"))
        if _is_dropped(path) and not _has_its_place(path.relative_to(root).parts, recipes)
    ]


def read_ingested(folder: Path) -> list[LoggedEpisode]:
    """The artefact's episodes but those left out, checked again, in the order of their files' hashes.

    Raises:
        UserError: an episode does not follow the schema, or its id is there twice.
    """
    left_out = json.loads((folder / LEFT_OUT_FILE).read_text(encoding="utf-8"))
    return [episode for episode in _read_stored(folder) if episode.episode_id not in left_out]


def stored_ids(folder: Path) -> set[str]:
    """Ids of all episodes that the artefact holds, those left out too."""
    return {episode.episode_id for episode in _read_stored(folder)}


def read_episodes(
    path: Path, content: bytes, rules: Rules, earlier: Collection[str]
) -> tuple[list[LoggedEpisode], list[str]]:
    """The episodes in a file, and everything that is wrong with it: where, which episode, and what.

    Args:
        path: its suffix tells the format.
        earlier: ids of episodes that other files have brought.
    """
    try:
        rows = _rows(path.suffix, content)
    except UserError as error:
        return [], [f"{path.name}: {error}"]
    episodes: dict[str, LoggedEpisode] = {}
    problems = [] if rows else [f"{path.name}: it holds no episodes"]
    for place, row in rows:
        try:
            episode = _parse(row)
        except UserError as error:
            problems.append(f"{path.name}: {place}: {error}")
            continue
        problem = rules.objection(episode)
        if episode.episode_id in episodes:
            problem = "its id is in this file twice"
        elif episode.episode_id in earlier:
            problem = "an earlier file has brought an episode of this id"
        if problem is not None:
            problems.append(f"{path.name}: {place}: episode {episode.episode_id!r}: {problem}")
        episodes[episode.episode_id] = episode
    return list(episodes.values()), problems


def _rows(suffix: str, content: bytes) -> list[tuple[str, Any]]:
    """Each row and its place in the file: a line of JSON, or what a row of Parquet holds.

    Raises:
        UserError: it is neither JSONL nor Parquet.
    """
    if suffix == ".jsonl":
        return [(f"line {n}", line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if suffix == ".parquet":
        return [(f"row {n}", row) for n, row in enumerate(_parquet_rows(content), start=1)]
    raise UserError("use .jsonl or .parquet")


def _parquet_rows(content: bytes) -> list[dict[str, Any]]:
    """By pyarrow, since a damaged file can make polars abort the whole process.

    Raises:
        UserError: it is no Parquet file, or a damaged one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read(use_threads=False).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"not a Parquet file, or a damaged one: {_one_line(error)}") from error
    return [_without_nulls(row) for row in rows]


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - whatever a Parquet file holds
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _parse(row: Any) -> LoggedEpisode:  # noqa: ANN401 - a line of JSON, or what a row of Parquet holds
    """Raises: UserError: it is no episode; which one, and what is wrong with it."""
    value = row
    try:
        if isinstance(row, bytes):
            value = from_json(row)
        return LoggedEpisode.model_validate(value)
    except ValidationError as error:
        first, *others = error.errors()
        named = f"episode {value['episode_id']!r}: " if isinstance(value, dict) and value.get("episode_id") else ""
        field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(_one_line(f"{named}{field}{first['msg']}{more}")) from error
    except ValueError as error:
        raise UserError(f"not JSON: {_one_line(error)}") from error


def _store(episodes: Sequence[LoggedEpisode], path: Path) -> None:
    """One row an episode. Equal episodes give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet

    text = pa.string()
    step = pa.struct([(name, text) for name in LoggedStep.model_fields])
    others = {"steps": pa.list_(step), "success": pa.bool_(), "reward": pa.float64()}
    schema = pa.schema([(name, others.get(name, text)) for name in LoggedEpisode.model_fields])
    table = pa.Table.from_pylist([episode.model_dump() for episode in episodes], schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _read_stored(artefact: Path) -> list[LoggedEpisode]:
    """Raises: UserError: an episode does not follow the schema, or its id is there twice."""
    episodes: dict[str, LoggedEpisode] = {}
    for path in _stored_files(artefact):
        for row in _parquet_rows(path.read_bytes()):
            try:
                episode = _parse(row)
            except UserError as error:
                raise UserError(f"{path}: {error}; restore it with `dvc checkout {artefact}`") from error
            if episode.episode_id in episodes:
                raise UserError(
                    f"{path}: episode {episode.episode_id!r} is in another file too; restore it with `dvc checkout {artefact}`"
                )
            episodes[episode.episode_id] = episode
    return list(episodes.values())


def _stored_files(artefact: Path) -> list[Path]:
    return sorted((artefact / EPISODES_FOLDER).glob("*.parquet"))


def _held(data_root: Path, recipe: str) -> set[str]:
    """sha256 of every dropped file that the published artefact holds."""
    return {path.stem for path in _stored_files(artifact_folder(STAGE, recipe, data_root))}


def _held_out_games(benchmark_tasks: Path) -> dict[str, str]:
    import pyarrow.parquet

    tables = {
        split: pyarrow.parquet.read_table(benchmark_tasks / f"{split}.parquet", columns=["task_id"])
        for split in HELD_OUT_SPLITS
    }
    return {task_id: split for split, table in tables.items() for task_id in table["task_id"].to_pylist()}


def _dropped(incoming: Path) -> Iterator[tuple[Path, bytes]]:
    """Files that lie directly in the folder, sorted by name, and their content.

    Raises:
        UserError: a file may not be read.
    """
    for path in sorted(incoming.iterdir()) if incoming.is_dir() else []:
        if not _is_dropped(path):
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # another process has moved it meanwhile
        except PermissionError as error:
            raise UserError(f"{path} may not be read: give this user the right to, or move it away") from error
        yield path, content


def _is_dropped(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix != ".part"


def _has_its_place(parts: tuple[str, ...], recipes: Sequence[str]) -> bool:
    """Args: parts: of a file's path under `data/incoming/`."""
    filed = (INGESTED_FOLDER, QUARANTINE_FOLDER)
    return parts[0] in recipes and (len(parts) == 2 or (len(parts) == 3 and parts[1] in filed))


def _quarantine(path: Path, digest: str, problems: Sequence[str]) -> None:
    """The reasons come first, so that no file ever lies there without."""
    folder = path.parent / QUARANTINE_FOLDER
    folder.mkdir(exist_ok=True)
    reason = folder / f"{_filed_name(path, digest)}.reason.txt"
    part = reason.with_name(f".{reason.name}.part")
    part.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
    part.replace(reason)
    _move(path, folder, digest)


def _move(path: Path, folder: Path, digest: str) -> None:
    folder.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):  # another process has moved it meanwhile
        path.rename(folder / _filed_name(path, digest))


def _filed_name(path: Path, digest: str) -> str:
    return f"{digest[:12]}-{path.name}"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
