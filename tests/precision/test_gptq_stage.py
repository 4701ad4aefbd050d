"""Rungs that GPTQ makes, in the stage: what they are calibrated on, and what becomes of a run that was killed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmr_pipeline.agent.checkpoint import load_causal_lm
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision import gptq
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import Precisions, Rung
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.stages import quantized_checkpoints as stage
from dmr_pipeline.stages.quantized_checkpoints import expert_steps, quantized_checkpoints
from tests.helpers.ladders import ladder_recipe, write_inputs
from tests.helpers.rollouts import RUNS

REPOSITORY = Path(__file__).parents[2]
GAMES = [run.task for run in RUNS]
LADDER = [
    {"name": "float", "weights": "float"},
    {"name": "int3-gptq", "weights": "int3", "rounding": "gptq", "ranges": "mse", "head": "int8"},
    {"name": "int3", "weights": "int3"},
]


def gptq_recipe(settings: dict[str, object] | None) -> Recipe:
    gptq = {} if settings is None else {"gptq": settings}
    return ladder_recipe(LADDER, agent_train=3, **gptq)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    inputs = write_inputs(tmp_path, validation=GAMES[:1], agent_train=GAMES[1:4])
    return StageContext(gptq_recipe(None), inputs, tmp_path / "out", tmp_path / "scratch")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[gptq.GptqRun]:
    """What GPTQ was given, rung by rung."""
    given: list[gptq.GptqRun] = []
    quantize_rung = stage.quantize_rung

    def watched(model: object, rung: Rung, calibration: Callable, run: gptq.GptqRun | None) -> object:
        given.extend([] if run is None else [run])
        return quantize_rung(model, rung, calibration, run)

    monkeypatch.setattr(stage, "quantize_rung", watched)
    return given


@pytest.mark.parametrize(
    ("settings", "episodes", "tokens", "damping"),
    [(None, 3, None, 0.01), ({"episodes": 2, "damping": 0.5}, 2, None, 0.5), ({"tokens": 60}, 3, 60, 0.01)],
)
def test_it_is_calibrated_on_the_experts_episodes_of_agent_train(
    context: StageContext,
    runs: list[gptq.GptqRun],
    settings: dict | None,
    episodes: int,
    tokens: int | None,
    damping: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def watched(games: list, *rest: object) -> object:
        asked.append(([game.task_id for game in games], expert_steps(games, *rest)))
        return asked[-1][1]

    monkeypatch.setattr(stage, "expert_steps", watched)
    found = quantized_checkpoints(replace(context, recipe=gptq_recipe(settings))).summary["rungs"]
    assert [rung["reloads_equal"] for rung in found] == [True] * 3
    by_gptq, nearest = found[1:]
    assert by_gptq["kl_to_float"] != nearest["kl_to_float"]
    _, (games, examples) = asked  # the first are those of validation, for the divergence
    assert games == [game.task_id for game in GAMES[1 : 1 + episodes]]
    whole = [example.tokens for example in examples]
    (run,) = runs
    assert [token for text in run.sequences for token in text] == [token for text in whole for token in text][:tokens]
    assert run.damping == damping
    assert sum(map(len, run.sequences)) == (tokens or sum(map(len, whole)))


def test_activations_are_calibrated_on_the_experts_episodes_of_agent_train_one_by_one(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = [{"name": "float", "weights": "float"}, {"name": "int8", "weights": "int8", "activations": "int8"}]
    read: list[list[list[int]]] = []
    quantize_rung, trained_logits = stage.quantize_rung, stage.trained_logits

    def watched(model: object, rung: Rung, calibration: Callable | None, run: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "trained_logits", recorded)
            return quantize_rung(model, rung, calibration, run)

    def recorded(model: object, examples: list, device: object) -> object:
        read.append([example.tokens for example in examples])
        return trained_logits(model, examples, device)

    monkeypatch.setattr(stage, "quantize_rung", watched)
    recipe = ladder_recipe(rungs, agent_train=3, gptq={"episodes": 2})
    _, int8 = quantized_checkpoints(replace(context, recipe=recipe)).summary["rungs"]
    assert int8["reloads_equal"]
    model, tokenizer = load_causal_lm(context.inputs["agent"] / "model", None, torch.device("cpu"))
    prompter = Prompter.of(tokenizer, recipe.agent.prompt, model.generation_config)
    assert read == [
        [example.tokens] for example in expert_steps(GAMES[1:3], prompter, recipe.benchmark.step_limit, 4096)
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stage_that_was_killed_goes_on_and_writes_the_same(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(context, output=tmp_path / "whole", scratch=tmp_path / "other")
    quantized_checkpoints(whole)
    rounded, layers = gptq._round_layer, []

    def killed_at_the_second(*args: object) -> object:
        layers.append(args)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return rounded(*args)

    monkeypatch.setattr(gptq, "_round_layer", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantized_checkpoints(context)
    again = replace(context, output=tmp_path / "again")
    quantized_checkpoints(again)
    assert len(layers) == 3, "the first layer is not rounded again"
    assert content(again.output) == content(whole.output)


def test_nothing_to_calibrate_on_is_one_line(context: StageContext) -> None:
    folder = context.inputs["benchmark_tasks"]
    write_games([], folder / "agent_train.parquet")
    with pytest.raises(
        UserError, match=r"^precisions\.gptq: the split agent_train has no games, so there is nothing to"
    ):
        quantized_checkpoints(context)


def test_episodes_that_do_not_fit_are_one_line(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_validation_alone(games: list, *rest: object) -> object:
        if games[0].task_id != GAMES[0].task_id:
            raise UserError("none of the expert's 3 episodes fits")
        return expert_steps(games, *rest)

    monkeypatch.setattr(stage, "expert_steps", of_validation_alone)
    with pytest.raises(
        UserError, match=r"^precisions\.gptq calibrates on agent_train: none of the expert's 3 episodes fits"
    ):
        quantized_checkpoints(context)


def test_recipes_without_it_have_the_provenance_that_they_had() -> None:
    plain = Precisions(
        ladder=(Rung(name="float", weights="float"), Rung(name="int2", weights="int2")), route=("float", "int2")
    )
    assert plain.model_dump().keys() & {"gptq"} == set()
    assert plain.model_dump()["ladder"][1].keys() & {"rounding", "head", "ranges"} == set()
