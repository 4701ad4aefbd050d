"""Who acts: the committed tiny agents in games, and a model of a real one's shape with random weights along transcripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from transformers import LlamaConfig, PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm, load_tokenizer, random_causal_lm
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.engine import play_alone
from dmr_pipeline.rollout.kv_cache.choice import token_streams, transcript_capacity
from dmr_pipeline.rollout.prompts import Moment, Prompter
from dmr_pipeline.rollout_bench.generate import Generate

CPU = torch.device("cpu")
SPLIT = "validation"

Actions = list[list[list[int]]]
"""Tokens of each action: episode, step, token."""


class Way(StrEnum):
    """How actions are made."""

    REREAD = "generate, anew"
    """transformers' `generate`, called at each step with the whole transcript, which it reads again."""
    KEPT = "generate, cached"
    """The same, with the keys and values of the step before."""
    ENGINE = "engine"
    """This package's: `play_alone`, `token_streams`."""


class Player(Protocol):
    def __call__(self, episodes: Sequence[int], at_once: int) -> Actions:
        """Act in these episodes, by their numbers; `generate` acts in one at a time."""
        ...


class Agent(Protocol):
    @property
    def name(self) -> str: ...

    def player(self, way: Way) -> Player:
        """Load the model, and all that the episodes need."""
        ...


@dataclass(frozen=True)
class TinyAgent:
    """The committed agent of a recipe, in float32; its episodes are games of the validation split."""

    recipe: str
    data: Path
    """Project's data folder."""
    tasks: Path
    """Artifact of the stage `benchmark_tasks`."""

    @property
    def name(self) -> str:
        return f"tiny agent of {self.recipe}"

    @property
    def model_folder(self) -> Path:
        return self.data / self.recipe / "agent" / "model"

    def player(self, way: Way) -> Player:
        recipe = load_recipe(self.recipe)
        model, tokenizer = load_causal_lm(self.model_folder, None, CPU)
        prompter = Prompter.of(tokenizer, recipe.agent.prompt, model.generation_config)
        tasks = benchmark_of(recipe.benchmark).read_tasks(self.tasks, SPLIT)
        limit = recipe.benchmark.step_limit

        def play_in_slots(episodes: Sequence[int], at_once: int) -> Actions:
            played = play_alone(model, [tasks[number] for number in episodes], prompter, limit, at_once)
            return [[step.action for step in trajectory.steps] for trajectory in played]

        def play_one_by_one(episodes: Sequence[int], at_once: int) -> Actions:
            return [_play_by_generate(writer, tasks[number], prompter, limit) for number in episodes]

        if way == Way.ENGINE:
            return play_in_slots
        longest = recipe.agent.prompt.max_action_tokens
        writer = Generate(model, prompter.end_tokens, longest, keep_cache=way == Way.KEPT)
        return play_one_by_one


def _play_by_generate(writer: Generate, task: Task, prompter: Prompter, step_limit: int) -> list[list[int]]:
    """Actions of one episode."""
    capacity = transcript_capacity(writer.model.config, None)
    writer.begin()
    episode = task.episode()
    moment = Moment(1, step_limit, episode.admissible_commands)
    transcript = prompter.opening(episode.reset(), task.instruction, moment)
    actions: list[list[int]] = []
    while len(transcript) + writer.longest <= capacity:
        actions.append(writer.action(transcript))
        observation, _, over = episode.step(prompter.command(actions[-1]))
        done = len(actions)
        if over or done == step_limit:
            break
        moment = Moment(done + 1, step_limit - done, episode.admissible_commands)
        transcript = [*transcript, *actions[-1], *prompter.turn(observation, task.instruction, moment)]
    return actions


@dataclass(frozen=True)
class RandomLlama:
    """A Llama with random weights, which plays no games: at each step it reads what the expert saw there in a game of
    ALFWorld, and writes a fixed number of tokens, which stay in the transcript."""

    name: str
    reader: TinyAgent
    """Whose games, prompts and tokenizer the transcripts are of."""
    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    steps: int
    """Of an episode; games in which the expert takes fewer are left out."""
    action_tokens: int

    def player(self, way: Way) -> Player:
        model = self.model()
        recipe = load_recipe(self.reader.recipe)
        prompter = Prompter.of(load_tokenizer(self.reader.model_folder), recipe.agent.prompt)
        tasks = benchmark_of(recipe.benchmark).read_tasks(self.reader.tasks, SPLIT)
        seen = (_seen_by_expert(task, prompter, self.steps) for task in tasks)
        transcripts = [segments for segments in seen if len(segments) == self.steps]

        def write_in_slots(episodes: Sequence[int], at_once: int) -> Actions:
            written = []
            for first in range(0, len(episodes), at_once):
                together = [transcripts[number] for number in episodes[first : first + at_once]]
                written += _write_in_streams(model, together, self.action_tokens)
            return written

        def write_one_by_one(episodes: Sequence[int], at_once: int) -> Actions:
            return [_write_by_generate(writer, transcripts[number]) for number in episodes]

        if way == Way.ENGINE:
            return write_in_slots
        writer = Generate(model, [], self.action_tokens, keep_cache=way == Way.KEPT)
        return write_one_by_one

    def model(self) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        return random_causal_lm(config, CPU)


def _seen_by_expert(task: Task, prompter: Prompter, steps: int) -> list[list[int]]:
    """The segment that an agent would read before each of the expert's first steps."""
    episode, expert = task.episode(), task.expert()
    observation = episode.reset()
    expert.observe(None, observation)
    segments = [prompter.opening(observation, task.instruction)]
    while len(segments) < steps:
        command = expert.act()
        observation, _, over = episode.step(command)
        if over:
            break
        expert.observe(command, observation)
        segments.append(prompter.turn(observation, task.instruction, Moment(len(segments) + 1)))
    return segments


def _write_in_streams(model: PreTrainedModel, transcripts: Sequence[Sequence[list[int]]], tokens: int) -> Actions:
    """Actions of all these episodes at once; the last token of an action is read with what follows it."""
    streams = token_streams(model, len(transcripts), transcript_capacity(model.config, None))
    slots = range(len(transcripts))
    written: Actions = [[] for _ in slots]
    for segments in zip(*transcripts, strict=True):
        unread = [
            [*(actions[-1][-1:] if actions else []), *new] for actions, new in zip(written, segments, strict=True)
        ]
        chosen = [streams.extend(slots, unread).argmax(-1).tolist()]
        while len(chosen) < tokens:
            chosen.append(streams.extend(slots, [[token] for token in chosen[-1]]).argmax(-1).tolist())
        for slot in slots:
            written[slot].append([row[slot] for row in chosen])
    return written


def _write_by_generate(writer: Generate, segments: Sequence[list[int]]) -> list[list[int]]:
    writer.begin()
    transcript: list[int] = []
    actions = []
    for segment in segments:
        transcript = [*transcript, *segment]
        actions.append(writer.action(transcript))
        transcript += actions[-1]
    return actions
