"""Divergences against closed forms and against plain forward passes without caches."""

import math

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from dmr_pipeline.agent.streams import Streams
from dmr_pipeline.recipe import Sensitivity
from dmr_pipeline.sensitivity import compare, divergence, label, threshold
from tests.agent.test_rollout import HIGH, LOW, PROMPTER, greedy_uncached


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_two_tokens_by_hand() -> None:
    high, low = logits([0.5, 0.5], [0.9, 0.1]), logits([0.75, 0.25], [0.9, 0.1])
    found = divergence(high, low, low, agree=True)
    assert found.kl_high_low == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    assert found.kl_low_high == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), abs=1e-6)
    assert found.margin_low == pytest.approx(0.5, abs=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25, 0.9, 0.1))
    assert found.entropy_low == pytest.approx(entropy, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_divergences_equal_torchs_and_keep_their_bounds(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high, low = (5 * torch.randn(tokens, 7, generator=generator) for _ in range(2))
    found = divergence(high, low, low, agree=False)
    p, q = Categorical(logits=high.double()), Categorical(logits=low.double())
    assert found.kl_high_low == pytest.approx(float(kl_divergence(p, q).sum()), abs=1e-9)
    assert found.kl_low_high == pytest.approx(float(kl_divergence(q, p).sum()), abs=1e-9)
    assert 0 <= found.js <= tokens * math.log(2) + 1e-9
    assert divergence(high, high, high, agree=True).kl_high_low == 0


@torch.no_grad()
def test_comparison_on_a_prefix_equals_plain_forward_passes() -> None:
    prefixes = [[2, 40, 41, 42, 4], [3, 50, 4], [2, 60, 61, 62, 63, 64, 65, 4]]
    streams = {True: Streams(HIGH, 3, 64), False: Streams(LOW, 3, 64)}
    for half in (slice(0, 2), slice(2, None)):  # in two calls: the second continues the caches
        found = compare(streams, [0, 1, 2], [prefix[half] for prefix in prefixes], PROMPTER)
    for one, prefix in zip(found, prefixes, strict=True):
        action = greedy_uncached(HIGH, prefix)
        both = [
            model(torch.tensor([prefix + action])).logits[0, len(prefix) - 1 : -1].double().log_softmax(-1)
            for model in (HIGH, LOW)
        ]
        assert one.kl_high_low == pytest.approx(float((both[0].exp() * (both[0] - both[1])).sum()), abs=1e-4)
        assert one.greedy_agree == (action == greedy_uncached(LOW, prefix))
    assert streams[True].lengths == streams[False].lengths == [len(prefix) for prefix in prefixes]


def test_a_step_is_sensitive_from_tau_on() -> None:
    columns = {"kl_high_low": [0.0, 0.1, 0.2, 0.3], "kl_low_high": [1.0] * 4, "js": [0.0, 0.0, 0.5, 0.6]}
    others = {
        "episode_id": ["a"] * 4, "task_id": ["t"] * 4, "task_type": ["x"] * 4, "policy": ["p"] * 4,
        "turn": [0, 1, 2, 3], "greedy_agree": [True] * 4, "entropy_low": [0.0] * 4, "margin_low": [0.0] * 4,
        "success": [True] * 4,
    }  # fmt: skip
    rows = pl.DataFrame({**others, **columns})
    absolute = Sensitivity(tau=0.2)
    assert label(rows, absolute, threshold(rows, absolute))["sensitive"].to_list() == [False, False, True, True]
    quantile = Sensitivity(quantile=0.99, direction="js")
    assert label(rows, quantile, threshold(rows, quantile))["sensitive"].to_list() == [False, False, False, True]
    lost = rows.with_columns(success=pl.Series([True, True, False, True]))
    won_only = Sensitivity(tau=0.2, won_only=True)
    assert label(lost, absolute, 0.2)["sensitive"].to_list() == [False, False, True, True]
    assert label(lost, won_only, 0.2)["sensitive"].to_list() == [False, False, False, True]
