"""Rules that nobody trained: each gives every step a level, and a budget (budgets.py) has the dearest rung act where it is high.

So one number tunes each of them, and all are calibrated as routers are. The same rule has several names: the first k steps are
those until turn k, the last k of the step limit those from turn `limit - k` on. Of a route of more than two rungs, rules choose
between its ends.

Rules that look at the cheapest rung's draft decide after it was written. Where the dearest rung then acts, it may write anew, and
the draft is paid for in vain; or check it (speculative acting), which takes the same actions for less.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.choosing import seeded_generator
from dmr_pipeline.rollout.policy import Decision, DecisionContext, Draft
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest
from dmr_pipeline.router.budgets import AtBar, Bar

CAP_TURN = 15
"""Rules that are capped ask for nothing from this turn on: an episode that lasts so long is mostly lost. Ours."""
UNDEPLOYABLE = frozenset({"episode_margin"})
"""Rules that cannot be told from a transcript alone: what its first draft was is not in it."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class RulePast:
    """What a rule knows of an episode, for nothing."""

    run: RolloutRequest
    turn: int = 0
    segments: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How often each was met before: the observation, and what the prompt puts around it."""
    actions: Counter[tuple[int, ...]] = field(default_factory=Counter)
    segment: tuple[int, ...] = ()
    """The present one."""
    action: tuple[int, ...] = ()
    """The last one."""
    held: float | None = None
    """The level of the first step, for rules that decide once an episode."""


Levels = Callable[[Sequence[int], Sequence[RulePast], DecisionContext], list[float]]
"""From slots and what is known of them, a level each, in [0, 1]."""


@dataclass(frozen=True)
class Rule:
    """A policy that would have the dearest rung act throughout, and says by `Decision.exceedance` where most.

    Args:
        route: the rungs, dearest first.
        drafter: the cheapest rung, where the dearest checks what it has drafted; None: it writes anew.
    """

    route: Sequence[str]
    levels: Levels
    drafter: str | None = None
    pasts: dict[int, RulePast] = field(default_factory=dict)

    def begin(self, slot: int, run: RolloutRequest) -> None:
        self.pasts[slot] = RulePast(run)

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: DecisionContext) -> list[Decision]:
        pasts = [self.pasts[slot] for slot in slots]
        for past, segment in zip(pasts, segments, strict=True):
            past.segment = tuple(segment)
        cheaper = len(self.route) - 1
        return [
            Decision(self.route[0], (level,) * cheaper, drafter=self.drafter)
            for level in self.levels(slots, pasts, peek)
        ]

    def acted(self, slot: int, segment: list[int], precision: str, action: list[int]) -> None:
        past = self.pasts[slot]
        past.segments[tuple(segment)] += 1
        past.action = tuple(action)
        past.actions[past.action] += 1
        past.turn += 1


def by_past(level: Callable[[RulePast], float]) -> Levels:
    """Of what is known before anything is drafted."""
    return lambda slots, pasts, peek: [level(past) for past in pasts]


def by_draft(route: Sequence[str], level: Callable[[Draft], float]) -> Levels:
    """Of the cheapest rung's draft."""
    return lambda slots, pasts, peek: [level(draft) for draft in peek.drafts(route[-1], slots)]


def inadmissible(route: Sequence[str], prompter: Prompter) -> Levels:
    """1 where the cheapest rung's draft does nothing."""

    def levels(slots: Sequence[int], pasts: Sequence[RulePast], peek: DecisionContext) -> list[float]:
        drafts, commands = peek.drafts(route[-1], slots), peek.admissible_commands(slots)
        return [
            float(prompter.command(draft.action) not in there) for draft, there in zip(drafts, commands, strict=True)
        ]

    return levels


def where(asked: Callable[[RulePast], bool], levels: Levels) -> Levels:
    """Level 0 elsewhere, and nothing is looked at there."""

    def some(slots: Sequence[int], pasts: Sequence[RulePast], peek: DecisionContext) -> list[float]:
        found = [0.0] * len(slots)
        mine = [i for i, past in enumerate(pasts) if asked(past)]
        if mine:
            values = levels([slots[i] for i in mine], [pasts[i] for i in mine], peek)
            for i, value in zip(mine, values, strict=True):
                found[i] = value
        return found

    return some


