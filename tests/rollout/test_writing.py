"""Writing with guesses against writing without any: the same tokens and facts, in fewer passes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.writing import NgramGuesses, Written, write
from tests.helpers.causal_lms import MODELS, VOCABULARY, uncached

MODEL, PROMPTS, MOST = MODELS[0], [[1, 2, 3], [4], [5, 6, 7, 8]], 9
END = 7


def is_complete(tokens: list[int]) -> bool:
    return len(tokens) == MOST or tokens[-1] == END


def greedy(prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    while not tokens or not is_complete(tokens):
        tokens.append(int(uncached(MODEL, prompt + tokens)[-1].argmax()))
    return tokens


EXPECTED = [greedy(prompt) for prompt in PROMPTS]


class Counted(PackedStreams):
    passes = 0

    def extend(self, *args, **kwargs) -> Tensor:
        self.passes += 1
        return super().extend(*args, **kwargs)


def written(guess, streams: TokenStreams, **more) -> list[Written[float]]:
    return write(
        streams,
        range(len(PROMPTS)),
        more.pop("chunks", PROMPTS),
        choose=lambda logits, _: logits.argmax(-1).tolist(),
        observe=lambda logits: logits.max(-1).values.tolist(),
        guess=lambda waiting: {i: guess(i, tokens) for i, tokens in waiting.items()},
        is_complete=is_complete,
        **more,
    )


@given(seed=st.integers(0, 10_000), right=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_whatever_is_guessed_the_tokens_and_the_stream_are_those_of_no_guesses(seed: int, right: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def guess(i: int, tokens: list[int]) -> list[int]:
        count = int(torch.randint(MOST - len(tokens), (), generator=generator))
        found = EXPECTED[i][len(tokens) : len(tokens) + count]
        found += [0] * (count - len(found))
        draws = torch.rand(count, generator=generator).tolist()
        return [t if d < right else (t + 1) % VOCABULARY for t, d in zip(found, draws, strict=True)]

    streams = PackedStreams(MODEL, 3, 40)
    for prompt, tokens, slot, found in zip(PROMPTS, EXPECTED, range(3), written(guess, streams), strict=True):
        assert found.tokens == tokens
        assert streams.lengths[slot] == len(prompt) + len(tokens) - 1
        rows = uncached(MODEL, prompt + tokens)[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.tensor(found.facts), rows.max(-1).values, atol=1e-4, rtol=1e-4)
    last = streams.extend(range(3), [[9]] * 3)  # what the streams hold is what was written
    for prompt, tokens, row in zip(PROMPTS, EXPECTED, last, strict=True):
        torch.testing.assert_close(row, uncached(MODEL, [*prompt, *tokens[:-1], 9])[-1], atol=1e-4, rtol=1e-4)


def test_right_guesses_save_all_passes_but_one() -> None:
    none, all_right = Counted(MODEL, 3, 40), Counted(MODEL, 3, 40)
    written(lambda i, tokens: [], none)
    written(lambda i, tokens: EXPECTED[i][len(tokens) :], all_right)
    assert none.passes == max(map(len, EXPECTED))
    assert all_right.passes == 1


def test_it_goes_on_from_what_is_begun_and_from_logits_that_are_known() -> None:
    streams = PackedStreams(MODEL, 3, 40)
    begun = [tokens[:2] for tokens in EXPECTED]
    chunks = [prompt + tokens for prompt, tokens in zip(PROMPTS, begun, strict=True)]
    assert [w.tokens for w in written(lambda i, tokens: [], streams, chunks=chunks, begun=begun)] == EXPECTED
    streams = PackedStreams(MODEL, 3, 40)
    logits = streams.extend(range(2), PROMPTS[:2])
    chunks = [[], [], PROMPTS[2]]
    found = written(lambda i, tokens: [3], streams, chunks=chunks, known=dict(enumerate(logits)))
    assert [w.tokens for w in found] == EXPECTED
    assert [len(w.facts) for w in found] == [len(tokens) for tokens in EXPECTED]


def test_what_followed_is_guessed_until_it_is_wrong_too_often() -> None:
    guesses = NgramGuesses()
    assert guesses.guess([1, 2, 3], [], 5) == []
    for _ in range(2):
        guesses.learn([1, 2], [3, 4, 5])
    assert guesses.guess([1, 2], [], 5) == [3, 4, 5]
    assert guesses.guess([1, 2], [], 2) == [3, 4]
    assert guesses.guess([9, 2], [], 5) == []
    guesses.learn([1, 2], [8])
    guesses.learn([1, 2], [8])
    assert guesses.guess([1, 2], [], 1) in ([], [8])
    guesses.learn([1, 2], [8])
    assert guesses.guess([1, 2], [], 1) == [8]
