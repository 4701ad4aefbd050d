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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmr_pipeline.errors import UserError
from dmr_pipeline.serve.local import Turn

TASK = re.compile(r"\s*Your task is to: *(?P<task>[^\n]+?)\.? *(?:\n|$)")
GOAL = re.compile(r"Instruction: *(?:\[SEP\])? *(?P<task>.+?) *(?:\[SEP\]|\n|$)")
"""WebShop's, which stays on its pages."""
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
    found = TASK.search(opening) or next(filter(None, map(TASK.search, before)), None) or GOAL.search(opening)
    task = task or (found["task"] if found else None)
    if not task and needs_task:
        raise UserError(
            "no task: send metadata.task, or a line `Your task is to: ...` in the first user message or the system message"
        )
    opening = TASK.sub("\n", opening).strip()
    if not opening:
        raise UserError("messages: the first user message holds no observation")
    observations[0] = opening
    begun = json.dumps([before, observations[0], task]).encode()
    past = tuple(Turn(seen, *deed) for seen, deed in zip(observations, done, strict=False))
    return Conversation(task or "", past, observations[-1], hashlib.sha256(begun).hexdigest()[:32])


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
        written = [f"{function['name']}({function['arguments']})" for function in called]
    except (KeyError, TypeError) as error:
        raise UserError(
            'messages: tool_calls is to be a list of {"function": {"name": ..., "arguments": ...}}'
        ) from error
    return "\n".join(filter(None, [text_of(message), *written]))
