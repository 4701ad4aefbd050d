"""An evaluation that grows or was interrupted plays what it lacks, and comes out as one that has played everything."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from dmr_pipeline.agent.checkpoint import save_causal_lm
from dmr_pipeline.artifacts.manifest import hash_files, write_manifest
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.evaluation.play import acting_facts, router_content
from dmr_pipeline.precision.ladder import LADDER_FILE, read_ladder
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import PromptLookup, Speculative
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.known import Known
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from dmr_pipeline.router.budgets import AtBar
from dmr_pipeline.router.kl import ROUTER_FOLDER
from dmr_pipeline.router.labels import STEPS
from dmr_pipeline.router.model import save_router
from dmr_pipeline.router.policies import LmRouter
from dmr_pipeline.stages import evaluation_report as evaluate
from dmr_pipeline.stages.evaluation_report import evaluation_report
from dmr_pipeline.stages.quantized_checkpoints import quantized_checkpoints
from tests.helpers.routers import TOKENIZER, random_model, random_router

REPOSITORY = Path(__file__).parents[2]
GAMES = 3
THRESHOLDS = {"kl_router": 0.45, "grpo_router": 0.55}


def make_recipe(
    rungs: Sequence[str] = ("float", "int4", "int2"), route: Sequence[str] = ("float", "int2"), **evaluation: float
) -> Recipe:
    recipe = load_recipe("alfworld-tiny", REPOSITORY / "recipes")
    changes = {
        "benchmark": {"splits": {"agent_train": 1, "router_train": 1, "validation": 2, "test": GAMES}, "step_limit": 3},
        "agent": recipe.agent.model_dump() | {"prompt": {**recipe.agent.prompt.model_dump(), "max_action_tokens": 4}},
        "precisions": {
            "ladder": [{"name": name, "weights": name} for name in rungs],
            "route": list(route),
            "kl_episodes": 1,
        },
        "evaluation": {"random_draws": 2, "bootstrap": 50, "confidence_games": 1, **evaluation},
        "runtime": {"device": "cpu", "threads": 1, "processes": 1},
    }
    return Recipe.model_validate(recipe.model_dump() | changes)


def write_router(folder: Path, threshold: float) -> None:
    save_router(random_router(threshold=threshold), folder / ROUTER_FOLDER)
    write_manifest(folder)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("artifacts")
    save_causal_lm(random_model(7), TOKENIZER, folder / "agent" / "model", torch.float16)
    games = [generate_game(seed, 50)[0] for seed in range(GAMES)]
    inputs = {name: folder / name for name in ("agent", "benchmark_tasks", "quantized_checkpoints")}
    for split, part in {"test": games, "validation": games[:2]}.items():
        inputs["benchmark_tasks"].mkdir(exist_ok=True)
        write_games(part, inputs["benchmark_tasks"] / f"{split}.parquet")
    inputs["quantized_checkpoints"].mkdir()
    write_manifest(inputs["agent"])
    write_manifest(inputs["benchmark_tasks"])
    # One rung more than the recipe has at first.
    recipe = make_recipe(("float", "int8", "int4", "int2"))
    quantized_checkpoints(StageContext(recipe, inputs, inputs["quantized_checkpoints"], folder))
    write_manifest(inputs["quantized_checkpoints"])
    for name, threshold in THRESHOLDS.items():
        write_router(folder / name, threshold)
        pl.DataFrame().write_parquet(folder / name / "training.parquet")
    pl.DataFrame({"probability": [0.5], "sensitive": [True]}).write_parquet(folder / "kl_router" / "validation.parquet")
    (folder / "sensitivity_dataset").mkdir()
    row = {name: [np.zeros(1, int).item() if kind == pl.Int64 else 0.1] for name, kind in STEPS.items()}
    texts = {name: ["x"] for name, kind in STEPS.items() if kind == pl.String}
    truths = {name: [True] for name, kind in STEPS.items() if kind == pl.Boolean}
    of_rungs = [pl.DataFrame(row | texts | truths | {"precision": [rung]}, schema=STEPS) for rung in ("int4", "int2")]
    pl.concat(of_rungs).write_parquet(folder / "sensitivity_dataset" / "steps.parquet")
    return folder


@dataclass
class Bench:
    """Evaluations of one folder of artifacts, one after another."""

    folder: Path
    recipe: Recipe = field(default_factory=make_recipe)
    played: list[str] = field(default_factory=list)
    """Policies in the order in which they played, with the number of episodes: "high 3"."""
    fails_after: int | None = None
    """Policies that are finished before the evaluation is interrupted."""

    def run(self, kept: str = "kept") -> list[str]:
        """Evaluate, keeping episodes in that folder; what was played."""
        self.played.clear()
        names = ("benchmark_tasks", "quantized_checkpoints", "sensitivity_dataset", *THRESHOLDS)
        inputs = {name: self.folder / name for name in names}
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        evaluation_report(
            StageContext(self.recipe, inputs, self.output, self.folder / "scratch", kept=self.folder / kept)
        )
        return list(self.played)

    @property
    def output(self) -> Path:
        return self.folder / "evaluation_report"

    def files(self) -> dict[str, str]:
        return hash_files(self.output)


def label(rollouts: Rollouts, play: PolicyRuns) -> str:
    match play.policy:
        case SinglePrecision(precision=dear, drafter=str(cheap)):
            return f"{dear}<{cheap}"
        case SinglePrecision(precision=precision):
            alone = rollouts.route == (precision,)
            return "rung" if alone else {"float": "high", "int2": "low"}.get(precision, precision)
        case RandomMixing():
            return "random"
        case LmRouter():
            return "kl_router" if play.policy.router.settings.threshold < 0.5 else "grpo_router"
        case Confidence():
            return "confidence"
        case Disagreement():
            return "disagreement"
        case AtBar():
            return "curve"
    raise AssertionError


@pytest.fixture(scope="module")
def counted() -> Iterator[list[Bench]]:
    """Evaluations count what they play for the last of these, without the pictures and the times."""
    benches: list[Bench] = []
    play_each = Rollouts.play_each

    def counting(rollouts: Rollouts, plays: Sequence[PolicyRuns], seed: int, on_played: Callable, known: Known) -> None:
        bench = benches[-1]

        def finished(index: int, played: list[Trajectory], clock: Timings) -> None:
            if len(bench.played) == bench.fails_after:
                raise RuntimeError("interrupted")
            on_played(index, played, clock)
            bench.played.append(f"{label(rollouts, plays[index])} {len(played)}")

        play_each(rollouts, plays, seed, finished, known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "play_each", counting)
        patch.setattr(evaluate, "seconds_per_step", lambda *_: {"mean": 0.0})
        for name in (
            "plot_accuracy_cost",
            "plot_kl_by_turn",
            "plot_training_curves",
            "plot_calibration",
            "plot_curves",
        ):
            patch.setattr(evaluate, name, lambda *_: None)
        yield benches


@pytest.fixture(scope="module")
def finished(artifacts: Path, counted: list[Bench]) -> Bench:
    """An evaluation that has played everything."""
    counted.append(Bench(artifacts))
    counted[-1].run()
    return counted.pop()


@pytest.fixture
def bench(finished: Bench, counted: list[Bench], tmp_path: Path) -> Iterator[Bench]:
    """A copy of the finished one."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    counted.append(Bench(tmp_path))
    yield counted[-1]
    counted.pop()


