"""Sessions that go on when a server ends, for the server that comes after it: a hidden file each beside the episodes, which the
first server that is asked for the session takes over. A server that is killed leaves none."""

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.serve.journal import write_whole
from dmr_pipeline.serve.sessions import Action, Asked, Decider, Goal, Session

log = logging.getLogger(__name__)

_SUFFIX = ".unended"
_NOBODY = Decider(SinglePrecision(""), "fixed")
"""Decides until the session's next request names who does."""


class _KeptStep(FrozenModel):
    """What the engine reads again of a step. What it has cost is in the session's sums."""

    segment: list[int]
    action: list[int]
    command: str
    observation: str
    precision: str
    exceedance: tuple[float, ...]


class _Kept(FrozenModel):
    """A session as the file has it."""

    session_id: str
    goal: Goal
    member: int
    opening: str
    steps: list[_KeptStep]
    answers: list[str]
    actions: list[Action]
    spend: float
    cost: float
    margin: float
    asked: Asked | None


class Unended:
    """
    Args:
        folder: where episodes become files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, session: Session) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        task, trajectory = session.task, session.trajectory
        kept = _Kept(
            session_id=session.session_id,
            goal=Goal(task.task_id, task.task_type, task.instruction),
            member=trajectory.run.member,
            opening=trajectory.opening,
            steps=[
                _KeptStep(**{name: getattr(step, name) for name in _KeptStep.model_fields}) for step in trajectory.steps
            ],
            answers=session.answers,
            actions=session.actions,
            spend=session.spend,
            cost=session.cost,
            margin=session.margin,
            asked=session.asked,
        )
        write_whole(self._path(session.session_id), kept.model_dump_json())

    def take(self, session_id: str) -> Session | None:
        """The session of this name, and its file is gone: nobody else takes it too."""
        return self._taken(self._path(session_id))

    def take_old(self, seconds: float) -> Iterator[Session]:
        """Those that nobody has come back for in so many seconds."""
        now = time.time()
        for path in sorted(self.folder.glob(f".*{_SUFFIX}")):
            try:
                old = now - path.stat().st_mtime > seconds
            except FileNotFoundError:
                continue  # another server has taken it
            if old and (session := self._taken(path)) is not None:
                yield session

    def _taken(self, path: Path) -> Session | None:
        mine = path.with_suffix(".taken")
        try:
            path.rename(mine)
        except FileNotFoundError:
            return None
        try:
            kept = _Kept.model_validate_json(mine.read_bytes())
        except ValidationError:
            log.warning("a session of another version of this server is not taken over")
            return None
        finally:
            mine.unlink()
        steps = [Step(**dict(step)) for step in kept.steps]
        trajectory = Trajectory(RolloutRequest(kept.goal, kept.member), kept.opening, steps)
        return Session(
            kept.session_id,
            trajectory,
            _NOBODY,
            answers=kept.answers,
            actions=kept.actions,
            spend=kept.spend,
            cost=kept.cost,
            margin=kept.margin,
            asked=kept.asked,
        )

    def _path(self, session_id: str) -> Path:
        return self.folder / f".{hashlib.sha256(session_id.encode()).hexdigest()[:32]}{_SUFFIX}"
