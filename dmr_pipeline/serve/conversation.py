"""Chat messages as the transcript of an episode.

    system, developer   nothing but the task, where it says `Your task is to: ...`: the recipe's prompt has its own words around
                        texts, a system message among them where it has one
    first user          the first observation; a line `Your task is to: ...` in it is the task, and so is what WebShop's page
                        says; ALFWorld's welcome is left out
    assistant           a command, as it was answered; its thought, where there is one, in `reasoning_content`
    user, tool          what the command showed

So the tokens that the agents read are those of the recipe's own templates (`agent.prompt`), as in its training and its rollouts,
and not those of the tokenizer's chat template.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmr_pipeline.errors import UserError
from dmr_pipeline.serve.local import Turn

TASK = "Your task is to:"
GOAL = "Instruction:"
"""WebShop's, which stays on its pages."""
SEPARATOR = "[SEP]"
"""WebShop's, between the parts of a page."""
WELCOME = re.compile(r"^\s*-= Welcome to TextWorld, ALFRED! =-\s*")


@dataclass(frozen=True)
class Conversation:
    task: str
    """The instruction sentence."""
    past: tuple[Turn, ...]
    observation: str
    """What is to be acted on."""
    fingerprint: str
    """Of what the conversation begins with: 32 hexadecimal digits."""


def read_conversation(
    messages: Sequence[Mapping[str, Any]], task: str | None = None, needs_task: bool = True
) -> Conversation:
    """
    Args:
        task: the instruction, where the request says it apart from the messages.
        needs_task: whether there has to be one; else it may be empty.

    Raises:
        UserError: they are no turns of an environment and an agent, or there is no task.
    """
    before = [text_of(message) for message in messages if message.get("role") in ("system", "developer")]
    turns = [message for message in messages if message.get("role") not in ("system", "developer")]
    shown: list[list[str]] = [[]]
    done: list[tuple[str, str]] = []
    for message in turns:
        match message.get("role"):
            case "user" | "tool" | "function":
                shown[-1].append(text_of(message))
            case "assistant" if shown[-1]:
                done.append((command_of(message), str(message.get("reasoning_content") or "")))
                shown.append([])
            case "assistant":
                raise UserError("messages: two of the assistant's in a row, or one before any observation")
            case role:
                raise UserError(f"messages: {role!r} is no role (system, user, assistant or tool)")
    if not shown[-1]:
        raise UserError("messages: the last one is to be the user's, with what the environment shows")
    observations = ["\n".join(texts) for texts in shown]
    opening = WELCOME.sub("", observations[0])
    found = next(filter(None, map(task_in, [opening, *before])), None) or goal_in(opening) or ""
    task = task or found.strip()  # as the log takes it: a line may end in \r
    if not task and needs_task:
        raise UserError(
            "no task: send metadata.task, or a line `Your task is to: ...` in the first user message or the system message"
        )
    opening = without_task(opening).strip()
    if not opening:
        raise UserError("messages: the first user message holds no observation")
    observations[0] = opening
    begun = json.dumps([before, observations[0], task]).encode()
    past = tuple(Turn(seen, *deed) for seen, deed in zip(observations, done, strict=False))
    return Conversation(task or "", past, observations[-1], hashlib.sha256(begun).hexdigest()[:32])


def task_in(text: str) -> str | None:
    """What its first line `Your task is to: ...` says, without a full stop."""
    for _, rest in _rests_of_lines(text, TASK):
        if rest:
            said = rest.lstrip(" ") or " "
            return said.rstrip(" ").removesuffix(".") or said[0]
    return None


def without_task(text: str) -> str:
    """With a line break in place of each `Your task is to: ...` and the white space before it."""
    kept, end = list[str](), 0
    for place, rest in _rests_of_lines(text, TASK):
        if rest:
            kept.append(text[end:place].rstrip())
            end = place + len(TASK) + len(rest) + 1
    return "\n".join([*kept, text[end:]])


def goal_in(text: str) -> str | None:
    """What a page of WebShop's asks for."""
    for _, rest in _rests_of_lines(text, GOAL):
        if said := rest.lstrip(" ").removeprefix(SEPARATOR).lstrip(" "):
            return (said[0] + said[1:].partition(SEPARATOR)[0]).rstrip(" ")
    return None


def _rests_of_lines(text: str, mark: str) -> Iterator[tuple[int, str]]:
    """Where a mark stands, and what follows it on its line; marks that follow another one on its line are left out.

    In a time that grows with the text: a regular expression with repeated white space before or after the mark takes that of its
    square, and texts are the clients'.
    """
    place = text.find(mark)
    while place >= 0:
        begin = place + len(mark)
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        yield place, text[begin:end]
        place = text.find(mark, end)


def text_of(message: Mapping[str, Any]) -> str:
    """
    Raises:
        UserError: it holds more than text.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    raise UserError("messages: content is to be text; agents that see pictures are not served")


def command_of(message: Mapping[str, Any]) -> str:
    """What an assistant's message does: its text, or the tools that it calls.

    Raises:
        UserError: it does something else.
    """
    try:
        called = [call["function"] for call in message.get("tool_calls") or []]
        written = [f"{function['name']}({_arguments(function['arguments'])})" for function in called]
    except (KeyError, TypeError) as error:
        raise UserError(
            'messages: tool_calls is to be a list of {"function": {"name": ..., "arguments": ...}}'
        ) from error
    return "\n".join(filter(None, [text_of(message), *written]))


def _arguments(written: Any) -> str:  # noqa: ANN401 - what a client sends
    """As one JSON text: clients (LangChain) read what they are sent, and send it back in their own spacing."""
    try:
        read = json.loads(written) if isinstance(written, str) else written
    except ValueError:
        return str(written)
    return json.dumps(read, ensure_ascii=False)
