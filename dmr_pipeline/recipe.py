"""Recipes: one YAML file fixes one experiment, from the games to the report.

A recipe is made of sections. Each stage of the pipeline names the sections it reads, so that a change to one section makes
exactly those stages stale. Unknown keys are refused, and so is a value of another type than its key's ('24' and true are no
counts), or one that would only fail, or mean nothing, after hours of work. Sizes in the field descriptions are the unit of
the number.
"""

import logging
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from dmr_pipeline import benchmarks
from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.recipe_fields import (
    Batch,
    Bootstrap,
    Confidence,
    Count,
    EndText,
    GameCount,
    Name,
    Rate,
    Ratio,
    Section,
    Seed,
    Share,
    Size,
    StepLimit,
    Text,
    Update,
    Workers,
    at_most,
)
from dmr_pipeline.recipe_text import read_mapping, short

log = logging.getLogger(__name__)

RECIPE_FOLDER = Path("recipes")


def _unset(value: object) -> bool:
    """Of a field that came after artifacts had been published: where it is not used it stays out of their provenance."""
    return not value


class Splits(Section):
    """Numbers of games in the four disjoint splits."""

    agent_train: GameCount = Field(description="games; the agent learns on these")
    router_train: GameCount = Field(
        description="games; labels and GRPO (an agent's confidence on its own training games is memorised)"
    )
    validation: GameCount = Field(description="games; every choice: threshold, rung, checkpoint, headline policy")
    test: GameCount = Field(description="games; touched once, by the evaluation report")


class Games(Section):
    """Which games are played, whatever the environment."""

    splits: Splits
    seed: Seed = Field(0, description="decides which games there are, or which of them each split gets")
    step_limit: StepLimit = Field(description="steps an episode may take")
    environment: str = Field(description="the benchmark, and who made its games: generated here, or the official ones")


def games_of_a_benchmark(content: Any) -> Section:  # noqa: ANN401 - what a recipe file holds
    """The section of the benchmark that is named; of generated ALFWorld games where none is."""
    if isinstance(content, Section):
        return content
    name = str(content.get("environment", DEFAULT_BENCHMARK)) if isinstance(content, dict) else DEFAULT_BENCHMARK
    try:
        benchmark = benchmarks.find(name)
    except KeyError as error:
        known = ", ".join(map(repr, benchmarks.names()))
        raise PydanticCustomError("unknown_benchmark", "one of {known}", {"known": known, "name": name}) from error
    section: Section = benchmark.section.model_validate(content)
    return section


DEFAULT_BENCHMARK = "alfworld"


class Architecture(Section):
    """A Qwen3-architecture causal LM, made from nothing."""

    layers: Size = Field(description="decoder layers")
    width: Size = Field(description="hidden size; decides quanto's group size (see precision/quantization.py)")
    heads: Size = Field(description="attention heads")
    key_value_heads: Size = Field(description="heads of keys and values, each shared by as many attention heads")
    head_width: Size = Field(description="even: rotary positions turn its numbers in pairs")
    feed_forward: Size = Field(description="intermediate size")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.heads % self.key_value_heads:
            yield "key_value_heads", f"{self.key_value_heads} does not divide the {self.heads} heads, which share them"
        if self.head_width % 2:
            yield "head_width", f"{self.head_width} is odd, but rotary positions turn its numbers in pairs"
        attention = 2 * self.width * self.head_width * (self.heads + self.key_value_heads)
        parameters = self.layers * (attention + 3 * self.width * self.feed_forward)
        if parameters > 10**10:
            yield "", f"{parameters:,} weights, in float32, are no model that is trained here: bring one along"

    def linear_layers(self) -> list[str]:
        """Names of the linear layers of the model that is made of it."""
        parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        return ["lm_head", *(f"model.layers.{layer}.{part}" for layer in range(self.layers) for part in parts)]


class Pretrained(Section):
    """An LLM that exists: one that is known by name, a checkpoint folder, that of an adapter, or a hub id with a pinned
    revision."""

    model: Text = Field(
        description="a name that `dmr models list` knows, such as smollm2-135m; a folder with config, tokenizer and safetensors"
        " weights; or a hub id such as Qwen/Qwen3-1.7B"
    )
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(
        None,
        description="full commit hash; required for a hub id, also for one that is the base of an adapter's folder",
    )


