"""What an episode reads, term by term, against counts by hand of plain forward passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dmr_pipeline.precision.pass_bytes import PassBytes, cached_numbers, pass_bytes
from dmr_pipeline.precision.quantization import quantize_rung
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.rollout.cost import Cost, bytes_read, episode_cost
from dmr_pipeline.rollout.reading import NOTHING, Reading, each_in_full, one_by_one
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.router.baselines import Disagreement, RandomMixing
from tests.helpers.rollouts import HALF, PROMPTER, ROUTE, RUNS, THREE, passes_over, roll, transcript

WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY = 64, 3, 4, 2, 96, 50
COUNTS = st.integers(1, 40)


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


LINEAR = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KV_HEADS // HEADS + 3 * WIDTH * INNER)
NORMS = (2 * LAYERS + 1) * WIDTH
CACHED = 2 * LAYERS * WIDTH * KV_HEADS // HEADS


def test_a_pass_reads_all_but_the_embedding_and_a_row_of_it_a_token() -> None:
    head = VOCABULARY * WIDTH
    for tied in (True, False):
        for dtype in (torch.float32, torch.bfloat16):  # what a machine computes in makes nothing dearer
            assert pass_bytes(llama(tied, dtype)) == PassBytes(2 * (LINEAR + NORMS + head), 2 * WIDTH, CACHED)


def test_low_bit_weights_count_as_they_are_stored() -> None:
    quantized = quantize_rung(llama(tied=True), Rung(name="int4", weights="int4"))
    outputs = {WIDTH: 2 * WIDTH + 2 * WIDTH * KV_HEADS // HEADS + 2 * INNER, INNER: WIDTH}
    scales_and_shifts = 2 * LAYERS * sum(outputs.values())  # up to 128 inputs, a group a row
    kept = 2 * (NORMS + VOCABULARY * WIDTH)
    assert pass_bytes(quantized) == PassBytes(LINEAR // 2 + 2 * scales_and_shifts + kept, 2 * WIDTH, CACHED)


def test_learned_positions_are_looked_up_too() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    everything = sum(p.numel() for p in model.parameters())
    assert pass_bytes(model) == PassBytes(2 * (everything - 64 * WIDTH), 2 * 2 * WIDTH, 2 * LAYERS * WIDTH)
    assert cached_numbers(model) == 2 * LAYERS * WIDTH


@given(held=COUNTS, written=COUNTS, catch_up=COUNTS)
def test_writing_reads_the_cache_once_a_token(held: int, written: int, catch_up: int) -> None:
    passes, tokens, cached = 0, 0, 0
    for index in range(written):
        passes, tokens, cached = passes + 1, tokens + (catch_up if index == 0 else 1), cached + held + index
    assert Reading(tokens=catch_up) + one_by_one(held, written) == Reading(passes, tokens, cached)


@given(held=COUNTS, candidates=st.lists(COUNTS, min_size=1, max_size=30))
def test_scoring_reads_each_candidate_in_a_pass_of_its_own(held: int, candidates: list[int]) -> None:
    long = [count for count in candidates if count > 1]
    cached = held + sum(held + count - 1 for count in long)
    assert each_in_full(held, candidates) == Reading(1 + len(long), sum(candidates) - len(candidates), cached)


def test_each_term_has_its_price() -> None:
    size = PassBytes(weights=1000, embedding_row=10, cached_numbers=3)
    assert bytes_read(Reading(2, 5, 7), size, cache_bits=16) == Cost(2 * 1000 + 5 * 10, 7 * 3 * 2)
    assert bytes_read(Reading(2, 5, 7), size, cache_bits=8) == Cost(2 * 1000 + 5 * 10, 7 * 3)
    step = Step([], [], "", "", "float", (), Reading(1, 2, 3), {"int2": Reading(4, 5, 6)}, Reading(1, 0, 9))
    sizes, router = {"float": PassBytes(100, 1, 8), "int2": PassBytes(10, 1, 8)}, PassBytes(7, 0, 2)
    agent = Cost(100 + 2 + 40 + 5, 2 * (3 * 8 + 6 * 8))
    trajectory = Trajectory(RolloutRequest(RUNS[0].task), "", [step, step])
    assert episode_cost(trajectory, sizes, 16) == Cost(2 * agent.weights, 2 * agent.cache)
    assert episode_cost(trajectory, sizes, 16, router) == Cost(2 * (agent.weights + 7), 2 * (agent.cache + 2 * 9 * 2))


@pytest.mark.parametrize("policy", [RandomMixing(HALF, seed=3), Disagreement(ROUTE)])
def test_a_switch_costs_tokens_and_no_bytes_of_weights(policy: RandomMixing | Disagreement) -> None:
    """Each precision reads every token of the transcript up to the last step at which it acted, once; also where it is asked at
    every step by one who knows for nothing."""
    for trajectory in roll(policy):
        steps = trajectory.steps
        assert all(step.reading.passes == len(step.action) for step in steps)
        for turn, step in enumerate(steps):
            assert step.reading.cached == passes_over(transcript(trajectory, turn), step.action)
        for rung in ROUTE:
            acted = [turn for turn, step in enumerate(steps) if step.precision == rung]
            if acted:
                whole = len(transcript(trajectory, acted[-1]) + steps[acted[-1]].action)
                assert sum(steps[turn].reading.tokens for turn in acted) == whole - 1


def test_scoring_counts_a_pass_a_command() -> None:
    for trajectory in roll(RandomMixing(HALF, seed=3), action="score"):
        episode = trajectory.run.task.episode()
        episode.reset()
        for turn, step in enumerate(trajectory.steps):
            commands, held = [PROMPTER.action(c) for c in episode.admissible_commands()], transcript(trajectory, turn)
            assert step.reading.passes == 1 + len(commands) > 4
            assert step.reading.cached == len(held) + sum(len(held + command[:-1]) for command in commands)
            episode.step(step.command)


def test_an_oracle_knows_for_nothing() -> None:
    for trajectory in roll(Disagreement(THREE), route=THREE):
        assert all(step.besides == {} and step.router == NOTHING for step in trajectory.steps)
