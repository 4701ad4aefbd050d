"""Training sequences: the expert's actions are targets, wherever the transcript allows it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmr_pipeline.environments.alfworld.engine import AlfWorldEpisode
from dmr_pipeline.environments.alfworld.game import Game
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.environments.base import Demonstration
from dmr_pipeline.environments.webshop.benchmark import GeneratedWebShop
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.across import problems_across
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.engine import ALONE
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Step, Trajectory
from dmr_pipeline.training.examples import (
    IGNORED,
    Example,
    ExampleBuilder,
    demonstration_example,
    expert_example,
    refuse_lost_commands,
    relabelled_example,
)
from dmr_pipeline.training.vocabulary import exact_word_tokenizer, word_tokenizer


def prompter() -> Prompter:
    return Prompter.of(word_tokenizer(alfworld_texts()), Prompt())


def taught(example: Example) -> list[list[int]]:
    """Runs of consecutive targets."""
    runs: list[list[int]] = [[]]
    for target in example.targets:
        if target == IGNORED:
            runs.append([])
        else:
            runs[-1].append(target)
    return [run for run in runs if run]


def test_a_flawless_episode_teaches_exactly_the_experts_actions() -> None:
    game, _ = generate_game(5)
    p = prompter()
    example = expert_example(game, p, 50, mistake_rate=0.0, rng=random.Random(0))
    actions = taught(example)
    assert len(actions) == example.steps
    assert all(action[-1] == p.action_end.token for action in actions)
    assert p.command(actions[0]).startswith("go to ")
    for i, target in enumerate(example.targets):
        if target != IGNORED:
            assert target == example.tokens[i + 1]


def test_a_mistake_is_not_taught_but_the_step_after_it_is() -> None:
    builder = ExampleBuilder()
    builder.step([1, 2], taken=[7, 8, 9], expert=[7, 5, 9])
    builder.step([3], taken=[6, 9], expert=[6, 9])
    assert builder.tokens == [1, 2, 7, 8, 9, 3, 6, 9]
    #                         .  7  5  .  .  6  9  .
    assert builder.targets == [IGNORED, 7, 5, IGNORED, IGNORED, 6, 9, IGNORED]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_targets_are_the_experts_tokens_up_to_the_first_difference(taken: list[int], expert: list[int]) -> None:
    builder = ExampleBuilder()
    builder.step([0], taken, expert)
    assert len(builder.targets) == len(builder.tokens)
    shared = next(
        (i for i, (a, b) in enumerate(zip(taken, expert, strict=False)) if a != b), min(len(taken), len(expert))
    )
    wanted = expert[: shared + 1]
    got = [target for target in builder.targets if target != IGNORED]
    assert got == wanted[: len(taken)]


def test_the_tokenizer_knows_every_word_and_gives_commands_back() -> None:
    p = prompter()
    unknown = p.tokenizer.unk_token_id
    for seed in range(30):
        game, _ = generate_game(seed)
        example = expert_example(game, p, 50, mistake_rate=0.3, rng=random.Random(seed))
        assert unknown not in example.tokens
    for command in ("take mug 1 from cabinet 13", "move soapbar 2 to toilet 1", "heat egg 1 with microwave 1", "look"):
        assert p.command(p.action(command)) == command


def test_a_look_teaches_whether_what_is_wanted_is_there_and_to_take_it() -> None:
    thinker = Prompter.of(word_tokenizer(alfworld_texts()), Prompt(thought_end="<do>"))
    game, rng, kinds = generate_game(3)[0], random.Random(0), set()
    for _ in range(40):
        example = demonstration_example(game, thinker, rng)
        page = thinker.tokenizer.decode(
            [t for t, target in zip(example.tokens, example.targets, strict=True) if target == IGNORED]
        )
        task, shown = page.split("<obs>")
        (target,) = taught(example)
        thought, _, command = thinker.tokenizer.decode(target).partition(" <do>")
        thing, number = thought.split()
        assert f" {thing}" in task
        kinds.add(number == "none")
        if number == "none":
            assert (command, f" {thing} " in shown) == ("", False)
        else:
            assert f" {thought} " in shown
            assert command.startswith(f" take {thought} from ")
            assert command.endswith(" <end>")
    assert kinds == {True, False}


def test_a_look_with_a_command_needs_no_thoughts_and_begins_as_an_episode_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(game: Game, rng: random.Random) -> Demonstration:
        return Demonstration("On the desk 1, you see a mug 2.", "find two mug", "take mug 2 from desk 1", "")

    monkeypatch.setattr(Game, "demonstration", shown)
    p = Prompter.of(
        word_tokenizer(alfworld_texts()), Prompt(opening="<task> {task} <obs> {observation} <act>", turn="<obs>")
    )
    example = demonstration_example(generate_game(3)[0], p, random.Random(0))
    assert p.tokenizer.decode(example.tokens) == (
        "<task> find two mug <obs> on desk 1 mug 2 <act> take mug 2 from desk 1 <end>"
    )
    assert [p.tokenizer.decode(target) for target in taught(example)] == ["take mug 2 from desk 1 <end>"]


def test_an_episode_that_the_expert_played_teaches_what_the_experts_own_does() -> None:
    game, p = generate_game(5)[0], prompter()
    wanted = expert_example(game, p, 50, mistake_rate=0.0, rng=random.Random(0))
    episode = AlfWorldEpisode(game)
    played = Trajectory(RolloutRequest(game), episode.reset())
    segment = p.opening(played.opening, game.instruction)
    for action in taught(wanted):
        command = p.command(action)
        observation, _, _ = episode.step(command)
        played.steps.append(Step(segment, action, command, observation, ALONE, ()))
        segment = p.turn(observation, game.instruction)
    assert relabelled_example(played, p) == wanted


class Expert:
    """Of a game that one command wins."""

    def __init__(self, command: str) -> None:
        self.command = command

    def observe(self, command: str | None, observation: str) -> None:
        pass

    def act(self) -> str:
        return self.command

    def think(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("command", "written"),
    [("take the key", "take key"), ("turn dial to 75", "turn dial to"), ("go up-left", "go up left")],
)
def test_commands_that_no_agent_could_write_are_refused_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch, command: str, written: str
) -> None:
    game = generate_game(3)[0]
    monkeypatch.setattr(Game, "expert", lambda _: Expert(command))
    texts = [f"{command} {game.instruction}"]
    short, exact = (Prompter.of(made(texts), Prompt()) for made in (word_tokenizer, exact_word_tokenizer))
    said = (
        rf"the command '{command}' of task {game.task_id} would come back as '{written}.*: set exact_words = True there"
    )
    with pytest.raises(UserError, match=said):
        refuse_lost_commands([game], short, 2, exact_words=False)
    refuse_lost_commands([game], exact, 2, exact_words=True)
    other = Prompter.of(exact_word_tokenizer(["look"]), Prompt())
    with pytest.raises(UserError, match="its words are not all in what `texts` returns"):
        refuse_lost_commands([game], other, 2, exact_words=True)


def test_commands_of_the_benchmarks_here_can_be_written() -> None:
    refuse_lost_commands([generate_game(seed)[0] for seed in range(30)], prompter(), 50, exact_words=False)
    with pytest.raises(UserError, match="would come back as"):
        refuse_lost_commands(
            [generate_game(3)[0]], Prompter.of(word_tokenizer(["go"]), Prompt()), 50, exact_words=False
        )


def test_only_alfworlds_looks_need_thoughts() -> None:
    recipe = load_recipe("alfworld-tiny").model_dump()
    recipe["agent"]["prompt"]["thought_end"] = None
    (problem,) = problems_across(dict(Recipe.model_validate(recipe)))
    assert problem == "agent: the looks of alfworld teach thoughts, so they need 'prompt.thought_end'"
    recipe["benchmark"] = GeneratedWebShop(splits=Splits(agent_train=1, router_train=99, validation=200, test=1))
    assert not list(problems_across(dict(Recipe.model_validate(recipe))))
