"""Transcripts only grow; an action may hold a thought before its command."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.ingestion.tables import ingested_tables
from dmr_pipeline.recipe.agent import Agent, PageView, Prompt
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout import prompts
from dmr_pipeline.rollout.prompts import Moment, Prompter, shown, truncation_policy
from dmr_pipeline.training.vocabulary import word_tokenizer
from tests.helpers.rollouts import ROUTE
from tests.helpers.texts import episode_texts, generated
from tests.helpers.tokenizers import Kind, chat_tokenizer

TOKENIZER = word_tokenizer(alfworld_texts())


def test_a_thought_is_written_and_is_no_part_of_the_command() -> None:
    thinker = Prompter.of(TOKENIZER, Prompt(thought_end="<do>"))
    action = thinker.action("take mug 1 from cabinet 13", "mug 1")
    assert TOKENIZER.decode(action) == "mug 1 <do> take mug 1 from cabinet 13 <end>"
    assert thinker.command(action) == "take mug 1 from cabinet 13"
    assert thinker.command(action[:-1]) == "take mug 1 from cabinet 13"
    assert thinker.command(TOKENIZER.encode("go to desk 1 <end>")) == "go to desk 1"


def test_without_thoughts_the_action_is_the_command() -> None:
    plain = Prompter.of(TOKENIZER, Prompt())
    assert TOKENIZER.decode(plain.action("look", "mug 1")) == "look <end>"


@pytest.mark.parametrize("prompt", [Prompt(action_end="Action:"), Prompt(thought_end="</think>")])
def test_an_end_that_the_tokenizer_cannot_write_is_refused(prompt: Prompt) -> None:
    with pytest.raises(
        UserError, match=r"agent\.prompt\.\w+: this tokenizer cannot write '(Action:|</think>)': it becomes"
    ):
        Prompter.of(TOKENIZER, prompt)


@pytest.mark.parametrize(("prompt", "eos"), [(Prompt(thought_end="<end>"), None), (Prompt(thought_end="<do>"), "<do>")])
def test_an_end_of_the_thought_that_ends_the_whole_action_is_refused(prompt: Prompt, eos: str | None) -> None:
    generation = GenerationConfig(eos_token_id=TOKENIZER.convert_tokens_to_ids(eos) if eos else None)
    with pytest.raises(UserError, match=r"agent\.prompt\.thought_end: '<(end|do)>' ends the whole action too"):
        Prompter.of(TOKENIZER, prompt, generation)


def test_the_experts_thought_names_what_its_command_is_about() -> None:
    for seed in range(40):
        game, _ = generate_game(seed)
        episode, expert = AlfWorldEpisode(game), ExploringExpert(game.instruction)
        expert.observe(None, episode.reset())
        over = False
        while not over:
            command, thought = expert.act(), expert.think()
            verb = command.split()[0]
            if thought.endswith(" none"):
                assert verb in ("go", "open", "examine")
            elif verb in ("take", "move", "clean", "heat", "cool", "use"):
                assert thought in command
            observation, _, over = episode.step(command)
            expert.observe(command, observation)


RESULTS = (
    "Instruction: [SEP] a red  mug, {please} [SEP] Back to Search [SEP] B01 [SEP] Mug, red and very large [SEP] $7.99"
)
TASK = "a red  mug, {please}"


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        (PageView(), RESULTS),
        (
            PageView(hide=("Instruction:", "{task}", "Back")),
            "Back to Search [SEP] B01 [SEP] Mug, red and very large [SEP] $7.99",
        ),
        (
            PageView(hide=("Instruction:", "{task}"), segment_words=2),
            "Back to [SEP] B01 [SEP] Mug, red [SEP] $7.99",
        ),
        (
            PageView(hide=("Instruction:", "{task}"), segment_words=2, observation_words=4),
            "Back to [SEP] B01 [SEP] Mug,",
        ),
        (PageView(hide=("{task}",), observation_words=4), "Instruction: [SEP] Back to Search"),
        (PageView(hide=("Instruction:", "{task}"), segment_words=2, separator="\n"), "Back to\nB01\nMug, red\n$7.99"),
    ],
)
def test_pages_are_shown_as_the_recipe_says(page: PageView, wanted: str) -> None:
    assert shown(RESULTS, TASK, page) == wanted


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "$1"]), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_what_is_shown_are_the_first_words_of_the_first_segments(
    segments: list[str], segment_words: int, observation_words: int
) -> None:
    page = PageView(segment_words=segment_words, observation_words=observation_words)
    kept = shown(" [SEP] ".join(segments), "task", page).split(" [SEP] ")
    assert all(whole.startswith(part) for whole, part in zip(segments, kept, strict=False))
    may_be_shown = sum(min(segment_words, len(segment.split())) for segment in segments)
    assert sum(len(part.split()) for part in kept) == min(observation_words, may_be_shown)
    assert all(len(part.split()) <= segment_words for part in kept)


def test_a_prompt_shows_pages_through_its_view_in_every_segment() -> None:
    observation = "Instruction: [SEP] take mug 1 [SEP] desk 1 cabinet 2"
    page = PageView(hide=("Instruction:", "{task}"), segment_words=2)
    opening, turn = "<task> {task} <obs> {observation} <act>", "<obs> {observation} <act>"
    viewer = Prompter.of(TOKENIZER, Prompt(opening=opening, turn=turn, page=page))
    assert TOKENIZER.decode(viewer.opening(observation, "take mug 1")) == "<task> take mug 1 <obs> desk 1 <act>"
    assert TOKENIZER.decode(viewer.turn(observation, "take mug 1")) == "<obs> desk 1 <act>"


@pytest.mark.parametrize(
    ("page", "policy"),
    [
        (None, "observations are shown in full"),
        (PageView(hide=("Search",)), "observations are not cut; hidden: 'Search'"),
        (PageView(segment_words=12), "observations are cut to 12 words a segment"),
        (
            PageView(hide=("Search", "{task}"), segment_words=12, observation_words=200),
            "observations are cut to 12 words a segment and 200 words in all; hidden: 'Search', '{task}'",
        ),
        (PageView(separator="\n"), "observations are not cut; '\\n' between segments"),
    ],
)
def test_the_truncation_policy_is_said_in_a_line(page: PageView | None, policy: str) -> None:
    assert truncation_policy(page) == policy


NO_THINKING = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PROMPTS: dict[Kind, Prompt] = {
    "qwen": Prompt(
        opening="<|im_start|>user\n{observation}\nYour task is to: {task}<|im_end|>\n" + NO_THINKING,
        turn="\n<|im_start|>user\n{observation}<|im_end|>\n" + NO_THINKING,
        action_end="<|im_end|>",
    ),
    "llama": Prompt(
        opening="<|start_header_id|>user<|end_header_id|>\n\n{task}\n{observation}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        turn="<|start_header_id|>user<|end_header_id|>\n\n{observation}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        action_end="<|eot_id|>",
    ),
    "gemma": Prompt(
        opening="<start_of_turn>user\n{task}\n{observation}<end_of_turn>\n<start_of_turn>model\n",
        turn="\n<start_of_turn>user\n{observation}<end_of_turn>\n<start_of_turn>model\n",
        action_end="<end_of_turn>",
    ),
    "gpt2": Prompt(
        opening="{task}\nObservation: {observation}\nThought:",
        turn="Observation: {observation}\nThought:",
        thought_end="\nAction:",
        action_end="\n",
        max_action_tokens=60,
    ),
    "sentencepiece": Prompt(
        opening="<|user|>\n{task}\n{observation}</s>\n<|assistant|>\n",
        turn="\n<|user|>\n{observation}</s>\n<|assistant|>\n",
        action_end="</s>",
    ),
}
"""As the models' own chat templates write them, or as ReAct does."""
KINDS = list(PROMPTS)