def without_calibration(played: Sequence[str]) -> list[str]:
    """The cascade's own games aside."""
    return [what for what in played if what != "confidence 1"]


ROUTERS = ["kl_router 2", "grpo_router 2"]
"""On validation games."""
ALONE = ["high 3", "low 3", "disagreement 3"]
ON_TEST = [*ALONE, "confidence 3", "kl_router 3", "grpo_router 3", "float<int2 3", "random 6", "random 6"]
EVERYTHING = ["rung 3", *ROUTERS, *ON_TEST]


def test_what_is_played_and_in_which_order_it_is_reported(finished: Bench) -> None:
    assert without_calibration(finished.played) == EVERYTHING
    assert len(finished.played) > len(EVERYTHING) + 1
    episodes = pl.read_parquet(finished.output / "episodes.parquet")
    assert episodes["policy"].unique(maintain_order=True).to_list() == [
        "always_int4",
        "always_high",
        "always_low",
        "confidence",
        "kl_router",
        "random@kl_router",
        "grpo_router",
        "random@grpo_router",
        "disagreement",
        "speculative:float<int2",
    ]
    tables = {"episodes.parquet", "transcripts.parquet", "openings.parquet", "choices.parquet", "table.md"}
    assert set(hash_files(finished.output)) == {*tables, "metrics.json", "context.json", "figures.json"}


