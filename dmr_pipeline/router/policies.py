"""Routers as routing policies: they decide before each step of the episodes being played."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmr_pipeline.agent.rollout import CAPACITY, Decision, Peek, RoutingPolicy, Run, seeded_generator
from dmr_pipeline.agent.streams import Streams
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.probe import probe_features

ROUTER_CAPACITY = CAPACITY + CAPACITY // 2
"""Tokens that an LM router's sequence may have: one more a step than the transcript's, and a step has at least two."""


def routing_policy(router: Router, slots: int, sample: bool = False, seed: int = 0) -> RoutingPolicy:
    """
    Args:
        slots: episodes at once, at least as many as the agents' streams have.
        sample: draw the precision, seeded by (seed, task, member, turn), instead of comparing with the threshold.
    """
    if router.settings.kind == "probe":
        return ProbeRouter(router, sample, seed)
    return LmRouter(router, slots, sample, seed)


class _Chooser:
    """Takes the precision by a router's probability: by the threshold, or by a draw."""

    def __init__(self, router: Router, sample: bool, seed: int) -> None:
        self.settings, self.sample, self.seed = router.settings, sample, seed
        self._runs: dict[int, Run] = {}
        self.turns: dict[int, int] = {}

    def begin(self, slot: int, run: Run) -> None:
        self._runs[slot], self.turns[slot] = run, 0

    def choose(self, slots: Sequence[int], logits: Tensor) -> list[tuple[bool, float]]:
        """High or not, and P(high), from logits [slots, 2]; a turn ends."""
        choices = []
        for slot, probability in zip(slots, self.settings.probability(logits.double()).tolist(), strict=True):
            choices.append((probability >= (self._draw(slot) if self.sample else self.settings.threshold), probability))
            self.turns[slot] += 1
        return choices

    def _draw(self, slot: int) -> float:
        """In (0, 1], so that a probability of 0 is never taken."""
        run = self._runs[slot]
        return 1.0 - seeded_generator("router", self.seed, run.task.task_id, run.member, self.turns[slot]).random()


class LmRouter:
    """One cached forward pass a decision, over what is new since the last one. Arguments as in `routing_policy`."""

    def __init__(self, router: Router, slots: int, sample: bool = False, seed: int = 0) -> None:
        self.router, self._chooser = router, _Chooser(router, sample, seed)
        self._streams = Streams(router.model, slots, ROUTER_CAPACITY)
        self._pending: dict[int, list[int]] = {}
        """Tokens that the stream of a slot has not read: the last step's routing token and action."""

    def begin(self, slot: int, run: Run) -> None:
        self._streams.reset([slot])
        self._chooser.begin(slot, run)
        self._pending[slot] = []

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        tokens = self.router.settings.tokens
        chunks = [self._pending[slot] + segment for slot, segment in zip(slots, segments, strict=True)]
        choices = self._chooser.choose(slots, self._streams.extend(slots, chunks)[:, tokens])
        for slot, (high, _) in zip(slots, choices, strict=True):
            self._pending[slot] = [tokens[high]]
        return [Decision(high, probability) for high, probability in choices]

    def acted(self, slot: int, action: list[int]) -> None:
        self._pending[slot] += action


class ProbeRouter:
    """The low-precision agent reads what is new, and the head decides on its hidden states. Where high precision acts,
    that one pass was for the decision alone."""

    def __init__(self, router: Router, sample: bool = False, seed: int = 0) -> None:
        self.router, self._chooser = router, _Chooser(router, sample, seed)

    def begin(self, slot: int, run: Run) -> None:
        self._chooser.begin(slot, run)

    @torch.no_grad()
    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        turns = torch.tensor([self._chooser.turns[slot] for slot in slots])
        model = self.router.model
        features = probe_features(peek.states(model.config.layers), turns)
        choices = self._chooser.choose(slots, model(features.to(model.device)))
        rows = features.cpu().numpy()
        return [
            Decision(high, p, drafted=int(high), features=row) for (high, p), row in zip(choices, rows, strict=True)
        ]

    def acted(self, slot: int, action: list[int]) -> None:
        pass
