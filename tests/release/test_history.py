"""When a new router takes over, and what the history keeps of it."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmr_pipeline.artifacts.manifest import folder_hash, hash_files, write_manifest
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.base import Task
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.play import Arena, Entry
from dmr_pipeline.intervals import paired_interval
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.recipe.release import Release
from dmr_pipeline.release.comparison import CANDIDATE, RELEASED, Comparison, compare_routers, games_of
from dmr_pipeline.release.history import Candidate, Decision, decide, earlier_release, in_use, read_releases
from dmr_pipeline.router.model import save_router
from dmr_pipeline.stages import released_router as the_stage
from dmr_pipeline.stages.benchmark_tasks import benchmark_tasks
from dmr_pipeline.stages.quantized_checkpoints import quantized_checkpoints
from dmr_pipeline.stages.released_router import promote, released_router, roll_back
from tests.helpers.evaluations import make_episodes
from tests.helpers.fake_project import RECIPE_YAML, REPOSITORY

FAKE = Recipe.model_validate({"name": "fake", **yaml.safe_load(RECIPE_YAML)})
LADDER, OTHER_LADDER = "a" * 32 + ".dir", "b" * 32 + ".dir"
OLD = Candidate("0" * 32 + ".dir", LADDER)
NEW = Candidate("1" * 32 + ".dir", LADDER)
FIRST = (Decision(number=1, router=OLD.router, ladder=LADDER, decision="first", reason=""),)


def episodes(
    candidate: Sequence[bool], released: Sequence[bool], costs: tuple[float, float] = (0.5, 0.5)
) -> pl.DataFrame:
    """One episode of each game: whether the candidate, and whether the released router solves it; their costs."""
    success = {CANDIDATE: ("router", np.array([candidate])), RELEASED: ("router", np.array([released]))}
    return make_episodes(success, {CANDIDATE: 0.3, RELEASED: 0.4}, dict(zip((CANDIDATE, RELEASED), costs, strict=True)))


def decided(played: pl.DataFrame, **rule: float) -> Decision:
    section = Release(**rule)
    decision = decide(FIRST, NEW, section, lambda: compare_routers(played, section))
    assert decision is not None
    return decision


# The rule


@pytest.mark.parametrize(
    ("losses", "expected"),
    [(0, "promoted"), (1, "rejected"), (4, "rejected")],
)
def test_success_may_not_fall_by_the_margin(losses: int, expected: str) -> None:
    """100 games, of which the candidate loses some and gains none. The paired score interval is then Wilson's of the losses, and
    the margin is 5 points."""
    worst = -stats.binomtest(losses, 100).proportion_ci(0.95, "wilson").high
    decision = decided(episodes([game >= losses for game in range(100)], [True] * 100))
    assert decision.comparison is not None
    assert decision.comparison.interval[0] == pytest.approx(worst, abs=1e-6)
    assert decision.decision == expected
    assert f"success {100 * worst:+.1f} points at worst" in decision.reason
    assert ("asked: above -5.0" in decision.reason) == (expected == "rejected")


def test_margin_and_confidence_are_the_recipes() -> None:
    played = episodes([game >= 2 for game in range(100)], [True] * 100)
    assert decided(played).decision == "rejected"
    assert decided(played, success_margin=0.08).decision == "promoted"
    assert decided(played, confidence=0.5).decision == "promoted"
    equal, better = episodes([True] * 9, [True] * 9), episodes([True] * 9, [False] * 9)
    assert decided(equal, success_margin=0).decision == "rejected", "asks for an improvement"
    assert decided(better, success_margin=0).decision == "promoted"


@pytest.mark.parametrize(("games", "expected"), [(20, "rejected"), (72, "rejected"), (73, "promoted")])
def test_few_games_promote_nobody(games: int, expected: str) -> None:
    """Of 20 games without one loss the bound is 16 points; of 73 it is just below the margin."""
    assert stats.binomtest(0, 20).proportion_ci(0.95, "wilson").high == pytest.approx(0.161, abs=1e-3)
    decision = decided(episodes([True] * games, [True] * games))
    assert decision.decision == expected
    told = f"; {games} games cannot show a loss below 5.0 points, 73 are needed (release.games, benchmark.splits.validation)"
    assert decision.reason.endswith(told) == (expected == "rejected")
    assert "\n" not in decision.reason


@given(there=st.integers(1, 200), games=st.one_of(st.none(), st.integers(1, 200)), start=st.integers(1, 50))
def test_games_take_turns_and_all_are_used(there: int, games: int | None, start: int) -> None:
    rule = Release(games=None if games is None else min(games, there))
    drawn = [games_of(number, there, rule) for number in range(start, start + there)]
    count = len(drawn[0])
    assert count == (rule.games or min(there, max(there // 2, 73)))
    assert all(len(set(positions)) == count for positions in drawn)
    used = set()
    for positions in drawn[: -(-there // count)]:
        assert 2 * count > there or not used & set(positions) or len(used) + count > there
        used |= set(positions)
    assert used == set(range(there))
    assert games_of(start, there, rule) == drawn[0]


@pytest.mark.parametrize(
    ("candidate", "released", "increase", "expected"),
    [
        (0.5, 0.5, 0.0, "promoted"),
        (0.500001, 0.5, 0.0, "rejected"),
        (0.4, 0.5, 0.0, "promoted"),
        (0.55, 0.5, 0.1, "promoted"),
        (0.550001, 0.5, 0.1, "rejected"),
        (0.23, 0.2, 0.15, "promoted"),  # though 0.2 * 1.15 is below 0.23 in floats
        (0.230001, 0.2, 0.15, "rejected"),
    ],
)
def test_cost_may_rise_by_the_allowed_share(candidate: float, released: float, increase: float, expected: str) -> None:
    won = [True] * 80
    decision = decided(episodes(won, won, (candidate, released)), cost_increase=increase)
    assert decision.decision == expected
    assert ("asked: at most" in decision.reason) == (expected == "rejected")


def test_cheaper_does_not_excuse_worse_nor_better_dearer() -> None:
    won, lost = [True] * 80, [False] * 80
    assert decided(episodes(lost, won, (0.1, 0.5))).decision == "rejected"
    assert decided(episodes(won, lost, (0.6, 0.5))).decision == "rejected"
    assert decided(episodes(won, lost, (0.5, 0.5))).decision == "promoted"


def test_the_comparison_holds_the_numbers_of_both() -> None:
    played = episodes([True, True, False, False, True], [True, False, True, False, False], (0.25, 0.5))
    comparison = decided(played, seed=3).comparison
    assert comparison is not None
    assert comparison.games == 5
    assert comparison.candidate.model_dump() == {"success": 0.6, "cost": 0.25, "high_ratio": 0.3}
    assert comparison.released.model_dump() == {"success": 0.4, "cost": 0.5, "high_ratio": 0.4}
    assert comparison.difference == 0.2
    assert (comparison.wins, comparison.losses) == (2, 1)
    assert comparison.rule == {**Release().model_dump(mode="json"), "seed": 3}
    won, lost = (np.array(games, dtype=bool) for games in ([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]))
    assert comparison.interval == pytest.approx(paired_interval(won, lost, 0.95), abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=6, max_size=60))
def test_who_loses_more_games_is_never_preferred(games: list[tuple[bool, bool, bool]]) -> None:
    """Where a candidate is rejected, so is one that solves only a part of its games; and one that solves none of many."""
    released, better = ([game[i] for game in games] for i in (0, 1))
    worse = [solves and keeps for _, solves, keeps in games]
    rule = {"success_margin": 0.5}  # which six games can show
    assert (
        decided(episodes(better, released), **rule).decision,
        decided(episodes(worse, released), **rule).decision,
    ) != (
        "rejected",
        "promoted",
    )
    none, all_games = [False] * len(games), [True] * len(games)
    assert decided(episodes(none, all_games), **rule).decision == "rejected"
    assert decided(episodes(all_games, none), **rule).decision == "promoted"


# The stage


@dataclass
class World:
    """A folder in which routers are trained and released; a router's skill is how many of each 20 games it solves."""

    folder: Path
    comparisons: int = 0
    runs: int = 0

    def train(self, skill: int, ladder: str = LADDER) -> Path:
        """The artifact `grpo_router`; equal arguments give an equal one."""
        folder = self.folder / f"grpo_router_{skill}_{ladder[0]}"
        if not folder.exists():
            (folder / "router").mkdir(parents=True)
            (folder / "router" / "router.json").write_text(str(skill))
            write_manifest(folder, stage="grpo_router", recipe="fake", inputs={"quantized_checkpoints": ladder})
        return folder

    def run(
        self,
        stage: Callable[[StageContext], StageResult],
        grpo_router: Path,
        rule: Release = FAKE.release,
    ) -> StageResult:
        """As `materialize_stage` does: the old artifact stays if the stage fails, else the new one replaces it."""
        self.runs += 1
        output = self.folder / f"output_{self.runs}"
        output.mkdir()
        previous = self.released if self.released.exists() else None
        recipe = FAKE.model_copy(update={"release": rule})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(the_stage, "play_both", self.play)
            result = stage(StageContext(recipe, {"grpo_router": grpo_router}, output, self.folder, previous))
        shutil.rmtree(self.released, ignore_errors=True)
        output.rename(self.released)
        return result

    def play(self, context: StageContext, released: Path, candidate: Candidate, number: int) -> pl.DataFrame:
        self.comparisons += 1
        assert number == len(self.history) + 1
        grpo_router = context.inputs["grpo_router"]
        assert candidate == Candidate.of(grpo_router)
        skills = [int((folder / "router" / "router.json").read_text()) for folder in (grpo_router, released)]
        return episodes(*([game % 20 < skill for game in range(80)] for skill in skills))

    @property
    def released(self) -> Path:
        return self.folder / "released_router"

    @property
    def history(self) -> tuple[Decision, ...]:
        return read_releases(self.released).decisions if self.released.exists() else ()

    @property
    def decisions(self) -> list[str]:
        return [decision.decision for decision in self.history]

    @property
    def skill(self) -> int:
        """Of the router in use."""
        return int((self.released / "router" / "router.json").read_text())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_first_router_is_released_and_the_same_one_changes_nothing(world: World) -> None:
    result = world.run(released_router, world.train(10))
    assert world.decisions == ["first"]
    assert hash_files(world.released).keys() == {"releases.json", "router/router.json"}
    assert world.skill == 10
    assert world.history[0].router == folder_hash(hash_files(world.train(10))) == result.summary["router"]
    assert world.history[0].ladder == LADDER
    before = hash_files(world.released)
    assert world.run(released_router, world.train(10)).summary == result.summary
    assert hash_files(world.released) == before
    assert world.comparisons == 0


