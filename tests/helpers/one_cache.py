"""One KV cache for several rungs, as plain transformers has it: a `DynamicCache` that models of one shape take turns at."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.packed import PackedStreams
from dmr_pipeline.rollout.kv_cache.shared import SharedStreams
from dmr_pipeline.rollout.trajectory import Trajectory
from tests.helpers.rollouts import HIGH, MODELS, PROMPTER, ROUTE, RUNS, STEPS


class OneCache:
    """Of one sequence."""

    def __init__(self, model: PreTrainedModel = HIGH) -> None:
        self._cache, self.tokens = DynamicCache(config=model.config), list[int]()

    def cut(self, length: int) -> None:
        if length < len(self.tokens):
            self._cache.crop(length - len(self.tokens))
            del self.tokens[length:]

    @torch.no_grad()
    def read(self, model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary]."""
        self.tokens += tokens
        logits: Tensor = model(torch.tensor([list(tokens)]), past_key_values=self._cache, use_cache=True).logits[0]
        return logits

    def see(self, model: PreTrainedModel, transcript: Sequence[int]) -> Tensor:
        """The rest of a transcript, its last token at least: logits [vocabulary] after it."""
        self.cut(len(transcript) - 1)
        assert self.tokens == list(transcript[: len(self.tokens)])
        return self.read(model, transcript[len(self.tokens) :])[-1]

    @torch.no_grad()
    def features(self, model: PreTrainedModel, transcript: Sequence[int], layers: Sequence[int], turn: int) -> Tensor:
        """What a probe decides on, as `see` reads the transcript."""
        self.cut(len(transcript) - 1)
        new = torch.tensor([list(transcript[len(self.tokens) :])])
        states = model(new, past_key_values=self._cache, use_cache=True, output_hidden_states=True).hidden_states
        self.tokens = list(transcript)
        turns = torch.tensor([turn / 10, math.log1p(turn)])
        return torch.cat([*(states[layer][0, -1] for layer in layers), turns])

    def act(self, model: PreTrainedModel, transcript: Sequence[int]) -> list[int]:
        """A greedy action, all but its last token read."""
        action, logits = list[int](), self.see(model, transcript)
        while True:
            action.append(int(logits.argmax()))
            if PROMPTER.is_complete(action):
                return action
            logits = self.read(model, action[-1:])[-1]


def roll_shared(
    policy,
    slots=7,
    action="generate",
    temperature=0.0,
    seed=0,
    runs=RUNS,
    known=None,
    route=ROUTE,
    kind=PackedStreams,
    models: Mapping[str, PreTrainedModel] = MODELS,
    speculative=None,
    prompt_lookup=None,
) -> list[Trajectory]:
    """As `helpers.rollouts.roll`, with one cache."""
    agents = SharedStreams(kind, {rung: models[rung] for rung in route}, slots, 2048)
    return play(
        runs,
        agents,
        PROMPTER,
        policy,
        STEPS,
        action,
        temperature,
        seed,
        known=known,
        speculative=speculative,
        prompt_lookup=prompt_lookup,
    )
