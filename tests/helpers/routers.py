"""Random agents and routers that know ALFWorld's words, and the stand-in of a pretrained LLM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.rollout.engine import play
from dmr_pipeline.rollout.kv_cache.padded import Streams
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import Router, new_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.training.train import new_model
from dmr_pipeline.training.vocabulary import word_tokenizer

CPU = torch.device("cpu")
ARCHITECTURE = Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=48)
TOKENIZER = word_tokenizer(alfworld_texts())
ROUTE = ("float", "int2")
ROUTES = [ROUTE, ("float", "int4", "int2")]


def random_model(seed: int) -> Qwen3ForCausalLM:
    """Weights large enough for outputs that depend on the input."""
    model = new_model(ARCHITECTURE, len(TOKENIZER), seed)
    enlarge(model)
    return model.eval()


@torch.no_grad()
def enlarge(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim == 2 else 1)


AGENTS = {"float": random_model(1), "int4": random_model(2), "int2": random_model(0)}
"""They babble, each in its own way."""


def streams(route: Sequence[str], slots: int) -> dict[str, Streams]:
    return {rung: Streams(AGENTS[rung], slots, 4096) for rung in route}


def random_router(route: Sequence[str] = ROUTE, **settings: Any) -> Router:
    router = new_router(RouterModel(architecture=ARCHITECTURE), route, TOKENIZER, 2, CPU)
    enlarge(router.model)
    return with_settings(replace(router, model=router.model.eval()), **settings)


def play_with(router: Router, games: int, slots: int, sample: bool = False, seed: int = 0) -> list[Trajectory]:
    """The random agents of the router's route, and the router between them."""
    runs = [RolloutRequest(generate_game(number, 50)[0], member) for number in range(games) for member in range(2)]
    policy, agents = routing_policy(router, slots, sample=sample, seed=seed), streams(router.settings.route, slots)
    return play(runs, agents, Prompter.of(TOKENIZER, Prompt()), policy, step_limit=7)


@dataclass(frozen=True)
class Llm:
    """A pretrained LLM's stand-in, without routing tokens."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def make_llm(folder: Path, words: list[str], rows: int | None = None, tied: bool = False) -> Llm:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=rows or len(vocabulary),
        **shape,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Llm(folder, model, tokenizer)