def test_a_better_router_takes_over_and_a_worse_one_does_not(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(15))
    assert (world.decisions, world.skill) == (["first", "promoted"], 15)
    result = world.run(released_router, world.train(5))
    assert (world.decisions, world.skill) == (["first", "promoted", "rejected"], 15)
    assert read_releases(world.released).current == 2
    assert result.summary["release"] == 2
    assert result.summary["latest_decision"] == "3: rejected"
    comparison = world.history[2].comparison
    assert comparison is not None
    assert (comparison.candidate.success, comparison.released.success) == (0.25, 0.75)


def test_a_rejected_router_is_compared_again_only_under_another_rule_or_with_another_router(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(5))
    before = hash_files(world.released)
    world.run(released_router, world.train(5))
    assert hash_files(world.released) == before
    assert world.comparisons == 1
    world.run(released_router, world.train(5), Release(success_margin=0.1))
    assert (world.decisions, world.comparisons) == (["first", "rejected", "rejected"], 2)
    world.run(released_router, world.train(8), Release(success_margin=1.0))
    world.run(released_router, world.train(5), Release(success_margin=1.0))
    assert world.decisions[3:] == ["promoted", "promoted"]
    assert world.skill == 5


def test_a_rejected_router_may_be_better_than_another_one_in_use(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(5))
    world.run(promote, world.train(3))
    world.run(released_router, world.train(5))
    assert (world.decisions, world.skill) == (["first", "rejected", "promoted_by_hand", "promoted"], 5)


