"""The ladder as it is made, and as it plays."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm, save_causal_lm
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision import frontier, quantization
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.frontier import PLAYED_FILE
from dmr_pipeline.precision.kernels import LowBitLinear
from dmr_pipeline.precision.ladder import read_ladder
from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.rollout.batch import Timings
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.playing import PolicyRuns, Rollouts, scatter_by_game
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.baselines import Confidence, Disagreement, RandomMixing
from dmr_pipeline.stages import quantized_checkpoints as stage
from dmr_pipeline.stages.quantized_checkpoints import divergence_to_float, expert_steps, quantized_checkpoints
from dmr_pipeline.training.examples import IGNORED
from tests.helpers.ladders import ladder_recipe, write_inputs
from tests.helpers.memory import fits
from tests.helpers.quantized_files import write_packed
from tests.helpers.rollouts import (
    ALL_HIGH,
    ALL_LOW,
    HALF,
    HIGH,
    LOW,
    MODELS,
    PROMPTER,
    ROUTE,
    RUNS,
    THREE,
    but_for_rounding,
    roll,
    rollouts_of,
)

REPOSITORY = Path(__file__).parents[2]


@torch.no_grad()
def test_divergence_is_the_mean_over_steps_of_plain_forward_passes() -> None:
    examples = expert_steps([run.task for run in RUNS[:3]], PROMPTER, 50, 4096)
    total, different, tokens = 0.0, 0, 0
    for example in examples:
        at = [i for i, target in enumerate(example.targets) if target != IGNORED]
        p, q = (model(torch.tensor([example.tokens])).logits[0, at].double().log_softmax(-1) for model in (HIGH, LOW))
        total += float((p.exp() * (p - q)).sum())
        different += int((p.argmax(-1) != q.argmax(-1)).sum())
        tokens += len(at)
    steps = sum(example.steps for example in examples)
    divergence, disagreement = divergence_to_float(HIGH, LOW, examples, torch.device("cpu"))
    assert divergence == pytest.approx(total / steps, rel=1e-4)
    assert disagreement == pytest.approx(different / tokens, abs=0.01)
    assert divergence_to_float(HIGH, HIGH, examples, torch.device("cpu")) == (0.0, 0.0)


LADDER = [{"name": name, "weights": name} for name in ("float", "int8", "int2")]


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    inputs = write_inputs(tmp_path, validation=[RUNS[0].task])
    return StageContext(ladder_recipe(LADDER), inputs, tmp_path / "quantized_checkpoints", tmp_path)


@pytest.fixture
def nothing_older() -> Iterator[None]:
    """What is there already is no garbage and is not looked at, which would take seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def deploys_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that knows nothing loses at every precision, so the cheapest would be deployed."""
    for module in (stage, frontier):
        monkeypatch.setattr(module, "to_deploy", lambda rungs, precisions: rungs[0])


def float_bytes() -> int:
    """Of all float matrices that any model made in this test has as parameters."""
    gc.collect()
    # `type`, since quanto's packed weights call themselves Parameters too.
    alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.ndim == 2 and o.is_floating_point()]
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in alive}.values())


def test_beside_the_float_model_there_is_one_other_at_most(
    context: StageContext, nothing_older: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_causal_lm(context.inputs["agent"] / "model", None, torch.device("cpu"))
    one = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 2)
    del model
    before, seen = float_bytes(), []

    def watched(function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            seen.append(float_bytes() - before)
            result = function(*args, **kwargs)
            seen.append(float_bytes() - before)
            return result

        return wrapper

    for name in (
        "quantize_rung",
        "save_rung",
        "load_rung",
        "stored_size",
        "acting_model",
        "divergence_to_float",
        "play_alone",
    ):
        monkeypatch.setattr(stage, name, watched(getattr(stage, name)))
    for name in ("_quantize", "_fill", "save_model"):
        monkeypatch.setattr(quantization, name, watched(getattr(quantization, name)))
    quantized_checkpoints(context)
    assert len(seen) > 30
    assert 1.99 * one <= max(seen) <= 2.01 * one
    assert float_bytes() - before < 0.01 * one, "nothing is left afterwards"


def test_facts_of_a_ladder(context: StageContext) -> None:
    summary = quantized_checkpoints(context).summary
    by_float, int8, int2 = summary["rungs"]
    assert [rung["reloads_equal"] for rung in summary["rungs"]] == [True] * 3
    assert by_float["kl_to_float"] == by_float["quantized_share"] == 0
    assert int8["quantized_share"] == int2["quantized_share"] > 0.1
    assert by_float["bits_per_weight"] == 16 > int8["bits_per_weight"] > int2["bits_per_weight"]
    assert read_ladder(context.output).model_dump(mode="json") == summary
    assert summary["route"] == ["float", "int2"]
    played = pl.read_parquet(context.output / PLAYED_FILE)
    assert played["rung"].to_list() == ["float", "int8", "int2"]
    # An agent that has learned nothing writes no actions; what it writes is counted.
    for rung, failures, steps in played.select("rung", "parse_failures", "steps").iter_rows():
        assert 0 < failures <= steps
        assert {one["name"]: one for one in summary["rungs"]}[rung]["parse_failures"] == round(failures / steps, 6)
    # Of the ladder's dearest rung, the only episode there is, and with 16-bit weights.
    assert played.row(0, named=True)["cost"] == by_float["cost"] == pytest.approx(1)
    assert by_float["cost"] > int8["cost"]
    for rung in summary["rungs"]:
        assert 0 < rung["cost_cache"] < rung["cost"]
    rungs, deployed = {rung["name"]: rung for rung in summary["rungs"]}, summary["verdict"]["deploy"]
    smaller = [name for name in ("int8", "int2") if rungs[name]["pass_bytes"] < rungs[deployed]["pass_bytes"]]
    assert [one["drafter"] for one in summary["checked"]] == smaller


@pytest.mark.usefixtures("deploys_float")
def test_what_the_ladder_says_of_checking_is_what_checking_does(context: StageContext) -> None:
    summary = quantized_checkpoints(context).summary
    assert [one["drafter"] for one in summary["checked"]] == ["int8", "int2"]
    best = min(summary["checked"], key=lambda one: one["cost"])
    assert summary["verdict"]["drafter"] == (best["drafter"] if best["cost"] < summary["rungs"][0]["cost"] else "")
    for one in summary["checked"]:
        rollouts = Rollouts.load(context.output, context.recipe, ("float", one["drafter"]))
        checks, writes = (SinglePrecision("float", rollouts.route, drafter) for drafter in (one["drafter"], None))
        (played,), (alone,) = (rollouts.play([RUNS[0]], policy, 0) for policy in (checks, writes))
        assert one["cost"] == pytest.approx(rollouts.cost(played).total, abs=1e-6)
        passes = sum(step.reading.passes for step in played.steps) / len(played.steps)
        assert one["passes"] == pytest.approx(passes, abs=1e-6)
        assert [step.action for step in played.steps] == [step.action for step in alone.steps]


@pytest.mark.usefixtures("deploys_float")
def test_nothing_is_checked_where_commands_are_scored(context: StageContext) -> None:
    recipe = context.recipe
    scored = recipe.model_copy(update={"agent": recipe.agent.model_copy(update={"action": "score"})})
    summary = quantized_checkpoints(replace(context, recipe=scored)).summary
    assert (summary["checked"], summary["verdict"]["drafter"]) == ([], "")


@pytest.mark.usefixtures("deploys_float")
def test_what_is_looked_up_costs_less_in_the_same_unit(context: StageContext, tmp_path: Path) -> None:
    context = replace(context, kept=tmp_path / "kept")
    plain = quantized_checkpoints(context).summary
    recipe = ladder_recipe(LADDER, prompt_lookup={"ngram": 2})
    looked = quantized_checkpoints(replace(context, recipe=recipe, output=tmp_path / "looked")).summary
    assert looked["unit_bytes"] == plain["unit_bytes"]
    for mine, its in zip(looked["rungs"] + looked["checked"], plain["rungs"] + plain["checked"], strict=True):
        assert mine["cost"] < its["cost"]
        assert mine["validation_success"] == its["validation_success"]
    rollouts = Rollouts.load(tmp_path / "looked", recipe, ("float", "int2"))
    (played,) = rollouts.play([RUNS[0]], SinglePrecision("float", rollouts.route), 0)
    assert looked["rungs"][0]["cost"] == pytest.approx(rollouts.cost(played).total, abs=1e-6)
    assert quantized_checkpoints(replace(context, output=tmp_path / "again")).summary == plain


@pytest.mark.usefixtures("deploys_float")
def test_a_rung_that_was_measured_before_does_not_play_again(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name, or beside other rungs, it is the same; other weights, or the agent's other way of acting, are not."""
    played = []
    play_validation = stage._play_validation
    monkeypatch.setattr(stage, "_play_validation", lambda *args: played.append(1) or play_validation(*args))
    checked, play_each = [], Rollouts.play_each
    monkeypatch.setattr(Rollouts, "play_each", lambda *args: checked.append(1) or play_each(*args))
    context = replace(context, kept=tmp_path / "kept")
    first = quantized_checkpoints(context).summary
    files = {path.name: path.read_bytes() for path in context.output.rglob("*") if path.is_file()}
    assert len(played) == len(LADDER)
    assert len(checked) == len(first["checked"]) > 0

    again = replace(context, output=tmp_path / "again")
    assert quantized_checkpoints(again).summary == first
    assert {path.name: path.read_bytes() for path in again.output.rglob("*") if path.is_file()} == files
    assert (len(played), len(checked)) == (len(LADDER), len(first["checked"]))

    longer = [LADDER[0], {**LADDER[1], "name": "eight"}, {"name": "int4", "weights": "int4"}, LADDER[2]]
    more = quantized_checkpoints(replace(context, recipe=ladder_recipe(longer), output=tmp_path / "more")).summary
    assert len(played) == len(LADDER) + 1
    assert [{**rung, "name": ""} for rung in (more["rungs"][i] for i in (0, 1, 3))] == [
        {**rung, "name": ""} for rung in first["rungs"]
    ]
    warm = ladder_recipe(LADDER)
    warm = warm.model_copy(update={"agent": warm.agent.model_copy(update={"temperature": 1.0})})
    quantized_checkpoints(replace(context, recipe=warm, output=tmp_path / "warm"))
    assert len(played) == 2 * len(LADDER) + 1


