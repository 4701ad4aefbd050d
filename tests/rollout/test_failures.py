"""How actions fail is counted, each step in one class at most."""

from collections.abc import Sequence

import pytest

from dmr_pipeline.environments.alfworld.engine import NOTHING, AlfWorldEpisode
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.rollout.batch import Batch
from dmr_pipeline.rollout.failures import FAILURES, PARSE_FAILURES, Failure
from dmr_pipeline.rollout.policy import Draft
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.reading import NOTHING as NO_READING
from dmr_pipeline.rollout.trajectory import Trajectory, warn_of_parse_failures
from tests.helpers.chat_templates import CHATML, templated
from tests.helpers.rollouts import ALL_HIGH, PROMPTER, RUNS, roll
from tests.helpers.texts import generated

CHAT = {"opening": "{observation} {task}", "turn": "{observation}", "chat": {}}


@pytest.mark.parametrize(
    ("prompt", "text", "failure"),
    [
        ({}, "go to desk 1<|im_end|>", None),
        ({}, "go to desk 1<|endoftext|>", "unfinished"),
        ({}, "go to desk 1", "unfinished"),
        ({}, "<|im_end|>", "empty"),
        ({}, " \n<|im_end|>", "empty"),
        ({}, "<|im_start|><|im_end|>", "empty"),
        ({"thought_end": "</think>"}, "A mug.</think>look<|im_end|>", None),
        ({"thought_end": "</think>"}, "look<|im_end|>", "no_thought"),
        ({"thought_end": "</think>"}, "<|im_end|>", "no_thought"),
        ({"thought_end": "</think>"}, "A mug.</think><|im_end|>", "empty"),
        ({"thought_end": "</think>"}, "A mug.</think>look", "unfinished"),
        ({"thought_end": "Action:"}, "Thought: a mug.\nAction: look<|im_end|>", None),
        ({"thought_end": "Action:"}, "Thought: a mug.\nI look<|im_end|>", "no_thought"),
        ({"thought_end": "Action:"}, "Thought: a mug.\nAction:<|im_end|>", "empty"),
    ],
)  # fmt: skip
def test_classes_of_parse_failures(prompt: dict[str, str], text: str, failure: Failure | None) -> None:
    p = Prompter.of(templated("qwen", CHATML), Prompt.model_validate({**CHAT, **prompt, "max_action_tokens": 100}))
    assert p.parse_failure(generated(p, text)) == failure


def test_where_the_end_is_a_text() -> None:
    prompt = Prompt(opening="{task}\n{observation}\nThought:", turn="{observation}\nThought:", thought_end="\nAction:",
                    action_end="\n", max_action_tokens=60)  # fmt: skip
    p = Prompter.of(templated("gpt2", None), prompt)
    found = [
        p.parse_failure(generated(p, text)) for text in (" A mug.\nAction: look\n", " A mug.\nAction: look", " A\n")
    ]
    assert found == [None, "unfinished", "unfinished"]  # what ends an action may stand in a thought


def scripted(monkeypatch: pytest.MonkeyPatch, actions: Sequence[list[int]]) -> Trajectory:
    """An episode of the first game in which these actions are written."""
    script = iter(actions)

    def act(_: object, precision: str, slots: list[int], drafter: str | None = None, ready: object = ()) -> list[Draft]:
        return [Draft(next(script), NO_READING, 1.0) for _ in slots]

    monkeypatch.setattr(Batch, "act", act)
    (trajectory,) = roll(ALL_HIGH, runs=RUNS[:1])
    return trajectory


def test_a_steps_failure_is_what_the_environment_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    episode = RUNS[0].task.episode()
    episode.reset()
    going = next(command for command in episode.admissible_commands() if command.startswith("go to"))
    unfinished = PROMPTER.action("look")[:1] * PROMPTER.prompt.max_action_tokens
    commands = ["look", going, going, "take mug 1 from desk 99"]
    played = scripted(monkeypatch, [*map(PROMPTER.action, commands), unfinished, PROMPTER.action("")])
    assert [step.failure for step in played.steps] == [
        None,
        None,
        "inadmissible",
        "inadmissible",
        "unfinished",
        "empty",
    ]
    assert [step.observation == NOTHING for step in played.steps] == [False, False, True, True, True, True]


def test_a_command_that_does_something_is_none_that_failed_whatever_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As searches in words of one's own, of which WebShop lists one."""
    episode = RUNS[0].task.episode()
    episode.reset()
    going = [command for command in episode.admissible_commands() if command.startswith("go to")][:5]
    monkeypatch.setattr(AlfWorldEpisode, "admissible_commands", lambda _: [])
    played = scripted(monkeypatch, [PROMPTER.action(command) for command in (*going, "look")])
    assert [step.failure for step in played.steps] == [None] * 5 + ["inadmissible"]


def test_commands_that_are_chosen_among_the_admissible_ones_never_fail() -> None:
    assert {step.failure for trajectory in roll(ALL_HIGH, action="score") for step in trajectory.steps} == {None}


def test_what_fails_in_generated_episodes_is_what_shows_nothing() -> None:
    """Of agents that write at random."""
    steps = [step for trajectory in roll(ALL_HIGH) for step in trajectory.steps]
    assert {step.failure for step in steps} <= {None, *FAILURES}
    for step in steps:
        ended = PROMPTER.action_end.token in step.action
        assert (step.failure == "unfinished") == (not ended)
        if ended:
            assert (step.failure is not None) == (step.observation == NOTHING)


def test_many_parse_failures_are_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = PROMPTER.action("look")[:1] * PROMPTER.prompt.max_action_tokens
    look, lost = PROMPTER.action("look"), PROMPTER.action("take mug 1 from desk 99")
    warn_of_parse_failures([scripted(monkeypatch, [look, look, look, lost, lost, lost])], "rung int2")
    warn_of_parse_failures([], "rung int2")
    assert not caplog.messages
    warn_of_parse_failures(
        [scripted(monkeypatch, [look, unfinished, unfinished, PROMPTER.action(""), look, lost])], "rung int2"
    )
    (message,) = caplog.messages
    assert message.startswith(
        "rung int2: many actions are not as agent.prompt wants them, 33% unfinished, 17% empty of the steps"
    )


def test_inadmissible_is_no_parse_failure() -> None:
    assert {*FAILURES} - {*PARSE_FAILURES} == {"inadmissible"}