class Imitation(Section):
    """Behaviour cloning on the expert's actions, then DAgger rounds (Ross et al., 2011). All choices are ours."""

    updates: Count = Field(description="optimiser updates in all")
    episodes_per_update: Batch = Field(description="expert episodes")
    learning_rate: Rate = Field(
        description="the highest: of Muon and AdamW in training from nothing, of AdamW in fine-tuning"
    )
    warmup_updates: Update = Field(description="updates in which the learning rate rises from 0")
    weight_decay: Share = Field(0.1, description="of the layers' matrices; in fine-tuning of all that is trained")
    looks_per_update: Update = Field(
        0, description="single observations, each with what the expert makes of it; ALFWorld's teach thoughts"
    )
    looks_alone_until: Update = Field(
        0, description="update up to which there is nothing but looks; after it a quarter of them"
    )
    short_until: Update = Field(
        0, description="update up to which only games are used that the expert wins in `short_steps`"
    )
    short_steps: Count = Field(10, description="steps; short games teach sooner what the goal is")
    dagger_from: Update = Field(description="update from which on the agent's own episodes are added")
    dagger_every: Count = Field(description="updates between two collections of the agent's own episodes")
    dagger_episodes: Batch = Field(description="episodes a collection")
    dagger_steps: Count = Field(
        description="steps that such an episode may take; a failing agent's last ones teach little"
    )
    dagger_tokens: Annotated[int, Field(gt=0), at_most(10**7, "an update is held in memory")] = Field(
        description="tokens of the agent's own episodes in an update, which then has half the expert's"
    )
    mistake_rate: Annotated[float, Field(ge=0.0), at_most(0.5, "the expert would hardly win any more")] = Field(
        description="chance that the expert's step is replaced by a random admissible one before DAgger"
    )
    seed: Seed = Field(0, description="of the weights, of which games are shown when, and of mistakes")

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("warmup_updates", "looks_alone_until", "short_until", "dagger_from"):
            if (value := getattr(self, field)) > self.updates:
                yield field, f"{value:,}, but there are {self.updates:,} updates"
        if self.looks_alone_until and not self.looks_per_update:
            yield "looks_per_update", f"0, but there is nothing else up to update {self.looks_alone_until}"
        if 0 < self.short_until <= self.looks_alone_until:
            yield "short_until", f"{self.short_until}, but up to update {self.looks_alone_until} there are no games"
        first = -(-self.dagger_from // self.dagger_every) * self.dagger_every
        if self.dagger_from < self.updates <= first:
            yield (
                "dagger_every",
                f"{self.dagger_every:,} has no multiple from dagger_from on ({self.dagger_from:,}) below {self.updates:,}"
                " updates, so nothing would be collected; to do without, set dagger_from to the number of updates",
            )


class Training(Imitation):
    """A new agent, from nothing."""

    architecture: Architecture


LINEAR_LAYERS = "all-linear"
"""peft's name of all linear layers but the head."""


class Lora(Section):
    """A low-rank adapter (Hu et al., 2021): W becomes W + (alpha / rank) B A at each layer, and B and A are trained."""

    rank: Size = Field(8, description="rows of A, columns of B")
    alpha: Size = Field(16, description="what the adapter is scaled by, times 1 / rank")
    targets: tuple[Text, ...] = Field(
        (LINEAR_LAYERS,),
        min_length=1,
        max_length=100,
        description="ends of the names of the layers that are adapted, such as q_proj; all-linear: all but the head",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if LINEAR_LAYERS in self.targets and len(self.targets) > 1:
            yield "targets", f"{LINEAR_LAYERS} has all layers in it: name it alone, or leave it out"

    @property
    def target_modules(self) -> str | list[str]:
        """As peft wants them."""
        return LINEAR_LAYERS if self.targets == (LINEAR_LAYERS,) else list(self.targets)


class Finetune(Imitation):
    """A pretrained agent, which goes on learning from the expert. It computes in bfloat16, and what is trained is held in
    float32."""

    lora: Lora | None = Field(
        None, description="an adapter is trained, and is the artifact; without it all weights are, and are the artifact"
    )


class PageView(Section):
    """What the agent is shown of a page. A page's segments are what ' [SEP] ' separates; limits are in words, which blanks
    separate. What is cut or hidden is lost to the agent alone: environment and expert have the whole page."""

    hide: tuple[Text, ...] = Field(
        (),
        max_length=1000,
        description="segments that are not shown, each named in full; {task} stands for the task sentence",
    )
    segment_words: Count | None = Field(
        None,
        description="words of a segment that are shown; the rest is lost, and with it the end of long titles, descriptions"
        " and options, which cannot be clicked then (their name must be written in full)",
    )
    observation_words: Count | None = Field(
        None,
        description="words of a whole observation that are shown; the rest is lost, with what stands last on a page, such as"
        " the title and 'Buy Now' below many options",
    )
    separator: Text | None = Field(
        None,
        exclude_if=_unset,
        description="what stands between the segments that are shown, a line break for instance; by default ' [SEP] ' as on the"
        " page, which an LLM's own tokenizer may cut into four tokens each time",
    )


PLACEHOLDERS = ("task", "observation", "step", "steps_left", "admissible_commands")
"""What templates may name, in braces: the task sentence, what the last command showed, the number of the step that comes next
(from 1), the steps that are left (this one included), and the commands that do something there, a line each."""


def placeholders(template: str) -> set[str]:
    """Names in braces.

    Raises:
        ValueError: a brace without its partner.
    """
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _problem_of(template: str) -> str | None:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"{error}; write a brace that is meant as such twice, '{{{{' or '}}}}'"
    for _, name, form, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or form or conversion):
            written = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form}"
            there = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            return (
                f"{_shown('{' + written + '}')} is no placeholder: there are {there}; write a brace that is meant as such twice,"
                f" {_shown('{{' + written + '}}')}"
            )
    return None


class Chat(Section):
    """The transcript is a conversation as the tokenizer's own chat template renders it: `opening` and `turn` are what the user
    says, an action is what the assistant says, and what stands around them is the template's."""

    system: Text | None = Field(
        None,
        description="what the system turn says, the same for all tasks; without it, what the template writes by itself, which may"
        " be a system turn of its own",
    )
    thinking: bool | None = Field(
        None,
        description="given to templates that ask for enable_thinking, such as Qwen 3's; by default nothing is given",
    )
    date: Text | None = Field(
        None, description="given as date_string to templates that would write today's date, such as Llama 3.2's"
    )


