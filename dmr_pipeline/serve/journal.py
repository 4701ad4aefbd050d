"""Episodes that have ended become files in `data/incoming/<recipe>/`, which the pipeline takes in and learns from.

A file is written whole or not at all, and is on the disk before its outcome is acknowledged. Where no outcome came nothing is to
be learned: such an episode is kept beside, under a hidden name that no stage reads.
"""

import os
from pathlib import Path
from uuid import uuid4

from dmr_pipeline.artifacts.folders import incoming_folder
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.rules import Rules
from dmr_pipeline.ingestion.schema import LoggedEpisode, LoggedStep
from dmr_pipeline.serve.sessions import Session


class Journal:
    """
    Args:
        rules: what the recipe asks of an episode.
    """

    def __init__(self, recipe: str, data_root: Path, rules: Rules) -> None:
        self.folder, self.rules = incoming_folder(recipe, data_root), rules

    def write(self, episode: LoggedEpisode) -> Path:
        """
        Raises:
            UserError: the recipe does not take such an episode.
            OSError: it cannot be written.
        """
        if problems := list(self.rules.violations(episode)):
            raise UserError(f"the episode is not logged: {'; '.join(problems)}")
        return self._put(f"{episode.episode_id}.jsonl", episode)

    def set_aside(self, episode: LoggedEpisode) -> Path:
        """One whose outcome is not known. Its `success` means nothing.

        Raises:
            OSError: it cannot be written.
        """
        return self._put(f".{episode.episode_id}.unknown", episode)

    def _put(self, name: str, episode: LoggedEpisode) -> Path:
        path = self.folder / name
        write_whole(path, episode.model_dump_json(exclude_none=True) + "\n")
        return path


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, and on the disk once this returns.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name.removeprefix('.')}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def episode_of(session: Session, success: bool, reward: float | None = None, observation: str = "") -> LoggedEpisode:
    """
    Args:
        observation: what the last command has shown.

    Raises:
        UserError: a part of it was played elsewhere, or nothing was.
        pydantic.ValidationError: the task is not named as the schema asks.
    """
    if session.has_foreign_steps or not session.actions:
        why = "its beginning was played elsewhere" if session.actions else "it has no steps"
        raise UserError(f"the episode is not logged: {why}, so that it is not known which precisions acted")
    steps = session.trajectory.steps
    return LoggedEpisode(
        episode_id=f"served-{uuid4().hex}",
        task_id=session.task.task_id,
        task_type=session.task.task_type,
        task=session.task.instruction,
        observation=session.trajectory.opening,
        steps=[
            LoggedStep(
                command=step.command,
                thought=action.thought,
                observation=step.observation if turn + 1 < len(steps) else observation,
                precision=action.precision,
                probability=action.probability,
                propensity=action.propensity,
                reason=action.reason,
                release=action.release,
            )
            for turn, (step, action) in enumerate(zip(steps, session.actions, strict=True))
        ],
        success=success,
        reward=reward,
    )
