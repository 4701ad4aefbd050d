"""Choices from logits: how sure they are, and draws that follow their distribution."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def leads(logits: Tensor) -> list[float]:
    """For each row of logits [n, choices], how far the likeliest choice leads the next, in probability; 1 if it is alone."""
    if logits.shape[-1] == 1:
        return [1.0] * len(logits)
    best = (logits.topk(2, -1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return list((best[:, 0] - best[:, 1]).tolist())


def entropies(logits: Tensor) -> list[float]:
    """Of the softmax of each row of logits [n, choices], in nats."""
    return list(torch.special.entr(logits.float().softmax(-1)).sum(-1).tolist())


def drawn(logits: Tensor, draws: Sequence[float]) -> list[int]:
    """For each row of logits [n, choices] the choice that its draw, uniform in [0, 1), falls on: the first whose cumulative
    probability (float64) is above it."""
    return _falling_on(logits.softmax(-1).double(), draws)


def checked(
    logits: Tensor, draft_logits: Tensor, drafts: Sequence[int], draws: Sequence[tuple[float, float]]
) -> list[int]:
    """For each row a choice that follows its logits, from a draft that was drawn by others: the draft x with probability
    min(1, p(x) / q(x)), else a draw from max(0, p - q), normalised (speculative sampling: Leviathan et al., 2023; Chen et al.,
    2023). A draft that is not taken is never drawn again, so the choice is the draft exactly where it was taken.

    Args:
        logits: [n, choices], whose softmax is p.
        draft_logits: [n, choices], whose softmax is q.
        drafts: n choices, drawn from q.
        draws: n times two numbers, uniform in [0, 1): whether the draft is taken, and what instead.
    """
    p, q = logits.double().softmax(-1), draft_logits.to(logits.device).double().softmax(-1)
    rows, x = torch.arange(len(p), device=p.device), torch.tensor(drafts, device=p.device)
    taking, instead = torch.tensor(draws, dtype=torch.double, device=p.device).T
    left = (p - q).clamp(min=0)
    taken = (taking * q[rows, x] < p[rows, x]).tolist()
    others = _falling_on(left, instead.tolist())
    return [draft if kept else other for draft, kept, other in zip(drafts, taken, others, strict=True)]


def seeded_generator(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone, never on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _falling_on(weights: Tensor, draws: Sequence[float]) -> list[int]:
    """For each row of weights [n, choices], which need not sum to 1, the first whose cumulative share is above its draw."""
    cumulative = weights.cumsum(-1)
    levels = torch.tensor(draws, dtype=torch.double, device=weights.device)[:, None] * cumulative[:, -1:]
    choices = torch.searchsorted(cumulative, levels, right=True).squeeze(-1)
    return list(choices.clamp(max=weights.shape[-1] - 1).tolist())
