"""Routers as routing policies, in one of two orders.

A router that decides *before* the draft names the rung that writes the action. One that decides *after* the draft lets the
cheapest rung draft every action, and accepts it or names the rung that checks it in a pass or two (rollout/speculation.py): under
greedy acting that takes the same actions, and costs less where the draft is mostly right. At a threshold of 0 everything is
checked by the dearest rung, whose episodes it plays. Where nothing can be checked (commands are scored, or a cache cannot be
cut) the rung that is named writes anew, and a draft that the router has looked at is thrown away and paid. The paper decides
before; the other order is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmr_pipeline.recipe.agent import DEFAULT_TRANSCRIPT_TOKENS
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.kv_cache.choice import positions_of, token_streams
from dmr_pipeline.rollout.policy import Decision, DecisionContext, RoutingPolicy
from dmr_pipeline.rollout.reading import Reading
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import AtBar, Bar
from dmr_pipeline.router.features import OF_DRAFTS, Drafted, Past
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.probe import probe_features
from dmr_pipeline.router.search_steps import with_searches_forced

_UNLIMITED = 2 * DEFAULT_TRANSCRIPT_TOKENS
"""Tokens that the sequence of an LM router without positions may have."""


@dataclass(frozen=True)
class Resumed(RolloutRequest):
    """An episode whose first decisions have been taken; a router that samples goes on from there."""

    taken: tuple[str, ...] = ()
    """Which precision acts at each of the first steps, whatever is drawn."""


def routing_policy(router: Router, slots: int, sample: bool = False, seed: int = 0) -> RoutingPolicy:
    """
    Args:
        slots: episodes at once, at least as many as the agents' streams have.
        sample: draw the precision, seeded by (seed, task, member, turn), instead of comparing with the threshold.
    """
    if not sample and router.settings.bar != Bar(router.settings.threshold):
        return AtBar(asking_policy(router, slots), router.settings.route, router.settings.bar, seed)
    chooser = _Chooser(router, sample, seed)
    policies: dict[str, Callable[[], RoutingPolicy]] = {
        "lm": lambda: LmRouter(router, chooser, slots),
        "encoder": lambda: EncoderRouter(router, chooser),
        "probe": lambda: ProbeRouter(router, chooser),
    }
    policy = policies[router.settings.kind]()
    return in_the_order_of(router, by_the_rules_of(router, policy))


def in_the_order_of(router: Router, policy: RoutingPolicy) -> RoutingPolicy:
    """The policy, with drafts checked where this router decides after them."""
    return Checking(policy, router.settings.route[-1]) if router.settings.decides == "after" else policy


def asking_policy(router: Router, slots: int) -> RoutingPolicy:
    """As `AtBar` wants it: the dearest rung throughout, with the router's own levels."""
    settings = router.settings.model_copy(update={"threshold": 0.0, "ties": 1.0, "sample": False, "strict": None})
    return routing_policy(replace(router, settings=settings), slots)


def by_the_rules_of(router: Router, policy: RoutingPolicy) -> RoutingPolicy:
    """The policy, with the steps forced at which this router is not asked."""
    return with_searches_forced(policy, router.settings.route) if router.settings.force_search else policy


@dataclass(frozen=True)
class Checking:
    """A policy after the draft: whichever rung it names checks what the drafter, the cheapest one, would do."""

    policy: RoutingPolicy
    drafter: str

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.policy.begin(slot, run)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        decisions = self.policy.decide(slots, segments, peek)
        if not peek.can_check:
            return decisions
        return [d if d.precision == self.drafter else replace(d, drafter=self.drafter) for d in decisions]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self.policy.acted(slot, segment, precision, action)


class _Chooser:
    """Takes the precision by a router's logits: by the threshold, or by a draw."""

    def __init__(self, router: Router, sample: bool, seed: int) -> None:
        self.settings, self.sample, self.seed = router.settings, sample, seed
        self._runs: dict[int, RolloutRequest] = {}
        self.turns: dict[int, int] = {}

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._runs[slot], self.turns[slot] = run, 0

    def choose(self, slots: Sequence[int], logits: Tensor) -> list[tuple[str, tuple[float, ...]]]:
        """For each slot what acts, and `Decision.exceedance`, from logits [slots, rungs]."""
        choices = []
        for slot, levels in zip(slots, self.settings.exceedance(logits.double()).tolist(), strict=True):
            bar = self._draw(slot) if self.sample else self.settings.threshold
            choices.append((self._taken(slot) or self.settings.choose(levels, bar), tuple(levels)))
        return choices

    def acted(self, slot: int) -> None:
        self.turns[slot] += 1

    def _taken(self, slot: int) -> str | None:
        run, turn = self._runs[slot], self.turns[slot]
        return run.taken[turn] if isinstance(run, Resumed) and turn < len(run.taken) else None

    def _draw(self, slot: int) -> float:
        """In (0, 1], so that a probability of 0 is never taken."""
        run = self._runs[slot]
        return 1.0 - seeded_generator("router", self.seed, run.task.task_id, run.member, self.turns[slot]).random()