class Prompt(Section):
    """The append-only transcript. Every segment is tokenized by itself, so that nothing before it ever changes; templates that
    make the tokens differ from those of the whole text are refused once there is a tokenizer. Braces that are meant as such
    are written twice. The transcript is the history: nothing of it is offered again."""

    chat: Chat | None = Field(
        None,
        exclude_if=_unset,
        description="takes what stands around the user's and the agent's texts from the tokenizer's chat template; without it,"
        " opening, turn and action_end say all of it",
    )
    opening: str = Field(
        "<task> {task} <obs> {observation} <act>",
        description="first segment; may name {task}, {observation}, {step}, {steps_left} and {admissible_commands}."
        " It begins with the tokenizer's bos token where the tokenizer adds one by default",
    )
    turn: str = Field(
        "<task> {task} <obs> {observation} <act>",
        description="segment after each action, with the same placeholders. Logged episodes do not tell {steps_left} and"
        " {admissible_commands}, and are left out where one of them is named",
    )
    thought_end: EndText | None = Field(
        None,
        description="what an action holds before it is thought, not command: a token such as </think>, or a text such as"
        " 'Action:'; thoughts of an LLM need a larger max_action_tokens",
    )
    action_end: EndText = Field(
        "<end>",
        description="a token or a text that ends the action; so do the model's own eos tokens. What the model writes after it, or"
        " after a line break, is no part of the command",
    )
    max_action_tokens: Annotated[int, Field(gt=0), at_most(10**6, "no transcript has room for more")] = Field(
        12, description="tokens generated for one action at most, its thought included"
    )
    page: PageView | None = Field(
        None,
        exclude_if=_unset,
        description="how pages are shown; without it, observations are shown as they are",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("opening", "turn"):
            if problem := _problem_of(getattr(self, field)):
                yield field, problem
        if self.chat is not None:
            yield from self._problems_of_chat()

    def _problems_of_chat(self) -> Iterator[tuple[str, str]]:
        fields = type(self).model_fields
        for field, text in (("opening", "'{observation}\\nYour task is to: {task}'"), ("turn", "'{observation}'")):
            if getattr(self, field) == fields[field].default:
                yield (
                    field,
                    f"its default is for agents that are trained here; with chat, say what the user says, such as {text}",
                )
        if self.action_end != fields["action_end"].default:
            yield "action_end", "with chat, the tokenizer's template says what ends an action: leave it out"
        if self.chat is not None and self.chat.thinking and self.thought_end is None:
            yield "thought_end", "chat.thinking lets the model think: say what ends its thoughts, such as '</think>'"


DEFAULT_TRANSCRIPT_TOKENS = 16_384
"""Tokens that a transcript may have where neither the recipe nor the model sets a limit."""
TRAINED_TRANSCRIPT_TOKENS = 4096
"""Those of an agent that is trained here, where the recipe does not say it."""


class Agent(Section):
    """The float LLM: trained here from nothing (`training`) or brought along (`pretrained`), and then perhaps fine-tuned here
    (`finetune`)."""

    pretrained: Pretrained | None = None
    training: Training | None = None
    finetune: Finetune | None = Field(
        None,
        exclude_if=_unset,
        description="how the pretrained LLM learns the benchmark first; without it, it acts as it is",
    )
    prompt: Prompt = Field(default_factory=Prompt)
    action: Literal["generate", "score"] = Field(
        "generate", description="generate the action, or score the admissible ones"
    )
    temperature: Annotated[float, Field(ge=0.0), at_most(100.0, "it would draw at random")] = Field(
        0.0, description="acting temperature; 0 is greedy"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        exclude_if=_unset,
        description="what the model computes in when it acts, at every precision; by default float32 on a CPU, bfloat16 on a GPU."
        " bfloat16 halves what a pass reads; it is slow on a CPU without AMX or AVX512-BF16",
    )
    max_transcript_tokens: Count | None = Field(
        None,
        exclude_if=_unset,
        description="tokens that a transcript may have; an episode that outgrows it is lost. By default what the model has"
        " positions for, up to 16,384 (4,096 for an agent that is trained here). Memory is taken as it is used",
    )

    @property
    def imitation(self) -> Imitation | None:
        """How it learns from the expert here; None where it acts as it was brought."""
        return self.training or self.finetune

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.action == "score" and self.prompt.thought_end is not None:
            yield "action", "an agent that thinks first must generate its actions"
        unknown = {"steps_left", "admissible_commands"} & placeholders(self.prompt.opening)
        if self.imitation is not None and self.imitation.looks_per_update and unknown:
            yield (
                f"{'training' if self.training else 'finetune'}.looks_per_update",
                f"looks know no {{{min(unknown)}}}, which prompt.opening names: set it to 0",
            )
        default = DEFAULT_TRANSCRIPT_TOKENS if self.training is None else TRAINED_TRANSCRIPT_TOKENS
        room = self.max_transcript_tokens or default
        if self.prompt.max_action_tokens >= room:
            yield (
                "prompt.max_action_tokens",
                f"{self.prompt.max_action_tokens:,}, but a transcript may have {room:,} tokens: set it lower, or"
                " agent.max_transcript_tokens higher",
            )
        if self.training is not None and self.prompt.chat is not None:
            yield "prompt.chat", "the tokenizer of an agent that is trained here has no chat template: leave it out"
        if self.training is not None and self.prompt.page is not None and self.prompt.page.separator is not None:
            yield (
                "prompt.page.separator",
                "the tokenizer of an agent that is trained here knows pages with ' [SEP] ' alone: leave it out",
            )
        if (self.pretrained is None) == (self.training is None):
            yield "", "give exactly one of 'pretrained' and 'training'"
        if self.finetune is not None and self.pretrained is None:
            yield (
                "finetune",
                "there is no 'pretrained' LLM to fine-tune; an agent that is trained from nothing has 'training'",
            )
        if 0 < self.temperature < 1e-3:
            yield "temperature", f"{self.temperature} divides logits by next to nothing; 0 is greedy"


class Rung(Section):
    """One rung of the precision ladder."""

    name: Name = Field(description="of the folder, and in reports: always_NAME")
    weights: Literal["float", "int8", "int4", "int3", "int2"] = Field(description="of the linear layers")
    activations: Literal["none", "int8"] = Field("none", description="int8: inputs of linear layers are rounded too")
    keep_float: tuple[Text, ...] = Field(
        ("lm_head",), max_length=1000, description="modules left in float, as glob patterns of module names"
    )
    ranges: Literal["mse"] | None = Field(
        None,
        exclude_if=_unset,
        description="of int4, int3 and int2: what a group's integers span. Without it, quanto's choice, from the group's least"
        " weight to its greatest (min-max); mse: the part of that with the least squared error (both: Nagel et al., 2021, 3.1)",
    )
    rounding: Literal["gptq"] | None = Field(
        None,
        exclude_if=_unset,
        description="of int4, int3 and int2: which integer a weight gets. Without it, the nearest one; gptq: the one that keeps"
        " the layer's outputs on calibration episodes (Frantar et al., 2023), see precisions.gptq",
    )
    head: Literal["int8", "int4", "int3"] | None = Field(
        None,
        exclude_if=_unset,
        description="the head's own precision, whatever keep_float says of it; int4 and int3 as `ranges` and `rounding` have it;"
        " a tied head is untied: the input embedding is a lookup, and stays in float. Of a small LLM with"
        " many tokens the head is a third of what a pass reads",
    )
    checkpoint: Pretrained | None = Field(
        None,
        exclude_if=_unset,
        description="the agent's own model as somebody else quantized it: folder or pinned hub id of a GPTQ or AWQ checkpoint, or"
        " a .gguf file. `weights` then says how many bits it has; nothing is quantized here",
    )

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
                        f"rung {self.name!r}: its weights are imported from {_shown(self.checkpoint.model)}: leave out {name}",
                    )
        for pattern in self.keep_float:
            if not _PATTERN.fullmatch(pattern):
                yield (
                    "keep_float",
                    f"rung {self.name!r}: {_shown(pattern)} is no pattern of module names, such as lm_head or *.down_proj",
                )
            elif not re.search("[a-z0-9]", pattern):
                yield "keep_float", f"rung {self.name!r}: {_shown(pattern)} fits every module, so nothing is quantized"


