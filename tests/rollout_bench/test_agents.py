"""Who acts in the bench, and that `generate` is called so that it acts greedily."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.rollout_bench.agents import RandomLlama, Way
from dmr_pipeline.rollout_bench.generate import Generate
from dmr_pipeline.rollout_bench.run import FULL, QUICK, make_tasks, measurements
from dmr_pipeline.training.train import new_model

ROOT = Path(__file__).parents[2]
ARCHITECTURE = Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=32)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = new_model(ARCHITECTURE, 50, 1).eval()
    with torch.no_grad():  # fresh weights repeat the token they read; these wander
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
@pytest.mark.parametrize("keep_cache", [False, True])
def test_generate_writes_the_likeliest_tokens_at_every_step(model: torch.nn.Module, keep_cache: bool) -> None:
    free = Generate(model, [], 6, keep_cache=keep_cache)
    first = free.action([1, 2, 3])
    ended = Generate(model, [first[3]], 6, keep_cache=keep_cache)
    for writer, ends in ((free, set()), (ended, {first[3]})):
        for opening in ([1, 2, 3], [9, 9]):
            writer.begin()
            transcript = opening
            for segment in ([7, 8], [30], [4, 5, 6]):
                wanted: list[int] = []
                while len(wanted) < 6 and not (wanted and wanted[-1] in ends):
                    logits = model(input_ids=torch.tensor([transcript + wanted])).logits
                    wanted.append(int(logits[0, -1].argmax()))
                assert writer.action(transcript) == wanted
                transcript = transcript + wanted + segment


@torch.no_grad()
def test_a_kept_cache_spares_the_reading(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for keep_cache, wanted in ((False, [10, 1, 15, 1]), (True, [10, 1, 4, 1])):
        read.clear()
        writer = Generate(model, [], 2, keep_cache=keep_cache)
        transcript = list(range(10))
        action = writer.action(transcript)
        writer.action([*transcript, *action, 1, 2, 3])
        assert read == wanted


def llama(sizes, tasks: Path = Path()) -> RandomLlama:
    agent = measurements(sizes, ROOT / "data", tasks)[-1][0].agent
    assert isinstance(agent, RandomLlama)
    return agent


def test_the_large_model_has_the_shape_of_smollm2() -> None:
    with torch.device("meta"):
        model = llama(FULL).model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # as its checkpoint
    assert (model.config.num_hidden_layers, model.config.head_dim, model.config.tie_word_embeddings) == (30, 64, True)


def test_the_random_model_writes_what_depends_on_its_transcript(tmp_path: Path) -> None:
    make_tasks("alfworld-tiny", 3, tmp_path / "alfworld-tiny")
    agent = replace(llama(QUICK, tmp_path), vocabulary=300)
    written = agent.player(Way.ENGINE)(range(3), 2)
    assert [[len(action) for action in actions] for actions in written] == [[3, 3]] * 3
    assert len({str(actions) for actions in written}) == 3
    for way in (Way.REREAD, Way.KEPT):
        assert agent.player(way)(range(3), 1) == written
