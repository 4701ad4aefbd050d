"""Segments derived from chat templates are what the templates render."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import load_tokenizer
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import Agent, Chat, Prompt
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.prompts import Prompter
from tests.helpers.chat_templates import (
    CHATML,
    GEMMA,
    GEMMA3,
    KEEPS_THOUGHTS,
    LLAMA3,
    LLAMA32,
    MISTRAL,
    QWEN3,
    templated,
)
from tests.helpers.texts import episode_texts
from tests.helpers.tokenizers import Kind

SYSTEM = 'Answer with one command, such as {"go": 1}.'
OPENING, TURN = "{observation}\nYour task is to: {task}", "{observation}"


def prompter(kind: Kind, template: str | None, chat: Chat, **more: str | None) -> Prompter:
    given = {"opening": OPENING, "turn": TURN, **more}
    return Prompter.of(templated(kind, template), Prompt(chat=chat, max_action_tokens=200, **given))


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, system: str | None, texts: list[str], **variables: object
) -> list[int]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **variables)


def test_the_turns_of_chatml() -> None:
    p = prompter("qwen", CHATML, Chat(system="Be short."))
    assert p.prompt.opening == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n{observation}\nYour task is to: {task}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert p.prompt.turn == "\n<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
    assert p.prompt.action_end == "<|im_end|>"
    assert p.action_end.token == p.tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = prompter("qwen", CHATML, Chat())
    assert own.prompt.opening.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n<|im_start|>user\n"
    )


@pytest.mark.parametrize(
    ("kind", "template", "chat", "variables"),
    [
        ("qwen", CHATML, Chat(), {}),
        ("qwen", CHATML, Chat(system=SYSTEM), {}),
        ("qwen", QWEN3, Chat(), {}),
        ("qwen", QWEN3, Chat(system=SYSTEM), {}),
        ("qwen", KEEPS_THOUGHTS, Chat(thinking=False), {"enable_thinking": False}),
        ("llama", LLAMA3, Chat(), {}),
        ("llama", LLAMA3, Chat(system=SYSTEM), {}),
        ("llama", LLAMA32, Chat(system=SYSTEM, date="1 Jan 2025"), {"date_string": "1 Jan 2025"}),
        ("gemma", GEMMA, Chat(), {}),
        ("gemma", GEMMA3, Chat(system=SYSTEM), {}),
    ],
)
@pytest.mark.parametrize("edge", ["", "\n"])
def test_appended_segments_are_the_conversation_that_the_template_renders(
    kind: Kind, template: str, chat: Chat, variables: dict[str, object], edge: str
) -> None:
    p = prompter(kind, template, chat, opening=OPENING + edge, turn=TURN + edge)
    for seed in range(3):
        tokens: list[int] = []
        texts: list[str] = []
        for observation, task, command, _ in episode_texts(seed):
            texts.append((TURN if texts else OPENING).format(observation=observation, task=task) + edge)
            tokens += (p.opening if len(texts) == 1 else p.turn)(observation, task)
            assert tokens == conversation_tokens(p.tokenizer, chat.system, texts, **variables)
            texts.append(command)
            tokens += p.action(command)


def test_thoughts_that_the_template_keeps() -> None:
    p = prompter("qwen", KEEPS_THOUGHTS, Chat(thinking=True), thought_end="</think>")
    tokens = [*p.opening("A mug.", "find it"), *p.action("look", "I look.")]
    texts = ["A mug.\nYour task is to: find it", "I look.</think>look", "A desk."]
    tokens += p.turn("A desk.", "find it")
    assert tokens == conversation_tokens(p.tokenizer, None, texts, enable_thinking=True)


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% raw %}", "{# no #}", "<b>&amp;'\"\\", "{observation} {}"])
def test_what_looks_like_a_template_comes_out_as_it_is(text: str) -> None:
    p = prompter("qwen", CHATML, Chat(system=text))
    said = f"system\n{text}<|im_end|>\n<|im_start|>user\n{text}\nYour task is to: {text}<|im_end|>\n<|im_start|>assistant\n"
    assert p.tokenizer.decode(p.opening(text, text)) == f"<|im_start|>{said}"


@pytest.mark.parametrize(
    ("kind", "template", "chat", "thought_end", "problem"),
    [
        ("qwen", None, Chat(), None, "this tokenizer has no chat template: leave chat out, and write the turns out"),
        (
            "qwen",
            QWEN3,
            Chat(thinking=False, system=SYSTEM),
            None,
            'once others follow (">\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nDeed1" becomes '
            '">\\n<|im_start|>assistant\\nDeed1<|im_end|>\\n<|im_sta"), so that no transcript that only grows is what it'
            " renders: leave"
            " thinking out; or leave chat out",
        ),
        (
            "qwen",
            QWEN3,
            Chat(),
            "</think>",
            'renders earlier turns otherwise once others follow (">\\n<|im_start|>assistant\\nThought</think>Deed1',
        ),
        (
            "gemma",
            GEMMA,
            Chat(system=SYSTEM),
            None,
            "refuses the conversation (System role not supported): leave system out, and say it in opening; or",
        ),
        (
            "llama",
            LLAMA32,
            Chat(),
            None,
            'writes today\'s date (give one that stays, such as date: "26 Jul 2024")',
        ),
        (
            "llama",
            LLAMA32.replace("if not date_string is defined", "if true"),
            Chat(date="1 Jan 2025"),
            None,
            "writes today's date, whatever date says: leave chat out",
        ),
        ("llama", LLAMA3, Chat(date="today"), None, "does not ask for date_string: leave date out; or"),
        ("llama", LLAMA3, Chat(thinking=False), None, "does not ask for enable_thinking: leave thinking out; or"),
        (
            "sentencepiece",
            MISTRAL,
            Chat(system=SYSTEM),
            None,
            "renders earlier turns otherwise once others follow (",
        ),
        (
            "qwen",
            CHATML.replace("'<|im_end|>'", "' <|im_end|>'"),
            Chat(),
            None,
            'goes on with " <|im_end|>\\n<|im_start|>" after the assistant\'s text, which begins with no special token that'
            " could end an action: leave chat out",
        ),
        ("qwen", "{{ messages | length }}", Chat(), None, "does not render each turn's text once: leave chat out"),
        ("qwen", "{{ messages[0].content.x.y }}", Chat(), None, "refuses the conversation ("),
        ("qwen", "{% if %}", Chat(), None, "refuses the conversation ("),
        (
            "qwen",
            CHATML.replace("message['content']", "message['content'].replace('mug', 'cup')"),
            Chat(),
            None,
            "the tokens of appended segments are not those of the conversation that the tokenizer's template renders, for 'You"
            " arrive at desk 1.",
        ),
    ],
)  # fmt: skip
def test_templates_that_no_growing_transcript_follows_are_refused(
    kind: Kind, template: str | None, chat: Chat, thought_end: str | None, problem: str
) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as refused:
        prompter(kind, template, chat, thought_end=thought_end)
    message = str(refused.value)
    assert message.startswith("agent.prompt.chat: ")
    assert len(message.splitlines()) == 1


def test_the_first_remedy_helps() -> None:
    prompter("qwen", QWEN3, Chat(system=SYSTEM))
    prompter("sentencepiece", MISTRAL, Chat())
    prompter("llama", LLAMA32, Chat(date="26 Jul 2024"))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"opening": None},
            "opening: its default is for agents that are trained here; with chat, say",
        ),
        ({"turn": None}, "turn: its default is for agents that are trained here"),
        (
            {"action_end": "<|im_end|>"},
            "action_end: with chat, the tokenizer's template says what ends an action: leave it out",
        ),
        ({"chat": {"thinking": True}}, "thought_end: chat.thinking lets the model think: say what ends its thoughts"),
        ({"chat": {"system": ""}}, "String should have at least 1 character"),
        ({"chat": {"sytem": "x"}}, "Extra inputs are not permitted"),
    ],
)
def test_prompts_that_contradict_their_chat_are_refused_when_they_are_read(
    changed: dict[str, object], problem: str
) -> None:
    given = {"chat": {}, "opening": OPENING, "turn": TURN} | changed
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Prompt.model_validate({field: value for field, value in given.items() if value is not None})


def test_an_agent_that_is_trained_here_has_no_chat_template() -> None:
    training = load_recipe("alfworld-tiny").agent.training
    with pytest.raises(ValidationError, match="an agent that is trained here has no chat template: leave it out"):
        Agent(training=training, prompt=Prompt(chat=Chat(), opening=OPENING, turn=TURN, thought_end="<do>"))


def test_a_prompt_without_chat_is_dumped_as_before() -> None:
    assert "chat" not in Prompt().model_dump(mode="json")
    prompt = Prompt(chat=Chat(), opening=OPENING, turn=TURN)
    assert Prompt.model_validate(prompt.model_dump(mode="json")) == prompt


def test_the_template_goes_with_the_tokenizer_of_the_rungs(tmp_path: Path) -> None:
    first = prompter("qwen", CHATML, Chat(system="Be short."))
    first.tokenizer.save_pretrained(tmp_path)
    prompt = Prompt(chat=Chat(system="Be short."), opening=OPENING, turn=TURN, max_action_tokens=200)
    again = Prompter.of(load_tokenizer(tmp_path), prompt)
    assert again.prompt == first.prompt
    assert again.opening("A mug.", "find it") == first.opening("A mug.", "find it")
