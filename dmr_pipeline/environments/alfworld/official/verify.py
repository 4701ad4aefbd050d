"""Is the engine right? Walkthroughs of official games must win, and the official engine must say the same at every step."""

import json
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dmr_pipeline.environments.alfworld.engine import KNIVES, AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.official.engine import OfficialEpisode
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.errors import UserError

GAMES_A_PROCESS = 25
"""The official engine leaks a mapped library for every episode."""
_FOLLOWS_WALKTHROUGH = 0.5
"""Share of the games that are walked to their goal, so that rewards are compared too."""
_INERT = ("look", "inventory", "help")
_RARE = ("clean", "heat", "cool", "slice", "use")
_WEIGHTS = {"go": 6, "take": 6, "open": 3, "close": 2, "move": 2, "put": 2, **dict.fromkeys(_RARE, 8)}
"""Of the verbs in a random walk; 1 for the others."""


@dataclass(frozen=True)
class Replay:
    path: Path
    failure: str | None
    """Why the walkthrough does not win; None where it does."""


@dataclass(frozen=True)
class Comparison:
    path: Path
    steps: int
    differences: tuple[str, ...]
    """What differed first, and after which commands: later differences follow from the first."""


def game_files(folder: Path) -> list[Path]:
    """All `game.tw-pddl` below a folder, sorted.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.rglob("game.tw-pddl"))
    if not found:
        raise UserError(f"{folder}: no game.tw-pddl below it; official games lie in $ALFWORLD_DATA/json_2.1.1")
    return found


def read_walkthrough(path: Path) -> list[str]:
    """The solution that comes with an official game; none where the file has none."""
    return json.loads(path.read_text(encoding="utf-8")).get("walkthrough") or []


def replay(paths: Iterable[Path]) -> Iterator[Replay]:
    """Play each game's walkthrough."""
    for path in paths:
        yield Replay(path, _failure(read_game(path), read_walkthrough(path)))


def _failure(game: Game, walkthrough: Sequence[str]) -> str | None:
    if not walkthrough:
        return "the file has no walkthrough"
    episode = AlfWorldEpisode(game)
    for number, command in enumerate(walkthrough, 1):
        if command not in episode.admissible_commands():
            return f"step {number}, {command!r}: not admissible"
        if episode.step(command)[2]:
            return None if number == len(walkthrough) else f"won {len(walkthrough) - number} steps early"
    return "not won at its end"


def compare(paths: Sequence[Path], steps: int, seed: int, processes: int) -> Iterator[Comparison]:
    """Seeded walks of `steps` commands, admissible and not, through the official engine and ours, in order of `paths`.

    Raises:
        UserError: the official engine is not installed.
    """
    # Not an executor: with max_tasks_per_child it hangs in Python 3.11 (CPython issue 115634).
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=GAMES_A_PROCESS) as pool:
        yield from pool.imap(partial(compare_game, steps=steps, seed=seed), paths)


def compare_game(path: Path, steps: int, seed: int) -> Comparison:
    game = read_game(path)
    ours, theirs = AlfWorldEpisode(game), OfficialEpisode(path)
    # Seeded by the game's name, not its path: the walk is the same wherever the games lie.
    rng = random.Random(f"{seed}-{game.task_id}")
    plan = read_walkthrough(path) if rng.random() < _FOLLOWS_WALKTHROUGH else []
    plan.reverse()
    history: list[str] = []
    differences = _differences("the first observation", theirs.first_observation(), ours.first_observation())
    differences += _differences("admissible commands", theirs.admissible_commands(), ours.admissible_commands())
    while not differences and len(history) < steps:
        command = _next_command(rng, ours, plan)
        history.append(command)
        for name, other, mine in zip(
            ("observation", "reward", "done"), theirs.step(command), ours.step(command), strict=True
        ):
            differences += _differences(name, other, mine)
        differences += _differences("won", theirs.won(), ours.won())
        differences += _differences("admissible commands", theirs.admissible_commands(), ours.admissible_commands())
    after = f" after {history}" if history else ""
    return Comparison(path, len(history), tuple(difference + after for difference in differences))


def _differences(name: str, official: object, ours: object) -> list[str]:
    if official == ours:
        return []
    if isinstance(official, list) and isinstance(ours, list):
        return [f"{name}: only official {sorted({*official} - {*ours})}, only ours {sorted({*ours} - {*official})}"]
    return [f"{name}: official {official!r}, ours {ours!r}"]


def _next_command(rng: random.Random, episode: AlfWorldEpisode, plan: list[str]) -> str:
    """The plan's next command (with commands that change nothing in between), or a random one; one in six does nothing here."""
    admissible = episode.admissible_commands()
    draw = rng.random()
    if draw < 1 / 6:
        return _inadmissible(rng, episode.game, admissible)
    if plan:
        return plan.pop() if draw < 5 / 6 else rng.choice(_INERT)
    # A verb first: there are thirty places to go to for every thing to take.
    verbs = sorted({command.split()[0] for command in admissible})
    verb = rng.choices(verbs, [_WEIGHTS.get(verb, 1) for verb in verbs])[0]
    candidates = [command for command in admissible if command.split()[0] == verb]
    if verb in ("go", "take") and rng.random() < 0.5:
        candidates = [command for command in candidates if _leads_to_rare(episode, command)] or candidates
    return rng.choice(candidates)


def _leads_to_rare(episode: AlfWorldEpisode, command: str) -> bool:
    """Can something be done after the command that a random walk seldom comes to? A knife in hand makes it likely."""
    before = episode.state
    episode.step(command)
    held = episode.state.held
    rare = any(action.verb in _RARE for action in episode.actions().values()) or (
        command.startswith("take") and held is not None and episode.game.things[held].kind in KNIVES
    )
    episode.state = before
    return rare


def _inadmissible(rng: random.Random, game: Game, admissible: Sequence[str]) -> str:
    """A command that looks like one but does nothing here."""
    receptacle, other = (rng.choice(game.receptacles).name for _ in range(2))
    thing, second = (rng.choice(game.things).name for _ in range(2))
    put = f"move {thing} to {receptacle}", f"put {thing} in/on {receptacle}"
    candidates = [
        f"go to {receptacle}",
        f"go {receptacle}",
        f"go to  {receptacle}",
        f"go to {receptacle} and {other}",
        f"open {receptacle}",
        f"close {receptacle}",
        f"take {thing} from {receptacle}",
        *put,
        f"clean {thing} with {receptacle}",
        f"heat {thing} with {receptacle}",
        f"cool {thing} with {receptacle}",
        f"use {thing}",
        f"slice {thing} with {second}",
        f"examine {thing}",
        f"examine {receptacle}",
        rng.choice(admissible).upper(),
        f"{rng.choice(admissible)} please",
        "sing",
        "",
    ]
    left = [command for command in candidates if command not in admissible]
    return rng.choice(left)
