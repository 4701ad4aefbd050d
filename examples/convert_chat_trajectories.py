"""Turns logs of agents that chat into new trajectories, as `dmr trajectories schema` describes them. An example to start from.

    python examples/convert_chat_trajectories.py LOG --precision float > data/new.jsonl
    dmr trajectories validate data/new.jsonl --recipe alfworld-tiny

It reads, told apart by what they hold:
- JSON or JSON lines of conversations with `from` and `value`, as ETO and AgentGym publish theirs;
- the same with `messages` of `role` and `content`, tool calls too, as from OpenAI's interface;
- text as ReAct prints it for ALFWorld: `> command` or `Act 3: command`, its observation below; one episode a file.

An episode's fields beside its turns (`id`, `task_type`, `success`, ...) are taken from the log where it has them, else from the
command line. Nothing is guessed: what is missing is left out, and `dmr trajectories validate` names it.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Turn = tuple[str, str, str]
"""Who speaks ('agent' or 'world'), the agent's thought, and the command or the observation."""

SPEAKERS = {"assistant": "agent", "gpt": "agent", "agent": "agent", "model": "agent"}
NAMES = {
    "episode_id": ("episode_id", "id", "session_id"),
    "task_id": ("task_id", "game_file", "gamefile", "item_id", "session_id", "id"),
    "task_type": ("task_type", "category"),
    "task": ("task", "instruction"),
    "success": ("success", "won"),
    "reward": ("reward", "score"),
}
"""Field of an episode -> what logs call it, the likeliest first."""
ALFWORLD_TYPES = re.compile(
    r"(pick_and_place_simple|look_at_obj_in_light|pick_\w+?_then_place_in_recep|pick_two_obj_and_place)"
)
TASK = re.compile(
    r"\s*Your task is to: *(?P<task>.+?) *(?:\n|$)|Instruction: *(?:\[SEP\])? *(?P<goal>.+?) *(?:\[SEP\]|\n|$)"
)
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
THOUGHT = re.compile(r"\s*Thought(?: \d+)?: *(.*?)\s*(?=Action(?: \d+)?:|$)", re.DOTALL)
ACTION = re.compile(r"(?:^|\n)Action(?: \d+)?: *(?:\n *)?(?P<command>.+?) *(?:\n|$)")
REACT = re.compile(r"^(?:> *|Act(?:ion)? \d+: *)(?P<command>.*)$")


def episodes(text: str) -> Iterator[dict[str, Any]]:
    """The episodes in a log: what it says of each, and its steps."""
    for log in _logs(text):
        if isinstance(log, str):
            yield _episode({}, _react_turns(log))
        else:
            messages = log.get("conversations") or log.get("messages") or log.get("conversation") or []
            yield _episode(log, list(_chat_turns(messages)))


def _logs(text: str) -> list[Any]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        return [json.loads(line) for line in lines] if text.lstrip().startswith("{") else [text]
    return whole if isinstance(whole, list) else [whole]


