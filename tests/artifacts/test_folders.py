from pathlib import Path

from dmr_pipeline.artifacts.folders import published


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "folder"
    for text in ("old", "half", "new"):
        try:
            with published(folder) as new:
                assert not list(new.iterdir())
                (new / text).touch()
                if text == "half":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert text == "half"
        assert [path.name for path in folder.iterdir()] == ["old" if text == "half" else text]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_an_earlier_kill_has_left_is_not_taken_over(tmp_path: Path):
    left = tmp_path / ".folder.new"
    left.mkdir()
    (left / "half").touch()
    with published(tmp_path / "folder") as new:
        (new / "whole").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["whole"]