@pytest.mark.usefixtures("deploys_float")
def test_a_rung_that_is_beaten_on_the_first_games_stops_there(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is routed; where it isn't beaten it plays on, as if there had been no pause."""
    played, play_validation = [], stage._play_validation
    monkeypatch.setattr(
        stage,
        "_play_validation",
        lambda model, games, *rest: played.append(len(games)) or play_validation(model, games, *rest),
    )
    games = list({run.task.task_id: run.task for run in RUNS}.values())[:3]
    whole = replace(context, inputs=write_inputs(tmp_path / "inputs", validation=games))
    (tmp_path / "whole").mkdir()
    wanted = quantized_checkpoints(replace(whole, output=tmp_path / "whole")).summary
    assert played == [3, 3, 3]

    def stopping(folder: str, kept: str = "kept", route: object = ("float", "int2")) -> tuple[dict, pl.DataFrame]:
        recipe = ladder_recipe(LADDER)
        precisions = recipe.precisions.model_copy(update={"stop_beaten_after": 2, "route": route})
        recipe = recipe.model_copy(update={"precisions": precisions})
        (tmp_path / folder).mkdir()
        played.clear()
        made = replace(whole, recipe=recipe, output=tmp_path / folder, kept=tmp_path / kept)
        return quantized_checkpoints(made).summary, pl.read_parquet(made.output / PLAYED_FILE)

    summary, _ = stopping("unbeaten")  # they all lose alike
    assert (summary, played) == (wanted, [3, 2, 1, 3])
    monkeypatch.setattr(stage, "beaten_by", lambda *_: 0)
    monkeypatch.setattr(frontier, "beaten_by", lambda *_: "float")
    summary, rows = stopping("beaten", "anew")
    assert played == [3, 2, 3]
    assert rows.group_by("rung", maintain_order=True).len().rows() == [("float", 3), ("int8", 2), ("int2", 3)]
    assert [rung.get("games") for rung in summary["rungs"]] == [None, 2, None]
    assert summary["rungs"][1]["dominated_by"] == "float"
    assert read_ladder(tmp_path / "beaten").model_dump(mode="json") == summary
    assert stopping("again", "anew")[0] == summary
    assert played == []
    assert stopping("played on before", "kept")[0] == summary, (
        "a run before, in which it did not stop, makes no difference"
    )
    assert played == []


def test_a_ladder_in_the_agents_dtype_by_low_bit_kernels(context: StageContext) -> None:
    ladder = [*LADDER[:2], {"name": "int4", "weights": "int4", "head": "int8", "rounding": "gptq"}]
    recipe = ladder_recipe(ladder)
    recipe = recipe.model_copy(update={"precisions": recipe.precisions.model_copy(update={"kernels": "low_bit"})})
    agent = recipe.agent.model_copy(update={"dtype": "bfloat16"})
    write_games([RUNS[0].task], context.inputs["benchmark_tasks"] / "agent_train.parquet")
    summary = quantized_checkpoints(replace(context, recipe=recipe.model_copy(update={"agent": agent}))).summary
    assert all(rung["reloads_equal"] for rung in summary["rungs"])
    rollouts = Rollouts.load(context.output, recipe.model_copy(update={"agent": agent}), ["float", "int8", "int4"])
    for name, model in rollouts.acting.models.items():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert any(isinstance(module, LowBitLinear) for module in model.modules()) == (name != "float")


def test_a_rung_that_was_quantized_elsewhere_is_measured_as_the_others_are(context: StageContext) -> None:
    model, _ = load_causal_lm(context.inputs["agent"] / "model", None, torch.device("cpu"))
    source = context.scratch / "gptq"
    meant = write_packed(model, source)
    bought = {"name": "bought", "weights": "int4", "checkpoint": {"model": str(source)}}
    recipe = ladder_recipe([LADDER[0], bought, LADDER[-1]])
    _, rung, int2 = quantized_checkpoints(replace(context, recipe=recipe)).summary["rungs"]
    stored = load_file(source / "model.safetensors")
    assert rung["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert rung["bits_per_weight"] == round(8 * rung["bytes"] / model.num_parameters(), 4)
    assert rung["reloads_equal"]
    assert 0 < rung["kl_to_float"] < int2["kl_to_float"]
    acting = ActingModels.load(context.output, ["bought"], torch.device("cpu"))
    tokens = torch.arange(30).reshape(2, 15)
    assert torch.equal(acting.models["bought"](tokens).logits, meant(tokens).logits)


def test_a_rung_that_cannot_be_imported_stops_the_ladder_before_anything_plays(context: StageContext) -> None:
    missing = {"name": "bought", "weights": "int2", "checkpoint": {"model": "nowhere.gguf"}}
    with pytest.raises(UserError, match=r"rung 'bought': nowhere\.gguf: no such file"):
        quantized_checkpoints(replace(context, recipe=ladder_recipe([LADDER[0], missing])))
    assert not (context.output / "float").exists()


def test_weights_that_were_not_saved_as_they_were_are_noticed(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_changed(model: PreTrainedModel, folder: Path) -> None:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_output_embeddings().weight[:, 0] += 1e-3
        quantization.save_rung(changed, folder)

    monkeypatch.setattr(stage, "save_rung", save_changed)
    only = context.recipe.precisions.model_copy(
        update={"ladder": context.recipe.precisions.ladder[:1], "route": ("float", "float")}
    )
    changed = replace(context, recipe=context.recipe.model_copy(update={"precisions": only}))
    assert [rung["reloads_equal"] for rung in quantized_checkpoints(changed).summary["rungs"]] == [False]


def test_a_ladder_that_is_not_made_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*ladder\.json: `dmr ladder mine` makes the ladder"):
        read_ladder(tmp_path / "mine" / "quantized_checkpoints")


def test_a_ladder_of_another_version_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ladder.json").write_text('{"rungs": []}')
    with pytest.raises(UserError, match=r"ladder\.json is of another version"):
        read_ladder(tmp_path)


def test_every_rung_acts_until_one_of_the_models_own_eos_tokens(context: StageContext) -> None:
    """Also one that is in the report alone: with other ends its texts would be others."""
    folder = context.inputs["agent"] / "model"
    model, tokenizer = load_causal_lm(folder, None, torch.device("cpu"))
    model.generation_config.eos_token_id = [3, 7]
    save_causal_lm(model, tokenizer, folder, torch.float16)
    quantized_checkpoints(context)
    ladders = [Rollouts.load(context.output, context.recipe), Rollouts.load(context.output, context.recipe, ("int8",))]
    assert [loaded.route for loaded in ladders] == [("float", "int2"), ("int8",)]
    for loaded in ladders:
        assert {3, 7} <= loaded.prompter.eos
    assert ladders[0].prompter.eos == ladders[1].prompter.eos


def acting_ladder(processes: int, batch_episodes: int = 64, reuse_actions: bool = True) -> Rollouts:
    return replace(rollouts_of(ROUTE), processes=processes, batch_episodes=batch_episodes, reuse_actions=reuse_actions)


GROUP = [RolloutRequest(run.task, member) for member in range(2) for run in RUNS[:3]]
PLAYS = (
    (ALL_HIGH, RUNS),
    (RandomMixing(HALF, seed=3), GROUP),
    (Confidence(ROUTE, 0.9), RUNS[6:]),
    (Disagreement(ROUTE), RUNS[:2]),
)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_policies_side_by_side_play_what_each_plays_alone(processes: int) -> None:
    ladder, ended = acting_ladder(processes), [0] * len(PLAYS)
    heard: list[tuple[int, list[Trajectory], Timings]] = []

    def on_progress(index: int) -> Callable[[int], None]:
        def add(count: int) -> None:
            ended[index] += count

        return add

    plays = [PolicyRuns(policy, runs, on_progress(index)) for index, (policy, runs) in enumerate(PLAYS)]
    ladder.play_each(plays, 0, lambda *found: heard.append(found))
    assert [index for index, _, _ in heard] == list(range(len(PLAYS)))
    assert ended == [len(runs) for _, runs in PLAYS]
    for (policy, runs), (_, played, clock) in zip(PLAYS, heard, strict=True):
        assert [trajectory.run for trajectory in played] == list(runs)
        assert but_for_rounding(played) == but_for_rounding(acting_ladder(1).play(runs, policy, 0))
        assert clock.steps == sum(len(trajectory.steps) for trajectory in played)
        assert len(clock.durations) >= max(len(trajectory.steps) for trajectory in played)
    assert heard[0][1] == roll(ALL_HIGH), "and what plain `engine.play` plays"


@pytest.mark.parametrize("processes", [1, 2])
def test_three_rungs_play_side_by_side_what_plain_play_plays(processes: int) -> None:
    policies = [RandomMixing(dict.fromkeys(THREE, 1 / 3), seed=3), Confidence(THREE, 0.9), Disagreement(THREE)]
    ladder, heard = replace(rollouts_of(THREE), processes=processes), list[list[Trajectory]]()
    plays = [PolicyRuns(policy, RUNS) for policy in policies]
    ladder.play_each(plays, 0, lambda _, played, __: heard.append(played))
    for policy, played in zip(policies, heard, strict=True):
        assert but_for_rounding(played) == but_for_rounding(roll(policy, route=THREE))
        assert {step.precision for t in played for step in t.steps} <= set(THREE)
    assert {step.precision for t in heard[0] for step in t.steps} == set(THREE)


def sized(**weights: int) -> dict[str, PassBytes]:
    return {rung: PassBytes(size) for rung, size in weights.items()}


def test_spend_goes_from_the_cheapest_rung_to_the_dearest_in_bytes() -> None:
    acting = ActingModels(MODELS, sized(float=1000, int4=200, int2=100), torch.device("cpu"))
    assert (acting.dearest, acting.cheapest) == ("float", "int2")
    assert acting.spend == pytest.approx({"float": 1.0, "int4": 1 / 9, "int2": 0.0})
    with pytest.raises(
        UserError, match=r"^precisions\.route: 'float' has 100 bytes and 'int2' 100, so nothing can be saved"
    ):
        _ = replace(acting, pass_bytes=sized(float=100, int2=100), models={"float": HIGH, "int2": LOW}).spend


def test_a_step_costs_the_bytes_of_its_rung_over_the_unit() -> None:
    ladder = replace(rollouts_of(THREE), unit_bytes=500.0)
    for trajectory in roll(RandomMixing(dict.fromkeys(THREE, 1 / 3), seed=3), route=THREE):
        sizes = [{"float": 8, "int4": 4, "int2": 2}[step.precision] * len(step.action) for step in trajectory.steps]
        assert ladder.cost(trajectory) == (sum(sizes) / 500, 0)


def test_a_policy_goes_on_with_the_streams_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, read = PackedStreams._forward, [0]

    def counted(self, slots, chunks, *rest):
        read[-1] += sum(map(len, chunks))
        return forward(self, slots, chunks, *rest)

    def on_played(_: int, played: list[Trajectory], __: Timings) -> None:
        heard.append(played)
        read.append(0)

    monkeypatch.setattr(PackedStreams, "_forward", counted)
    ladder, heard = acting_ladder(1, reuse_actions=False), list[list[Trajectory]]()
    ladder.play_each([PolicyRuns(ALL_HIGH, RUNS)] * 2, 0, on_played)
    assert heard[0] == heard[1]
    segments = sum(len(step.segment) for trajectory in heard[0] for step in trajectory.steps)
    assert read[0] - read[1] > 0.2 * segments


def test_a_policy_is_heard_of_while_the_next_one_plays(tmp_path: Path) -> None:
    heard, file = [], tmp_path / "heard"

    class BreaksOnceTheFirstIsHeardOf(SinglePrecision):
        def begin(self, slot: int, run: RolloutRequest) -> None:
            deadline = time.monotonic() + 60
            while not file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise UserError("broken")

    def on_played(index: int, played: list[Trajectory], clock: Timings) -> None:
        heard.append((index, len(played)))
        file.touch()

    plays = [PolicyRuns(ALL_LOW, RUNS), PolicyRuns(BreaksOnceTheFirstIsHeardOf("float"), RUNS)]
    with pytest.raises(UserError, match="broken"):
        acting_ladder(2).play_each(plays, 0, on_played)
    assert heard == [(0, len(RUNS))]


def test_each_policy_is_halved_for_itself_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [acting_ladder(1).play(runs, policy, 0) for policy, runs in PLAYS]
    ran, heard = fits(monkeypatch, rows=2), []
    plays = [PolicyRuns(policy, runs) for policy, runs in PLAYS]
    acting_ladder(1).play_each(plays, 0, lambda _, played, __: heard.append(played))
    assert [but_for_rounding(played) for played in heard] == [but_for_rounding(played) for played in expected]
    assert max(ran) == 2


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), unique=True), max_size=4), st.integers(1, 5))
def test_a_game_goes_to_one_process_under_every_policy(members: list[list[tuple[int, int]]], processes: int) -> None:
    games = [RUNS[0].task.model_copy(update={"task_id": str(number)}) for number in range(10)]
    plays = [[RolloutRequest(games[game], member) for game, member in pairs] for pairs in members]
    parts = scatter_by_game(plays, processes)
    assert 1 <= len(parts) <= processes
    for index, runs in enumerate(plays):
        assert sorted(i for part in parts for i in part[index]) == list(range(len(runs)))
        assert all(part[index] == sorted(part[index]) for part in parts)
    distinct = {game for pairs in members for game, _ in pairs}
    places = {
        (plays[n][i].task.task_id, place)
        for place, part in enumerate(parts)
        for n in range(len(plays))
        for i in part[n]
    }
    if len(distinct) >= processes:
        assert len(places) == len(distinct)
        shares = [len({game for game, at in places if at == place}) for place in range(len(parts))]
        assert len(parts) == processes
        assert max(shares) - min(shares) <= 1


def test_members_of_too_few_games_are_dealt_too() -> None:
    group = [RolloutRequest(RUNS[0].task, member) for member in range(8)]
    assert scatter_by_game([group], 3) == [[[0, 3, 6]], [[1, 4, 7]], [[2, 5]]]
    assert scatter_by_game([[]], 3) == [[[]]]
