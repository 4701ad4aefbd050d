import json
from pathlib import Path

import pytest
import torch

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Pretrained, RouterModel
from dmr_pipeline.rollout.tables import to_frames
from dmr_pipeline.router.model import (
    HIGH,
    LOW,
    RouterSettings,
    load_router,
    new_router,
    routing_logits,
    routing_margins,
    routing_sequence,
    save_router,
    sequence_of_trajectory,
    sequences_of_steps,
)
from tests.helpers.routers import ARCHITECTURE, CPU, TOKENIZER, Llm, make_llm, play_with, random_router


def test_routing_sequence_interleaves_the_precision_that_acted() -> None:
    settings = RouterSettings(low_token=100, high_token=101)
    sequence = routing_sequence([[1, 2], [3], [4, 5]], [[10], [11, 12], [13]], [True, False, True], settings)
    assert sequence.tokens == [1, 2, 101, 10, 3, 100, 11, 12, 4, 5, 101]
    assert sequence.positions == [1, 4, 9]
    assert sequence.high == [True, False, True]


def test_cached_probabilities_equal_a_plain_forward_pass() -> None:
    openings = {t.steps[0].probability for t in play_with(random_router(scale=0.7, offset=-0.2), games=3, slots=6)}
    threshold = (min(openings) + max(openings)) / 2  # so that first steps of both precisions are there
    router = random_router(scale=0.7, offset=-0.2, threshold=threshold)
    played = play_with(router, games=3, slots=4)  # fewer slots than episodes: slots are used again
    taken = set()
    for trajectory in played:
        sequence = sequence_of_trajectory(trajectory, router.settings)
        with torch.no_grad():
            logits = router.model(torch.tensor([sequence.tokens])).logits[0, sequence.positions]
        low, high = logits[:, router.settings.low_token], logits[:, router.settings.high_token]
        expected = 1 / (1 + torch.exp(-(0.7 * (high - low) - 0.2)))
        assert [s.probability for s in trajectory.steps] == pytest.approx(expected.tolist(), abs=1e-4)
        assert [s.high for s in trajectory.steps] == [s.probability >= threshold for s in trajectory.steps]
        taken |= {s.high for s in trajectory.steps}
    assert taken == {False, True}


def test_batched_margins_equal_the_acting_routers() -> None:
    router = random_router()
    played = play_with(router, games=3, slots=6)
    _, steps = to_frames(played, "router")
    sequences = sequences_of_steps(steps, router.settings)
    assert sequences == [sequence_of_trajectory(trajectory, router.settings) for trajectory in played]
    for trajectory, values in zip(played, routing_margins(router, sequences, batch=4), strict=True):
        assert torch.tensor(values).sigmoid().tolist() == pytest.approx(
            [s.probability for s in trajectory.steps], abs=1e-4
        )


def test_sampled_decisions_follow_the_probability_and_their_seed() -> None:
    router = random_router()
    first, again, other = (play_with(router, 15, slots, True, seed) for slots, seed in ((5, 3), (30, 3), (30, 4)))
    taken, repeated, changed = ([[s.high for s in t.steps] for t in played] for played in (first, again, other))
    assert taken == repeated  # whatever the number of slots
    assert taken != changed
    assert taken[0::2] != taken[1::2]  # the members of a group differ
    steps = [s for t in first for s in t.steps]
    excess = sum(s.high - s.probability for s in steps)
    deviation = sum(s.probability * (1 - s.probability) for s in steps) ** 0.5
    assert abs(excess) < 4 * deviation


def test_save_and_load_are_equal_and_deterministic(tmp_path: Path) -> None:
    router = random_router(scale=1.5, offset=0.3, threshold=0.2)
    for name in ("one", "two"):
        save_router(router, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "router.json" in files
    assert "model.safetensors" in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    loaded = load_router(tmp_path / "one", CPU)
    assert loaded.settings == router.settings
    assert loaded.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    for name, weight in router.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])
    assert loaded.weight_bytes == 4 * loaded.parameters
    assert loaded.parameters == sum({id(p): p.numel() for p in router.model.parameters()}.values())


@pytest.mark.parametrize("damage", [{"surprise": 1}, {"threshold": 2.0}, {"kind": "encoder"}])
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
def test_routing_tokens_are_added_to_a_pretrained_llm(tmp_path: Path, rows: int | None) -> None:
    llm = make_llm(tmp_path, ["take", "go", "apple"], rows)
    routers = [new_router(pretrained(llm), llm.tokenizer, 0, CPU) for _ in range(2)]
    tokens = routers[0].settings.tokens
    assert tokens == [5, 6]
    assert routers[0].tokenizer.convert_tokens_to_ids([LOW, HIGH]) == tokens
    assert LOW not in llm.tokenizer.get_vocab()  # the agent's own is left alone
    embeddings = routers[0].model.get_input_embeddings().weight
    assert len(embeddings) == (rows or 7)  # spare rows are used, and never cut off
    assert torch.equal(embeddings[:5], llm.model.get_input_embeddings().weight[:5])
    assert torch.equal(embeddings, routers[1].model.get_input_embeddings().weight)
    sequence = routing_sequence([[2, 3]], [[4]], [False], routers[0].settings)
    assert routing_logits(routers[0].model, [sequence], routers[0].settings).shape == (1, 2)


def test_a_router_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, ["take", "go", "apple"])  # has 2,048
    assert new_router(pretrained(llm), llm.tokenizer, 0, CPU, None, 2048).settings.kind == "lm"
    with pytest.raises(UserError, match=r"positions for 2048 tokens.*may have 2100.*max_transcript_tokens lower by 52"):
        new_router(pretrained(llm), llm.tokenizer, 0, CPU, None, 2100)


def test_a_new_routers_positions_are_those_of_its_transcripts() -> None:
    router = new_router(RouterModel(architecture=ARCHITECTURE), TOKENIZER, 0, CPU, None, 5000)
    assert router.model.config.max_position_embeddings == 5000


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "router", ["take", "go", "apple"])
    agent = make_llm(tmp_path / "agent", ["go", "take", "apple"])
    with pytest.raises(UserError, match="different vocabularies"):
        new_router(pretrained(llm), agent.tokenizer, 0, CPU)


def test_a_new_router_depends_on_its_seed_alone() -> None:
    one, again, other = (new_router(RouterModel(architecture=ARCHITECTURE), TOKENIZER, seed, CPU) for seed in (0, 0, 1))
    weights = [router.model.get_input_embeddings().weight for router in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert len(weights[0]) == len(TOKENIZER)  # its tokenizer had routing tokens
