"""Section `agent`: the LLM, how it is trained, and what it is shown."""

from collections.abc import Iterator
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field

from dmr_pipeline.recipe.fields import Batch, Count, EndText, Rate, Section, Seed, Share, Text, Update, at_most, unset
from dmr_pipeline.recipe.model import Architecture, Lora, Pretrained
from dmr_pipeline.recipe.text import shown


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
        exclude_if=unset,
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
                f"{shown('{' + written + '}')} is no placeholder: there are {there}; write a brace that is meant as such twice,"
                f" {shown('{{' + written + '}}')}"
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
        exclude_if=unset,
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
        exclude_if=unset,
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
        exclude_if=unset,
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
        exclude_if=unset,
        description="what the model computes in when it acts, at every precision; by default float32 on a CPU, bfloat16 on a GPU."
        " bfloat16 halves what a pass reads; it is slow on a CPU without AMX or AVX512-BF16",
    )
    max_transcript_tokens: Count | None = Field(
        None,
        exclude_if=unset,
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
