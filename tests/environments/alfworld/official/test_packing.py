"""`dmr data alfworld`: from little games in the official layout, and from the official ones where `$ALFWORLD_DATA` is."""

import hashlib
import json
import struct
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dmr_pipeline.cli import app
from dmr_pipeline.environments.alfworld.official import packing as official
from dmr_pipeline.environments.alfworld.official.packing import (
    OFFICIAL_GAMES,
    PACK_FOLDER,
    download_games,
    pack,
    read_official,
)
from dmr_pipeline.environments.alfworld.official.reading import read_game
from dmr_pipeline.errors import UserError
from tests.helpers import needs
from tests.helpers.games import PROBLEM

GRAMMAR = '"rhs": "Your task is to: put a book in desk."  template :: "move {o} to {r}";'
TASK = "pick_and_place_simple-Book-None-Desk-301"


@pytest.fixture(autouse=True)
def outside_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def add_game(folder: Path, split: str, task_id: str, **changes: object) -> Path:
    path = folder / "json_2.1.1" / split / task_id / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    content = {"pddl_problem": PROBLEM, "grammar": GRAMMAR, "solvable": True, **changes}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def games(tmp_path: Path) -> Path:
    """A folder of games whose own name must not make them skipped."""
    folder = tmp_path / "movable Sliced"
    for trial in ("trial_2", "trial_1"):
        add_game(folder, "valid_seen", f"{TASK}/{trial}")
    add_game(folder, "valid_seen", f"{TASK}1/trial_1")
    add_game(folder, "train", f"{TASK}/trial_3")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a folder, and the folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()
        thread.join()