def test_what_is_shown_step_by_step_is_what_was_played(finished: Bench) -> None:
    """As the episodes count it, and as the expert of what would have been done tells it: greedy acting does what it would do."""
    episodes = pl.read_parquet(finished.output / "episodes.parquet").filter(draw=0)
    steps = pl.read_parquet(finished.output / "transcripts.parquet")
    names = {"always_high", "always_low", "kl_router", "grpo_router", "disagreement"}
    assert set(steps["policy"]) == names
    counted = steps.group_by("policy", "task_id").agg(
        pl.len().cast(pl.Int64).alias("steps"), pl.col("precision").eq("float").sum().cast(pl.Int64).alias("high_steps")
    )
    told = episodes.filter(pl.col("policy").is_in(names)).select(counted.columns)
    assert counted.sort("policy", "task_id").equals(told.sort("policy", "task_id"))
    choices = pl.read_parquet(finished.output / "choices.parquet")
    (router,) = set(choices["policy"])
    mine = steps.filter(policy=router)
    assert choices.height == 2 * mine.height
    acted = mine.join(choices, on=["policy", "task_id", "turn", "precision"], suffix="_would")
    assert acted.height == mine.height
    assert acted["command"].equals(acted["command_would"], check_names=False)
    assert choices.filter(precision="float")["kl_high_low"].is_null().all()
    assert (choices.filter(precision="int2")["kl_high_low"] > 0).any()
    openings = pl.read_parquet(finished.output / "openings.parquet")
    assert openings["task_id"].to_list() == episodes.filter(policy="always_high")["task_id"].to_list()


def test_what_random_agents_write_is_counted_as_what_it_is(finished: Bench) -> None:
    episodes = pl.read_parquet(finished.output / "episodes.parquet")
    policies = json.loads((finished.output / "metrics.json").read_text())["policies"]
    counts = episodes.group_by("policy").agg(pl.sum("steps", "unfinished", "no_thought", "empty", "inadmissible"))
    assert 0 < counts["unfinished"].sum() <= counts["steps"].sum()
    for policy, steps, *failed in counts.iter_rows():
        assert policies[policy]["parse_failures"] == pytest.approx(sum(failed[:3]) / steps, abs=1e-6)
        assert list(policies[policy]["failures"].values()) == pytest.approx([n / steps for n in failed], abs=1e-6)


def test_a_finished_evaluation_plays_nothing_again(bench: Bench, finished: Bench) -> None:
    """Not even what shows what was found."""
    assert bench.run() == []
    assert bench.files() == finished.files()
    bench.recipe = make_recipe(bootstrap=60, confidence=0.9)
    assert bench.run() == []
    assert bench.files() != finished.files()


def test_processes_do_not_change_the_episodes(bench: Bench, finished: Bench) -> None:
    runtime = bench.recipe.runtime.model_copy(update={"processes": 2})
    bench.recipe = bench.recipe.model_copy(update={"runtime": runtime})
    assert bench.run(kept="anew") == finished.played
    assert bench.files() == finished.files()


@pytest.mark.parametrize("after", [1, 6, 12])
def test_an_interrupted_evaluation_goes_on_where_it_was(bench: Bench, finished: Bench, after: int) -> None:
    bench.fails_after = after
    with pytest.raises(RuntimeError, match="interrupted"):
        bench.run(kept="anew")
    before = list(bench.played)
    assert len(before) == after
    bench.fails_after = None
    played = bench.run(kept="anew")
    assert sorted(without_calibration([*before, *played])) == sorted(EVERYTHING)
    assert bench.files() == finished.files()


def another_router(bench: Bench) -> None:
    """Of the same ratio."""
    router = random_router(threshold=THRESHOLDS["grpo_router"])
    with torch.no_grad():
        next(router.model.parameters())[0, 0] += 1
    save_router(router, bench.folder / "grpo_router" / ROUTER_FOLDER)
    write_manifest(bench.folder / "grpo_router")


