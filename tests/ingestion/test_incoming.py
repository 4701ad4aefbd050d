"""What was dropped, of whatever kind: opened where that is safe, moved by its name where it can be, else named."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion import incoming
from dmr_pipeline.ingestion.incoming import (
    INGESTED_FOLDER,
    QUARANTINE_FOLDER,
    Dropped,
    look,
    make_way,
    move,
    quarantine,
    read,
)


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", "c.part"):
        (tmp_path / name).write_bytes(b"x")
    for name in (INGESTED_FOLDER, QUARANTINE_FOLDER):
        (tmp_path / name).mkdir()
    dropped, left = look(tmp_path)
    assert [file.path.name for file in dropped] == ["a", "b"]
    assert len({file.digest for file in dropped}) == 1
    assert [file.refusal for file in dropped] == [None, None]
    assert left == []
    assert look(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("/proc/self/environ"), "a link"),
        (lambda path: path.symlink_to("nowhere"), "a link"),
        (lambda path: path.symlink_to(path), "a link"),
        (lambda path: path.symlink_to("/tmp"), "a link"),
        (lambda path: (path.touch(), os.truncate(path, 8 << 30)), "8,589,934,592 bytes"),
    ],
)
def test_what_is_not_read_is_quarantined_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any], said: str
) -> None:
    make(tmp_path / "a.jsonl")
    kind = (tmp_path / "a.jsonl").lstat()
    monkeypatch.setattr(os, "open", None)
    ((file,), left) = look(tmp_path)
    assert left == []
    assert said in str(file.refusal)
    assert look(tmp_path)[0] == [file]  # as often as one looks
    reason = quarantine(file, [str(file.refusal)])
    moved = Path(str(reason).removesuffix(".reason.txt"))
    assert moved.lstat().st_ino == kind.st_ino
    assert said in reason.read_text()
    assert not os.path.lexists(tmp_path / "a.jsonl")


def refuse(number: int) -> Callable[..., int]:
    def opened(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return opened


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "may not be read: give this user the right to"),
        (errno.EIO, "cannot be read (Input/output error)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").mkdir()
    monkeypatch.setattr(os, "open", refuse(number))  # root may read everything
    dropped, left = look(tmp_path)
    assert dropped == []
    assert said in left[0]
    assert "b.jsonl: it is a folder" in left[1]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be read (Not a directory)" in look(tmp_path / "file")[1][0]


def test_a_file_that_is_gone_or_was_exchanged_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a")
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="no file any more"):
        read(tmp_path / "a")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"12345")
    monkeypatch.setattr(incoming, "FILE_LIMIT", 4)  # it has grown since it was looked at
    with pytest.raises(UserError, match="it has 5 bytes, but a file is read whole and may have 4"):
        read(tmp_path / "c")


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
@pytest.mark.parametrize("taken", [0, 2])
def test_what_is_called_as_our_folders_makes_way(tmp_path: Path, kind: str, taken: int) -> None:
    for name in (INGESTED_FOLDER, QUARANTINE_FOLDER):
        path = tmp_path / name
        {"file": path.touch, "link": lambda p=path: p.symlink_to("x"), "pipe": lambda p=path: os.mkfifo(p)}[kind]()
        for number in range(taken):
            (tmp_path / f"{name}.{number}").write_text("other")
    make_way(tmp_path)
    dropped, _ = look(tmp_path)
    for name in (INGESTED_FOLDER, QUARANTINE_FOLDER):
        assert not os.path.lexists(tmp_path / name)
        other = next(file for file in dropped if file.path.name == f"{name}.{taken}")
        assert (
            stat.S_IFMT(other.path.lstat().st_mode)
            == {"file": stat.S_IFREG, "link": stat.S_IFLNK, "pipe": stat.S_IFIFO}[kind]
        )
    assert [(tmp_path / f"{QUARANTINE_FOLDER}.{n}").read_text() for n in range(taken)] == ["other"] * taken
    (tmp_path / INGESTED_FOLDER).mkdir()
    make_way(tmp_path)
    assert (tmp_path / INGESTED_FOLDER).is_dir()


@pytest.mark.parametrize(
    "name",
    [b"n" * 255, b"n" * 249 + b".jsonl", "桌".encode() * 83 + b".jsonl", b"a." + b"s" * 253, b"caf\xe9.jsonl", b"\xff" * 255,
     b"two\nlines", b"\x1b[31m.jsonl"],
)  # fmt: skip
def test_names_of_any_kind_can_be_moved(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_text("content")
    ((file,), _) = look(tmp_path)
    reason = quarantine(file, [f"{path.name}: no \x1b[31mepisode"])
    assert reason.name.isprintable()
    assert reason.read_text(encoding="utf-8").strip().endswith(r": no \x1b[31mepisode")
    moved = Path(str(reason).removesuffix(".reason.txt"))
    assert moved.read_text() == "content"
    assert moved.name.startswith(file.digest[:12])
    assert moved.suffix == path.suffix or len(path.suffix) > 10 or not path.suffix.isprintable()
    assert sorted((tmp_path / QUARANTINE_FOLDER).iterdir()) == sorted([moved, reason])


def other_file_system(self: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("harm", [None, "power off", "disk full"])
def test_a_quarantine_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str | None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"content")
    ((file,), _) = look(tmp_path)
    folder = tmp_path / QUARANTINE_FOLDER
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", other_file_system)
        if harm == "power off":
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                move(file, folder)
        elif harm == "disk full":
            patch.setattr(os, "fsync", refuse(errno.ENOSPC))
            with pytest.raises(OSError, match="No space"):
                move(file, folder)
            assert list(folder.iterdir()) == []
        assert harm is None or file.path.read_bytes() == b"content"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", other_file_system)
        move(file, folder)
    assert not file.path.exists()
    assert [path.read_bytes() for path in folder.iterdir()] == [b"content"]


def test_no_reasons_are_left_of_what_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    ((file,), _) = look(tmp_path)
    monkeypatch.setattr(Path, "rename", other_file_system)
    with pytest.raises(OSError, match="named pipe"):
        quarantine(file, ["a pipe"])
    assert list((tmp_path / QUARANTINE_FOLDER).iterdir()) == []
    assert file.path.is_fifo()


def test_another_process_has_moved_it(tmp_path: Path) -> None:
    move(Dropped(tmp_path / "gone", "0" * 64, None), tmp_path / INGESTED_FOLDER)
    assert list((tmp_path / INGESTED_FOLDER).iterdir()) == []
