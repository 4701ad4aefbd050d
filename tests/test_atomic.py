from pathlib import Path

import pytest

from dmr_pipeline.atomic import replaced


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), replaced(path) as part:
        part.write_bytes("no bytes")
    assert path.read_text() == "old"
    with replaced(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "new")]
