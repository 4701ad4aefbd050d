"""The vector environment against gymnasium's own, made of one single environment a slot; and its state."""

import pickle
import random
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.vector import TextVectorEnv

GAMES = [generate_game(seed)[0] for seed in range(12)]


class Single(gymnasium.Env[str, str]):
    """One slot, which plays always the same game."""

    def __init__(self, game: Game) -> None:
        self.episode = AlfWorldEpisode(game)
        self.observation_space = self.action_space = gymnasium.spaces.Text(100_000, min_length=0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return self.episode.first_observation(), {"won": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, over = self.episode.step(action)
        return observation, reward, over, False, {"won": over}


def test_it_says_what_gymnasium_says() -> None:
    """One game in every slot, so that both play the same however tasks are dealt; experts act, so that episodes end."""
    game = next(game for game in GAMES if game.task_type == "pick_two_obj_and_place")
    ours = TextVectorEnv([game], num_envs=3, step_limit=9)
    theirs = SyncVectorEnv([lambda: gymnasium.wrappers.TimeLimit(Single(game), 9)] * 3)
    seen, _ = ours.reset(seed=1)
    assert seen == tuple(theirs.reset(seed=1)[0])
    rng = random.Random(0)
    experts: list[ExploringExpert | None] = [None] * 3
    ended = {"terminated": 0, "truncated": 0}
    for _ in range(80):
        commands = []
        for slot in range(3):
            if seen[slot].startswith("-= Welcome"):
                experts[slot] = ExploringExpert(game.instruction)
                experts[slot].observe(None, seen[slot].split("\n\n")[1])
            wild = slot == 2 or rng.random() < 0.03
            commands.append(rng.choice(ours._episodes[slot].admissible_commands()) if wild else experts[slot].act())
        seen, rewards, terminations, truncations, infos = ours.step(commands)
        expected = theirs.step(commands)
        assert seen == tuple(expected[0])
        np.testing.assert_array_equal([rewards, terminations, truncations], expected[1:4])
        np.testing.assert_array_equal(infos["won"], expected[4]["won"])
        for slot in range(3):
            experts[slot].observe(commands[slot], seen[slot])
        ended["terminated"] += terminations.sum()
        ended["truncated"] += truncations.sum()
    assert min(ended.values()) > 0, ended


class Lost:
    """A game that ends at once, with half of the reward or all of it, as its id says."""

    task_type, instruction = "buy", "buy one"

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id

    def episode(self) -> "Lost":
        return self

    def first_observation(self) -> str:
        return "a shop"

    def admissible_commands(self) -> list[str]:
        return ["buy"]

    def step(self, command: str) -> tuple[str, float, bool]:
        return "bought", float(self.task_id), True


def test_an_episode_that_ends_without_the_whole_reward_is_not_won() -> None:
    env = TextVectorEnv([Lost("0.5"), Lost("1.0")], num_envs=8, step_limit=5)  # type: ignore[list-item]
    env.reset(seed=0)
    _, rewards, terminations, _, infos = env.step(["buy"] * 8)
    assert terminations.all()
    assert infos["won"].tolist() == [float(task) == 1 for task in infos["task_id"]] == (rewards == 1).tolist()
    assert set(infos["task_id"]) == {"0.5", "1.0"}


def _walk(env: TextVectorEnv, steps: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    history = []
    for _ in range(steps):
        commands = [rng.choice(episode.admissible_commands()) for episode in env._episodes]
        seen, rewards, terminations, truncations, infos = env.step(commands)
        history.append((seen, rewards.tolist(), terminations.tolist(), truncations.tolist(), infos["task_id"].tolist()))
    return history


@given(seed=st.integers(0, 1000), before=st.integers(0, 12), after=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_a_restored_state_plays_on_as_the_first_time(seed: int, before: int, after: int) -> None:
    env = TextVectorEnv(GAMES, num_envs=4, step_limit=7)
    env.reset(seed=seed)
    _walk(env, before, seed)
    kept = pickle.loads(pickle.dumps(env.state))
    first = _walk(env, after, seed + 1)
    env.state = kept
    assert _walk(env, after, seed + 1) == first
    fresh = TextVectorEnv(GAMES, num_envs=4, step_limit=7)
    fresh.state = kept
    assert _walk(fresh, after, seed + 1) == first


def test_seeds_decide_the_order_of_tasks_and_all_come_before_any_comes_again() -> None:
    env = TextVectorEnv(GAMES, num_envs=len(GAMES), step_limit=2)
    orders = [env.reset(seed=seed)[1]["task_id"].tolist() for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(game.task_id for game in GAMES)


def test_the_state_of_an_episode_can_be_kept_and_sent() -> None:
    episode = AlfWorldEpisode(GAMES[0])
    episode.step(episode.admissible_commands()[0])
    assert hash(episode.state) == hash(pickle.loads(pickle.dumps(episode.state)))


@pytest.mark.timing
def test_an_episode_is_cloned_and_restored_in_microseconds() -> None:
    episode = AlfWorldEpisode(GAMES[0])
    started = time.perf_counter()
    for _ in range(1000):
        kept = episode.state
        episode.state = kept
    assert (time.perf_counter() - started) / 1000 < 20e-6


def test_misuse_is_refused() -> None:
    env = TextVectorEnv(GAMES, num_envs=2, step_limit=5)
    with pytest.raises(RuntimeError, match="reset before step"):
        env.step(["look", "look"])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="zip"):
        env.step(["look"])
    with pytest.raises(ValueError, match="no options"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="a state of 2 slots"):
        TextVectorEnv(GAMES, num_envs=3, step_limit=5).state = env.state
