import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.recipe.model import Pretrained
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.kl import with_settings
from dmr_pipeline.router.model import (
    RouterSettings,
    load_router,
    new_router,
    routing_logits,
    routing_margins,
    routing_sequence,
    routing_token,
    save_router,
    sequence_of_trajectory,
    sequences_of_steps,
)
from tests.helpers.routers import ARCHITECTURE, CPU, ROUTE, ROUTES, TOKENIZER, Llm, make_llm, play_with, random_router


def test_routing_sequence_interleaves_the_precision_that_acted() -> None:
    settings = RouterSettings(tokens={"float": 102, "int4": 100, "int2": 101})
    acted = ["float", "int2", "int4"]
    sequence = routing_sequence([[1, 2], [3], [4, 5]], [[10], [11, 12], [13]], acted, settings)
    assert sequence.tokens == [1, 2, 102, 10, 3, 101, 11, 12, 4, 5, 100]
    assert sequence.positions == [1, 4, 9]
    assert sequence.acted == [2, 0, 1]  # steps up from the cheapest


def reached(logits: np.ndarray) -> np.ndarray:
    """Probability of each rung or a dearer one, dearest first, from logits that are dearest first."""
    return softmax(logits, axis=1).cumsum(1)[:, :-1]


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_cached_exceedances_equal_a_plain_forward_pass(route: tuple[str, ...]) -> None:
    router = random_router(route)
    sequences = [sequence_of_trajectory(trajectory, router) for trajectory in play_with(router, games=3, slots=6)]
    openings = np.median([margins[0] for margins in routing_margins(router, sequences, 6)], axis=0)[::-1]
    offsets = [*(-100 * openings), 0.0]  # so that every rung acts
    router = with_settings(router, scale=100.0, offsets=dict(zip(route, offsets, strict=True)), threshold=0.45)
    played = play_with(router, games=3, slots=4)  # fewer slots than episodes: slots are used again
    tokens = router.tokenizer.convert_tokens_to_ids([routing_token(rung) for rung in route])
    taken = set()
    for trajectory in played:
        sequence = sequence_of_trajectory(trajectory, router)
        assert [sequence.tokens[at + 1] for at in sequence.positions] == [
            tokens[route.index(step.precision)] for step in trajectory.steps
        ]
        with torch.no_grad():
            logits = router.model(torch.tensor([sequence.tokens])).logits[0, sequence.positions][:, tokens].numpy()
        expected = reached(100 * logits + offsets)
        for step, levels in zip(trajectory.steps, expected.tolist(), strict=True):
            assert step.exceedance == pytest.approx(levels, abs=1e-3)
            places = [k for k, level in enumerate(step.exceedance) if level >= 0.45]
            assert step.precision == route[min(places, default=len(route) - 1)]
            taken.add(step.precision)
    assert taken == set(route)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_batched_margins_equal_the_acting_routers(route: tuple[str, ...]) -> None:
    router = random_router(route)
    played = play_with(router, games=3, slots=6)
    _, steps = to_frames(played, "router")
    sequences = sequences_of_steps(steps, router.settings)
    assert sequences == [sequence_of_trajectory(trajectory, router) for trajectory in played]
    for trajectory, values in zip(played, routing_margins(router, sequences, batch=4), strict=True):
        dearest_first = np.concatenate([values[:, ::-1], np.zeros((len(values), 1))], axis=1)
        acting = np.array([step.exceedance for step in trajectory.steps])
        assert acting == pytest.approx(reached(dearest_first), abs=1e-4)


@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_sampled_decisions_follow_the_exceedances_and_their_seed(route: tuple[str, ...]) -> None:
    router = random_router(route)
    first, again, other = (play_with(router, 15, slots, True, seed) for slots, seed in ((5, 3), (30, 3), (30, 4)))
    taken, repeated, changed = ([[s.precision for s in t.steps] for t in played] for played in (first, again, other))
    assert taken == repeated  # whatever the number of slots
    assert taken != changed
    assert taken[0::2] != taken[1::2]  # the members of a group differ
    steps = [s for t in first for s in t.steps]
    for k in range(len(route) - 1):
        levels = [s.exceedance[k] for s in steps]
        excess = sum(route.index(s.precision) <= k for s in steps) - sum(levels)
        deviation = sum(p * (1 - p) for p in levels) ** 0.5
        assert abs(excess) < 4 * deviation


