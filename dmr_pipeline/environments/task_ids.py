"""Which split a game is in, however a log spells its name. Apart from `tasks`, so that nothing heavy is imported with it.

Logs name a game by what the environment gave them: ALFWorld by the path of its file (`.../json_2.1.1/valid_seen/<task>/<trial>/
game.tw-pddl`), WebShop by the goal's index or by the session that asks for it (`fixed_17`).
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from dmr_pipeline.environments.benchmark import Benchmark

HELD_OUT_SPLITS = ("validation", "test")
"""Of a recipe: what is chosen is chosen on the one, what is reported is measured on the other."""
_HELD_OUT_NAMES = frozenset(
    {"valid_seen", "valid_unseen", "tests_seen", "tests_unseen", "eval_in_distribution", "eval_out_of_distribution"}
    | {"validation", "valid", "dev", "eval", "test"}
)
"""What ALFWorld, WebShop and their users call splits that nobody trains on."""


@dataclass(frozen=True)
class KnownGames:
    """The games of a recipe's four splits."""

    benchmark: type[Benchmark[Any]]
    splits: Mapping[str, str]
    """Task id -> split. Empty where the stage `benchmark_tasks` has not been made."""

    def held_out(self, task_id: str) -> str | None:
        """Why an episode of this game must not be trained on; None where nothing speaks against it.

        Case, slashes of either kind, percent signs of URLs, and what stands around `<task>/<trial>` or a goal's number make no
        difference. A name that has the name of a held-out split as a part of its path is refused whatever else it says, and so
        is one that the benchmark itself holds out (`Benchmark.held_out`): the recipe need not have drawn the game.
        """
        names = self._names(task_id)
        for name in names:
            game = self._games.get(name)
            if game is not None and self.splits[game] in HELD_OUT_SPLITS:
                spelled = task_id if game == task_id else f"{task_id}, which is {game},"
                return f"its game {spelled} is held out, in the split {self.splits[game]}"
        for part in _parts(task_id):
            if re.sub(r"[\s-]", "_", part) in _HELD_OUT_NAMES:
                return f"its game {task_id} is held out, in a split called {part}"
        for name in names:
            if (where := self.benchmark.held_out(name)) is not None:
                return f"its game {task_id} is held out, in {where}"
        return None

    def is_known(self, task_id: str) -> bool:
        """Whether it names a game of the four splits; also True where these are unknown."""
        return not self.splits or any(name in self._games for name in self._names(task_id))

    @cached_property
    def _games(self) -> dict[str, str]:
        """Normalised name -> task id."""
        names: dict[str, str] = {}
        for game in self.splits:
            name = "/".join(_parts(game))
            names |= dict.fromkeys([name, *self.benchmark.names_in(name)], game)
        return names

    @cached_property
    def _lengths(self) -> set[int]:
        """How many parts names of games have."""
        return {name.count("/") + 1 for name in self._games}

    def _names(self, task_id: str) -> list[str]:
        """Normalised names of every game that the id may mean."""
        parts = _parts(task_id)
        runs = ("/".join(parts[i : i + n]) for n in {1, 2, *self._lengths} for i in range(len(parts) - n + 1))
        return [*runs, *self.benchmark.names_in("/".join(parts))]


def _text(task_id: str) -> str:
    """In one case, one Unicode form and without characters that nobody sees."""
    folded = unicodedata.normalize("NFKC", unquote(unquote(task_id))).casefold()
    return "".join(c for c in folded if unicodedata.category(c) != "Cf").replace("\\", "/")


def _parts(task_id: str) -> list[str]:
    return [part for part in map(str.strip, _text(task_id).split("/")) if part not in ("", ".")]
