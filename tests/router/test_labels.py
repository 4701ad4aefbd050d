"""Divergences against closed forms and against plain forward passes without caches."""

import copy
import math
from dataclasses import replace
from itertools import product

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.sensitivity import Sensitivity
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.baselines import RandomMixing
from dmr_pipeline.router.labels import compare, label, measure, own_numbers, threshold, token_divergences
from tests.helpers.one_cache import OneCache
from tests.helpers.rollouts import HIGH, LOW, MODELS, PROMPTER, RUNS, THREE, greedy_uncached, rollouts_of, transcript


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_two_tokens_by_hand() -> None:
    (high_low, low_high, _), (none, *_) = token_divergences(
        logits([0.5, 0.5], [0.9, 0.1]), logits([0.75, 0.25], [0.9, 0.1])
    )
    assert high_low == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    assert low_high == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), abs=1e-6)
    assert none == 0.0
    (entropy, lead), _ = own_numbers(logits([0.75, 0.25], [0.9, 0.1]))
    assert lead == pytest.approx(0.5, abs=1e-6)
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in (0.75, 0.25)), abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_divergences_equal_torchs_and_keep_their_bounds(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high, low = (5 * torch.randn(tokens, 7, generator=generator) for _ in range(2))
    p, q = Categorical(logits=high.double()), Categorical(logits=low.double())
    high_low, low_high, js = (torch.tensor(column) for column in zip(*token_divergences(high, low), strict=True))
    torch.testing.assert_close(high_low.double(), kl_divergence(p, q), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(low_high.double(), kl_divergence(q, p), atol=1e-6, rtol=1e-6)
    assert all(-1e-9 <= value <= math.log(2) + 1e-9 for value in js.tolist())


class TableStreams:
    """A model without rounding: its logits are drawn from its seed and all tokens before them."""

    cuts = True

    def __init__(self, slots: int, seed: object) -> None:
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.seed, self.capacity = seed, 100

    def logits(self, text: list[int]) -> torch.Tensor:
        return torch.from_numpy(seeded_generator(self.seed, *text).normal(0, 2, 6).astype(np.float32))

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    def truncate(self, slot: int, length: int) -> None:
        assert 0 <= length <= len(self.texts[slot])
        del self.texts[slot][length:]

    def extend(self, slots: list[int], chunks: list[list[int]], counts: list[int] | None = None) -> torch.Tensor:
        for slot, chunk in zip(slots, chunks, strict=True):
            self.texts[slot] += chunk
        ends = [
            self.texts[slot][: len(self.texts[slot]) - back]
            for slot, count in zip(slots, counts or [1] * len(slots), strict=True)
            for back in reversed(range(count))
        ]
        return torch.stack([self.logits(text) for text in ends])


class Shape:
    """As much of a prompter as a comparison asks for: 0 ends an action, 1 a thought."""

    def __init__(self, thinks: bool) -> None:
        self.prompt = Prompt(thought_end="<do>" if thinks else None)

    def is_complete(self, action: list[int]) -> bool:
        return action[-1] == 0 or len(action) == 8

    def thought_length(self, action: list[int]) -> int:
        return action.index(1) + 1 if 1 in action else 0


@pytest.mark.parametrize(("tokens", "thinks"), [("action", True), ("command", True), ("command", False)])
@given(
    st.integers(0, 10_000),
    st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=3, max_size=3),
    st.sampled_from([("int2",), ("int4", "int2")]),
)
@settings(max_examples=60, deadline=None)
def test_a_comparison_equals_one_written_down_straight(
    tokens: str, thinks: bool, seed: int, recorded: list[list[int]], cheaper: tuple[str, ...]
) -> None:
    prefixes, shape = [[3, 4], [5], [2, 2, 5]], Shape(thinks)
    streams = {rung: TableStreams(3, (seed, rung if seed % 5 else "")) for rung in ("float", *cheaper)}  # or equal ones
    found = compare(streams, [0, 1, 2], prefixes, shape, tokens, recorded)
    for stream in streams.values():
        assert all(text[: len(prefix)] == prefix for text, prefix in zip(stream.texts, prefixes, strict=True))

    def greedy(model: TableStreams, prefix: list[int]) -> list[int]:
        action: list[int] = []
        while not action or not shape.is_complete(action):
            action.append(int(model.logits(prefix + action).argmax()))
        return action

    def counted(action: list[int]) -> slice:
        if tokens == "action" or not thinks:
            return slice(0, None)
        return slice(action.index(1) + 1 if 1 in action else len(action), None)

    assert [list(its.divergences) for its in found] == [list(cheaper)] * 3
    for rung, (its, prefix) in product(cheaper, zip(found, prefixes, strict=True)):
        one = its.divergences[rung]
        high, low = (greedy(streams[name], prefix) for name in ("float", rung))
        p, q = (
            [Categorical(logits=streams[name].logits(prefix + high[:i]).double()) for i in range(8)]
            for name in ("float", rung)
        )
        places = range(len(high))[counted(high)]
        assert one.kl_high_low == pytest.approx(sum(float(kl_divergence(p[i], q[i])) for i in places), abs=1e-9)
        assert one.kl_low_high == pytest.approx(sum(float(kl_divergence(q[i], p[i])) for i in places), abs=1e-9)
        middle = [Categorical((p[i].probs + q[i].probs) / 2) for i in range(8)]
        js = sum(float(kl_divergence(p[i], middle[i]) + kl_divergence(q[i], middle[i])) / 2 for i in places)
        assert one.js == pytest.approx(js, abs=1e-9)
        own = [Categorical(logits=streams[rung].logits(prefix + low[:i]).double()) for i in range(len(low))][
            counted(low)
        ]
        assert one.entropy_low == pytest.approx(sum(float(each.entropy()) for each in own), abs=1e-9)
        leads = [float(best[0] - best[1]) for best in (each.probs.topk(2).values for each in own)]
        assert one.margin_low == pytest.approx(min(leads, default=1.0), abs=1e-9)
        assert one.greedy_agree == (high[counted(high)] == low[counted(low)])
        for name, action in (("float", high), (rung, low)):
            best = [
                streams[name].logits(prefix + action[:i]).double().softmax(-1).topk(2).values
                for i in range(len(action))
            ]
            leads = [float(first - second) for first, second in best]
            assert its.drafts[name].action == action
            assert its.drafts[name][1:] == pytest.approx((min(leads), np.mean(leads)), abs=1e-5)


@torch.no_grad()
def test_comparison_on_a_prefix_equals_plain_forward_passes() -> None:
    prefixes = [[2, 40, 41, 42, 4], [3, 50, 4], [2, 60, 61, 62, 63, 64, 65, 4]]
    streams = {"float": Streams(HIGH, 3, 64), "int2": Streams(LOW, 3, 64)}
    for part in (slice(2), slice(None)):  # in two calls: the second continues the caches
        found = compare(streams, [0, 1, 2], [prefix[part] for prefix in prefixes], PROMPTER)
    for its, prefix in zip(found, prefixes, strict=True):
        one = its.divergences["int2"]
        action, own = greedy_uncached(HIGH, prefix), greedy_uncached(LOW, prefix)
        assert prefix + action[:-1] in streams["float"].texts, "so that it need not be read again"
        assert any(text[: len(prefix + own) - 1] == prefix + own[:-1] for text in streams["int2"].texts)
        both = [
            model(torch.tensor([prefix + action])).logits[0, len(prefix) - 1 : -1].double().log_softmax(-1)
            for model in (HIGH, LOW)
        ]
        assert one.kl_high_low == pytest.approx(float((both[0].exp() * (both[0] - both[1])).sum()), abs=1e-4)
        assert one.greedy_agree == (action == own)


def test_what_is_counted_is_in_provenance_only_where_it_is_chosen() -> None:
    assert "tokens" not in Sensitivity(tau=0.2).model_dump(mode="json")
    assert Sensitivity(tau=0.2, tokens="command").model_dump(mode="json")["tokens"] == "command"


def test_a_step_is_sensitive_from_tau_on() -> None:
    columns = {"kl_high_low": [0.0, 0.1, 0.2, 0.3], "kl_low_high": [1.0] * 4, "js": [0.0, 0.0, 0.5, 0.6]}
    others = {
        "episode_id": ["a"] * 4, "task_id": ["t"] * 4, "task_type": ["x"] * 4, "policy": ["p"] * 4,
        "turn": [0, 1, 2, 3], "precision": ["int2"] * 4,
        "greedy_agree": [True] * 4, "entropy_low": [0.0] * 4, "margin_low": [0.0] * 4,
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


@torch.no_grad()
@pytest.mark.parametrize("route", [("float", "int2"), THREE])
def test_with_one_cache_each_goes_on_from_what_the_played_episode_has_read(route: tuple[str, ...]) -> None:
    rollouts = replace(rollouts_of(route), shared_cache=True)
    played = rollouts.play(RUNS[:3], RandomMixing(dict.fromkeys(route, 1 / len(route)), seed=3), seed=0)
    told = list[int]()
    rows = measure(rollouts, *to_frames(played, "mixed"), "action", told.append).steps.iter_rows(named=True)
    turns = [len(trajectory.steps) for trajectory in played]
    assert (sum(told), len(told) >= max(turns)) == (sum(turns), True)
    for trajectory in played:
        cache = OneCache()
        for turn, step in enumerate(trajectory.steps):
            text, (high, along) = transcript(trajectory, turn), (copy.deepcopy(cache) for _ in range(2))
            action = high.act(HIGH, text)
            high = copy.deepcopy(cache)
            p = torch.stack([high.see(HIGH, text), *high.read(HIGH, action)[:-1]]).double().log_softmax(-1)
            for rung in route[1:]:
                low = copy.deepcopy(along)
                q = torch.stack([low.see(MODELS[rung], text), *low.read(MODELS[rung], action)[:-1]])
                row = next(rows)
                assert (row["turn"], row["precision"]) == (turn, rung)
                divergence = (p.exp() * (p - q.double().log_softmax(-1))).sum()
                assert row["kl_high_low"] == pytest.approx(float(divergence), abs=1e-4)
                assert row["greedy_agree"] == (action == copy.deepcopy(along).act(MODELS[rung], text))
            assert cache.act(MODELS[step.precision], text) == step.action
    assert next(rows, None) is None
