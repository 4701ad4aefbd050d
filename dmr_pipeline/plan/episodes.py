"""How long the episodes of a recipe are."""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.benchmark import Games, Splits
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.examples import expert_example

GAMES = 24
"""Of the expert, by which lengths are known."""


@dataclass(frozen=True)
class Episodes:
    """Means over the expert's episodes."""

    steps: float
    """Of an episode."""
    opening: float
    """Tokens of the first segment."""
    segment: float
    """Tokens that a step reads after the first."""
    action: float
    """Tokens that a step writes."""
    environment_seconds: float
    """Of a step, the expert's thinking among it."""
    step_limit: int

    def played(self, success: float) -> float:
        """Steps of an episode of an agent that wins so many, as the expert does, and takes all steps of those that it loses."""
        return success * self.steps + (1 - success) * self.step_limit

    def tokens(self, steps: float) -> float:
        """Of a transcript of so many steps."""
        return self.opening + steps * (self.segment + self.action) - self.segment


def tried_episodes(
    games: Games, prompt: Prompt, tokenizer_of: Callable[[list[str]], PreTrainedTokenizerBase]
) -> tuple[Episodes, PreTrainedTokenizerBase]:
    """Of some validation games, and the tokenizer.

    Args:
        tokenizer_of: from the benchmark's texts.

    Raises:
        UserError: the games are official ones and not here, or the prompt does not go with the tokenizer.
    """
    few = Splits(agent_train=1, router_train=1, validation=min(GAMES, games.splits.validation), test=1)
    benchmark = benchmark_of(games.model_copy(update={"splits": few}))
    with tempfile.TemporaryDirectory() as folder:
        benchmark.make_tasks(Path(folder))
        tokenizer = tokenizer_of(benchmark.texts(Path(folder)))
        prompter = Prompter.of(tokenizer, prompt)
        tasks = benchmark.read_tasks(Path(folder), "validation")
        started = time.perf_counter()
        examples = [expert_example(task, prompter, games.step_limit, 0.0, random.Random(0)) for task in tasks]
        seconds = time.perf_counter() - started
    steps = sum(example.steps for example in examples)
    written = sum(sum(target >= 0 for target in example.targets) for example in examples)
    openings = [next(i for i, target in enumerate(e.targets) if target >= 0) + 1 for e in examples]
    read = sum(len(example.tokens) for example in examples) - written - sum(openings)
    count = len(examples)
    return Episodes(
        steps=steps / count,
        opening=sum(openings) / count,
        segment=read / max(steps - count, 1),
        action=written / steps,
        environment_seconds=seconds / steps,
        step_limit=games.step_limit,
    ), tokenizer