_PATTERN = re.compile(r"(?:[\w.*?]|\[!?\w[\w-]*\])+", re.ASCII)
"""A glob of module names whose brackets are closed."""
_BITS = {"float": 32, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
GROUPED = ("int4", "int3", "int2")
"""Weights with a scale and a shift for each group of them."""


_AUTO, _NAMED = "(auto)", "(named)"
"""The two forms of a route; pydantic puts these into the places of errors, where brackets tell them from keys."""


class Gptq(Section):
    """What GPTQ is calibrated on: the expert's episodes of games of agent_train."""

    episodes: Count = Field(16, description="games of agent_train; all of them where there are fewer")
    tokens: Count | None = Field(
        None, exclude_if=_unset, description="tokens of them in all, the first ones; all of them by default"
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
        Annotated[Literal["auto"], Tag(_AUTO)]
        | Annotated[tuple[str, ...], Field(min_length=2, max_length=50), Tag(_NAMED)],
        Discriminator(lambda value: _AUTO if isinstance(value, str) else _NAMED),
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
        exclude_if=_unset,
        description="validation games after which a rung of neither `route` nor `pair` plays no more if a dearer one has beaten"
        " it on them: at no more cost, and with intervals of success that lie apart. A hopeless precision wanders to the step"
        " limit, and takes longest to measure. By default all rungs play all games",
    )
    gptq: Gptq | None = Field(
        None, exclude_if=_unset, description="how rungs with `rounding: gptq` are made; by default as its keys have it"
    )
    speculative: Speculative | None = Field(
        None,
        exclude_if=_unset,
        description="how a cheaper precision drafts where a dearer one checks; by default as its keys have it",
    )
    prompt_lookup: PromptLookup | None = Field(
        None,
        exclude_if=_unset,
        description="what every precision writes is looked up in the transcript first, and costs as many passes as it then takes;"
        " without it, a pass a token. The unit of cost is an episode at a pass a token all the same",
    )
    kernels: Literal["low_bit"] | None = Field(
        None,
        exclude_if=_unset,
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
        if self.gptq is not None and all(rung.rounding is None for rung in self.ladder):
            yield "gptq", "no rung has `rounding: gptq`; give one of them that, or leave this out"
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
                yield field, f"{_shown(rung_name)} is not on the ladder {names}"
        places = [names.index(rung_name) for rung_name in routed if rung_name in names]
        for i, j in pairwise(places):
            if i >= j:
                yield field, f"{names[j]!r} has to be below {names[i]!r}; the ladder is highest first: {names}"

    @property
    def fallback(self) -> tuple[str, str]:
        """What is routed between where `route: auto` finds nothing."""
        return self.pair or (self.ladder[0].name, self.ladder[-1].name)


def _in_order(field: str, bounds: tuple[float, float]) -> Iterator[tuple[str, str]]:
    if not bounds[0] < bounds[1]:
        yield field, f"{list(bounds)}: the first is the lower bound, the second the upper one"


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


class Consequences(Section):
    """Labels by consequence, ours: at steps where the precisions' greedy actions differ, both are played on to the end."""

    continuation: Literal["low", "high", "mixed"] = Field(
        "low",
        description="who goes on: the cheapest routed rung, the dearest, or all, each step drawn by equal chances",
    )
    games: Count | None = Field(None, description="of router_train, the first ones; all by default")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="of the steps where actions differ, drawn at random; each counts for as many as it stands for"
    )
    seed: Seed = Field(0, description="of these draws, and of a mixed continuation")


class Sensitivity(Section):
    """Labels. The paper's label is KL >= tau; direction, tokens, teacher forcing and tau are ours to choose."""

    direction: Literal["high_low", "low_high", "js"] = Field(
        "high_low", description="KL(high||low), KL(low||high), or Jensen-Shannon"
    )
    tokens: Literal["action", "command"] = Field(
        "action",
        exclude_if=lambda tokens: tokens == "action",
        description="ours: what a divergence is summed over, all of the action or only what follows its thought. A long"
        " thought's sum measures its length more than the step's risk: command is for LLMs that think at length",
    )
    tau: Annotated[float, Field(gt=0), at_most(1000.0, "no step's divergence is larger")] | None = Field(
        None, description="absolute threshold in nats"
    )
    quantile: Ratio | None = Field(
        None,
        description="threshold as a quantile of the KL over all steps, each with every cheaper routed rung; at 0 or 1 there"
        " would be a single class",
    )
    won_only: bool = Field(
        False,
        description="ours: only steps of episodes that were won can be sensitive. In a lost episode the precisions diverge"
        " the most, but high precision no longer helps there",
    )
    consequences: Consequences | None = Field(
        None,
        exclude_if=_unset,
        description="swap the precision of single steps of the trajectories and play on, for `kl_router.target: consequence`;"
        " it takes much longer than the divergences",
    )
    label_share: tuple[Share, Share] = Field(
        (0.02, 0.6), description="bounds for the share of sensitive steps; outside them the check fails"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.tau is None) == (self.quantile is None):
            yield "", "give exactly one of 'tau' and 'quantile'"
        yield from _in_order("label_share", self.label_share)


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
        exclude_if=_unset,
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
        exclude_if=_unset,
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
    encoder: Encoder | None = Field(None, exclude_if=_unset)
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
        exclude_if=_unset,
        description="share of the games that are not trained on: the epoch whose loss is least there is kept (early stopping)",
    )
    validation_games: Count = Field(description="validation games for Platt scaling and for the closed-loop threshold")
    target_ratio: Ratio = Field(
        description="high-precision ratio on validation games at most, to which the threshold is calibrated in closed loop"
    )
    force_search: bool = Field(
        False,
        exclude_if=_unset,
        description="WebShop: high precision at every step whose page has a search bar, without asking the router, if the mean"
        " divergence of the labelled searches is at least tau; the paper's special case, as far as it is known",
    )
    seed: Seed = Field(0, description="of the weights and of the episodes' order")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.estimator != "r_learner" and self.target != "advantage":
            yield "estimator", f"is of advantages, but target is {self.target!r}; leave it out"
        if self.agreeing_weight != 1 and self.target != "consequence":
            yield "agreeing_weight", f"is of consequences, but target is {self.target!r}; leave it out"