def test_routers_of_different_ladders_are_not_compared(world: World) -> None:
    world.run(released_router, world.train(10))
    for _ in range(2):
        world.run(released_router, world.train(20, OTHER_LADDER))
        assert (world.decisions, world.skill, world.comparisons) == (["first", "not_comparable"], 10, 0)
    assert "`dmr router promote`" in world.history[1].reason
    world.run(promote, world.train(20, OTHER_LADDER))
    assert (world.decisions[-1], world.skill) == ("promoted_by_hand", 20)
    assert in_use(world.history).ladder == OTHER_LADDER


def test_by_hand_a_rejected_router_is_released_once(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(5))
    world.run(promote, world.train(5))
    assert (world.decisions, world.skill, world.comparisons) == (["first", "rejected", "promoted_by_hand"], 5, 1)
    assert world.history[2].comparison is None
    with pytest.raises(UserError, match=r"in use already \(release 3\)"):
        world.run(promote, world.train(5))
    world.run(released_router, world.train(5))
    assert len(world.history) == 3


def test_by_hand_works_before_there_is_a_release(world: World) -> None:
    world.run(promote, world.train(5))
    assert (world.decisions, world.skill) == (["promoted_by_hand"], 5)


def test_a_rollback_is_a_decision_of_its_own_and_no_rerun_undoes_it(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(15))
    to = earlier_release(world.history)
    assert to.number == 1
    world.run(partial(roll_back, to=1, router=world.train(10)), world.train(15))
    assert (world.decisions, world.skill) == (["first", "promoted", "rolled_back"], 10)
    assert (world.history[2].router, world.history[2].ladder) == (to.router, to.ladder)

    before = hash_files(world.released)
    for rule in (Release(), Release(success_margin=0.5, confidence=0.9)):
        world.run(released_router, world.train(15), rule)
        assert hash_files(world.released) == before

    world.run(released_router, world.train(16))
    assert (world.decisions[3:], world.skill) == (["promoted"], 16)
    world.run(released_router, world.train(15), Release(success_margin=0.5))
    assert len(world.history) == 4, "still rolled back"
    world.run(promote, world.train(15))
    world.run(released_router, world.train(17))
    world.run(released_router, world.train(15), Release(success_margin=0.5))
    assert world.decisions[4:] == ["promoted_by_hand", "promoted", "promoted"], "by hand it has come back for good"
    assert world.skill == 15