def prompter(kind: Kind, **changes: object) -> Prompter:
    return Prompter.of(chat_tokenizer(kind), PROMPTS[kind].model_copy(update=changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_segments_are_those_of_the_whole_text(kind: Kind) -> None:
    p, prompt = prompter(kind), PROMPTS[kind]
    for seed in range(5):
        tokens: list[int] = []
        text = ""
        for observation, task, command, thought in episode_texts(seed):
            template = prompt.turn if text else prompt.opening
            tokens += (p.turn if text else p.opening)(observation, task) + p.action(command, thought)
            text += template.format(observation=observation, task=task)
            text += (thought + prompt.thought_end if prompt.thought_end else "") + command + prompt.action_end
        assert tokens == p.tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_agent_writes_is_its_command(kind: Kind) -> None:
    p = prompter(kind)
    action = p.action("go to desk 1", "I look for a mug.")
    assert [n for n in range(1, len(action) + 1) if p.is_complete(action[:n])] == [len(action)] or len(action) > 12
    assert p.command(action) == "go to desk 1"
    assert p.tokenizer.decode(action[p.thought_length(action) :]).strip().startswith("go to desk 1")


@pytest.mark.parametrize("kind", ["llama", "gemma", "sentencepiece"])
def test_the_opening_begins_with_bos_where_the_tokenizer_adds_it(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    prompts._say_once.cache_clear()
    with caplog.at_level("INFO"):
        p = prompter(kind)
        prompter(kind)
    assert caplog.text.count("transcripts begin with") == 1
    bos = p.tokenizer.bos_token_id
    opening = p.opening("You see a mug.", "find it")
    assert opening.count(bos) == 1
    assert opening[0] == bos
    assert p.turn("You see a mug.", "find it").count(bos) == 0
    assert f"transcripts begin with {p.tokenizer.bos_token!r}" in caplog.text
    written_out = prompter(kind, opening=p.tokenizer.bos_token + PROMPTS[kind].opening)
    assert written_out.opening("You see a mug.", "find it").count(bos) == 1


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
def test_other_openings_begin_with_their_template(kind: Kind) -> None:
    assert prompter(kind).bos == ()


@pytest.mark.parametrize(
    ("field", "template", "problem", "remedied"),
    [
        (
            "opening",
            "{task} {observation}\n> ",
            "opening ends in .*> ' and the action .*end without the blank",
            "{task}\n",
        ),
        (
            "turn",
            "{observation}\n> ",
            "turn ends in .*> ' and the action begins with 'go to.*end without the blank",
            "\t>\n",
        ),
        (
            "turn",
            "\n{observation}\n",
            "the action ends in .*1.n' and turn begins with '.nYou .*begin without blanks",
            "a\n",
        ),
        (
            "opening",
            "{task} <p>",
            "opening ends in .*<p>' and the action .*: put a special token of the tokenizer",
            "<p>\n",
        ),
    ],
)
def test_templates_that_the_tokenizer_joins_with_what_follows_are_refused(
    field: str, template: str, problem: str, remedied: str
) -> None:
    prompt = Prompt(opening="{observation} {task}\n", turn="{observation}\n", action_end="\n")
    with pytest.raises(UserError, match=f"^agent.prompt: {problem}"):
        Prompter.of(chat_tokenizer("qwen"), prompt.model_copy(update={field: template}))
    Prompter.of(chat_tokenizer("qwen"), prompt.model_copy(update={field: remedied}))


@pytest.mark.parametrize(
    "goes_on",
    [
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>user\n",
        "\nuser: done",
        "<|endoftext|>go to desk 2",
        "\r\nlook",
        "<|im_start|>user<|im_end|>",
    ],
)
def test_what_a_model_goes_on_to_write_is_no_part_of_the_command(goes_on: str) -> None:
    p = prompter("qwen")
    assert p.command(generated(p, "go to desk 1" + goes_on)) == "go to desk 1"
    by_text = prompter("qwen", action_end="</action>", thought_end="<action>")
    assert by_text.command(generated(by_text, f"A mug.\n<action>go to desk 1{goes_on}</action>")) == "go to desk 1"


def test_a_tokenizer_without_special_tokens_ends_a_command_by_its_text() -> None:
    tokenizer = chat_tokenizer("qwen")
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    p = Prompter.of(plain, Prompt(opening="{observation} {task}\n", turn="{observation}\n", action_end="\n"))
    assert p.command(generated(p, " go to desk 1\nlook")) == "go to desk 1"


def completed(p: Prompter, tokens: list[int]) -> list[int]:
    """What is generated of a text that the model would go on writing for ever."""
    return next(tokens[:n] for n in range(1, len(tokens) + 1) if p.is_complete(tokens[:n]))


def test_ends_of_several_tokens() -> None:
    p = prompter("qwen", thought_end="<action>", action_end="</action>", max_action_tokens=200)
    text = "I need a mug > 1.\n<action>go to desk 1</action> and then <action>look</action>"
    action = completed(p, generated(p, text))
    assert p.tokenizer.decode(action) == "I need a mug > 1.\n<action>go to desk 1</action>"
    assert p.command(action) == "go to desk 1"
    assert p.tokenizer.decode(action[: p.thought_length(action)]).startswith("I need a mug > 1.\n<action>")
    react = prompter("gpt2", max_action_tokens=200)
    action = completed(react, generated(react, " I look for a mug.\nAction: go to desk 1\nObservation: You see"))
    assert react.command(action) == "go to desk 1"
    assert react.tokenizer.decode(action).endswith("go to desk 1\n")


def test_an_end_within_a_token() -> None:
    """Two line breaks are one token, which is not the one that '\\n' is."""
    p = prompter("qwen", action_end="\n", turn="{observation}\n", opening="{task} {observation}\n")
    tokens = generated(p, "look\n\nYou see")
    assert tokens[1] != generated(p, "\n")[0]
    assert completed(p, tokens) == tokens[:2]
    assert p.command(tokens[:2]) == "look"


@pytest.mark.parametrize("eos", [7, [3, 7]])
def test_the_models_own_eos_ends_an_action(eos: int | list[int]) -> None:
    p = Prompter.of(chat_tokenizer("gemma"), PROMPTS["gemma"], GenerationConfig(eos_token_id=eos))
    assert p.is_complete([100, 7])
    assert p.is_complete([100, p.tokenizer.eos_token_id])
    assert not p.is_complete([7, 100])
    assert p.command([*generated(p, "look"), 7, *generated(p, "go")]) == "look"


def test_an_eos_that_the_tokenizer_does_not_have_is_never_written() -> None:
    """A GPT-2 of few tokens still names 50256 in its config."""
    prompt = Prompt(opening="{task}\n{observation}\n>", turn="\n{observation}\n>", action_end="\n")
    p = Prompter.of(chat_tokenizer("gpt2"), prompt, GenerationConfig(eos_token_id=50256))
    assert p.command(p.action("go to desk 1")) == "go to desk 1"
    assert p.command([*p.tokenizer.encode("look"), p.tokenizer.eos_token_id, *p.action("go")]) == "look"


def test_a_thought_without_end_and_an_action_that_is_cut_off() -> None:
    p = prompter(
        "qwen", thought_end="</think>", opening="{task} {observation}<|im_start|>", turn="{observation}<|im_start|>"
    )
    action = completed(p, generated(p, "<think>\nThe mug may be on one of the desks, or in a cabinet"))
    assert len(action) == 12
    assert p.thought_length(action) == 0
    assert p.command(action) == "<think>"
    assert prompter("qwen").command(generated(p, "go to desk 1 and")) == "go to desk 1 and"


def test_placeholders_of_the_moment() -> None:
    template = "{observation} ({step}, {steps_left} left)\n{admissible_commands}\n{{}}<|im_start|>"
    p = prompter("qwen", opening="{task} " + template, turn=template)
    moment = Moment(3, 48, lambda: ("go to desk 1", "look"))
    shown_text = "You see a mug. (3, 48 left)\ngo to desk 1\nlook\n{}<|im_start|>"
    assert p.tokenizer.decode(p.turn("You see a mug.", "find it", moment)) == shown_text
    assert p.tokenizer.decode(p.opening("You see a mug.", "find it", moment)) == f"find it {shown_text}"


def test_admissible_commands_are_only_asked_for_where_a_template_names_them() -> None:
    def asked() -> list[str]:
        raise AssertionError

    p = prompter("qwen")
    assert p.turn("You see a mug.", "find it", Moment(1, 1, asked)) == p.turn("You see a mug.", "find it")


@pytest.mark.parametrize(
    ("field", "template", "problem"),
    [
        (
            "opening",
            "{task} {observation} {commands}",
            "'{commands}' is no placeholder: there are {task}, {observation}",
        ),
        ("turn", '{"action": 1}', "is no placeholder"),
        (
            "turn",
            "{observation} {",
            "Single '{' encountered in format string; write a brace that is meant as such twice",
        ),
        ("turn", "} {observation}", "Single '}' encountered in format string; write a brace"),
        ("turn", "{observation!r}", "'{observation!r}' is no placeholder"),
        ("turn", "{observation:>9}", "'{observation:>9}' is no placeholder"),
        ("turn", "{observation.__class__}", "is no placeholder"),
        ("turn", "{}", "'{}' is no placeholder"),
        ("turn", "{0}", "'{0}' is no placeholder"),
    ],
)
def test_templates_are_checked_when_the_recipe_is_read(field: str, template: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Prompt(**{field: template})


@given(st.text(alphabet="{}a b\n", max_size=12))
def test_a_template_that_is_accepted_can_be_filled(template: str) -> None:
    """And all of a text's braces may be written, twice each."""
    Prompt(turn=template.replace("{", "{{").replace("}", "}}"))
    try:
        prompt = Prompt(turn=template)
    except ValidationError:
        return
    assert prompt.turn.format() == template.replace("{{", "{").replace("}}", "}")


NAMES_COMMANDS = "<task> {task} <obs> {observation} {admissible_commands} <act>"


def test_looks_do_not_know_what_an_episode_knows() -> None:
    training = load_recipe("alfworld-tiny").agent.training
    assert training is not None
    prompt = Prompt(opening=NAMES_COMMANDS, thought_end="<do>")
    problem = "training.looks_per_update: looks know no {admissible_commands}, which prompt.opening names: set it to 0"
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Agent(training=training, prompt=prompt)
    without = training.model_copy(update={"looks_per_update": 0, "looks_alone_until": 0})
    Agent(training=without, prompt=prompt)


def test_logs_that_do_not_tell_what_a_template_names_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    step = {"command": "look", "observation": "You see a mug.", "precision": "float"}
    logged = LoggedEpisode.model_validate(
        {
            "episode_id": "one",
            "task_id": "unknown-game",
            "task_type": "look",
            "task": "find a mug",
            "observation": "You are in a room.",
            "steps": [step],
            "success": False,
        }
    )
    episodes, steps = ingested_tables([logged], ROUTE, ROUTE, Prompter.of(TOKENIZER, Prompt(turn="{step} <act>")), 2048)
    assert (len(episodes), len(steps), caplog.text) == (1, 1, "")
    episodes, steps = ingested_tables([logged], ROUTE, ROUTE, Prompter.of(TOKENIZER, Prompt(turn=NAMES_COMMANDS)), 2048)
    assert (len(episodes), len(steps)) == (0, 0)
    assert "1 ingested episodes are left out: logs do not tell {admissible_commands}" in caplog.text