def test_save_and_load_are_equal_and_deterministic(tmp_path: Path) -> None:
    router = random_router(ROUTES[1], scale=1.5, offsets={"float": 0.3, "int4": -1.0}, threshold=0.2)
    for name in ("one", "two"):
        save_router(router, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "router.json" in files
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    loaded = load_router(tmp_path / "one", CPU)
    assert loaded.settings == router.settings
    assert loaded.settings.route == ROUTES[1]  # the order is kept
    assert loaded.tokenizer.get_vocab() == router.tokenizer.get_vocab()
    for name, weight in router.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])
    table = loaded.model.get_input_embeddings().weight.numel()  # looked up, and not the head
    assert loaded.model.get_output_embeddings().weight is not loaded.model.get_input_embeddings().weight
    assert loaded.pass_bytes.weights == 2 * (loaded.parameters - table)
    assert loaded.parameters == sum({id(p): p.numel() for p in router.model.parameters()}.values())


@pytest.mark.parametrize("damage", [{"surprise": 1}, {"threshold": 2.0}, {"kind": "mixture"}, {"tokens": {"float": 5}}])
def test_malformed_settings_are_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    save_router(random_router(), tmp_path)
    path = tmp_path / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match=f"router.json: {next(iter(damage))}"):
        load_router(tmp_path, CPU)


def test_a_folder_without_settings_is_no_router(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no router: it has no router\.json"):
        load_router(tmp_path, CPU)


def pretrained(llm: Llm) -> RouterModel:
    return RouterModel(pretrained=Pretrained(model=str(llm.folder)))


@pytest.mark.parametrize("rows", [None, 40])
@pytest.mark.parametrize("route", ROUTES, ids=len)
def test_routing_tokens_are_added_to_a_pretrained_llm(tmp_path: Path, rows: int | None, route: tuple[str, ...]) -> None:
    llm = make_llm(tmp_path, ["take", "go", "apple"], rows)
    routers = [new_router(pretrained(llm), route, llm.tokenizer, 0, CPU) for _ in range(2)]
    settings = routers[0].settings
    assert settings.route == route
    assert settings.columns == list(range(5, 5 + len(route)))  # cheapest first
    for rung, token in settings.tokens.items():
        assert routers[0].tokenizer.convert_tokens_to_ids(f"<precision:{rung}>") == token
        assert routing_token(rung) not in llm.tokenizer.get_vocab()  # the agent's own is left alone
    embeddings = routers[0].model.get_input_embeddings().weight
    assert len(embeddings) == (rows or 5 + len(route))  # spare rows are used, and never cut off
    assert torch.equal(embeddings[:5], llm.model.get_input_embeddings().weight[:5])
    assert torch.equal(embeddings, routers[1].model.get_input_embeddings().weight)
    sequence = routing_sequence([[2, 3]], [[4]], ["int2"], settings)
    assert routing_logits(routers[0].model, [sequence], settings).shape == (1, len(route))


def test_a_router_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, ["take", "go", "apple"])  # has 2,048
    assert new_router(pretrained(llm), ROUTE, llm.tokenizer, 0, CPU, None, 2048).settings.kind == "lm"
    with pytest.raises(UserError, match=r"positions for 2048 tokens.*may have 2100.*max_transcript_tokens lower by 52"):
        new_router(pretrained(llm), ROUTE, llm.tokenizer, 0, CPU, None, 2100)


def test_a_new_routers_positions_are_those_of_its_transcripts() -> None:
    router = new_router(RouterModel(architecture=ARCHITECTURE), ROUTE, TOKENIZER, 0, CPU, None, 5000)
    assert router.model.config.max_position_embeddings == 5000


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "router", ["take", "go", "apple"])
    agent = make_llm(tmp_path / "agent", ["go", "take", "apple"])
    with pytest.raises(UserError, match="different vocabularies"):
        new_router(pretrained(llm), ROUTE, agent.tokenizer, 0, CPU)


def test_a_new_router_depends_on_its_seed_alone() -> None:
    one, again, other = (
        new_router(RouterModel(architecture=ARCHITECTURE), ROUTE, TOKENIZER, seed, CPU) for seed in (0, 0, 1)
    )
    weights = [router.model.get_input_embeddings().weight for router in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert len(weights[0]) == len(TOKENIZER) + 2