def test_a_second_rollback_takes_back_the_first(world: World) -> None:
    world.run(released_router, world.train(10))
    world.run(released_router, world.train(15))
    for skill in (10, 15, 10):
        to = earlier_release(world.history).number
        world.run(partial(roll_back, to=to, router=world.train(skill)), world.train(15))
        assert world.skill == skill


def test_a_rollback_goes_to_earlier_releases_alone(world: World) -> None:
    world.run(released_router, world.train(10))
    with pytest.raises(UserError, match="no earlier release"):
        earlier_release(world.history)
    world.run(released_router, world.train(5))
    world.run(released_router, world.train(15))
    with pytest.raises(UserError, match=r"decision 2 released no router.*\(releases: 1, 3\)"):
        earlier_release(world.history, 2)
    with pytest.raises(UserError, match=r"decision 7 released no router"):
        earlier_release(world.history, 7)
    with pytest.raises(UserError, match="release 3 is in use already"):
        earlier_release(world.history, 3)
    with pytest.raises(UserError, match=r"holds router .*, but release 1 is router"):
        world.run(partial(roll_back, to=1, router=world.train(5)), world.train(15))
    assert (world.decisions, world.skill) == (["first", "rejected", "promoted"], 15)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(0, 20), st.sampled_from([LADDER, LADDER, OTHER_LADDER])),
        st.tuples(st.just("promote"), st.integers(0, 20), st.sampled_from([LADDER, OTHER_LADDER])),
        st.tuples(st.just("roll back"), st.integers(1, 8), st.none()),
    ),
    max_size=10,
)


@settings(deadline=None, max_examples=40)
@given(operations)
def test_history_only_grows_and_holds_whatever_is_done(steps: list[tuple[str, int, str | None]]) -> None:
    """At equal cost, no router that solves fewer games takes over by itself."""
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        worlds = World(Path(first)), World(Path(second))
        for world in worlds:
            latest = world.train(10)
            world.run(released_router, latest)
            trained = {Candidate.of(latest).router: latest}
            for name, number, ladder in steps:
                history, skill, used = world.history, world.skill, in_use(world.history)
                stage: Callable[[StageContext], StageResult] = {"train": released_router, "promote": promote}.get(
                    name, partial(roll_back, to=number, router=latest)
                )
                if name != "roll back":
                    assert ladder is not None
                    latest = world.train(number, ladder)
                    trained[Candidate.of(latest).router] = latest
                elif number <= len(history):
                    stage = partial(roll_back, to=number, router=trained[history[number - 1].router])
                try:
                    world.run(stage, latest)
                except UserError:
                    assert name != "train"
                    assert world.history == history
                    continue
                assert world.history[: len(history)] == history
                assert len(world.history) - len(history) in ((0, 1) if name == "train" else (1,))
                now = in_use(world.history)
                assert hash_files(world.released / "router") == hash_files(trained[now.router] / "router")
                if name == "train":
                    assert (world.skill >= skill and now.ladder == used.ladder) or now == used
                    before = hash_files(world.released)
                    world.run(released_router, latest)
                    assert hash_files(world.released) == before
                else:
                    assert now == world.history[-1]
                    by_hand, files = now, hash_files(world.released)
                    world.run(released_router, latest)
                    assert in_use(world.history) == by_hand or used.router != Candidate.of(latest).router
                    assert name == "roll back" or hash_files(world.released) == files
        assert (
            worlds[0].released.joinpath("releases.json").read_bytes()
            == worlds[1].released.joinpath("releases.json").read_bytes()
        )