def another_threshold(bench: Bench) -> None:
    """It lies in `router.json` alone, and makes another ratio."""
    write_router(bench.folder / "kl_router", threshold=0.0)


def more_of_a_routers_artifact(bench: Bench) -> None:
    (bench.folder / "kl_router" / "training.txt").write_text("took longer")
    write_manifest(bench.folder / "kl_router")


def another_rung(bench: Bench) -> None:
    bench.recipe = make_recipe(("float", "int8", "int4", "int2"))
    path = bench.folder / "quantized_checkpoints" / LADDER_FILE
    ladder = json.loads(path.read_text())
    ladder["rungs"][1]["kl_to_float"] += 0.1  # of the rung that was not there before
    path.write_text(json.dumps(ladder))
    write_manifest(bench.folder / "quantized_checkpoints")


def other_low_weights(bench: Bench) -> None:
    path = bench.folder / "quantized_checkpoints" / "int2" / "config.json"
    path.write_text(path.read_text() + "\n")
    write_manifest(bench.folder / "quantized_checkpoints")


def change_ladder(bench: Bench, **facts: object) -> None:
    path = bench.folder / "quantized_checkpoints" / LADDER_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    write_manifest(bench.folder / "quantized_checkpoints")


def other_unit_of_cost(bench: Bench) -> None:
    change_ladder(bench, unit_bytes=2 * read_ladder(bench.folder / "quantized_checkpoints").unit_bytes)


def other_games(bench: Bench) -> None:
    write_games(
        [generate_game(50 + seed, 50)[0] for seed in range(GAMES)], bench.folder / "benchmark_tasks" / "test.parquet"
    )
    write_manifest(bench.folder / "benchmark_tasks")


def recipe_with(**evaluation: float) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        bench.recipe = make_recipe(**evaluation)

    return change


@pytest.mark.parametrize(
    ("change", "played"),
    [
        (recipe_with(random_draws=3), ["random 3", "random 3"]),
        (recipe_with(random_draws=1), []),
        (recipe_with(seed=1), EVERYTHING),
        (another_router, ["grpo_router 2", "grpo_router 3"]),
        (another_threshold, ["kl_router 2", "kl_router 3", "random 6"]),
        (more_of_a_routers_artifact, []),
        (another_rung, ["rung 3"]),
        (other_low_weights, EVERYTHING[1:]),
        (other_unit_of_cost, EVERYTHING),
        (other_games, EVERYTHING),
    ],
)
def test_what_has_changed_is_played_and_nothing_else(
    bench: Bench, change: Callable[[Bench], None], played: list[str]
) -> None:
    change(bench)
    assert without_calibration(bench.run()) == played
    assert bench.run() == [], "and is kept in its turn"


@pytest.mark.parametrize("change", [recipe_with(random_draws=3), another_threshold, another_rung])
def test_a_grown_evaluation_is_the_one_that_has_played_everything(
    bench: Bench, finished: Bench, change: Callable[[Bench], None]
) -> None:
    change(bench)
    bench.run()
    grown = bench.files()
    bench.run(kept="anew")
    assert bench.files() == grown != finished.files()


def test_another_ratio_of_the_cascade_is_calibrated_again(bench: Bench) -> None:
    bench.recipe = make_recipe(confidence_ratio=0.6)
    assert set(bench.run()) <= {"confidence 1", "confidence 3"}
    assert bench.played.count("confidence 1") > 1


def test_what_is_damaged_is_played_again(bench: Bench, finished: Bench, caplog: pytest.LogCaptureFixture) -> None:
    files = sorted((bench.folder / "kept").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "dmr_pipeline"):
        assert len(bench.run()) >= 1
    assert "damaged" in caplog.text
    assert bench.files() == finished.files()
    assert bench.run() == []


def test_nothing_is_kept_that_the_last_evaluation_did_not_need(bench: Bench) -> None:
    count = len(list((bench.folder / "kept").iterdir()))
    bench.recipe = make_recipe(seed=1)
    bench.run()
    assert len(list((bench.folder / "kept").iterdir())) == count
    bench.recipe = make_recipe(random_draws=1)
    bench.run()
    assert len(list((bench.folder / "kept").iterdir())) == count - 2


