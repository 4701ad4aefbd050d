"""Section `kl_router`: the router's model, and stage 1 of its training."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import Batch, Count, Rate, Ratio, Section, Seed, Size, at_most, unset
from dmr_pipeline.recipe.model import Architecture, Lora, Pretrained

Feature = Literal["repeats", "behind", "margin", "draft", "draft_repeats"]


class Probe(Section):
    """A head on the hidden states of the low-precision agent, which has read the transcript; the turn is told besides."""

    layers: tuple[Size, ...] = Field(
        max_length=1000,
        description="decoder layers, from 1, whose outputs are read; with none nothing is read for the decision",
    )
    features: tuple[Feature, ...] = Field(
        (),
        max_length=10,
        exclude_if=unset,
        description="numbers that cost nothing, ours: of states and commands that come again (repeats), tokens since each rung"
        " acted (behind), how sure the last action was (margin) and, where the router decides after it, of the cheapest rung's"
        " draft (draft, draft_repeats)",
    )
    hidden: Annotated[int, Field(ge=0), at_most(1_000_000, "no LLM has so many")] = Field(
        32, description="width of the head's hidden layer; 0: none, a logistic regression"
    )
    activation: Literal["gelu", "none"] = Field(
        "gelu",
        exclude_if=lambda activation: activation == "gelu",
        description="of the hidden layer. none: a matrix factorisation, RouteLLM's written for steps: a rung's score is the"
        " product of its vector and the step's, each of `hidden` numbers",
    )
    neighbours: Size | None = Field(
        None,
        exclude_if=unset,
        description="in place of a head: so many of the labelled steps, those that look most alike, vote; nothing is trained, so"
        " epochs and learning_rate count for nothing, and stage 2 has nothing to start from",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.activation == "none" and not self.hidden:
            yield "activation", "there is no hidden layer; leave it out, or set 'hidden'"
        if not self.layers and not self.features:
            yield "layers", "there is nothing to decide on; name a layer, or 'features'"
        for field, values in (("layers", self.layers), ("features", self.features)):
            if len(set(values)) != len(values):
                yield field, f"{list(values)} are not all different"


class Encoder(Section):
    """A Transformer encoder over the trajectory, trained from nothing: the paper's form, as readers describe it."""

    layers: Size = Field(2, description="of the encoder; two in the paper's first version")
    width: Size = Field(64, description="hidden size")
    heads: Size = Field(4, description="attention heads, which share the width")
    feed_forward: Size = Field(256, description="intermediate size")
    window: Annotated[int, Field(ge=2), at_most(100_000, "memory grows with its square")] = Field(
        256, description="tokens of the transcript that are read: of a longer one its beginning and its end, half each"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width % self.heads:
            yield "heads", f"{self.heads} do not divide the width, {self.width}"


class RouterModel(Section):
    """A probe; an encoder; or a small causal LM over the transcript whose next token at a routing position is a precision."""

    probe: Probe | None = None
    encoder: Encoder | None = Field(None, exclude_if=unset)
    architecture: Architecture | None = None
    pretrained: Pretrained | None = None
    lora: Lora | None = Field(None, description="train adapters only (needs 'pretrained')")
    decides: Literal["before", "after"] = Field(
        "before",
        exclude_if=lambda decides: decides == "before",
        description="before: the rung that is chosen writes the action. after (ours): the cheapest rung drafts every action, and"
        " the router accepts it or names the rung that checks it, which takes a pass or two (speculative acting)",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if [self.probe, self.encoder, self.architecture, self.pretrained].count(None) != 3:
            yield "", "give exactly one of 'probe', 'encoder', 'architecture' and 'pretrained'"
        if self.lora is not None and self.pretrained is None:
            yield "lora", "needs 'pretrained'"
        if self.probe is not None and self.decides == "before":
            for feature in self.probe.features:
                if feature.startswith("draft"):
                    yield "probe.features", f"{feature!r} is of a draft, which there is only with decides: after"


Target = Literal["divergence", "advantage", "consequence"]


class KlRouter(Section):
    """Stage 1: class-weighted cross-entropy on the sensitivity labels, or advantages from mixed episodes."""

    model: RouterModel
    epochs: Count = Field(description="times that all labelled episodes are learned from")
    batch_episodes: Batch = Field(description="episodes an optimiser update")
    learning_rate: Rate = Field(description="of AdamW at the first update; it falls to 0")
    target: Target = Field(
        "divergence",
        exclude_if=lambda target: target == "divergence",
        description="divergence: the labels of `sensitivity`, the paper's. advantage (ours): by how much the chance of success"
        " rises where a dearer rung takes the step, learned from the trajectories in which rungs were drawn. consequence (ours):"
        " the same, learned from single steps that were swapped (`sensitivity.consequences`)",
    )
    agreeing_weight: Annotated[float, Field(ge=0.0), at_most(1000.0, "nothing else would count")] = Field(
        1.0,
        exclude_if=lambda weight: weight == 1,
        description="with target consequence, of a step at which all rungs act alike and nothing follows from who does; a"
        " step that was swapped counts 1, or for as many as it was drawn from",
    )
    estimator: Literal["r_learner", "doubly_robust"] = Field(
        "r_learner",
        exclude_if=lambda estimator: estimator == "r_learner",
        description="of the advantage. doubly_robust: from what is expected where each rung acts, corrected by what came of it"
        " (router/advantage.py)",
    )
    weight_decay: Annotated[float, Field(ge=0.0), at_most(100.0, "the weights would be 0")] | None = Field(
        None, exclude_if=lambda decay: decay is None, description="of AdamW; 0.01 by default"
    )
    held_out: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        0.0,
        exclude_if=unset,
        description="share of the games that are not trained on: the epoch whose loss is least there is kept (early stopping)",
    )
    validation_games: Count = Field(description="validation games for Platt scaling and for the closed-loop threshold")
    target_ratio: Ratio = Field(
        description="high-precision ratio on validation games at most, to which the threshold is calibrated in closed loop"
    )
    force_search: bool = Field(
        False,
        exclude_if=unset,
        description="WebShop: high precision at every step whose page has a search bar, without asking the router, if the mean"
        " divergence of the labelled searches is at least tau; the paper's special case, as far as it is known",
    )
    seed: Seed = Field(0, description="of the weights and of the episodes' order")

    def nothing_for_stage_2(self) -> Iterator[str]:
        """What keeps stage 2 from starting with this router; stage 1 and studies take it."""
        if self.model.probe is not None and self.model.probe.neighbours is not None:
            yield (
                "kl_router.model.probe.neighbours: neighbours have no weights for stage 2 to train; leave it out, or stay with"
                " stage 1 (`dmr materialize kl_router`, or a study)"
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.estimator != "r_learner" and self.target != "advantage":
            yield "estimator", f"is of advantages, but target is {self.target!r}; leave it out"
        if self.agreeing_weight != 1 and self.target != "consequence":
            yield "agreeing_weight", f"is of consequences, but target is {self.target!r}; leave it out"
