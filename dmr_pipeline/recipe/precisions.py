"""Section `precisions`: the ladder, and what is routed between."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from dmr_pipeline.recipe.fields import Confidence, Count, Name, Section, Share, Text, at_most, unset
from dmr_pipeline.recipe.model import Pretrained
from dmr_pipeline.recipe.text import shown

_PATTERN = re.compile(r"(?:[\w.*?]|\[!?\w[\w-]*\])+", re.ASCII)
"""A glob of module names whose brackets are closed."""
_BITS = {"float": 32, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
GROUPED = ("int4", "int3", "int2")
"""Weights with a scale and a shift for each group of them."""
AUTO, NAMED = "(auto)", "(named)"
"""The two forms of a route; pydantic puts these into the places of errors, where brackets tell them from keys."""


class Rung(Section):
    """One rung of the precision ladder."""

    name: Name = Field(description="of the folder, and in reports: always_NAME")
    weights: Literal["float", "int8", "int4", "int3", "int2"] = Field(description="of the linear layers")
    activations: Literal["none", "int8"] = Field(
        "none", description="int8: inputs of linear layers are rounded too (`gptq.episodes`)"
    )
    keep_float: tuple[Text, ...] = Field(
        ("lm_head",), max_length=1000, description="modules left in float, as glob patterns of module names"
    )
    ranges: Literal["mse"] | None = Field(
        None,
        exclude_if=unset,
        description="of int4, int3 and int2: what a group's integers span. Without it, quanto's choice, from the group's least"
        " weight to its greatest (min-max); mse: the part of that with the least squared error (both: Nagel et al., 2021, 3.1)",
    )
    rounding: Literal["gptq"] | None = Field(
        None,
        exclude_if=unset,
        description="of int4, int3 and int2: which integer a weight gets. Without it, the nearest one; gptq: the one that keeps"
        " the layer's outputs on calibration episodes (Frantar et al., 2023), see precisions.gptq",
    )
    head: Literal["int8", "int4", "int3"] | None = Field(
        None,
        exclude_if=unset,
        description="the head's own precision, whatever keep_float says of it; int4 and int3 as `ranges` and `rounding` have it;"
        " a tied head is untied: the input embedding is a lookup, and stays in float. Of a small LLM with"
        " many tokens the head is a third of what a pass reads",
    )
    checkpoint: Pretrained | None = Field(
        None,
        exclude_if=unset,
        description="the agent's own model as somebody else quantized it: folder or pinned hub id of a GPTQ or AWQ checkpoint, or"
        " a .gguf file. `weights` then says how many bits it has; nothing is quantized here",
    )

    @property
    def calibrated(self) -> bool:
        """Whether it is made on episodes (`precisions.gptq`)."""
        return self.rounding is not None or self.activations != "none"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.name == "tokenizer":
            yield "name", "'tokenizer' is the folder beside the rungs"
        if self.ranges is not None and self.weights not in GROUPED:
            yield "ranges", f"rung {self.name!r}: ranges is for int4, int3 and int2 weights, these are {self.weights}"
        if self.rounding is not None and self.weights not in GROUPED:
            yield (
                "rounding",
                f"rung {self.name!r}: rounding is for int4, int3 and int2 weights, these are {self.weights}",
            )
        if self.head is not None and self.weights == "float":
            yield "head", f"rung {self.name!r} is float throughout: leave out head"
        if self.checkpoint is not None:
            if self.weights == "float":
                yield (
                    "weights",
                    f"rung {self.name!r}: a checkpoint that is imported is quantized: say its bits, such as int4",
                )
            for name, field in type(self).model_fields.items():
                if name not in ("name", "weights", "checkpoint") and getattr(self, name) != field.default:
                    yield (
                        name,
                        f"rung {self.name!r}: its weights are imported from {shown(self.checkpoint.model)}: leave out {name}",
                    )
        for pattern in self.keep_float:
            if not _PATTERN.fullmatch(pattern):
                yield (
                    "keep_float",
                    f"rung {self.name!r}: {shown(pattern)} is no pattern of module names, such as lm_head or *.down_proj",
                )
            elif not re.search("[a-z0-9]", pattern):
                yield "keep_float", f"rung {self.name!r}: {shown(pattern)} fits every module, so nothing is quantized"


class Gptq(Section):
    """What GPTQ is calibrated on, and the scales of `activations: int8`: the expert's episodes of games of agent_train."""

    episodes: Count = Field(16, description="games of agent_train; all of them where there are fewer")
    tokens: Count | None = Field(
        None, exclude_if=unset, description="tokens of them in all, the first ones; all of them by default"
    )
    damping: Annotated[float, Field(ge=1e-4), at_most(100.0, "it would round to nearest")] = Field(
        0.01, description="what is added to the diagonal of a layer's Hessian, as a share of the mean of that diagonal"
    )


