"""What one cache changes, measured on a few games with random agents."""

import pytest

from dmr_pipeline.evaluation.caches import Played, compare_caches, written_bytes
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.router.baselines import RandomMixing
from tests.helpers.rollouts import ARCHITECTURE, HALF, MODELS, PROMPTER, ROUTE, RUNS, STEPS, THREE, rollouts_of


@pytest.mark.parametrize("kind", [Streams, PackedStreams])
def test_bytes_are_those_of_the_longest_transcripts(kind: type) -> None:
    models = {rung: MODELS[rung] for rung in ROUTE}
    position = ARCHITECTURE.layers * 2 * ARCHITECTURE.key_value_heads * ARCHITECTURE.head_width * 4
    for agents, caches in (
        ({rung: kind(model, 7, 2048) for rung, model in models.items()}, 2),
        (SharedStreams(kind, models, 7, 2048), 1),
    ):
        played = play(RUNS, agents, PROMPTER, RandomMixing(HALF, seed=3), STEPS)
        whole = [sum(len(step.segment) + len(step.action) for step in t.steps) - 1 for t in played]
        # Guesses may have reached beyond the ends; one of several caches may lag behind there.
        assert 0.8 < written_bytes(agents) / (caches * sum(whole) * position) < 1.05


def test_each_policy_plays_the_same_games_with_both() -> None:
    told: list[Played] = []
    played, compared = compare_caches(rollouts_of(THREE), [run.task for run in RUNS[:3]], 2, 0, told.append)
    assert told == played
    assert [row.policy for row in played[::2]] == [change.policy for change in compared]
    assert [row.cache for row in played] == ["separate", "shared"] * len(compared)
    by_policy = {change.policy: change for change in compared}
    for policy in ("always_float", "always_int2", "speculative:float<int2"):  # do the same with both
        separate, shared = (row for row in played if row.policy == policy)
        assert (shared.success, shared.steps) == (separate.success, separate.steps)
    assert by_policy["always_float"].cache_bytes == by_policy["always_float"].tokens == 1
    assert by_policy["random at 0.35"].tokens < 0.75
    for policy in ("random at 0.35", "speculative:float<int2"):
        assert 0.45 < by_policy[policy].cache_bytes < 0.6
    assert 0.3 < by_policy["disagreement"].cache_bytes < 0.4  # asks all three
    assert all(change.low <= change.success <= change.high for change in compared)
