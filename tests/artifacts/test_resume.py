import logging
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmr_pipeline.artifacts.resume import load_state, save_state

REPOSITORY = Path(__file__).parents[2]
STATE = {"weights": {"a": torch.arange(50.0)}, "epoch": 3, "losses": [0.5, 0.25], "own": [{"tokens": [1, 2]}]}


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path / "training.pt", STATE)
    return tmp_path / "training.pt"


def test_what_was_saved_comes_back(saved: Path):
    assert same(load_state(saved), STATE)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert load_state(saved.with_name("other.pt")) is None


@pytest.mark.parametrize("harm", ["empty", "cut at half", "cut by a byte", "text", "zip of something else"])
def test_damaged_state_is_dropped_with_a_warning(saved: Path, harm: str, caplog: pytest.LogCaptureFixture):
    content = saved.read_bytes()
    damaged = {
        "empty": b"",
        "cut at half": content[: len(content) // 2],
        "cut by a byte": content[:-1],
        "text": b"text",
        "zip of something else": b"PK\x05\x06" + bytes(18),
    }
    saved.write_bytes(damaged[harm])
    with caplog.at_level(logging.WARNING):
        assert load_state(saved) is None
    assert "training.pt: this resume state is damaged" in caplog.text
    assert not saved.exists()


def test_a_flipped_bit_is_found_or_harmless(saved: Path):
    content, rng = saved.read_bytes(), random.Random(1)
    dropped = 0
    for _ in range(150):
        position = rng.randrange(len(content))
        saved.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]
        )
        loaded = load_state(saved)
        assert loaded is None or same(loaded, STATE)
        dropped += loaded is None
    assert dropped > 10


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("PWNED"),)


def test_nothing_in_a_state_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"update": Harmful()}, "training.pt")
    assert load_state(Path("training.pt")) is None
    assert not Path("PWNED").exists()


def test_the_package_loads_pickles_nowhere_else():
    lines = [line for path in (REPOSITORY / "dmr_pipeline").rglob("*.py") for line in path.read_text().splitlines()]
    loads = [line for line in lines if "torch.load(" in line]
    assert loads
    assert all("weights_only=True" in line for line in loads)
