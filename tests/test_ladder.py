"""The gate, and the ladder's divergence from the float model."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dmr_pipeline import ladder, quantization
from dmr_pipeline.agent.checkpoint import load_causal_lm, save_causal_lm
from dmr_pipeline.agent.examples import IGNORED
from dmr_pipeline.agent.train import new_model
from dmr_pipeline.environments.alfworld.store import write_games
from dmr_pipeline.errors import UserError
from dmr_pipeline.ladder import (
    Ladder,
    RungFacts,
    divergence_to_float,
    expert_steps,
    gate,
    quantized_checkpoints,
    read_ladder,
)
from dmr_pipeline.recipe import Architecture, Precisions, Recipe, Rung, load_recipe
from dmr_pipeline.stage import StageContext
from tests.agent.test_rollout import HIGH, LOW, PROMPTER, RUNS

REPOSITORY = Path(__file__).parents[1]
PRECISIONS = Precisions(
    ladder=(Rung(name="float", weights="float"), Rung(name="int2", weights="int2")), high="float", low="int2"
)


def facts(name: str, success: float) -> RungFacts:
    return RungFacts(
        name=name, bytes=1, bits_per_weight=1, quantized_share=0, kl_to_float=0, greedy_disagreement=0,
        validation_success=success, validation_steps=1, reloads_equal=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("high", "low", "passed"),
    [(0.9, 0.6, True), (0.84, 0.5, False), (0.9, 0.75, False), (0.95, 0.4, False), (0.85, 0.65, True)],
)
def test_the_gate_asks_for_a_strong_high_and_a_useful_low(high: float, low: float, passed: bool) -> None:
    found = gate([facts("float", high), facts("int2", low)], PRECISIONS)
    assert found.passed is passed
    assert found.gap == pytest.approx(high - low)
    assert f"{high:.1%}" in found.verdict


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


def ladder_recipe(ladder: list[dict[str, str]]) -> Recipe:
    changes = {
        "benchmark": {"splits": {"agent_train": 1, "router_train": 1, "validation": 1, "test": 1}, "step_limit": 3},
        "precisions": {"ladder": ladder, "high": ladder[0]["name"], "low": ladder[-1]["name"], "kl_episodes": 1},
        "runtime": {"device": "cpu", "threads": 1, "processes": 1},
    }
    return Recipe.model_validate(load_recipe("alfworld-tiny", REPOSITORY / "recipes").model_dump() | changes)


LADDER = [{"name": name, "weights": name} for name in ("float", "int8", "int2")]


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """Of the stage, with an agent that knows nothing."""
    architecture = Architecture(layers=2, width=64, heads=4, key_value_heads=2, head_width=16, feed_forward=96)
    model = new_model(architecture, len(PROMPTER.tokenizer), 0)
    save_causal_lm(model, PROMPTER.tokenizer, tmp_path / "agent" / "model", torch.float16)
    (tmp_path / "benchmark_tasks").mkdir()
    write_games([RUNS[0].task], tmp_path / "benchmark_tasks" / "validation.parquet")
    inputs = {name: tmp_path / name for name in ("agent", "benchmark_tasks")}
    return StageContext(ladder_recipe(LADDER), inputs, tmp_path / "quantized_checkpoints", tmp_path)


@pytest.fixture
def nothing_older() -> Iterator[None]:
    """What is there already is no garbage and is not looked at, which would take seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
        "rung_size",
        "acting_model",
        "divergence_to_float",
        "play_alone",
    ):
        monkeypatch.setattr(ladder, name, watched(getattr(ladder, name)))
    for name in ("_quantize", "load_model", "save_model"):
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
    assert by_float["bits_per_weight"] == 32 > int8["bits_per_weight"] > int2["bits_per_weight"]
    assert read_ladder(context.output).model_dump() == summary


def test_weights_that_were_not_saved_as_they_were_are_noticed(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_changed(model: PreTrainedModel, folder: Path) -> None:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_output_embeddings().weight[:, 0] += 1e-3
        quantization.save_rung(changed, folder)

    monkeypatch.setattr(ladder, "save_rung", save_changed)
    only = context.recipe.precisions.model_copy(update={"ladder": context.recipe.precisions.ladder[:1], "low": "float"})
    changed = replace(context, recipe=context.recipe.model_copy(update={"precisions": only}))
    assert [rung["reloads_equal"] for rung in quantized_checkpoints(changed).summary["rungs"]] == [False]


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
    ladders = [Ladder.load(context.output, context.recipe), Ladder.of_rung(context.output, context.recipe, "int8")]
    for loaded in ladders:
        assert {3, 7} <= loaded.prompter.eos
    assert ladders[0].prompter.eos == ladders[1].prompter.eos