class GrpoBudget(Section):
    """What stage 2 may spend; the price is solved for, by dual ascent: it rises by an update as long as more is spent."""

    ratio: Ratio | None = Field(
        None,
        description="mean spend of all steps, with two rungs the high-precision ratio; then lambda prices that in place of cost",
    )
    cost: Annotated[float, Field(gt=0.0), at_most(100.0, "nothing costs that much")] | None = Field(
        None, description="mean cost of an episode, in the ladder's unit"
    )
    rate: Annotated[float, Field(gt=0.0), at_most(100.0, "the price would jump between its ends")] = Field(
        0.5,
        description="what lambda rises by in an update for each unit that the update's episodes spent above the budget",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.ratio is None) == (self.cost is None):
            yield "", "give either ratio or cost"


class GrpoRouter(Section):
    """Stage 2: GRPO on success and cost."""

    updates: Count = Field(description="times that new episodes are played and learned from")
    games_per_update: Batch = Field(description="games of router_train an update, a group of episodes each")
    group_size: Annotated[int, Field(ge=2), at_most(10_000, "they are played at once")] = Field(
        description="episodes of one game in a group; with one alone there is nothing to compare"
    )
    iterations: Count = Field(1, description="optimizer steps on the same episodes (GRPO's mu)")
    clip: Ratio = Field(0.2, description="GRPO's epsilon: bounds the importance ratio to 1 - clip and 1 + clip")
    learning_rate: Rate = Field(description="of the optimiser")
    reward: Literal["gated", "difference"] = Field(
        "gated",
        description="gated: success * (1 - cost_weight * cost), ours; difference: success - cost_weight * cost, the paper's",
    )
    cost_weight: Annotated[float, Field(ge=0.0), at_most(100.0, "success would count for nothing")] = Field(
        description="lambda; with a budget, where it starts"
    )
    budget: GrpoBudget | None = Field(
        None, exclude_if=_unset, description="solve lambda for what may be spent, and keep the best weights within that"
    )
    start: Literal["untrained"] | None = Field(
        None,
        exclude_if=_unset,
        description="untrained: new weights in the place of those that stage 1 has learned (an ablation); by default stage 1's",
    )
    branch_groups: Update = Field(
        0,
        exclude_if=_unset,
        description="of games_per_update, those whose group branches at one decision (see router/grpo_groups.py)",
    )
    refills: Update = Field(
        0,
        exclude_if=_unset,
        description="rounds in which groups whose rewards tie are replaced by other games' in an update",
    )
    entropy_weight: Annotated[float, Field(ge=0.0), at_most(100.0, "nothing else would count")] = Field(
        0.0,
        exclude_if=_unset,
        description="added to an episode's reward for each nat of entropy of a decision; keeps the router from collapsing",
    )
    beta: Annotated[float, Field(ge=0.0), at_most(100.0, "the router would stay as it is")] = Field(
        0.0, description="KL penalty to the stage-1 router"
    )
    initial_ratio: Ratio = Field(
        0.4, description="mean routing probability that the tempered stage-1 router starts from"
    )
    validate_every: Count = Field(description="updates between two validations; the best checkpoint is kept")
    validation_games: Count = Field(description="validation games that choose checkpoint and threshold")
    target_ratio: Ratio | None = Field(
        None,
        description="high-precision ratio on validation games at most, to which the threshold is calibrated in closed loop;"
        " without it, the threshold is 0.5",
    )
    seed: Seed = Field(0, description="of the games' order and of the routing decisions")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.reward == "gated" and self.cost_weight > 1:
            yield (
                "cost_weight",
                f"{self.cost_weight}: with the gated reward, a game won at the cost of always-high would be worth less than"
                " a lost one; give at most 1",
            )
        if self.branch_groups > self.games_per_update:
            yield (
                "branch_groups",
                f"{self.branch_groups}: an update has only {self.games_per_update} groups (games_per_update)",
            )
        if self.budget is not None and self.target_ratio is not None:
            yield (
                "target_ratio",
                "leave it out: with a budget of ratio the threshold is calibrated to that",
            )


RuleName = Literal[
    "random",
    "evenly",
    "first",
    "last",
    "stuck",
    "stuck_capped",
    "episode",
    "episode_margin",
    "margin",
    "margin_capped",
    "entropy",
    "entropy_capped",
    "inadmissible",
]
"""Rules that nobody trained (router/rules.py)."""
OracleName = Literal["disagreement", "divergence"]
"""Oracles that a bar decides for (router/oracles.py)."""


