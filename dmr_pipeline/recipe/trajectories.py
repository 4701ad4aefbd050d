"""Section `trajectories`: who acts while episodes are collected."""

from collections.abc import Iterator, Mapping

from pydantic import Field

from dmr_pipeline.recipe.fields import Name, Section, Seed, Share


class BehaviourPolicy(Section):
    """Who acts while trajectories are collected."""

    name: Name = Field(description="as tables and the summary call it")
    shares: dict[str, Share] = Field(
        min_length=1,
        max_length=50,
        description="routed rung -> chance that it acts at a step; they sum to 1, and a rung that is left out never acts",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if abs(sum(self.shares.values()) - 1) > 1e-9:
            yield "shares", f"{dict(self.shares)} sum to {sum(self.shares.values()):g}, not to 1"


class Trajectories(Section):
    behaviour: tuple[BehaviourPolicy, ...] = Field(
        (),
        max_length=100,
        description="by default each routed rung alone, and all of them in equal shares; with precisions.route: auto nothing else"
        " can be said, since the rungs are not known yet",
    )
    seed: Seed = Field(0, description="of who acts when, and of actions drawn at a temperature")

    def problems(self) -> Iterator[tuple[str, str]]:
        names = [policy.name for policy in self.behaviour]
        if len(set(names)) != len(names):
            yield "behaviour", f"names are not unique: {names}"
        if "ingested" in names:
            yield "behaviour", "'ingested' is the policy of episodes that people bring; choose another name"
        for i, policy in enumerate(self.behaviour):
            for earlier in self.behaviour[:i]:
                if _acting(earlier.shares) == _acting(policy.shares):
                    yield (
                        "behaviour",
                        f"{earlier.name!r} and {policy.name!r} have equal shares, so they play the same episodes",
                    )


def _acting(shares: Mapping[str, float]) -> dict[str, float]:
    return {rung: share for rung, share in shares.items() if share > 0}