def test_other_drafts_are_drafted_anew_and_end_alike(bench: Bench) -> None:
    precisions = bench.recipe.precisions.model_copy(update={"speculative": Speculative(draft_tokens=1)})
    bench.recipe = bench.recipe.model_copy(update={"precisions": precisions})
    whole = pl.read_parquet(bench.output / "episodes.parquet").filter(kind="speculative")
    assert bench.run() == ["float<int2 3"]
    short = pl.read_parquet(bench.output / "episodes.parquet").filter(kind="speculative")
    assert short["steps"].to_list() == whole["steps"].to_list()
    assert short["passes"].sum() > whole["passes"].sum()


def test_what_is_looked_up_is_played_anew_and_ends_alike_for_less(bench: Bench) -> None:
    def single() -> pl.DataFrame:
        return pl.read_parquet(bench.output / "episodes.parquet").filter(kind="single").sort("policy", "task_id")

    plain = single()
    precisions = bench.recipe.precisions.model_copy(update={"prompt_lookup": PromptLookup(ngram=2)})
    bench.recipe = bench.recipe.model_copy(update={"precisions": precisions})
    assert len(bench.run()) > 5
    looked = single()
    assert looked["steps"].to_list() == plain["steps"].to_list()
    for spent in ("passes", "cost"):
        assert looked[spent].sum() < plain[spent].sum()
    notes = json.loads((bench.output / "context.json").read_text())["notes"]
    assert any("looked up in the transcript (precisions.prompt_lookup)" in note for note in notes)


CURVED = {"budgets": (0.3, 0.6), "rules": ("first", "margin")}


def test_curves_are_played_besides_and_kept_by_policy_and_budget(bench: Bench, finished: Bench) -> None:
    before = {name: md5 for name, md5 in finished.files().items() if name == "episodes.parquet"}
    bench.recipe = make_recipe(**CURVED)
    levels_and_points = bench.run()
    assert set(levels_and_points) == {"curve 2", "curve 3"}
    assert levels_and_points.count("curve 3") == 4 * len(CURVED["budgets"])
    assert bench.run() == []
    curves = pl.read_parquet(bench.output / "curves.parquet")
    assert curves.group_by("policy", "budget").len()["len"].to_list() == [GAMES] * 8
    metrics = json.loads((bench.output / "metrics.json").read_text())
    assert list(metrics["curves"]) == ["kl_router", "grpo_router", "first", "margin"]
    for curve in metrics["curves"].values():
        for point in curve["points"]:
            assert point["validation_spend"] <= point["budget"]
    named = {f"rule@{router}" for router in metrics["best_rules"]}
    assert named == {name for name in metrics["policies"] if name.startswith("rule@")}
    assert "Curves: success" in (bench.output / "table.md").read_text()
    # Another budget and another rule leave what there is.
    bench.recipe = make_recipe(budgets=(0.3, 0.6), rules=("first", "margin", "last"))
    more = bench.run()
    assert more.count("curve 3") == 2
    assert len(more) < len(levels_and_points)
    bench.recipe = make_recipe()
    bench.run()
    assert before.items() <= bench.files().items()


@pytest.mark.parametrize("after", [2, 9])
def test_curves_that_were_interrupted_go_on(bench: Bench, after: int) -> None:
    bench.recipe = make_recipe(**CURVED)
    everything = bench.run()
    whole = bench.files()
    shutil.rmtree(bench.folder / "kept")
    bench.recipe = make_recipe()
    bench.run()
    bench.recipe, bench.fails_after = make_recipe(**CURVED), after
    with pytest.raises(RuntimeError, match="interrupted"):
        bench.run()
    bench.fails_after = None
    assert len(bench.run()) <= len(everything) - after + 1
    assert bench.files() == whole


def test_nothing_is_drafted_where_commands_are_scored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(evaluate, "seconds_per_step", lambda policy, *_: timed.append(str(policy)))
    agent = bench.recipe.agent
    prompt = agent.prompt.model_copy(update={"thought_end": None})
    bench.recipe = bench.recipe.model_copy(
        update={"agent": agent.model_copy(update={"action": "score", "prompt": prompt})}
    )
    assert "float<int2 3" not in bench.run()
    assert "speculative" not in set(pl.read_parquet(bench.output / "episodes.parquet")["kind"])
    assert timed
    assert not any("drafter='int2'" in policy for policy in timed)