class Evaluation(Section):
    random_draws: Annotated[int, Field(gt=0), at_most(10_000, "each plays all test games")] = Field(
        3, description="draws of random routing at each router's ratio"
    )
    confidence_ratio: Ratio = Field(
        0.3,
        description="high-precision ratio at most, to which the confidence cascade is calibrated on validation games",
    )
    confidence_games: Count = Field(60, description="validation games for that")
    budgets: tuple[Ratio, ...] = Field(
        (),
        exclude_if=_unset,
        max_length=50,
        description="high-precision ratios, rising: each router and each rule is set to each of them, at most, on validation"
        " games, and plays the test games there, for the report's curves; without them there are no curves",
    )
    budget_games: Count | None = Field(
        None, exclude_if=_unset, description="validation games for that, the first ones; all of them by default"
    )
    rules: tuple[RuleName, ...] = Field(
        (),
        exclude_if=_unset,
        max_length=50,
        description="rules that get a curve (router/rules.py); all of them by default",
    )
    confidence: Confidence = Field(0.95, description="of the intervals")
    bootstrap: Bootstrap = Field(2000, description="bootstrap resamples, of games")
    seed: Seed = Field(0, description="of random routing, of the resamples, and of actions drawn at a temperature")

    def problems(self) -> Iterator[tuple[str, str]]:
        if any(before >= after for before, after in pairwise(self.budgets)):
            yield "budgets", f"{list(self.budgets)} do not rise"
        for field in ("budget_games", "rules"):
            if getattr(self, field) and not self.budgets:
                yield field, "is for curves: name 'budgets', or leave this out"
        if len(set(self.rules)) != len(self.rules):
            yield "rules", f"{list(self.rules)} are not all different"
        yield from _resamples(self.confidence, self.bootstrap)


def _resamples(confidence: float, bootstrap: int) -> Iterator[tuple[str, str]]:
    needed = math.ceil(round(2 / (1 - confidence), 6))
    if bootstrap < needed:
        yield (
            "bootstrap",
            f"{bootstrap} resamples, but an interval of {confidence} has one beyond its ends from {needed} on",
        )


class Release(Section):
    """When a newly trained router takes the place of the released one. The rule and its numbers are ours."""

    success_margin: Share = Field(
        0.05,
        description="promoted only if the lower bound of the paired difference in success, new minus released, is above"
        " minus this",
    )
    cost_increase: Annotated[float, Field(ge=0.0), at_most(1000.0, "any router would do")] = Field(
        0.0, description="mean cost of an episode may rise by this share of the released router's at most"
    )
    games: Count | None = Field(
        None,
        description="validation games that both play, the next ones at each decision; by default half of them, or as many as the"
        " margin needs; with fewer than it needs nothing is promoted",
    )
    confidence: Confidence = Field(0.95, description="of the interval whose lower bound decides")
    bootstrap: Bootstrap = Field(2000, description="bootstrap resamples, of games")
    seed: Seed = Field(0, description="of the resamples, of the games' order, and of actions drawn at a temperature")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from _resamples(self.confidence, self.bootstrap)


class Retraining(Section):
    """When new trajectories start a retraining. Not part of any hash."""

    min_new_steps: Count = Field(
        2000, description="steps that were ingested since the last sensitivity dataset was made"
    )


class Versioning(Section):
    """What becomes of materialised artifacts besides DVC's cache and `dvc.lock`. Not part of any hash."""

    git: Literal["none", "commit"] = Field(
        "none",
        description="commit: each new entry of dvc.lock also becomes a commit on the branch retrain/<date, UTC>; what is"
        " checked out is never touched",
    )
    remote: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = Field(
        None,
        description="DVC remote over which machines exchange artifacts by hash: a worker pulls the inputs that Dagster's"
        " instance records and pushes what it made; without it all stages work on one data folder",
    )


