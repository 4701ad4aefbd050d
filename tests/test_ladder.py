"""The gate, and the ladder's divergence from the float model."""

import copy

import pytest
import torch

from dmr_pipeline.agent.examples import IGNORED
from dmr_pipeline.ladder import RungFacts, divergence_to_float, expert_steps, gate, same_logits
from dmr_pipeline.recipe import Precisions, Rung
from tests.agent.test_rollout import HIGH, LOW, PROMPTER, RUNS

PRECISIONS = Precisions(
    ladder=(Rung(name="float", weights="float"), Rung(name="int2", weights="int2")), high="float", low="int2"
)


def facts(name: str, success: float) -> RungFacts:
    return RungFacts(
        name=name, bytes=1, bits_per_weight=1, kl_to_float=0, greedy_disagreement=0,
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


@torch.no_grad()
def test_a_changed_weight_makes_other_logits() -> None:
    examples = expert_steps([RUNS[0].task], PROMPTER, 50, 4096)
    changed = copy.deepcopy(HIGH)
    assert same_logits(HIGH, changed, examples, torch.device("cpu"))
    weight = changed.get_output_embeddings().weight
    weight[0, 0] += 1e-3
    assert not same_logits(HIGH, changed, examples, torch.device("cpu"))
