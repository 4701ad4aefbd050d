"""The official engine, for comparisons: the optional extra `alfworld`, which this package never needs.

alfworld and textworld are MIT, but textworld brings jericho (GPLv2+) and fast-downward-textworld (GPLv3): they are installed by
whoever wants to compare, and nothing of them is part of this package. The engine is not thread-safe, and every episode leaks a
mapped library: give it processes of its own, and not for long.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from dmr_pipeline.errors import UserError


def is_installed() -> bool:
    return find_spec("alfworld") is not None and find_spec("textworld") is not None


class OfficialEpisode:
    """A game in the official engine, its names not shuffled.

    Raises:
        UserError: the extra is not installed.
    """

    def __init__(self, path: Path) -> None:
        if not is_installed():
            raise UserError(
                "the official engine is not installed: pip install 'dmr-pipeline[alfworld]' (needs gcc, g++ and make)"
            )
        # Without the variable, importing alfworld makes a folder in the home directory.
        os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs.pddl import PddlEnv

        self._environment = AlfredDemangler(PddlEnv(EnvInfos(won=True, admissible_commands=True)), shuffle=False)
        self._environment.load(str(path))

    def first_observation(self) -> str:
        self._state = self._environment.reset()
        return self._state.feedback

    def step(self, command: str) -> tuple[str, float, bool]:
        self._state, reward, done = self._environment.step(command)
        return self._state.feedback, float(reward), bool(done)

    def won(self) -> bool:
        return bool(self._state.won)

    def admissible_commands(self) -> list[str]:
        return list(self._state.admissible_commands)
