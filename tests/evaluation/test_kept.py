import logging
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dmr_pipeline.evaluation.kept import KeptTables

TABLE = pl.DataFrame({"name": ["a", "b"], "cost": [0.1, 2.0]})


def test_a_table_is_found_under_exactly_the_facts_that_it_was_kept_under(tmp_path: Path) -> None:
    kept = KeptTables(tmp_path / "kept", {"seed": 0})
    assert kept.read(policy="x") is None
    kept.write(TABLE, policy="x")
    again = KeptTables(tmp_path / "kept").under(seed=0)
    found = again.read(policy="x")
    assert found is not None
    assert_frame_equal(found, TABLE)
    assert again.under(policy="x").read() is not None
    for other in (again.under(seed=1), KeptTables(tmp_path / "kept"), again.under(more=None)):
        assert other.read(policy="x") is None
    assert again.read(policy="y") is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_what_is_damaged_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    kept = KeptTables(tmp_path)
    kept.write(TABLE, policy="x")
    kept.write(TABLE, policy="y")
    (path,) = [path for path in tmp_path.iterdir() if path.name.startswith(kept._key({"policy": "x"}))]
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"flipped": flipped, "cut": content[:-1], "emptied": b""}[damage])
    with caplog.at_level(logging.WARNING, "dmr_pipeline"):
        assert kept.read(policy="x") is None
    assert f"{path} is damaged" in caplog.text
    assert not path.exists()
    assert kept.read(policy="y") is not None
    kept.write(TABLE, policy="x")
    assert path.read_bytes() == content


def test_what_nobody_asked_for_is_removed(tmp_path: Path) -> None:
    before = KeptTables(tmp_path)
    for policy in ("read", "written again", "neither"):
        before.write(TABLE, policy=policy, seed=0)
    (tmp_path / "killed.part").write_bytes(b"half")
    kept = KeptTables(tmp_path)
    under = kept.under(seed=0)
    assert under.read(policy="read") is not None
    assert under.read(policy="not there") is None
    under.write(TABLE, policy="written again")
    kept.drop_unused()
    assert len(list(tmp_path.iterdir())) == 2
    assert before.read(policy="neither", seed=0) is None
    assert before.read(policy="written again", seed=0) is not None
    KeptTables(tmp_path / "none").drop_unused()