class LmRouter:
    """One cached forward pass a decision, over what is new since the last one."""

    def __init__(self, router: Router, chooser: _Chooser, slots: int) -> None:
        self.router, self._chooser = router, chooser
        self._streams = token_streams(router.model, slots, positions_of(router.model.config) or _UNLIMITED)
        self._pending: dict[int, list[int]] = {}
        """Tokens that the stream of a slot has not read, but for the segment of the present step."""
        self._read: set[int] = set()
        """Slots whose stream has read that segment."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._streams.reset([slot])
        self._chooser.begin(slot, run)
        self._pending[slot] = []
        self._read.discard(slot)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        new = [self._pending[slot] + segment for slot, segment in zip(slots, segments, strict=True)]
        logits = self._streams.extend(slots, new)
        self._pending |= {slot: [] for slot in slots}
        self._read.update(slots)
        choices = self._chooser.choose(slots, logits[:, self.router.settings.columns])
        return [
            Decision(*choice, Reading(1, len(tokens), len(self._streams.texts[slot])))
            for choice, slot, tokens in zip(choices, slots, new, strict=True)
        ]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        unread = [] if slot in self._read else segment
        self._read.discard(slot)
        self._pending[slot] += [*unread, self.router.settings.tokens[precision], *action]
        self._chooser.acted(slot)


class EncoderRouter:
    """A forward pass over the whole window at each decision."""

    def __init__(self, router: Router, chooser: _Chooser) -> None:
        self.router, self._chooser = router, chooser
        self._texts: dict[int, list[int]] = {}
        """The transcript with its routing tokens, but for the segment of the present step."""

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._chooser.begin(slot, run)
        self._texts[slot] = []

    @torch.no_grad()
    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        model = self.router.model
        windows = [model.window_of(self._texts[slot] + segment) for slot, segment in zip(slots, segments, strict=True)]
        choices = self._chooser.choose(slots, model(windows))
        return [Decision(*choice, Reading(1, len(window))) for choice, window in zip(choices, windows, strict=True)]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self._texts[slot] += [*segment, self.router.settings.tokens[precision], *action]
        self._chooser.acted(slot)


class ProbeRouter:
    """A head decides on the hidden states of the cheapest agent, which reads what is new, and on what is known for nothing. Where
    another one acts, a pass for states was for the decision alone; after the draft it was the draft's first."""

    def __init__(self, router: Router, chooser: _Chooser) -> None:
        self.router, self._chooser, self._seen = router, chooser, _Seen(router)

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self._chooser.begin(slot, run)
        self._seen.begin(slot)

    @torch.no_grad()
    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        model = self.router.model
        features = self._seen.features(slots, segments, peek)
        choices = self._chooser.choose(slots, model(features.to(model.device)))
        return [
            Decision(*choice, Reading(1), features=row)
            for choice, row in zip(choices, features.cpu().numpy(), strict=True)
        ]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self._chooser.acted(slot)
        self._seen.acted(slot, segment, precision, action)


class Observed:
    """A policy in whose episodes is written down what a probe would have decided on."""

    def __init__(self, router: Router, policy: RoutingPolicy) -> None:
        self.policy, self._seen = policy, _Seen(router)

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.policy.begin(slot, run)
        self._seen.begin(slot)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        rows = self._seen.features(slots, segments, peek).cpu().numpy()
        decisions = self.policy.decide(slots, segments, peek)
        return [replace(decision, features=row) for decision, row in zip(decisions, rows, strict=True)]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self.policy.acted(slot, segment, precision, action)
        self._seen.acted(slot, segment, precision, action)


class _Seen:
    """What a probe decides on, slot by slot."""

    def __init__(self, router: Router) -> None:
        config = router.model.config
        self._layers, self._features, self._route = config.layers, config.features, router.settings.route
        self._pasts: dict[int, Past] = {}
        self._turns: dict[int, int] = {}
        self._acted: dict[int, list[tuple[list[int], str, list[int]]]] = {}
        """Segment, precision and action of the steps that `_pasts` does not know of."""

    def begin(self, slot: int) -> None:
        self._pasts[slot], self._turns[slot], self._acted[slot] = Past(self._route), 0, []

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        self._turns[slot] += 1
        if self._features:
            self._acted[slot].append((segment, precision, action))

    def features(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> Tensor:
        """float32 [slots, features]"""
        states = peek.states(slots, self._layers) if self._layers else torch.empty(len(slots), 0)
        features = probe_features(states, torch.tensor([self._turns[slot] for slot in slots]))
        if not self._features:
            return features
        drafts: list[Drafted | None] = [None] * len(slots)
        if not OF_DRAFTS.isdisjoint(self._features):
            drafts = [
                Drafted(peek.command(draft.action), len(draft.action), draft.margin, draft.mean_margin)
                for draft in peek.drafts(self._route[-1], slots)
            ]
        numbers = []
        for slot, segment, margin, draft in zip(slots, segments, peek.margins(slots), drafts, strict=True):
            for seen, precision, action in self._acted[slot]:
                self._pasts[slot].act(seen, peek.command(action), precision, len(action))
            self._acted[slot].clear()
            numbers.append(self._pasts[slot].numbers(self._features, segment, margin, draft))
        return torch.cat([features, torch.tensor(numbers, dtype=features.dtype, device=features.device)], dim=1)