@pytest.mark.parametrize(("decides", "counts"), [("before", False), ("after", True)])
def test_drafts_count_where_a_router_decides_after_them(artifacts: Path, decides: str, counts: bool) -> None:
    router = SimpleNamespace(settings=SimpleNamespace(decides=decides))
    found = [
        router_content(artifacts / "kl_router", router, drafts)
        for drafts in (None, Speculative(draft_tokens=2), Speculative(draft_tokens=3))
    ]
    assert len({json.dumps(one) for one in found}) == (3 if counts else 1)
    assert "router.json" in found[0]


def test_all_that_acting_reads_of_the_recipe_is_among_the_facts(artifacts: Path) -> None:
    recipe = make_recipe()
    checkpoints = artifacts / "quantized_checkpoints"
    agent, prompt = recipe.agent, recipe.agent.prompt
    changed = [
        recipe.model_copy(update={"agent": agent.model_copy(update={"temperature": 0.5})}),
        recipe.model_copy(update={"agent": agent.model_copy(update={"action": "score"})}),
        recipe.model_copy(update={"agent": agent.model_copy(update={"max_transcript_tokens": 100})}),
        recipe.model_copy(
            update={"agent": agent.model_copy(update={"prompt": prompt.model_copy(update={"max_action_tokens": 5})})}
        ),
        recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"step_limit": 4})}),
        recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"seed": 5})}),
        recipe.model_copy(
            update={"precisions": recipe.precisions.model_copy(update={"prompt_lookup": PromptLookup()})}
        ),
        recipe.model_copy(update={"precisions": recipe.precisions.model_copy(update={"kernels": "low_bit"})}),
    ]
    facts = [json.dumps(acting_facts(checkpoints, other, ("float", "int2"))) for other in [recipe, *changed]]
    other_rungs = (("int4", "int2"), ("float", "int4"), ("float", "int4", "int2"), ("float",), ("int2",))
    facts += [json.dumps(acting_facts(checkpoints, recipe, rungs)) for rungs in other_rungs]
    assert len(set(facts)) == len(facts)
    training = recipe.agent.training.model_copy(update={"updates": 7})
    trained = recipe.model_copy(update={"agent": agent.model_copy(update={"training": training})})
    assert json.dumps(acting_facts(checkpoints, trained, ("float", "int2"))) == facts[0]


def test_a_rung_that_validation_has_clearly_beaten_does_not_play_again_unless_routed(bench: Bench) -> None:
    path = bench.folder / "quantized_checkpoints" / LADDER_FILE
    rungs = json.loads(path.read_text())["rungs"]
    won = {"float": (0.9, 1.0), "int8": (0.95, 0.5), "int4": (0.2, 0.6), "int2": (0.1, 1.4)}
    for rung in rungs:
        success, cost = won[rung["name"]]
        ends = {"success_low": success - 0.03, "success_high": success + 0.03}
        rung |= {"validation_success": success, "cost": cost} | ends
    change_ladder(bench, rungs=rungs)
    bench.run("beaten")
    assert "rung 3" not in bench.played
    assert "low 3" in bench.played
    assert "always_int4" not in pl.read_parquet(bench.output / "episodes.parquet")["policy"]
    notes = json.loads((bench.output / "context.json").read_text())["notes"]
    (note,) = (note for note in notes if "did not play" in note)
    assert note == (
        "int4 did not play the test games: on the 2 validation games it won 20.0% at a cost of 0.600, int8 won 95.0% at 0.500."
    )