def once(levels: Levels) -> Levels:
    """One decision an episode: that of its first step."""

    def held(slots: Sequence[int], pasts: Sequence[RulePast], peek: DecisionContext) -> list[float]:
        first = where(lambda past: past.held is None, levels)(slots, pasts, peek)
        for past, level in zip(pasts, first, strict=True):
            past.held = level if past.held is None else past.held
        return [past.held or 0.0 for past in pasts]

    return held


def capped(levels: Levels) -> Levels:
    return where(lambda past: past.turn < CAP_TURN, levels)


def evenly(past: RulePast) -> float:
    """Every n-th step at a ratio of 1/n or so, and evenly spaced at every ratio: multiples of the golden ratio lie in gaps of at
    most three lengths (Steinhaus' three-distance theorem)."""
    return 1 - past.turn * GOLDEN % 1


def repeats(past: RulePast) -> float:
    """Stuck: n / (n + 1), of n times that this observation was met before and the last command issued before."""
    again = past.segments[past.segment] + max(past.actions[past.action] - 1, 0)
    return again / (again + 1)


def doubt(draft: Draft) -> float:
    """One minus the margin of the draft's least certain token."""
    return 1 - draft.margin


def surprise(draft: Draft) -> float:
    """1 - exp(-H), of the greatest entropy H of the draft's tokens, in nats: of n equally likely ones 1 - 1 / n."""
    return 1 - math.exp(-draft.entropy)


def rules(route: Sequence[str], step_limit: int, prompter: Prompter, check: bool, seed: int) -> dict[str, Rule]:
    """All rules by their names, dearest act first.

    Args:
        check: the dearest rung checks the draft where there is one.
        seed: of what is drawn.
    """

    def episode_lot(past: RulePast) -> float:
        return seeded_generator("episode-lot", seed, past.run.task.task_id, past.run.member).random()

    before: Mapping[str, Levels] = {
        "random": by_past(lambda past: 0.5),  # all drawn by lot
        "evenly": by_past(evenly),
        # A study may play on beyond the step limit that the rules were tuned for.
        "first": by_past(lambda past: max(0.0, 1 - past.turn / step_limit)),
        "last": by_past(lambda past: min(1.0, (past.turn + 1) / step_limit)),
        "stuck": by_past(repeats),
        "episode": by_past(episode_lot),
    }
    margin, entropy = by_draft(route, doubt), by_draft(route, surprise)
    after = {"margin": margin, "entropy": entropy, "inadmissible": inadmissible(route, prompter)}
    found = {name: Rule(route, levels) for name, levels in before.items()}
    drafter = route[-1] if check else None
    if step_limit > CAP_TURN:
        found["stuck_capped"] = Rule(route, capped(before["stuck"]))
        after |= {"margin_capped": capped(margin), "entropy_capped": capped(entropy)}
    # Only the first step has a draft to check.
    found["episode_margin"] = Rule(route, once(margin))
    return found | {name: Rule(route, levels, drafter) for name, levels in after.items()}


def is_rule_at_bar(text: str) -> bool:
    """Whether this names a rule at a threshold (`rule_at_bar`)."""
    return ">" in text


def named_at(rule: str, bar: Bar) -> str | None:
    """What `rule_at_bar` reads; None where it cannot say this: lots at the threshold, samples, strict budgets, all steps."""
    if rule in UNDEPLOYABLE or bar.sample or bar.strict is not None or 0 < bar.ties < 1:
        return None
    said, above = f"{bar.threshold:.6g}", bar.ties == 1
    if (float(said) < bar.threshold) != above:  # a level that is just the threshold is to stay on its side
        said = f"{bar.threshold * (1 - 1e-5 if above else 1 + 1e-5):.6g}"
    return None if above and bar.threshold <= 0 else f"{rule}>{said}"


def rule_at_bar(text: str, there: Mapping[str, Rule], route: Sequence[str]) -> AtBar:
    """A rule as it is deployed, by its name: of `margin>0.4` the dearest rung acts where the rule's level is above 0.4, and the
    cheapest elsewhere.

    Args:
        there: as of `rules`.

    Raises:
        UserError: there is no such rule, its level is no number from 0 to 1, or it cannot be told from a transcript alone.
    """
    name, _, said = text.partition(">")
    deployable = [rule for rule in there if rule not in UNDEPLOYABLE]
    if name not in deployable:
        raise UserError(f"{text!r}: {name!r} is no rule that can be deployed ({', '.join(deployable)})")
    try:
        threshold = float(said)
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise UserError(f"{text!r}: write the threshold behind '>', a number from 0 to 1, such as {name}>0.4")
    return AtBar(there[name], route, Bar(threshold, ties=0.0))