def zip_games(games: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(games.rglob("*.tw-pddl")):
            file.write(path, path.relative_to(games))
        file.writestr("json_2.1.1/train/readme.txt", "not a game")


def dmr(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", **environment}).invoke(app, list(arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pack_reads_back_as_the_games_in_order_of_task_id(games: Path):
    packed = pack(games)
    read = read_official("valid_seen")
    assert [game.task_id for game in read] == [f"{TASK}/trial_1", f"{TASK}/trial_2", f"{TASK}1/trial_1"]
    split = games / "json_2.1.1" / "valid_seen"
    assert read == [read_game(split / game.task_id / "game.tw-pddl") for game in read]
    files = {id: split / id / "game.tw-pddl" for id in sorted(game.task_id for game in read)}
    lines = "".join(f"{id} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for id, path in files.items())
    assert packed.splits["valid_seen"].sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert json.loads((PACK_FOLDER / "pack.json").read_text()) == packed.model_dump()
    assert set(packed.splits) == {"train", "valid_seen"}


def test_equal_games_give_equal_bytes(games: Path, tmp_path: Path):
    pack(games, tmp_path / "a")
    pack(games, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {"train.parquet", "valid_seen.parquet", "pack.json"}


def test_games_are_skipped_by_the_official_rules(games: Path):
    for trial, changes in enumerate([{"solvable": False}, {"solvable": None}, {"pddl_problem": "", "solvable": False}]):
        add_game(games, "train", f"{TASK}/unsolvable_{trial}", **changes)
    without = add_game(games, "train", f"{TASK}/unsolvable_3")
    without.write_text(without.read_text().replace('"solvable"', '"checked"'))
    add_game(games, "train", "pick_and_place_with_movable_recep-Book-Box-Desk-301/trial_1")
    add_game(games, "train", f"{TASK}/movable")
    add_game(games, "train", "pick_heat_then_place_in_recep-AppleSliced-None-Desk-1/trial_1", solvable=False)
    add_game(games, "train", "pick_and_drop-Book-None-Desk-301/trial_1")
    add_game(games, "valid_unseen", "pick_and_drop-Book-None-Desk-301/trial_1")
    packed = pack(games)
    assert packed.splits["train"].skipped == {"unsolvable": 4, "movable": 2, "sliced": 1, "other": 1}
    assert packed.splits["train"].games == len(read_official("train")) == 1
    assert packed.splits["valid_unseen"].games == len(read_official("valid_unseen")) == 0
    assert not any(packed.splits["valid_seen"].skipped.values())


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"solvable": true}'])
def test_a_malformed_game_is_named_and_the_old_pack_stays(games: Path, content: bytes):
    pack(games)
    before = contents(PACK_FOLDER)
    path = games / "json_2.1.1" / "valid_seen" / TASK / "trial_2" / "game.tw-pddl"
    path.write_bytes(content)
    result = dmr("data", "alfworld", "--from", str(games))
    assert result.exit_code == 2
    assert f"error: {path}: not an ALFWorld game" in result.output
    assert contents(PACK_FOLDER) == before
    assert [path.name for path in PACK_FOLDER.parent.iterdir() if not path.name.endswith(".lock")] == ["alfworld"]


def test_an_interrupted_pack_leaves_the_old_one(games: Path, monkeypatch: pytest.MonkeyPatch):
    pack(games)
    before = contents(PACK_FOLDER)
    add_game(games, "train", f"{TASK}/trial_4")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(official, "read_game", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(games)
    assert contents(PACK_FOLDER) == before
    assert pack(games).splits["train"].games == 2


def test_a_pack_killed_between_its_two_renames_is_put_back(games: Path):
    pack(games)
    PACK_FOLDER.rename(PACK_FOLDER.with_name(".alfworld.old"))
    assert len(read_official("valid_seen")) == 3


def test_a_full_disk(games: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(official, "write_games", full)
    result = dmr("data", "alfworld", "--from", str(games))
    assert result.exit_code == 2
    assert "no space left on the disk" in result.output
    assert not PACK_FOLDER.exists()


def test_what_is_not_packed_or_damaged_says_so(games: Path):
    with pytest.raises(UserError, match=r"valid_unseen\.parquet is missing: run `dmr data alfworld`"):
        read_official("valid_unseen")
    pack(games)
    with pytest.raises(UserError, match=r"valid_unseen\.parquet is missing"):
        read_official("valid_unseen")
    path = PACK_FOLDER / "valid_seen.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"valid_seen\.parquet is damaged: run `dmr data alfworld`"):
        read_official("valid_seen")


def test_a_pack_of_another_code_version_is_refused(games: Path, monkeypatch: pytest.MonkeyPatch):
    pack(games)
    monkeypatch.setattr(official, "CODE_VERSION", "next")
    with pytest.raises(UserError, match=r"has code version \d+, not next: run `dmr data alfworld`"):
        read_official("train")


def test_a_download_gives_the_same_files_as_a_folder(games: Path, site: tuple[str, Path], tmp_path: Path):
    zip_games(games, site[1] / "games.zip")
    sha256 = hashlib.sha256((site[1] / "games.zip").read_bytes()).hexdigest()
    pack(games, tmp_path / "from_folder")
    result = dmr("data", "alfworld", "--url", f"{site[0]}/games.zip", "--sha256", sha256)
    assert result.exit_code == 0, result.output
    assert f"archive: sha256 {sha256}" in result.output
    downloaded, from_folder = contents(PACK_FOLDER), contents(tmp_path / "from_folder")
    record, folder_record = json.loads(downloaded.pop("pack.json")), json.loads(from_folder.pop("pack.json"))
    assert downloaded == from_folder
    assert record["splits"] == folder_record["splits"]
    assert record["archive"] == {"url": f"{site[0]}/games.zip", "sha256": sha256}
    assert folder_record["archive"] is None
    assert not official.DOWNLOAD_FOLDER.exists()


def test_an_unknown_checksum_is_said_and_from_then_on_known(games: Path, site: tuple[str, Path]):
    url, archive = f"{site[0]}/games.zip", site[1] / "games.zip"
    zip_games(games, archive)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    first = dmr("data", "alfworld", "--url", url)
    assert first.exit_code == 0, first.output
    assert "not known to this project" in first.output
    assert f"--sha256 {sha256}" in first.output
    again = dmr("data", "alfworld", "--url", url)
    assert again.exit_code == 0, again.output
    assert "not known to this project" not in again.output
    assert f"must have sha256 {sha256}" in again.output

    add_game(games, "train", f"{TASK}/trial_4")
    archive.unlink()
    zip_games(games, archive)
    other = hashlib.sha256(archive.read_bytes()).hexdigest()
    packed = contents(PACK_FOLDER)
    refused = dmr("data", "alfworld", "--url", url)
    assert refused.exit_code == 2
    assert f"its sha256 is {other}, it should be {sha256}" in refused.output
    assert contents(PACK_FOLDER) == packed
    assert dmr("data", "alfworld", "--url", url, "--sha256", other).exit_code == 0
    assert official.known_checksum(url) == other


def test_a_checksum_that_the_project_knows_holds_for_its_own_address(monkeypatch: pytest.MonkeyPatch):
    assert official.known_checksum(official.ARCHIVE_URL) is official.ARCHIVE_SHA256
    monkeypatch.setattr(official, "ARCHIVE_SHA256", "ab" * 32)
    assert official.known_checksum(official.ARCHIVE_URL) == "ab" * 32
    assert official.known_checksum("http://127.0.0.1/games.zip") is None


def test_nothing_of_another_download_is_packed(games: Path, site: tuple[str, Path], tmp_path: Path):
    for name in ("a", "b"):
        zip_games(games, site[1] / f"{name}.zip")
        (games / "json_2.1.1" / "train" / TASK / "trial_3" / "game.tw-pddl").unlink(missing_ok=True)
    for name in ("a", "b"):
        download_games(f"{site[0]}/{name}.zip", tmp_path / "there")
    assert set(pack(tmp_path / "there").splits) == {"valid_seen"}


@pytest.mark.parametrize("damage", ["not a zip", "cut", "wrong CRC", "wrong sha256"])
def test_a_damaged_archive_is_deleted(games: Path, site: tuple[str, Path], damage: str):
    archive = site[1] / "games.zip"
    zip_games(games, archive)
    good = content = archive.read_bytes()
    if damage == "not a zip":
        content = b"<html>log in</html>"
    if damage == "cut":
        content = content[: len(content) // 2]
    if damage == "wrong CRC":
        entry = content.index(b"PK\x01\x02")  # the first entry of the table of contents, with its CRC at byte 16
        content = content[: entry + 16] + struct.pack("<I", 1) + content[entry + 20 :]
    archive.write_bytes(content)
    arguments = ("--url", f"{site[0]}/games.zip", *(["--sha256", "0" * 64] if damage == "wrong sha256" else []))
    result = dmr("data", "alfworld", *arguments)
    assert result.exit_code == 2, result.output
    assert ("its sha256 is" if damage == "wrong sha256" else "not a sound zip file") in result.output
    assert "the file was deleted, run the same command again" in result.output
    assert not PACK_FOLDER.exists()
    archive.write_bytes(good)
    assert dmr("data", "alfworld", "--url", f"{site[0]}/games.zip").exit_code == 0


@pytest.mark.parametrize("name", ["json_2.1.1/train/../../../../game.tw-pddl", "/json_2.1.1/train/a/b/game.tw-pddl"])
def test_an_archive_cannot_write_elsewhere(site: tuple[str, Path], tmp_path: Path, name: str):
    with zipfile.ZipFile(site[1] / "games.zip", "w") as file:
        file.writestr(name, "{}")
    with pytest.raises(UserError, match="would be unpacked outside of"):
        download_games(f"{site[0]}/games.zip", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("game.tw-pddl"))


def test_an_archive_without_games(site: tuple[str, Path], tmp_path: Path):
    with zipfile.ZipFile(site[1] / "games.zip", "w") as file:
        file.writestr("json_2.1.1/train/a/b/traj_data.json", "{}")
    with pytest.raises(UserError, match=r"there is no game\.tw-pddl in it"):
        download_games(f"{site[0]}/games.zip", tmp_path / "there")


def test_the_table_and_what_differs_from_the_official_data(games: Path):
    add_game(games, "valid_seen", f"{TASK}/unsolvable", solvable=False)
    add_game(games, "valid_seen", "pick_and_drop-Book-None-Desk-301/trial_1")
    result = dmr("data", "alfworld", ALFWORLD_DATA=str(games))
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "split games official skipped" in lines
    assert "train 1 3553 none" in lines
    assert "valid_seen 3 140 1 unsolvable, 1 other" in lines
    assert "valid_unseen not there 134" in lines
    assert "valid_seen: 3 games, but the official split has 140" in lines
    assert any(line.startswith(f"packed: {PACK_FOLDER} (0.0") for line in lines)


@pytest.mark.parametrize("option", ["--url", "--sha256"])
def test_options_of_the_download_are_refused_with_a_folder(games: Path, option: str):
    result = dmr("data", "alfworld", option, "a", ALFWORLD_DATA=str(games))
    assert result.exit_code == 2
    assert "are for the download, but the games are in" in result.output


def test_a_folder_without_games(tmp_path: Path):
    result = dmr("data", "alfworld", "--from", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "nowhere has no json_2.1.1/<split>/<task>/<trial>/game.tw-pddl" in result.output
    assert not PACK_FOLDER.parent.exists()


def test_help_names_the_licence():
    assert "MIT licence" in dmr("data", "alfworld", "--help").output


@needs.official_games
def test_the_official_games():
    packed = pack(needs.ALFWORLD_DATA)
    for split, found in packed.splits.items():
        assert (split, found.games) == (split, OFFICIAL_GAMES[split])
    games = read_official("valid_seen")
    assert len(games) == 140
    folder = needs.ALFWORLD_DATA / "json_2.1.1" / "valid_seen"
    assert games == [read_game(folder / game.task_id / "game.tw-pddl") for game in games]
