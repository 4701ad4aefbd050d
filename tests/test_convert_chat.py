"""The example converter: what it makes of published formats is what ingestion takes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dmr_pipeline.environments.alfworld.benchmark import GeneratedGames
from dmr_pipeline.environments.task_ids import KnownGames
from dmr_pipeline.ingestion.rules import Rules, read_episodes
from dmr_pipeline.ingestion.schema import LoggedEpisode
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.scripts import load_script

SCRIPT = REPOSITORY / "examples" / "convert_chat_trajectories.py"
converter = load_script(SCRIPT)

GAME = "json_2.1.1/train/pick_and_place_simple-Apple-None-SideTable-21/trial_T20190906_182353_418140/game.tw-pddl"
ROOM = "You are in the middle of a room. Looking quickly around you, you see a fridge 1, and a sidetable 1."
TASK = "put some apple on sidetable."
CLOSED, EMPTY = "You arrive at fridge 1. The fridge 1 is closed.", "You open the fridge 1. In it, you see nothing."
RULES = Rules(("pick_and_place_simple",), ("float", "int2"), 50, KnownGames(GeneratedGames, {}))


def conversation(first: str, second: str, agent: str, world: str, who: str, what: str) -> list[dict[str, Any]]:
    turns = [
        (world, "Interact with a household. Reply with Thought and Action."),
        (agent, "OK"),
        (world, f"{ROOM}\n\nYour task is to: {TASK}"),
        (agent, first),
        (world, f"Observation: {CLOSED}"),
        (agent, second),
        (world, f"Observation: {EMPTY}"),
    ]
    return [{who: speaker, what: text} for speaker, text in turns]


REACT = ("Thought: find apple\nAction: go to fridge 1", "Action: open fridge 1")
CALLS = [
    {"role": "system", "content": "You act in a household."},
    {"role": "user", "content": [{"type": "text", "text": f"{ROOM}\n\nYour task is to: {TASK}"}]},
    {"role": "assistant", "content": "find apple",
     "tool_calls": [{"function": {"name": "act", "arguments": '{"command": "go to fridge 1"}'}}]},
    {"role": "tool", "content": CLOSED},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "open", "arguments": {"what": "fridge 1"}}}]},
    {"role": "tool", "content": EMPTY},
]  # fmt: skip
TEXT = f"{ROOM}\nYour task is to: {TASK}\n\n> think: find apple\nOK.\n> go to fridge 1\n{CLOSED}\n> open fridge 1\n{EMPTY}\n"
PRINTED = (
    f"{ROOM}\nYour task is to: {TASK}\nAct 1: think: find apple\nObs 1: OK.\nAct 2: go to fridge 1\nObs 2: {CLOSED}\n"
    f"Act 3: open fridge 1\nObs 3: {EMPTY}\n"
)
BARE = conversation(
    "<think>find apple</think>\ngo to fridge 1", "open fridge 1", "assistant", "user", "role", "content"
)
LOGS = {
    "ETO": [
        {
            "id": 3,
            "game_file": GAME,
            "reward": 0.0,
            "conversations": conversation(*REACT, "gpt", "human", "from", "value"),
        }
    ],
    "AgentGym": [
        {"item_id": GAME, "success": 0, "conversations": conversation(*REACT, "gpt", "human", "from", "value")}
    ],
    "messages": [
        {"task_id": GAME, "won": False, "messages": conversation(*REACT, "assistant", "user", "role", "content")}
    ],
    "tool calls": [{"task_id": GAME, "score": 0, "messages": CALLS}],
    "commands alone": [{"task_id": GAME, "score": 0, "messages": BARE[2:]}],
    "ReAct": TEXT,
    "ReAct, printed": PRINTED,
}


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("layout", ["whole", "lines"])
def test_published_logs_become_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, layout: str
) -> None:
    log, path = LOGS[kind], tmp_path / "log"
    lines = log if isinstance(log, str) else "\n".join(map(json.dumps, log))
    path.write_text(lines if isinstance(log, str) or layout == "lines" else json.dumps(log, indent=2))
    said = ["--task-id", GAME, "--task-type", "pick_and_place_simple", "--success", "false"]
    monkeypatch.setattr(
        sys, "argv", ["convert", str(path), "--precision", "int2", *(said if isinstance(log, str) else [])]
    )
    converter.main()
    (episode,), problems = read_episodes(Path("x.jsonl"), capsys.readouterr().out.encode(), RULES, set())
    assert problems == []
    reward = {"ETO": 0.0, "tool calls": 0.0, "commands alone": 0.0}.get(kind)
    assert episode == LoggedEpisode.model_validate(
        {
            "episode_id": "3" if kind == "ETO" else "log-0",
            "task_id": GAME,
            "task_type": "pick_and_place_simple",
            "task": TASK,
            "observation": ROOM,
            "steps": [
                {"command": "go to fridge 1", "thought": "find apple", "observation": CLOSED, "precision": "int2"},
                {"command": "open fridge 1", "observation": EMPTY, "precision": "int2"},
            ],
            "success": False,
            "reward": reward,
        }
    )


def test_what_the_log_does_not_say_is_named_by_ingestion() -> None:
    ((episode),) = converter.episodes(TEXT)
    _, problems = read_episodes(Path("x.jsonl"), json.dumps(episode).encode(), RULES, set())
    missing = [problem.partition("line 1: ")[2] for problem in problems]
    assert missing == [
        "episode_id: Field required",
        "task_id: Field required",
        "task_type: Field required",
        *(f"steps.{n}.precision: Field required" for n in range(2)),
        "success: Field required",
    ]


def test_a_webshop_page_keeps_its_instruction() -> None:
    page = "WebShop [SEP] Instruction: [SEP] i need a red lamp [SEP] Search"
    turns = [("human", page), ("gpt", "Action: search[red lamp]"), ("human", "Back to Search [SEP] Page 1")]
    log = {"item_id": "webshop_1600", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (episode,) = converter.episodes(json.dumps(log))
    assert episode["task"] == "i need a red lamp"
    assert episode["observation"] == page
    assert [step["command"] for step in episode["steps"]] == ["search[red lamp]"]
