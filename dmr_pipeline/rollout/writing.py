"""Writing an action: token by token as a model would alone, in fewer forward passes.

Agents repeat themselves. What is likely to come next is guessed from what was written before, read together with what is known,
and kept as far as it is what the model writes itself (speculative decoding, Leviathan et al., 2023, with n-grams in the place
of a small model: Saxena, 2023, "prompt lookup"). The tokens are the model's own, whatever was guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from dmr_pipeline.recipe.precisions import PromptLookup
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.reading import NOTHING, Reading

T = TypeVar("T")

Guess = Callable[[Mapping[int, list[int]]], Mapping[int, Sequence[int]]]
"""For each place, from what is written there so far: tokens that may come next."""

_ORDERS = (5, 3, 2)
"""Tokens before the one that is guessed, the longest known first."""
_LEAST_BELIEF = 0.35
"""A guess is read where the product of its beliefs, and of those of the guesses before it, is at least this: reading a token for
nothing costs about a quarter of a pass for one sequence."""
_FADING = 0.6
"""What is left of a belief after each time that it was tried."""
_UNTRIED, _RENEWED = 0.25, 0.5
"""Belief in a token before it is first seen, and in one that takes the place of another."""
_TOO_LITTLE = 0.3
"""Below this belief another token takes the place."""
_MOST_ENTRIES = 500_000


class NgramGuesses:
    """What followed the last tokens the last time, and how often that has been right lately."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], tuple[int, float]] = {}
        """Last tokens -> the next one, and the belief in it."""

    def guess(self, before: Sequence[int], written: Sequence[int], most: int) -> list[int]:
        """What may come after these tokens, at most so many."""
        context, guesses, belief = [*before[-max(_ORDERS) :], *written], list[int](), 1.0
        while len(guesses) < most:
            found = next((known for n in _ORDERS if (known := self._next.get(tuple(context[-n:])))), None)
            if found is None:
                break
            belief *= found[1]
            if belief < _LEAST_BELIEF:
                break
            guesses.append(found[0])
            context.append(found[0])
        return guesses

    def learn(self, before: Sequence[int], written: Sequence[int]) -> None:
        """That these tokens were written after those before."""
        if len(self._next) > _MOST_ENTRIES:
            self._next.clear()
        context = [*before[-max(_ORDERS) :], *written]
        for place, token in enumerate(written, start=len(context) - len(written)):
            for n in _ORDERS:
                key = tuple(context[max(0, place - n) : place])
                known, belief = self._next.get(key, (token, _UNTRIED))
                if known == token:
                    self._next[key] = token, belief * _FADING + 1 - _FADING
                elif belief * _FADING >= _TOO_LITTLE:
                    self._next[key] = known, belief * _FADING
                else:
                    self._next[key] = token, _RENEWED


def looked_up(text: Sequence[int], settings: PromptLookup) -> list[int]:
    """What followed the text's last tokens where they stood in it before, the longest such run and its last place."""
    tokens = np.asarray(text, np.int64)
    for n in range(min(settings.ngram, len(tokens) - 1), 0, -1):
        found = np.flatnonzero((sliding_window_view(tokens[:-1], n) == tokens[-n:]).all(axis=1))
        if found.size:
            after = int(found[-1]) + n
            return list(tokens[after : after + settings.tokens].tolist())
    return []


@dataclass
class Written(Generic[T]):
    tokens: list[int] = field(default_factory=list)
    facts: list[T] = field(default_factory=list)
    """One for each token that was chosen, about the logits that it was chosen from."""
    reading: Reading = NOTHING
    """Of the passes that it took, without the chunk that the first one is given; known logits are those of a first pass."""


def write(
    streams: TokenStreams,
    slots: Sequence[int],
    chunks: Sequence[Sequence[int]],
    choose: Callable[[Tensor, list[tuple[int, int]]], list[int]],
    observe: Callable[[Tensor], Sequence[T]],
    guess: Guess,
    is_complete: Callable[[list[int]], bool],
    begun: Sequence[Sequence[int]] | None = None,
    known: Mapping[int, Tensor] | None = None,
    stop: Callable[[int, Sequence[int], T], bool] = lambda *_: False,
) -> list[Written[T]]:
    """Append a chunk to each of these slots, and write on until what is written is complete. The streams end before the last
    token.

    Args:
        choose: tokens from logits [n, vocabulary], each for (place among `slots`, index in what is written).
        observe: facts about logits [n, vocabulary], one a row.
        guess: asked before each pass, of all places among `slots` that are not complete.
        is_complete: asked of what is written, after each token.
        begun: what is written already, the last tokens of the chunks included.
        known: place among `slots` -> logits [vocabulary] after its stream; its chunk is then empty.
        stop: (place among `slots`, what is written, fact of its last token) -> whether nothing is written after it; asked after
            each token that does not complete it.
    """
    written: list[Written[T]] = [Written(list(tokens)) for tokens in (begun or [[]] * len(slots))]
    unread = [list(chunk) for chunk in chunks]
    ends = [
        len(streams.texts[slot]) + len(chunk) - len(w.tokens)
        for slot, chunk, w in zip(slots, chunks, written, strict=True)
    ]
    """Tokens of each stream before what is written."""

    def accept(i: int, tokens: list[int], facts: Sequence[T], guessed: list[int]) -> bool:
        """Whether it is complete. All but the last token may be in the stream already."""
        for count, (token, fact) in enumerate(zip(tokens, facts, strict=True)):
            written[i].tokens.append(token)
            written[i].facts.append(fact)
            if is_complete(written[i].tokens) or stop(i, written[i].tokens, fact):
                return True
            if count == len(guessed) or token != guessed[count]:
                break
        unread[i] = [token]
        return False

    waiting = list(range(len(slots)))
    if known:
        first = [i for i in waiting if i in known]
        rows = torch.stack([known[i] for i in first])
        parts = zip(first, choose(rows, [(i, len(written[i].tokens)) for i in first]), observe(rows), strict=True)
        done = {i for i, token, fact in parts if accept(i, [token], [fact], [])}
        waiting = [i for i in waiting if i not in done]
        for i in first:
            written[i].reading = Reading(1, 0, ends[i])
    while waiting:
        guessed = guess({i: list(written[i].tokens) for i in waiting}) if streams.cuts else {}
        guesses: dict[int, list[int]] = {}
        for i in waiting:  # what completes an action need not be read
            tokens = list(guessed.get(i, []))
            complete = next((n for n in range(1, len(tokens) + 1) if is_complete(written[i].tokens + tokens[:n])), None)
            guesses[i] = tokens[: complete - 1] if complete else tokens
        counts = [len(guesses[i]) + 1 for i in waiting]
        for i, read in zip(waiting, counts, strict=True):
            its = written[i]
            its.reading += Reading(1, read - (its.reading.passes == 0), ends[i] + len(its.tokens) + read - 1)
        rows = streams.extend([slots[i] for i in waiting], [[*unread[i], *guesses[i]] for i in waiting], counts)
        places = [
            (i, len(written[i].tokens) + n) for i, count in zip(waiting, counts, strict=True) for n in range(count)
        ]
        tokens, facts, at, going_on = choose(rows, places), observe(rows), 0, []
        for i, count in zip(waiting, counts, strict=True):
            if not accept(i, tokens[at : at + count], facts[at : at + count], guesses[i]):
                going_on.append(i)
            at += count
            if count > 1:
                streams.truncate(slots[i], ends[i] + len(written[i].tokens) - 1)
        waiting = going_on
    return written
