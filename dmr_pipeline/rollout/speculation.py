"""Speculative acting: a cheap precision drafts an action, a dear one checks it.

The dear precision reads a draft in one pass, keeps what it would have written itself, puts its own token after that, and the
next draft goes on from there (speculative decoding, Leviathan et al., 2023; Chen et al., 2023). Greedy actions are those that the
dear precision writes alone; at a temperature they follow its distribution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from dmr_pipeline.recipe.precisions import Speculative
from dmr_pipeline.rollout.choosing import checked, drawn, leads
from dmr_pipeline.rollout.kv_cache.catching_up import catch_up
from dmr_pipeline.rollout.kv_cache.padded import TokenStreams
from dmr_pipeline.rollout.reading import NOTHING, Reading, Round, one_by_one
from dmr_pipeline.rollout.writing import Guess, write


class Draw(Protocol):
    def __call__(self, place: int, index: int, /, *purpose: str) -> float:
        """Uniform in [0, 1), by the place among the slots, the index in the action, and what it is for: nothing but these."""
        ...


@dataclass(frozen=True)
class Checked:
    """An action."""

    tokens: list[int]
    leads: list[float]
    """At each token, as `choosing.leads`, of the precision that checked."""
    rounds: list[Round]


@dataclass(frozen=True)
class _Draft:
    start: int
    """Tokens of the action before it."""
    tokens: list[int]
    logits: list[Tensor]
    """That each was drawn from; not kept where acting is greedy."""
    read: int
    """As `Round.read`."""
    writing: Reading
    """As `Round.writing`."""


def write_checked(
    dear: TokenStreams,
    cheap: TokenStreams,
    slots: Sequence[int],
    texts: Sequence[list[int]],
    unread: Sequence[Sequence[int]],
    unread_by_cheap: Sequence[Sequence[int]],
    known: Mapping[int, Tensor],
    guess: Guess,
    is_complete: Callable[[list[int]], bool],
    settings: Speculative,
    temperature: float,
    draw: Draw,
    shared: bool = False,
    ready: Sequence[list[int]] = (),
    guesses_count: bool = False,
) -> list[Checked]:
    """After each text an action of the dear precision, drafted by the cheap one. The dear streams end before the action's last
    token, the cheap ones where the last draft did.

    Args:
        dear: that checks; streams that cut, as the cheap ones.
        unread: of each text, what the dear streams have not read.
        unread_by_cheap: of each text, what the cheap streams have not read.
        known: place among `slots` -> the cheap precision's logits [vocabulary] after a text that it has read to its end.
        guess: spares passes of drafting, and changes no draft.
        is_complete: as in `write`.
        shared: both are streams of one cache (`SharedStreams`), from which each draft is cut before it is checked. The dear
            precision's keys and values take the place of what the cheap one has written of `unread`, and of the drafts.
        ready: of each text the cheap precision's greedy action, if it is there already: the first draft, however long.
        guesses_count: whether a draft costs the passes that it took, or one a token.
    """
    drafts: list[list[_Draft]] = [[] for _ in slots]

    def draft(waiting: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """What the cheap precision would write next at these places."""
        places, begun = list(waiting), list(waiting.values())
        first = not any(begun)
        mine = [slots[i] for i in places]
        if first:
            left: Sequence[Sequence[int]] = unread_by_cheap
        elif shared:
            left = [tokens[-1:] for tokens in begun]
        else:
            left = catch_up(cheap, mine, [texts[i] + waiting[i] for i in places])
        written = write(
            cheap,
            mine,
            left,
            choose=lambda logits, at: choose(logits, [(places[n], index) for n, index in at], "draft"),
            observe=lambda logits: list(zip(leads(logits), logits, strict=True)),
            guess=lambda inside: guess_at(places, inside),
            is_complete=is_complete,
            begun=begun,
            known=known if first else None,
            stop=lambda n, so_far, fact: (
                len(so_far) - len(begun[n]) == settings.draft_tokens or fact[0] < settings.stop_margin
            ),
        )
        read = {}
        for i, action in zip(places, written, strict=True):
            start, complete = len(waiting[i]), is_complete(action.tokens)
            tokens = action.tokens[start:]
            read[i] = tokens[:-1] if complete else tokens
            logits = [row for _, row in action.facts] if temperature else []
            writing = action.reading if guesses_count else one_by_one(len(texts[i]) + start, len(tokens))
            drafts[i].append(_Draft(start, tokens, logits, len(read[i]), writing))
            if shared:
                dear.truncate(slots[i], len(texts[i]) + start - (1 if start else len(unread[i])))
        return read

    def guess_at(places: list[int], inside: Mapping[int, list[int]]) -> dict[int, Sequence[int]]:
        guessed = guess({places[n]: tokens for n, tokens in inside.items()})
        return {n: guessed[places[n]] for n in inside}

    def choose(logits: Tensor, at: Sequence[tuple[int, int]], *purpose: str) -> list[int]:
        if temperature == 0:
            return list(logits.argmax(-1).tolist())
        return drawn(logits / temperature, [draw(i, index, *purpose) for i, index in at])

    def check(logits: Tensor, at: list[tuple[int, int]]) -> list[int]:
        """The dear precision's token at each (place, index), where the last draft reaches so far; else its own."""
        chosen = choose(logits, at)
        if temperature == 0:
            return chosen
        of_drafts = {row: (drafts[i][-1], index - drafts[i][-1].start) for row, (i, index) in enumerate(at)}
        rows = [row for row, (its, n) in of_drafts.items() if n < len(its.tokens)]
        if rows:
            tokens = checked(
                logits[rows] / temperature,
                torch.stack([its.logits[n] for its, n in map(of_drafts.__getitem__, rows)]) / temperature,
                [its.tokens[n] for its, n in map(of_drafts.__getitem__, rows)],
                [(draw(*at[row], "take"), draw(*at[row], "instead")) for row in rows],
            )
            for row, token in zip(rows, tokens, strict=True):
                chosen[row] = token
        return chosen

    # The first ones now: where there is one cache, `unread` is what it then lacks.
    if ready:
        for i, action in enumerate(ready):
            drafts[i].append(_Draft(0, action, [], len(action) - 1, NOTHING))
        first_drafts = {i: action[:-1] for i, action in enumerate(ready)}
    else:
        first_drafts = draft({i: [] for i in range(len(slots))})
    written = write(
        dear,
        slots,
        unread,
        check,
        leads,
        lambda waiting: draft(waiting) if any(waiting.values()) else first_drafts,
        is_complete,
    )
    return [
        Checked(action.tokens, action.facts, [_round(its, action.tokens) for its in of_slot])
        for action, of_slot in zip(written, drafts, strict=True)
    ]


def _round(draft: _Draft, action: Sequence[int]) -> Round:
    """A draft that an action came of."""
    pairs = zip(draft.tokens, action[draft.start :], strict=False)
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Round(draft.start, len(draft.tokens), draft.read, agreed, draft.writing)