class Runtime(Section):
    """How a stage runs, not what it computes. Not part of any hash; results on CPU are equal for fixed numbers
    of threads and processes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: Workers = Field(
        1, description="torch threads a process; an LLM is fine-tuned in one process with as many as all of them have"
    )
    processes: Workers = Field(2, description="processes that play episodes at once on a CPU; one on a GPU")
    batch_episodes: Batch = Field(
        64, description="episodes acted on at once in a process; fewer where a GPU runs out of memory"
    )
    reuse_actions: bool = Field(
        True,
        description="look up what a precision does at a transcript that it has met before; false computes it again",
        exclude_if=bool,
    )

    @property
    def all_threads(self) -> int:
        """Of all processes: what one has that works alone."""
        return self.threads * self.processes

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.threads > 1 and self.processes > 1:
            yield "threads", "torch's threads do not survive a fork; give more 'threads' or more 'processes'"


class Recipe(Section):
    name: str
    benchmark: Annotated[SerializeAsAny[Games], BeforeValidator(games_of_a_benchmark)]
    agent: Agent
    precisions: Precisions
    trajectories: Trajectories = Field(default_factory=Trajectories)
    sensitivity: Sensitivity
    kl_router: KlRouter
    grpo_router: GrpoRouter
    evaluation: Evaluation
    release: Release
    retraining: Retraining = Field(default_factory=Retraining)
    versioning: Versioning = Field(default_factory=Versioning)
    runtime: Runtime = Field(default_factory=Runtime)

    def with_step_limit(self, steps: int) -> "Recipe":
        """The same with another one."""
        return self.model_copy(update={"benchmark": self.benchmark.model_copy(update={"step_limit": steps})})


UNHASHED_SECTIONS = frozenset({"retraining", "versioning", "runtime"})
"""Sections that say how a pipeline is run, not what it computes; no stage reads them into its provenance."""


def problems_across(sections: Mapping[str, Section]) -> Iterator[str]:
    """What is wrong between sections that are right by themselves, a line each. Checks of sections that are not given are
    left out."""
    for check in _ACROSS:
        wanted = signature(check).parameters
        if wanted.keys() <= sections.keys():
            yield from check(**{name: sections[name] for name in wanted})


def _games_asked_for(
    benchmark: Games,
    precisions: Precisions,
    kl_router: KlRouter,
    grpo_router: GrpoRouter,
    evaluation: Evaluation,
    release: Release,
    sensitivity: Sensitivity,
) -> Iterator[str]:
    """What a field has by default is as many as there are at most; a number that somebody wrote is meant."""
    asked: list[tuple[str, Section, str, str]] = [
        ("precisions", precisions, "kl_episodes", "validation"),
        ("kl_router", kl_router, "validation_games", "validation"),
        ("grpo_router", grpo_router, "validation_games", "validation"),
        ("grpo_router", grpo_router, "games_per_update", "router_train"),
        ("evaluation", evaluation, "confidence_games", "validation"),
        ("evaluation", evaluation, "budget_games", "validation"),
        ("release", release, "games", "validation"),
    ]
    if precisions.gptq is not None:
        asked.append(("precisions.gptq", precisions.gptq, "episodes", "agent_train"))
    if sensitivity.consequences is not None:
        asked.append(("sensitivity.consequences", sensitivity.consequences, "games", "router_train"))
    for name, section, field, split in asked:
        wanted, there = getattr(section, field), getattr(benchmark.splits, split)
        if field in section.model_fields_set and wanted is not None and wanted > there:
            yield f"{name}.{field}: {wanted:,} games, but benchmark.splits.{split} has {there:,}"


def _behaviour_on_the_route(precisions: Precisions, trajectories: Trajectories) -> Iterator[str]:
    if precisions.route == "auto":
        if trajectories.behaviour:
            yield "trajectories.behaviour: which rungs are routed is not known with precisions.route: auto; leave it out"
        return
    for i, policy in enumerate(trajectories.behaviour):
        for rung in policy.shares:
            if rung not in precisions.route:
                yield f"trajectories.behaviour.{i}.shares: {_shown(rung)} is none of precisions.route {list(precisions.route)}"


def _reference_model(kl_router: KlRouter, grpo_router: GrpoRouter) -> Iterator[str]:
    model = kl_router.model
    if grpo_router.beta and (model.probe or model.encoder):
        kind = "a probe" if model.probe else "an encoder"
        yield f"grpo_router.beta: trl reloads the reference as a causal LM, which {kind} is not; set it to 0"


def _greedy_features(agent: Agent, kl_router: KlRouter) -> Iterator[str]:
    """What is recorded of drafts and margins for training is of greedy actions."""
    greedy = agent.action == "generate" and agent.temperature == 0
    probe = kl_router.model.probe
    wanted = [name for name in (probe.features if probe else ()) if name not in ("repeats", "behind")]
    if wanted and not greedy:
        yield (
            f"kl_router.model.probe.features: {wanted[0]!r} is learned from greedy actions; set agent.action to generate and"
            " agent.temperature to 0, or leave it out"
        )


def _swapped_steps(agent: Agent, sensitivity: Sensitivity, kl_router: KlRouter) -> Iterator[str]:
    if kl_router.target == "consequence" and sensitivity.consequences is None:
        yield "kl_router.target: consequence needs steps that were swapped: give sensitivity.consequences too"
    if sensitivity.consequences is not None and agent.temperature > 0:
        yield "sensitivity.consequences: where actions are drawn no outcome is due to one step; set agent.temperature to 0"


def _thoughts_of_looks(benchmark: Games, agent: Agent) -> Iterator[str]:
    thinks = agent.prompt.thought_end is not None
    teaches_thoughts = benchmarks.find(benchmark.environment).demonstrations_think
    if teaches_thoughts and agent.imitation and agent.imitation.looks_per_update and not thinks:
        yield f"agent: the looks of {benchmark.environment} teach thoughts, so they need 'prompt.thought_end'"


def _forced_searches(benchmark: Games, kl_router: KlRouter) -> Iterator[str]:
    if kl_router.force_search and "search" not in benchmarks.find(benchmark.environment).step_kinds:
        yield f"kl_router.force_search: nothing is searched in {benchmark.environment}; leave it out"


def _short_games(agent: Agent) -> Iterator[str]:
    imitation = agent.imitation
    if imitation and imitation.short_until and imitation.short_steps < 3:
        where = "training" if agent.training else "finetune"
        yield f"agent.{where}.short_steps: {imitation.short_steps}, but no game can be won in fewer than 3 steps"


def _probe_layers(agent: Agent, kl_router: KlRouter) -> Iterator[str]:
    if agent.training is None or kl_router.model.probe is None:
        return
    layers, there = kl_router.model.probe.layers, agent.training.architecture.layers
    if max(layers, default=0) > there:
        yield f"kl_router.model.probe.layers: {list(layers)}, but the agent has {there}"


def _drafts_of_commands(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if agent.action == "score":
        for name, section in (("speculative", precisions.speculative), ("prompt_lookup", precisions.prompt_lookup)):
            if section is not None:
                yield f"precisions.{name}: with agent.action: score nothing is written, so nothing is drafted; leave it out"


def _kernels_of_bfloat16(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if precisions.kernels is not None and agent.dtype != "bfloat16":
        yield "precisions.kernels: low-bit kernels compute with bfloat16: set agent.dtype to that, or leave kernels out"


def _kept_in_float(agent: Agent, precisions: Precisions) -> Iterator[str]:
    if agent.training is None:
        return
    layers = agent.training.architecture.linear_layers()
    for rung in precisions.ladder:
        if rung.weights == "float":
            continue
        where = f"precisions.ladder: rung {rung.name!r}: keep_float"
        for pattern in rung.keep_float:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                yield f"{where}: {_shown(pattern)} fits no linear layer of the agent, which has {layers[0]}, {layers[1]} ..."
        if all(any(fnmatchcase(layer, pattern) for pattern in rung.keep_float) for layer in layers):
            yield f"{where}: {list(rung.keep_float)} leave every linear layer in float, so nothing is quantized"


_ACROSS: tuple[Callable[..., Iterator[str]], ...] = (
    _games_asked_for,
    _behaviour_on_the_route,
    _reference_model,
    _greedy_features,
    _swapped_steps,
    _thoughts_of_looks,
    _forced_searches,
    _short_games,
    _probe_layers,
    _drafts_of_commands,
    _kernels_of_bfloat16,
    _kept_in_float,
)
"""Their parameters are the sections that they look at."""

NAME_RULE = "small letters, digits, '.', '_' and '-', a letter or digit first, at most 100, and no number"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_LIKE_A_NUMBER = re.compile(r"[0-9][0-9_.]*(?:e[0-9]+)?|0[box][0-9a-f_]+")
"""YAML would read such a name as a number, and DVC then look for another recipe."""
_TAKEN = frozenset({"incoming", "official"})
"""Folders of `data/` beside those of the recipes."""


def is_recipe_name(name: str) -> bool:
    """Does a recipe or its file's stem go by the rule? What does is safe as part of a path, a command and a YAML text."""
    return bool(_NAME.fullmatch(name)) and not _LIKE_A_NUMBER.fullmatch(name) and name not in _TAKEN


