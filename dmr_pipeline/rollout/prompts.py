"""The append-only transcript: what the agent has read and done, as token ids.

Every segment is tokenized by itself and appended, so that nothing before it ever changes and caches stay valid. (The sliding
window of verl-agent's prompt would defeat them.) The transcript is also all the history that an agent has, so templates offer
no other. Whether the tokens of appended segments are those of the whole text is tried once, when a `Prompter` is made; so is
whether that text is what the tokenizer's chat template renders, where it is to be.

An action ends with `action_end`, with a token that ends the model's texts (eos), or after `max_action_tokens`; what was
generated stays in the transcript as it is.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import dropwhile, pairwise, takewhile

from transformers import GenerationConfig, PreTrainedTokenizerBase

from dmr_pipeline.environments.base import SEPARATOR
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import Chat, PageView, Prompt, placeholders
from dmr_pipeline.rollout.chat import BY_HAND, rendered, written_out
from dmr_pipeline.rollout.failures import ParseFailure

log = logging.getLogger(__name__)

_SAMPLES = (
    ("You arrive at desk 1. On the desk 1, you see a mug 2.", "put a clean mug in cabinet.", "go to desk 1", "mug 2"),
    (f"Back to Search{SEPARATOR}< Prev{SEPARATOR}$7.99", "find me a red mug", "search[red mug]", "I look for a mug."),
    ("2 mugs (blue) are here!", "7 mugs: find them", "look", "None"),
)
"""Observation, task, command and thought: what segments are tried on."""
_HOSTILE = ("{{ 7 * 7 }} {% raw %} {# <b>&amp;'\"\\n", "{}", "{{bos_token}}", "{%-")
"""The same, of what a template might take for its own."""


@dataclass(frozen=True)
class Moment:
    """What templates may name besides observation and task; None where it is not known."""

    step: int = 1
    """Number of the step that comes next, from 1."""
    steps_left: int | None = None
    """That the episode may still take, the next one included."""
    admissible_commands: Callable[[], Sequence[str]] | None = None


@dataclass(frozen=True)
class End:
    """What ends an action or a thought: a token, or a text that the model writes as it likes."""

    text: str
    token: int | None
    """Where the text is a special token; None where it has to be looked for in the decoded text."""

    def closes(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether it has just been written; to be asked after each token."""
        if self.token is not None:
            return tokens[-1] == self.token
        # A token stands for a byte at least, but for a few that are read as nothing.
        return self.text in _decoded(tokenizer, tokens[-len(self.text.encode()) - 8 :])


@cache
def _say_once(line: str) -> None:
    """In a process, however often a stage loads its tokenizer."""
    log.info(line)


