"""Routers as routing policies: they decide before each step of the episodes being played."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmr_pipeline.recipe import DEFAULT_TRANSCRIPT_TOKENS
from dmr_pipeline.rollout.engine import Decision, Peek, RoutingPolicy, Run, seeded_generator
from dmr_pipeline.rollout.kv_cache.choice import positions_of, token_streams
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.probe import probe_features
from dmr_pipeline.router.search_steps import at_search_bar

_UNLIMITED = 2 * DEFAULT_TRANSCRIPT_TOKENS
"""Tokens that the sequence of an LM router without positions may have."""


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
    """Takes the precision by a router's probability: by the threshold, or by a draw. Search steps may be forced."""

    def __init__(self, router: Router, sample: bool, seed: int) -> None:
        self.settings, self.sample, self.seed = router.settings, sample, seed
        self._runs: dict[int, Run] = {}
        self.turns: dict[int, int] = {}

    def begin(self, slot: int, run: Run) -> None:
        self._runs[slot], self.turns[slot] = run, 0

    def asked(self, slots: Sequence[int], peek: Peek) -> list[int]:
        """The slots at which it is the router that decides; at the others high precision is forced."""
        if not self.settings.force_search:
            return list(slots)
        return [slot for slot, forced in zip(slots, at_search_bar(peek), strict=True) if not forced]

    def choose(self, slots: Sequence[int], logits: Tensor) -> dict[int, tuple[bool, float]]:
        """For each slot high or not, and P(high), from logits [slots, 2]."""
        choices = {}
        for slot, probability in zip(slots, self.settings.probability(logits.double()).tolist(), strict=True):
            bar = self._draw(slot) if self.sample else self.settings.threshold
            choices[slot] = (probability >= bar, probability)
        return choices

    def acted(self, slot: int) -> None:
        self.turns[slot] += 1

    def _draw(self, slot: int) -> float:
        """In (0, 1], so that a probability of 0 is never taken."""
        run = self._runs[slot]
        return 1.0 - seeded_generator("router", self.seed, run.task.task_id, run.member, self.turns[slot]).random()


class LmRouter:
    """One cached forward pass a decision, over what is new since the last one that was the router's. Arguments as in
    `routing_policy`."""

    def __init__(self, router: Router, slots: int, sample: bool = False, seed: int = 0) -> None:
        self.router, self._chooser = router, _Chooser(router, sample, seed)
        self._streams = token_streams(router.model, slots, positions_of(router.model.config) or _UNLIMITED)
        self._pending: dict[int, list[int]] = {}
        """Tokens that the stream of a slot has not read: since its last decision."""

    def begin(self, slot: int, run: Run) -> None:
        self._streams.reset([slot])
        self._chooser.begin(slot, run)
        self._pending[slot] = []

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        tokens = self.router.settings.tokens
        for slot, segment in zip(slots, segments, strict=True):
            self._pending[slot] += segment
        choices: dict[int, tuple[bool, float]] = {}
        if asked := self._chooser.asked(slots, peek):
            logits = self._streams.extend(asked, [self._pending[slot] for slot in asked])
            choices = self._chooser.choose(asked, logits[:, tokens])
            self._pending |= {slot: [] for slot in asked}
        forced = Decision(True, 1.0, forced=True)
        decisions = [Decision(*choices[slot]) if slot in choices else forced for slot in slots]
        for slot, decision in zip(slots, decisions, strict=True):
            self._pending[slot].append(tokens[decision.high])
        return decisions

    def acted(self, slot: int, action: list[int]) -> None:
        self._pending[slot] += action
        self._chooser.acted(slot)


class ProbeRouter:
    """The low-precision agent reads what is new, and the head decides on its hidden states. Where high precision acts,
    that one pass was for the decision alone."""

    def __init__(self, router: Router, sample: bool = False, seed: int = 0) -> None:
        self.router, self._chooser = router, _Chooser(router, sample, seed)

    def begin(self, slot: int, run: Run) -> None:
        self._chooser.begin(slot, run)

    @torch.no_grad()
    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        model = self.router.model
        # Nothing is learned from a forced step, but a sequence has features at all of its steps.
        forced = Decision(True, 1.0, features=np.zeros(len(model.mean), np.float32), forced=True)
        decisions = dict.fromkeys(slots, forced)
        if asked := self._chooser.asked(slots, peek):
            turns = torch.tensor([self._chooser.turns[slot] for slot in asked])
            features = probe_features(peek.states(asked, model.config.layers), turns)
            choices = self._chooser.choose(asked, model(features.to(model.device)))
            for (slot, (high, p)), row in zip(choices.items(), features.cpu().numpy(), strict=True):
                decisions[slot] = Decision(high, p, drafted=int(high), features=row)
        return list(decisions.values())

    def acted(self, slot: int, action: list[int]) -> None:
        self._chooser.acted(slot)