# releases.json


def spoil(content: dict, where: list[str | int], value: object) -> str:
    *path, last = where
    part = content
    for key in path:
        part = part[key]  # type: ignore[index]
    if value is None:
        del part[last]  # type: ignore[arg-type]
    else:
        part[last] = value  # type: ignore[index]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["current"], 3, "current is not the last decision that releases"),
        (["current"], 1, "current is not the last decision that releases"),
        (["decisions", 1, "number"], 5, "not numbered"),
        (["decisions", 0], None, "not numbered"),
        (["decisions", 0, "decision"], "not_comparable", "the first decision releases no router"),
        (["decisions", 0, "decision"], "liked", "decisions.0.decision: Input should be"),
        (["decisions", 1, "comparison"], None, "decision 2: a comparison belongs to"),
        (["decisions", 2, "router"], "abc", "decisions.2.router: String should match"),
        (["decisions", 2, "when"], "today", "decisions.2.when: Extra inputs"),
        (["decisions"], [], "decisions: Tuple should have at least 1 item"),
    ],
)
def test_a_malformed_history_is_one_line(world: World, where: list[str | int], value: object, said: str) -> None:
    for skill in (10, 15, 5):
        world.run(released_router, world.train(skill))
    path = world.released / "releases.json"
    path.write_text(spoil(json.loads(path.read_text()), where, value))
    for stage in (released_router, promote):
        with pytest.raises(UserError, match=said) as error:
            world.run(stage, world.train(20))
        assert "\n" not in str(error.value)
        assert f"dvc checkout {world.released}" in str(error.value)


def test_a_missing_history_is_one_line(world: World) -> None:
    world.run(released_router, world.train(10))
    (world.released / "releases.json").unlink()
    with pytest.raises(UserError, match=r"releases.json is missing: restore it with `dvc checkout"):
        world.run(released_router, world.train(15))


# The real thing: the agent in Git, which wins more games in float than in int2


def real_recipe() -> Recipe:
    changes = {
        "benchmark": {
            "splits": {"agent_train": 1, "router_train": 1, "validation": 10, "test": 1},
            "step_limit": 20,
        },
        "precisions": {
            "ladder": [{"name": "float", "weights": "float"}, {"name": "int2", "weights": "int2"}],
            "route": ["float", "int2"],
            "kl_episodes": 1,
        },
        "runtime": {"device": "cpu", "threads": 1, "processes": 1},
    }
    return Recipe.model_validate(load_recipe("alfworld-tiny", REPOSITORY / "recipes").model_dump() | changes)


@pytest.fixture(scope="module")
def real_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("real")
    done = {"agent": REPOSITORY / "data" / "alfworld-tiny" / "agent"}
    for stage in (benchmark_tasks, quantized_checkpoints):
        done[stage.__name__] = folder / stage.__name__
        done[stage.__name__].mkdir()
        stage(StageContext(real_recipe(), done, done[stage.__name__], folder))
        if stage is benchmark_tasks:
            write_manifest(done["benchmark_tasks"])
    return done


def real_router(folder: Path, checkpoints: Path, threshold: float, note: str = "") -> Path:
    """An artifact `grpo_router` with a router of random weights, which acts in high precision from its threshold on."""
    from dmr_pipeline.agent.checkpoint import load_tokenizer
    from dmr_pipeline.recipe.kl_router import RouterModel
    from dmr_pipeline.recipe.model import Architecture
    from dmr_pipeline.router.model import new_router

    tokenizer = load_tokenizer(checkpoints / "tokenizer")
    architecture = Architecture(layers=1, width=8, heads=1, key_value_heads=1, head_width=8, feed_forward=8)
    router = new_router(RouterModel(architecture=architecture), ("float", "int2"), tokenizer, 0, torch.device("cpu"))
    settings = router.settings.model_copy(update={"threshold": threshold})
    save_router(replace(router, settings=settings), folder / "router")
    inputs = {"quantized_checkpoints": folder_hash(hash_files(checkpoints))}
    write_manifest(folder, stage="grpo_router", recipe="alfworld-tiny", inputs=inputs, summary={"note": note})
    return folder