def _episode(log: dict[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """Args: log: fields beside the turns. turns: the world's and the agent's, in order."""
    begun = next((n for n, (who, _, _) in enumerate(turns) if who == "agent"), len(turns))
    opening = turns[begun - 1][2] if begun else ""
    said: dict[str, Any] = {}
    for field, names in NAMES.items():
        found = [log[name] for name in names if log.get(name) is not None]
        if found:
            said[field] = str(found[0]) if field.endswith("_id") else found[0]
    if "success" in said:
        said["success"] = said["success"] in (True, 1)
    if isinstance(said.get("reward"), (int, float)):
        said.setdefault("success", said["reward"] >= 1)
    task = TASK.search(opening)
    if task is not None:
        said.setdefault("task", task["task"] or task["goal"])
        if task["task"]:
            opening = (opening[: task.start()] + "\n" + opening[task.end() :]).strip()
    kind = ALFWORLD_TYPES.search(said.get("task_id", ""))
    if kind is not None:
        said.setdefault("task_type", kind[1])
    steps = []
    for n in range(begun, len(turns)):
        who, thought, command = turns[n]
        if who == "agent":
            answer = turns[n + 1][2] if n + 1 < len(turns) and turns[n + 1][0] == "world" else ""
            steps.append({"command": command, "thought": thought, "observation": answer})
    return {**said, "observation": opening, "steps": steps}


def _chat_turns(messages: Sequence[dict[str, Any]]) -> Iterator[Turn]:
    """What the agent says before its first action, such as `OK` to its instructions, is no step."""
    acts = any(_speaker(message) == "agent" and _acts(message) for message in messages)
    for message in messages:
        text = _text(message)
        if _speaker(message) == "world":
            yield "world", "", re.sub(r"^Observation(?: \d+)?: *(?:\n *)?", "", text).strip()
        elif message.get("tool_calls"):
            for number, call in enumerate(message["tool_calls"]):
                yield "agent", text.strip() if number == 0 else "", _called(call.get("function", call))
        elif _acts(message) or not acts:
            thoughts = [found[1] for pattern in (THINKING, THOUGHT) if (found := pattern.search(text)) is not None]
            action = ACTION.search(text)
            command = THINKING.sub("", text) if action is None else action["command"]
            yield "agent", "\n".join(thoughts).strip(), command.strip()


def _speaker(message: dict[str, Any]) -> str:
    return SPEAKERS.get(str(message.get("from", message.get("role"))), "world")


def _text(message: dict[str, Any]) -> str:
    content = message.get("value", message.get("content")) or ""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else str(content)


def _acts(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or ACTION.search(_text(message)) is not None


def _called(function: dict[str, Any]) -> str:
    """The command in a call: its only argument, or the tool's name as words, then its arguments."""
    given = function.get("arguments", {})
    arguments = json.loads(given) if isinstance(given, str) else given
    values = [str(value) for value in arguments.values()]
    if list(arguments) in (["command"], ["action"], ["input"]):
        return values[0]
    return " ".join([str(function["name"]).replace("_", " "), *values])


def _react_turns(text: str) -> list[Turn]:
    """A line `> think: ...` is the thought before the next command; the `OK.` below it is nobody's."""
    turns: list[Turn] = []
    thought, shown = "", []

    def see() -> None:
        if turns or any(line.strip() for line in shown):
            turns.append(("world", "", "\n".join(shown).strip()))
        shown.clear()

    thinks = False
    for line in text.splitlines():
        acted = REACT.match(line)
        if acted is None:
            shown.append(re.sub(r"^Obs(?:ervation)? \d+: *", "", line))
            continue
        if thinks:
            shown.clear()
        else:
            see()
        thinks = acted["command"].startswith("think:")
        if thinks:
            thought = f"{thought} {acted['command'].removeprefix('think:').strip()}".strip()
        else:
            turns.append(("agent", thought, acted["command"].strip()))
            thought = ""
    if not thinks:
        see()
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat logs -> JSON lines of new trajectories, on standard output.")
    parser.add_argument("log", type=Path, nargs="+")
    parser.add_argument("--precision", required=True, help="rung of the recipe's ladder that the agent ran in")
    for field in ("task-id", "task-type", "task"):
        parser.add_argument(f"--{field}", help="of all episodes for which the log does not say it")
    parser.add_argument("--success", choices=("true", "false"), help="as above")
    options = parser.parse_args()
    given = {name: value for name in ("task_id", "task_type", "task") if (value := getattr(options, name)) is not None}
    if options.success is not None:
        given["success"] = options.success == "true"
    for path in options.log:
        for number, episode in enumerate(episodes(path.read_text(encoding="utf-8-sig"))):
            for step in episode["steps"]:
                step["precision"] = options.precision
            named = {"episode_id": f"{path.stem}-{number}", **given, **episode}
            sys.stdout.write(json.dumps(named) + "\n")


if __name__ == "__main__":
    main()