@dataclass(frozen=True)
class Prompter:
    """Turns observations into segments, and generated tokens into commands."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    """Written out, where the recipe's has its turns from the chat template."""
    action_end: End
    thought_end: End | None
    """Of the thought before a command, for agents that think."""
    eos: frozenset[int]
    """Tokens that end the model's texts."""
    bos: tuple[int, ...]
    """What the tokenizer begins texts with, and so the opening."""
    anchor: str = ""
    """A special token that segments are tokenized behind, where the tokenizer treats the beginning of a text in its own way."""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, generation: GenerationConfig | None = None
    ) -> "Prompter":
        """
        Args:
            generation: the model's, which says what ends its texts.

        Raises:
            UserError: the tokenizer does not know what ends an action or a thought, the tokens of appended segments are not
                those of the whole text, or its chat template does not render such transcripts.
        """
        given = prompt
        if given.chat is not None:
            prompt = written_out(tokenizer, given)
            turns = f"opening {prompt.opening!r}, turn {prompt.turn!r}, end {prompt.action_end!r}"
            _say_once(f"the chat template's turns: {turns}")
        own = generation.eos_token_id if generation is not None else None
        eos = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        prompter = cls(
            tokenizer,
            prompt,
            _end(tokenizer, "action_end", prompt.action_end),
            None if prompt.thought_end is None else _end(tokenizer, "thought_end", prompt.thought_end),
            frozenset(eos),
            _bos(tokenizer) if given.chat is None else (),  # a chat template writes its own
        )
        if prompter.thought_end is not None and prompter.thought_end.token in {*eos, prompter.action_end.token} - {
            None
        }:
            raise UserError(
                f"agent.prompt.thought_end: {prompt.thought_end!r} ends the whole action too, so that no command would follow:"
                " choose another end of the thought"
            )
        if prompter.bos:
            begins = tokenizer.decode(list(prompter.bos))
            _say_once(f"transcripts begin with {begins!r}, which this tokenizer begins texts with")
        anchors = [token for token in (tokenizer.eos_token, tokenizer.bos_token) if token is not None]
        tried = [prompter, *(replace(prompter, anchor=anchor) for anchor in anchors)]
        broken = [next(candidate._broken_joints(), None) for candidate in tried]
        if None not in broken:
            raise UserError(f"agent.prompt: {broken[-1]}")
        prompter = tried[broken.index(None)]
        if given.chat is not None:
            prompter._refuse_another_conversation(given, given.chat)
        return prompter

    @cached_property
    def named(self) -> set[str]:
        """Placeholders that the templates name."""
        return placeholders(self.prompt.opening) | placeholders(self.prompt.turn)

    @cached_property
    def end_tokens(self) -> list[int]:
        """Those at which an action ends."""
        return sorted({*self.eos, *([] if self.action_end.token is None else [self.action_end.token])})

    def opening(self, observation: str, task: str, moment: Moment = Moment()) -> list[int]:
        text = self._filled(self.prompt.opening, observation, task, moment)
        tokens = self._encode_first(text)
        return tokens if tuple(tokens[: len(self.bos)]) == self.bos else [*self.bos, *tokens]

    def turn(self, observation: str, task: str, moment: Moment = Moment()) -> list[int]:
        return self._encode(self._filled(self.prompt.turn, observation, task, moment))

    def action(self, command: str, thought: str = "") -> list[int]:
        """Tokens of a command, the end included; after a thought, for agents that think."""
        if self.thought_end is not None and self.thought_end.token is None:
            # As one text: what ends the thought may share a token with the command.
            return self._ended(thought + self.thought_end.text + command, self.action_end)
        return [*self.thought(thought), *self._ended(command, self.action_end)]

    def thought(self, text: str) -> list[int]:
        """Tokens of a thought, its end included; none for agents that do not think."""
        return [] if self.thought_end is None else self._ended(text, self.thought_end)

    def is_complete(self, action: list[int]) -> bool:
        """Whether generated tokens end here; to be asked after each one."""
        return len(action) >= self.prompt.max_action_tokens or self._has_end(action)

    def _has_end(self, action: list[int]) -> bool:
        """Whether generated tokens end as an action does, not only for want of room."""
        if action[-1] in self.eos:
            return True
        if not self.action_end.closes(action, self.tokenizer):
            return False
        # A thought may hold a text that would end a command, such as a line break.
        return self.action_end.token is not None or self.action_end.text in self._after_thought(action)

    def thought_length(self, action: list[int]) -> int:
        """Tokens of an action up to the end of its thought, which is included; 0 where there is none."""
        end = self.thought_end
        if end is None:
            return 0
        return next((n for n in range(1, len(action) + 1) if end.closes(action[:n], self.tokenizer)), 0)

    def thought_text(self, action: list[int]) -> str:
        """The thought in generated tokens, without its end; empty where there is none."""
        length, end = self.thought_length(action), self.thought_end
        return (
            ""
            if end is None or not length
            else _decoded(self.tokenizer, action[:length]).partition(end.text)[0].strip()
        )

    def command(self, action: list[int]) -> str:
        """The command in generated tokens: what follows the thought, up to the first end of an action, special token (there a
        model that goes on begins another turn) or line break."""
        if self.action_end.token in action:
            action = action[: action.index(self.action_end.token)]
        if self.action_end.token is not None and (self.thought_end is None or self.thought_end.token is not None):
            if self.thought_end is not None and self.thought_end.token in action:
                action = action[action.index(self.thought_end.token) + 1 :]
            begun = dropwhile(self._marks.__contains__, action)
            command = list(takewhile(lambda token: token not in self._marks, begun))
            text = str(self.tokenizer.decode(command, skip_special_tokens=True))
        else:
            thought = self.thought_end is not None and self._has_thought(action, self.thought_end)
            text = self._after_thought(action) if thought else _decoded(self.tokenizer, action)
            if self.action_end.token is None:
                text = text.partition(self.action_end.text)[0]
            if self._mark_texts:
                marks = map(re.escape, self._mark_texts)
                text = next(filter(str.strip, re.split("|".join(marks), text)), "")
        return re.split(r"[\r\n]", text.strip(), maxsplit=1)[0].strip()

    def command_so_far(self, action: list[int]) -> str:
        """What the command surely begins with, of an action that is being written: nothing while its thought goes on, nor of what
        may be the beginning of its end, or a part of a character."""
        if self.thought_end is not None and not self._has_thought(action, self.thought_end):
            return ""
        text = self.command(action).rstrip("\N{REPLACEMENT CHARACTER}")
        if self.action_end.token is not None and (self.thought_end is None or self.thought_end.token is not None):
            return text
        end = self.action_end.text  # behind nothing but blanks its own have gone with them
        return without_beginning_of(text, [end, end.lstrip(), *self._mark_texts]).rstrip()

    def parse_failure(self, action: list[int]) -> ParseFailure | None:
        """How generated tokens, which `is_complete` let end, fail to be an action as the prompt wants it."""
        if not self._has_end(action):
            return "unfinished"
        if self.thought_end is not None and not self._has_thought(action, self.thought_end):
            return "no_thought"
        return None if self.command(action) else "empty"

    def _has_thought(self, action: list[int], end: End) -> bool:
        return end.text in _decoded(self.tokenizer, action) if end.token is None else end.token in action

    def _after_thought(self, action: list[int]) -> str:
        """What has been written since the thought ended; nothing where it has not."""
        if self.thought_end is None:
            return _decoded(self.tokenizer, action)
        if self.thought_end.token is None:
            return _decoded(self.tokenizer, action).partition(self.thought_end.text)[2]
        ended = self.thought_end.token in action
        return _decoded(self.tokenizer, action[action.index(self.thought_end.token) + 1 :]) if ended else ""

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Special tokens, without the one that stands for unknown words."""
        return (frozenset(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}) | self.eos

    @cached_property
    def _mark_texts(self) -> list[str]:
        """Those of them that the tokenizer has: a config may name an eos that lies beyond its vocabulary."""
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self._marks))
        return [text for text in texts if text is not None]

    def _ended(self, text: str, end: End) -> list[int]:
        return self._encode(text + end.text) if end.token is None else [*self._encode(text), end.token]

    def _filled(self, template: str, observation: str, task: str, moment: Moment) -> str:
        named = placeholders(template)
        values: dict[str, object] = {"task": task, "step": moment.step}
        values["observation"] = observation if self.prompt.page is None else shown(observation, task, self.prompt.page)
        if "steps_left" in named and moment.steps_left is not None:
            values["steps_left"] = moment.steps_left
        if "admissible_commands" in named and moment.admissible_commands is not None:
            values["admissible_commands"] = "\n".join(moment.admissible_commands())
        return template.format_map(values)

    def _encode(self, text: str) -> list[int]:
        if not self.anchor:
            return self._encode_first(text)
        return self._encode_first(self.anchor + text)[1:]

    def _encode_first(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _refuse_another_conversation(self, given: Prompt, chat: Chat) -> None:
        """The template may look at the texts: that it renders these transcripts is tried."""
        said = replace(self, prompt=given)
        for observation, task, command, thought in (*_SAMPLES, _HOSTILE):
            moment = Moment(2, 9, lambda: ("go to desk 1", "search[red mug]"))
            first, later = (said._filled(t, observation, task, moment) for t in (given.opening, given.turn))
            answer = command if self.thought_end is None else thought + self.thought_end.text + command
            whole = rendered(self.tokenizer, chat, [first, answer, later, answer, later])
            action, turn = self.action(command, thought), self.turn(observation, task, moment)
            appended = [*self.opening(observation, task, moment), *action, *turn, *action, *turn]
            if appended != self._encode_first(whole):
                raise UserError(
                    "agent.prompt.chat: the tokens of appended segments are not those of the conversation that the tokenizer's"
                    f" template renders, for {observation!r} and {answer!r}: {BY_HAND}"
                )

    def _broken_joints(self) -> Iterator[str]:
        """Where the tokens of two segments are not those of the two as one text, and what to do."""
        for observation, task, command, thought in _SAMPLES:
            moment = Moment(2, 9, lambda: ("go to desk 1", "search[red mug]"))
            opening, turn = (
                self._filled(t, observation, task, moment) for t in (self.prompt.opening, self.prompt.turn)
            )
            begun = "" if self.thought_end is None else thought + self.thought_end.text
            action = ("the action", begun + command + self.action_end.text)
            for (left, first), (right, second) in pairwise([("opening", opening), action, ("turn", turn), action]):
                encode = self._encode_first if left == "opening" else self._encode
                if encode(first + second) == [*encode(first), *self._encode(second)]:
                    continue
                if first[-1:] in (" ", "\t"):
                    remedy = f"let {left} end without the blank"
                elif second[:1].isspace():
                    remedy = f"let {right} begin without blanks, or move them to the end of {left}"
                else:
                    remedy = "put a special token of the tokenizer or a line break between them"
                yield (
                    f"{left} ends in {first[-12:]!r} and {right} begins with {second[:12]!r}, which this tokenizer joins, so that"
                    f" the tokens of appended segments are not those of the text: {remedy}"
                )


def without_beginning_of(text: str, others: Sequence[str]) -> str:
    """The text without the longest piece at its end that one of these others begins with, and is more than."""
    pieces = (n for other in others for n in range(1, len(other)) if text.endswith(other[:n]))
    return text[: len(text) - max(pieces, default=0)]


def _end(tokenizer: PreTrainedTokenizerBase, field: str, text: str) -> End:
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    if len(tokens) == 1 and tokenizer.get_added_vocab().get(text) == tokens[0]:
        return End(text, tokens[0])
    if text not in (written := _decoded(tokenizer, tokens)):
        raise UserError(f"agent.prompt.{field}: this tokenizer cannot write {text!r}: it becomes {written!r}")
    return End(text, None)


def _bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer.encode("x")[:1] == [bos] else ()


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def shown(observation: str, task: str, page: PageView) -> str:
    """The truncation policy: what an agent reads of an observation.

    Hidden segments of the page are left out, the others cut to their first words, and of these the first ones stay, up to the
    limit for the whole observation. Nothing marks where text was cut; a segment without a word left goes with its separator.
    """
    hidden = {segment.replace("{task}", task) for segment in page.hide}
    left = page.observation_words
    kept = []
    for segment in observation.split(SEPARATOR):
        if not segment or segment in hidden:
            continue
        # Split at blanks alone, so that what is not cut stays as it is.
        words = segment.split(" ")[: page.segment_words][:left]
        if left is not None:
            left -= len(words)
        if words:
            kept.append(" ".join(words))
    return (page.separator or SEPARATOR).join(kept)


def truncation_policy(page: PageView | None) -> str:
    """What `shown` does, in a line for reports."""
    if page is None:
        return "observations are shown in full"
    limits = [f"{page.segment_words} words a segment"] if page.segment_words else []
    limits += [f"{page.observation_words} words in all"] if page.observation_words else []
    policy = f"observations are cut to {' and '.join(limits)}" if limits else "observations are not cut"
    policy += f"; hidden: {', '.join(map(repr, page.hide))}" if page.hide else ""
    return policy + (f"; {page.separator!r} between segments" if page.separator is not None else "")
