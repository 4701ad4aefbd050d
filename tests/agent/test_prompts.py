"""Transcripts only grow; an action may hold a thought before its command."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.agent.prompts import Prompter, shown, truncation_policy
from dmr_pipeline.agent.vocabulary import word_tokenizer
from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.expert import ExploringExpert
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import PageView, Prompt

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


@pytest.mark.parametrize("prompt", [Prompt(action_end="take mug"), Prompt(thought_end="</think>")])
def test_markers_must_be_single_tokens(prompt: Prompt) -> None:
    with pytest.raises(UserError, match=r"agent\.prompt\.\w+: .* is not a single token"):
        Prompter.of(TOKENIZER, prompt)


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
    viewer = Prompter.of(
        TOKENIZER, Prompt(opening="<task> {task} <obs> {observation}", turn="<obs> {observation}", page=page)
    )
    assert TOKENIZER.decode(viewer.opening(observation, "take mug 1")) == "<task> take mug 1 <obs> desk 1"
    assert TOKENIZER.decode(viewer.turn(observation, "take mug 1")) == "<obs> desk 1"


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
    ],
)
def test_the_truncation_policy_is_said_in_a_line(page: PageView | None, policy: str) -> None:
    assert truncation_policy(page) == policy