class Speculative(Section):
    """How long the drafts are that a cheaper precision writes and a dearer one checks."""

    draft_tokens: Count | None = Field(
        None, description="tokens that are drafted before a check, at most; by default the whole action"
    )
    stop_margin: Share = Field(
        0.0,
        description="a draft ends with the first token that leads the next one by less than this, in probability; 0: it goes on",
    )


class PromptLookup(Section):
    """Acting in fewer passes: what followed the transcript's last tokens when they stood in it before is read along, and kept as
    far as it is what the model writes itself (Saxena, 2023, "prompt lookup decoding"). Greedy actions stay the same, drawn ones
    keep their distribution. Of several such places the last counts, and the pass that reads an observation reads nothing along:
    both ours."""

    ngram: Count = Field(
        5, description="last tokens that are looked for, at most; fewer, down to one, where those are not found"
    )
    tokens: Count = Field(6, description="tokens that are read along in a pass, at most")


class Precisions(Section):
    """The precision ladder, highest first, and the rungs that the router chooses from."""

    ladder: tuple[Rung, ...] = Field(min_length=2, max_length=50)
    route: Annotated[
        Annotated[Literal["auto"], Tag(AUTO)]
        | Annotated[tuple[str, ...], Field(min_length=2, max_length=50), Tag(NAMED)],
        Discriminator(lambda value: AUTO if isinstance(value, str) else NAMED),
    ] = Field(
        description="names of the rungs that the router chooses from, dearest first; the others act alone, for comparison."
        " auto: those between which routing can pay, by the validation games that the ladder has played"
        " (precision/frontier.py)",
    )
    pair: tuple[str, str] | None = Field(
        None,
        description="what is routed between where `route: auto` finds that routing cannot pay; by default the ladder's dearest"
        " and cheapest rung",
    )
    margin: Share = Field(
        0.05,
        description="success that a rung may lose against the ladder's dearest, at most, to be called not worse: the upper bound"
        " of what it loses has to be below this",
    )
    least_saving: Share = Field(
        0.05,
        description="share of the dear end's cost that a cheaper rung has to save to be worth routing to: a router costs too",
    )
    confidence: Confidence = Field(0.95, description="of the intervals that the verdict rests on")
    cache_bits: Literal[8, 16, 32] = Field(
        16, description="bits of a number in the KV cache, as its reading is charged for"
    )
    cache: Literal["separate", "shared"] = Field(
        "separate",
        exclude_if=lambda cache: cache == "separate",
        description="separate: each rung reads an episode into a KV cache of its own; shared: all have one, and each goes on from"
        " the keys and values that whoever acted before has written, so that a switch costs no reading",
    )
    kl_episodes: Count = Field(
        50, description="validation games whose expert steps give the mean KL to the float model"
    )
    stop_beaten_after: Count | None = Field(
        None,
        exclude_if=unset,
        description="validation games after which a rung of neither `route` nor `pair` plays no more if a dearer one has beaten"
        " it on them: at no more cost, and with intervals of success that lie apart. A hopeless precision wanders to the step"
        " limit, and takes longest to measure. By default all rungs play all games",
    )
    gptq: Gptq | None = Field(
        None, exclude_if=unset, description="what rungs are calibrated on; by default as its keys have it"
    )
    speculative: Speculative | None = Field(
        None,
        exclude_if=unset,
        description="how a cheaper precision drafts where a dearer one checks; by default as its keys have it",
    )
    prompt_lookup: PromptLookup | None = Field(
        None,
        exclude_if=unset,
        description="what every precision writes is looked up in the transcript first, and costs as many passes as it then takes;"
        " without it, a pass a token. The unit of cost is an episode at a pass a token all the same",
    )
    kernels: Literal["low_bit"] | None = Field(
        None,
        exclude_if=unset,
        description="low_bit: where few episodes are acted in at once, int8, int4, int3 and int2 are computed by torch's low-bit"
        " kernels, which is quicker, rounds otherwise, and takes more memory; needs agent.dtype: bfloat16. Without it, by what"
        " they are in float",
    )

    @property
    def names(self) -> list[str]:
        """Of all rungs, dearest first."""
        return [rung.name for rung in self.ladder]

    def may_stop(self, rung: str) -> bool:
        """Whether it need not play all validation games (`stop_beaten_after`)."""
        named = self.pair or () if self.route == "auto" else self.route
        return self.stop_beaten_after is not None and rung not in (self.names[0], *named)

    def problems(self) -> Iterator[tuple[str, str]]:
        names = self.names
        if self.gptq is not None and not any(rung.calibrated for rung in self.ladder):
            yield (
                "gptq",
                "no rung has `rounding: gptq` or `activations: int8`; give one of them that, or leave this out",
            )
        if len(set(names)) != len(names):
            yield "ladder", f"names are not unique: {names}"
        routed = {"pair": self.pair or ()} if self.route == "auto" else {"route": self.route}
        for field, asked in routed.items():
            yield from self._off_the_ladder(field, asked)
        if self.route != "auto" and self.pair is not None:
            yield "pair", "is for route: auto; leave it out, or name the rungs there alone"
        ends = ("", "") if self.route == "auto" else (self.route[0], self.route[-1])
        for called, end, place in (("high", ends[0], "first"), ("low", ends[1], "last")):
            if called in names and called != end:
                yield "ladder", f"a rung may be called {called!r} only if it is the {place} of the route"
        for rung in self.ladder:
            if rung.weights == "float" and rung.keep_float != ("lm_head",):
                yield "ladder", f"rung {rung.name!r} is float throughout: leave out keep_float"
            if rung.weights == "float" and rung.activations != "none":
                yield "ladder", f"rung {rung.name!r}: quantized activations need quantized weights"
        for i, rung in enumerate(self.ladder):
            for earlier in self.ladder[:i]:
                if earlier.model_copy(update={"name": rung.name}) == rung:
                    yield "ladder", f"rungs {earlier.name!r} and {rung.name!r} are equal"
        for above, below in pairwise(self.ladder):
            if _BITS[above.weights] < _BITS[below.weights]:
                yield "ladder", f"is highest first, but {below.name!r} ({below.weights}) is below {above.name!r}"

    def _off_the_ladder(self, field: str, routed: Sequence[str]) -> Iterator[tuple[str, str]]:
        names = self.names
        for rung_name in routed:
            if rung_name not in names:
                yield field, f"{shown(rung_name)} is not on the ladder {names}"
        places = [names.index(rung_name) for rung_name in routed if rung_name in names]
        for i, j in pairwise(places):
            if i >= j:
                yield field, f"{names[j]!r} has to be below {names[i]!r}; the ladder is highest first: {names}"

    @property
    def fallback(self) -> tuple[str, str]:
        """What is routed between where `route: auto` finds nothing."""
        return self.pair or (self.ladder[0].name, self.ladder[-1].name)