def test_real_routers_play_and_a_crippled_one_is_kept_out(real_inputs: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = real_inputs["quantized_checkpoints"]
    routers = {
        "high": real_router(tmp_path / "high", checkpoints, threshold=0.0),
        "same": real_router(tmp_path / "same", checkpoints, threshold=0.0, note="trained again"),
        "low": real_router(tmp_path / "low", checkpoints, threshold=1.0),
    }
    few = Release(games=2, success_margin=0.9)  # which two games can show
    rules = {"high": Release(), "same": few, "low": Release(games=10, success_margin=0.31)}
    previous = None
    for name, router in routers.items():
        output = tmp_path / f"released_{name}"
        output.mkdir()
        recipe = real_recipe().model_copy(update={"release": rules[name]})
        released_router(StageContext(recipe, real_inputs | {"grpo_router": router}, output, tmp_path, previous))
        previous = output
    first, same, crippled = read_releases(tmp_path / "released_low").decisions

    assert (first.decision, same.decision, crippled.decision) == ("first", "promoted", "rejected")
    assert isinstance(same.comparison, Comparison)
    assert isinstance(crippled.comparison, Comparison)
    assert same.router != first.router
    assert same.comparison.candidate == same.comparison.released
    assert same.comparison.difference == 0.0
    assert same.comparison.interval[1] == pytest.approx(
        stats.binomtest(0, 2).proportion_ci(0.95, "wilson").high, abs=1e-6
    )
    # What both play was measured before, by the precisions alone.
    ladder = json.loads((checkpoints / "ladder.json").read_text())
    success = {rung["name"]: rung["validation_success"] for rung in ladder["rungs"]}
    assert success["float"] > success["int2"]
    assert (same.comparison.games, crippled.comparison.games) == (2, 10)
    assert crippled.comparison.released.success == success["float"]
    assert crippled.comparison.candidate.success == success["int2"]
    assert (crippled.comparison.released.high_ratio, crippled.comparison.candidate.high_ratio) == (1.0, 0.0)
    assert crippled.comparison.candidate.cost < 1 < crippled.comparison.released.cost < 1.1
    assert hash_files(tmp_path / "released_low" / "router") == hash_files(routers["high"] / "router")

    again = tmp_path / "again"
    again.mkdir()
    context = StageContext(
        real_recipe().model_copy(update={"release": few}),
        real_inputs | {"grpo_router": routers["same"]},
        again,
        tmp_path,
        tmp_path / "released_high",
    )
    released_router(context)
    assert hash_files(again) == hash_files(tmp_path / "released_same")


def test_actions_are_drawn_by_the_releases_seed(
    real_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the evaluation's, which is no part of what the artifact was made from. Each decision has games of its own."""
    seeds, games = [], []

    def evaluate(entries: Sequence[Entry], arena: Arena, tasks: Sequence[Task], *_: object) -> dict[str, pl.DataFrame]:
        seeds.append(arena.seed)
        games.append({task.task_id for task in tasks})
        return {entry.name: pl.DataFrame({"policy": [entry.name]}) for entry in entries}

    monkeypatch.setattr(the_stage, "evaluate", evaluate)
    router = real_router(tmp_path / "router", real_inputs["quantized_checkpoints"], 0.5)
    recipe = real_recipe().model_copy(update={"release": Release(seed=7, games=5)})
    context = StageContext(recipe, real_inputs | {"grpo_router": router}, tmp_path, tmp_path)
    played = the_stage.play_both(context, router, Candidate.of(router), 2)
    assert played["policy"].to_list() == [RELEASED, CANDIDATE]
    the_stage.play_both(context, router, Candidate.of(router), 3)
    assert seeds == [7, 7]
    assert [len(played) for played in games] == [5, 5]
    assert len(games[0] | games[1]) == 10


def test_a_router_of_precisions_that_are_gone_is_not_played(real_inputs: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = tmp_path / "quantized_checkpoints"
    shutil.copytree(real_inputs["quantized_checkpoints"], checkpoints)
    router = real_router(tmp_path / "router", checkpoints, 0.5)
    (checkpoints / "ladder.json").write_text("{}")
    inputs = real_inputs | {"grpo_router": router, "quantized_checkpoints": checkpoints}
    context = StageContext(real_recipe(), inputs, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"trained for another precision ladder than .*dmr run alfworld-tiny"):
        the_stage.play_both(replace(context, previous=router), router, Candidate.of(router), 2)
