"""Who may decide for a recipe's sessions: its releases, or what is named in their place; and what needs no router: each precision
by itself, or one that checks what a cheaper one drafts."""

import logging
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from dmr_pipeline.errors import UserError
from dmr_pipeline.rollout.policy import static_policy
from dmr_pipeline.router.model import Router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.serve import release
from dmr_pipeline.serve.requests import Which
from dmr_pipeline.serve.sessions import Decider

log = logging.getLogger(__name__)

_MOST = 8
"""Earlier releases that are kept in memory."""


def decider_of(router: Router, slots: int, number: int | None = None) -> Decider:
    """
    Args:
        slots: sessions at once.
        number: of the router's release, if it is one.
    """
    policy = routing_policy(router, slots + 1)  # one more for what is decided and not played
    settings = router.settings
    return Decider(policy, "router", number, settings.threshold, router.pass_bytes, settings.bar)


class Deciders:
    """
    Args:
        load: reads a router from its folder.
        slots: as of `decider_of`.
        checks: whether a rung can check what a cheaper one drafts.
        untrained: what decides for the recipe in place of its releases: its name, and that itself.
        router: folder of the router that does.
    """

    def __init__(
        self,
        recipe: str,
        data_root: Path,
        route: tuple[str, ...],
        load: Callable[[Path], Router],
        slots: int,
        checks: bool = False,
        untrained: tuple[str, Decider] | None = None,
        router: Path | None = None,
    ) -> None:
        self.recipe, self.data_root, self.route, self._load, self._slots = recipe, data_root, route, load, slots
        pairs = [f"{dear}<{cheap}" for dear, cheap in combinations(route, 2)] if checks else []
        self._fixed = {name: Decider(static_policy(name, route), "fixed") for name in (*route, *pairs)}
        self._instead, self._earlier = untrained, dict[int, Decider]()
        if router is not None:
            self._instead = str(router), decider_of(load(router), slots)
        self.current: Decider | None = None if self._instead is None else self._instead[1]
        """Of the release in use, as far as that is known."""
        self._mark: tuple[int, int] | None = None

    def names(self) -> list[str]:
        """Of the models that there are."""
        own = f"dmr/{self.recipe}"
        numbers = release.numbers(self.recipe, self.data_root) if self._instead is None else []
        return [
            *([own] if numbers or self._instead is not None else []),
            *(f"{own}@{n}" for n in numbers),
            *(f"{own}:{name}" for name in self._fixed),
        ]

    def is_at_hand(self, which: Which) -> bool:
        """Whether `find` need not read anything."""
        if which.rung is not None:
            return which.rung in self._fixed
        if which.release is not None:
            return which.release in self._earlier
        if self._instead is not None:
            return True
        return self.current is not None and release.mark_of_release(self.recipe, self.data_root) == self._mark

    def find(self, which: Which) -> Decider:
        """The present one of the release in use, whatever has been released meanwhile. One thread at a time.

        Raises:
            UserError: there is none.
        """
        if which.rung is not None:
            if which.rung not in self._fixed:
                raise UserError(f"{which.rung!r} is none of {', '.join(self._fixed)}")
            return self._fixed[which.rung]
        if self._instead is not None and which.release is not None:
            raise UserError(f"{self._instead[0]} decides here: there are no releases")
        if which.release is not None:
            if which.release not in self._earlier:
                with release.earlier(self.recipe, which.release, self.data_root) as folder:
                    decider = decider_of(self._load(folder), self._slots, which.release)
                if len(self._earlier) >= _MOST:
                    self._earlier.pop(next(iter(self._earlier)))
                self._earlier[which.release] = decider
            return self._earlier[which.release]
        return self._in_use()

    def _in_use(self) -> Decider:
        if self._instead is not None:
            return self._instead[1]
        mark = release.mark_of_release(self.recipe, self.data_root)
        if self.current is not None and mark in (self._mark, None):  # None: another one is being put in its place
            return self.current
        try:
            folder, number = release.released(self.recipe, self.data_root)
            found = decider_of(self._load(folder), self._slots, number)
        except UserError as error:
            if self.current is None:
                raise
            log.error("the released router is not taken up, release %s goes on: %s", self.current.release, error)
        else:
            log.info("release %d decides", number)
            self.current = found
        self._mark = mark
        return self.current