def load_recipe(name: str, folder: Path = RECIPE_FOLDER) -> Recipe:
    """Read `<folder>/<name>.yaml`.

    Raises:
        UserError: there is no such recipe, or it is malformed; the message names the file, the key and what to do. Where
            there is more than one problem it names the first, and the command that shows all.
    """
    recipe, problems = check_recipe(name, folder)
    if recipe is None:
        more = len(problems) - 1
        rest = f" (and {more} more: `dmr recipe check {name}` shows all)" if more else ""
        raise UserError(problems[0] + rest)
    return recipe


def check_recipe(name: str, folder: Path = RECIPE_FOLDER) -> tuple[Recipe | None, list[str]]:
    """The recipe, or None and everything that is wrong with it: a line each, of file, key, what to do and what is there."""
    if not is_recipe_name(name):
        known = ", ".join(recipe_names(folder)) or "none"
        return None, [f"{_shown(name)} can be no recipe's name: {NAME_RULE} (known recipes: {known})"]
    path = folder / f"{name}.yaml"
    if not path.exists() and not path.is_symlink():
        known = ", ".join(recipe_names(folder)) or "none"
        return None, [f"unknown recipe {name!r}: there is no {path} (known recipes: {known})"]
    try:
        content = {"name": name, **read_mapping(path)}
    except UserError as error:
        return None, [str(error)]
    if content["name"] != name:
        return None, [f"{path}: its name is {_shown(content['name'])}, but the file is called {name!r}"]
    recipe, errors = None, list[ErrorDetails]()
    try:
        recipe = Recipe.model_validate(content)
        sections: dict[str, Section] = dict(recipe)
    except ValidationError as error:
        sections, errors = _read_sections(content, error)
    problems = [line for e in errors for line in _lines(e)] + list(problems_across(sections))
    return (None if problems else recipe), [f"{path}: {problem}" for problem in problems]


def _read_sections(content: Mapping[str, Any], error: ValidationError) -> tuple[dict[str, Section], list[ErrorDetails]]:
    """The sections that are right, each by itself, and everything that is wrong with the others and with the whole."""
    readers = _section_readers()
    sections: dict[str, Section] = {}
    # Of the whole: sections that are missing, keys that are none. What is misspelt explains what is missing: it comes first.
    errors = [e for e in error.errors() if not e["loc"] or e["loc"][0] not in readers.keys() & content.keys()]
    for name in readers.keys() & content.keys():
        try:
            sections[name] = readers[name].validate_python(content[name])
        except ValidationError as found:
            errors += [{**e, "loc": (name, *e["loc"])} for e in found.errors()]
    rank = {name: place for place, name in enumerate(Recipe.model_fields)}
    errors.sort(key=lambda e: (e["type"] != "extra_forbidden", rank.get(str(e["loc"][0]) if e["loc"] else "", -1)))
    return sections, errors


@cache
def _section_readers() -> dict[str, TypeAdapter[Section]]:
    hints = get_type_hints(Recipe, include_extras=True)
    return {name: TypeAdapter(hints[name]) for name in Recipe.model_fields if name != "name"}


def _lines(error: ErrorDetails) -> Iterator[str]:
    """One a problem; the path is that of the YAML text."""
    loc = [part for part in error["loc"] if part not in (_AUTO, _NAMED)]
    if error["type"] == "problems":
        for field, text in error["ctx"]["problems"]:
            yield f"{'.'.join([*map(_key, loc), *([field] if field else [])])}: {short(text)}"
        return
    if error["type"] == "unknown_benchmark":
        said = error["ctx"]
        yield f"benchmark.environment: Input should be one of {said['known']} (it is {_shown(said['name'])})"
        return
    given = "" if error["type"] in ("missing", "extra_forbidden") else f" (it is {_shown(error['input'])})"
    yield f"{'.'.join(map(_key, loc)) or 'recipe'}: {short(error['msg'])}{given}"


def _key(part: int | str) -> str:
    return short(reprlib.repr(part) if not isinstance(part, str) else part[:60])


def _shown(value: object) -> str:
    """A value from a file in a few characters."""
    return printable(reprlib.repr(value))


def recipe_names(folder: Path = RECIPE_FOLDER) -> list[str]:
    """Names of all recipes, sorted. Other files called *.yaml are passed over, with a warning that names them."""
    names = []
    for path in folder.glob("*.yaml"):
        if is_recipe_name(path.stem) and path.is_file():
            names.append(path.stem)
        else:
            _warn_of(path)
    return sorted(names)


@cache
def _warn_of(path: Path) -> None:
    """Once, since commands list the recipes many times."""
    why = "is no file" if is_recipe_name(path.stem) else f"is not called as a recipe may be ({NAME_RULE})"
    log.warning("%s is passed over: it %s", printable(path), why)