@pytest.mark.parametrize(
    ("deploy", "drafter", "alone"), [("int4", "int2", "always_int4"), ("float", "int4", "always_high")]
)
def test_what_the_verdict_deploys_plays_as_it_would_be_deployed(
    bench: Bench, deploy: str, drafter: str, alone: str
) -> None:
    path = bench.folder / "quantized_checkpoints" / LADDER_FILE
    change_ladder(bench, verdict=json.loads(path.read_text())["verdict"] | {"deploy": deploy, "drafter": drafter})
    bench.run("deployed")
    assert f"{deploy}<{drafter} 3" in bench.played
    episodes = pl.read_parquet(bench.output / "episodes.parquet")
    checks = episodes.filter(policy=f"speculative:{deploy}<{drafter}")
    writes = episodes.filter(policy=alone)
    assert set(checks["variant_of"]) == {alone}
    assert checks["drafted"].sum() > 0
    same = ["task_id", "success", "reward", "steps", "steps_at", "high_steps", "switches", "spend", "bits"]
    assert checks.select(same).equals(writes.select(same))
    assert bench.run("deployed") == []


def test_of_three_routed_rungs_each_is_a_policy_and_the_mix_has_the_routers_shares(bench: Bench) -> None:
    """And what is told of an episode is what its steps are, by hand."""
    bench.recipe = make_recipe(route=("float", "int4", "int2"))
    change_ladder(bench, route=bench.recipe.precisions.route)
    for name, threshold in THRESHOLDS.items():
        router = random_router(("float", "int4", "int2"), threshold=threshold, offsets={"float": -0.5})
        save_router(router, bench.folder / name / ROUTER_FOLDER)
        write_manifest(bench.folder / name)
    checked = ["float<int4 3", "int4<int2 3"]
    on_test = [*ALONE, "int4 3", "confidence 3", "kl_router 3", "grpo_router 3", *checked]
    assert without_calibration(bench.run("of three")) == [*ROUTERS, *on_test, "random 6", "random 6"]
    assert bench.run("of three") == []
    episodes = pl.read_parquet(bench.output / "episodes.parquet")
    kinds = dict(episodes.select("policy", "kind").iter_rows())
    assert list(kinds)[:4] == ["always_high", "always_low", "always_int4", "confidence"]
    assert kinds["always_int4"] == "rung"
    assert (episodes["steps_at"].list.sum() == episodes["steps"]).all()
    assert (episodes["steps_at"].list.first() == episodes["high_steps"]).all()
    assert (episodes["kind"] == "speculative").to_list() == episodes["policy"].str.starts_with("speculative:").to_list()
    for policy, alone in {"speculative:float<int4": "always_high", "speculative:int4<int2": "always_int4"}.items():
        same = ["task_id", "success", "reward", "steps", "steps_at", "high_steps", "switches", "spend", "bits"]
        assert episodes.filter(policy=policy).select(same).equals(episodes.filter(policy=alone).select(same))
        assert set(episodes.filter(policy=policy)["variant_of"]) == {alone}
        assert 0 < episodes.filter(policy=policy)["accepted"].sum() <= episodes.filter(policy=policy)["drafted"].sum()
    at_int4 = episodes.filter(policy="always_int4")
    assert at_int4["steps_at"].to_list() == [[0, steps, 0] for steps in at_int4["steps"]]
    folder = bench.folder / "quantized_checkpoints"
    sizes = {rung.name: rung for rung in read_ladder(folder).rungs}
    bits = [sizes[rung].bits_per_weight for rung in ("float", "int4", "int2")]
    assert episodes["bits"].to_list() == pytest.approx(
        [float(np.dot(bits, steps)) for steps in episodes["steps_at"].to_list()]
    )
    read = {name: rung.pass_bytes for name, rung in sizes.items()}
    spent = (read["int4"] - read["int2"]) / (read["float"] - read["int2"])
    assert episodes["spend"].to_list() == pytest.approx(
        [steps[0] + spent * steps[1] for steps in episodes["steps_at"].to_list()]
    )
    metrics = json.loads((bench.output / "metrics.json").read_text())
    assert metrics["route"] == ["float", "int4", "int2"]
    mixes = {name: f"random@{name}" for name in THRESHOLDS}
    assert dict(episodes.filter(kind="random").select("variant_of", "policy").iter_rows()) == mixes
    for name, policy in metrics["policies"].items():
        of_all = np.array(episodes.filter(policy=name)["steps_at"].to_list()).sum(axis=0)
        assert list(policy["shares"].values()) == pytest.approx(of_all / of_all.sum(), abs=1e-6), name
