"""Downloads from a server of our own, which misbehaves on demand."""

import base64
import hashlib
import random
import re
import shutil
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from urllib3.util import Retry

from dmr_pipeline import download as downloader
from dmr_pipeline.download import download
from dmr_pipeline.errors import UserError

CONTENT = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What it serves, how it fails, and what it was asked."""

    url: str
    content: bytes = CONTENT
    etag: str | None = '"1"'
    md5: str | None = None
    ranges: bool = True
    length: bool = True
    cut_after: int | None = None
    """Bytes of an answer's body after which the connection is closed."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the next answers."""
    asked: list[str] = field(default_factory=list)
    """The Range of each request, empty where it has none."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(downloader, "RETRIES", Retry(total=2, backoff_factor=0, status_forcelist=(503,)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            state.asked.append(asked)
            if state.failures:
                self.send_error(state.failures.pop(0))
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and state.ranges else 0
            if start and start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.md5 and not start:
                self.send_header("Content-MD5", state.md5)
            self.end_headers()
            self.wfile.write(body[: state.cut_after])

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = Server(f"http://127.0.0.1:{http.server_port}/games.zip")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def cut(server: Server, path: Path, after: int = 600_000) -> None:
    """A first try, of which `after` bytes arrive."""
    server.cut_after = after
    with pytest.raises(UserError, match=r"was cut after [\d,]+ of 1,500,000 bytes: run the same command again"):
        download(server.url, path)
    assert not path.exists()
    server.cut_after = None
    server.asked.clear()


@pytest.mark.parametrize("length", [True, False])
def test_a_file_arrives_whole_and_nothing_else_stays(server: Server, tmp_path: Path, length: bool):
    server.length = length
    server.md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    path = tmp_path / "new" / "games.zip"
    assert download(server.url, path, SHA256.upper()) == SHA256
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == {"games.zip"}


def test_a_file_that_is_there_is_kept(server: Server, tmp_path: Path):
    path = tmp_path / "games.zip"
    path.write_bytes(b"whole")
    assert download(server.url, path) == hashlib.sha256(b"whole").hexdigest()
    assert server.asked == []


def test_a_cut_download_is_resumed(server: Server, tmp_path: Path):
    path = tmp_path / "games.zip"
    server.md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    cut(server, path)
    arrived = (tmp_path / "games.zip.part").stat().st_size
    assert 600_000 - downloader.CHUNK_BYTES < arrived <= 600_000
    assert download(server.url, path, SHA256) == SHA256
    assert server.asked == [f"bytes={arrived}-"]
    assert left(tmp_path) == {"games.zip"}


def test_a_server_without_ranges_starts_from_zero(server: Server, tmp_path: Path):
    cut(server, tmp_path / "games.zip")
    server.ranges = False
    assert download(server.url, tmp_path / "games.zip") == SHA256


@pytest.mark.parametrize("change", ["longer", "shorter than what is there", "another URL", "no version"])
def test_pieces_of_two_files_are_never_joined(server: Server, tmp_path: Path, change: str):
    if change == "no version":
        server.etag = None
    cut(server, tmp_path / "games.zip")
    server.content, server.etag = CONTENT[::-1], '"2"'
    if change == "shorter than what is there":
        server.content = server.content[:1000]
    url = f"{server.url}?other" if change == "another URL" else server.url
    assert download(url, tmp_path / "games.zip") == hashlib.sha256(server.content).hexdigest()


@pytest.mark.parametrize("damage", ["record lost", "record malformed", "part lost"])
def test_a_part_that_cannot_be_trusted_is_dropped(server: Server, tmp_path: Path, damage: str):
    cut(server, tmp_path / "games.zip")
    if damage == "record lost":
        (tmp_path / "games.zip.part.json").unlink()
    if damage == "record malformed":
        (tmp_path / "games.zip.part.json").write_text("[")
    if damage == "part lost":
        (tmp_path / "games.zip.part").unlink()
    assert download(server.url, tmp_path / "games.zip") == SHA256
    assert server.asked == [""]


def test_a_complete_part_is_only_renamed(server: Server, tmp_path: Path):
    cut(server, tmp_path / "games.zip")
    (tmp_path / "games.zip.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "games.zip") == SHA256
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_wrong_checksum_of_the_caller(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match=f"its sha256 is {SHA256}, it should be {'0' * 64}: the file was deleted"):
        download(server.url, tmp_path / "games.zip", "0" * 64)
    assert not left(tmp_path) & {"games.zip", "games.zip.part"}
    assert download(server.url, tmp_path / "games.zip", SHA256) == SHA256
    with pytest.raises(UserError, match="is not a sha256"):
        download(server.url, tmp_path / "games.zip", "abc")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_wrong_checksum_of_the_server(server: Server, tmp_path: Path, resumed: bool):
    server.md5 = base64.b64encode(hashlib.md5(b"other").digest()).decode()
    if resumed:
        cut(server, tmp_path / "games.zip")
    with pytest.raises(UserError, match=rf"its MD5 is \S+, it should be {re.escape(server.md5)}"):
        download(server.url, tmp_path / "games.zip")
    assert not left(tmp_path) & {"games.zip", "games.zip.part"}


def test_a_passing_failure_is_tried_again(server: Server, tmp_path: Path):
    server.failures = [503, 503]
    assert download(server.url, tmp_path / "games.zip") == SHA256
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "message"), [(404, "the server answers 404"), (503, "no answer .*503")])
def test_a_failure_that_stays(server: Server, tmp_path: Path, status: int, message: str):
    server.failures = [status] * 5
    with pytest.raises(UserError, match=message):
        download(server.url, tmp_path / "games.zip")
    assert left(tmp_path) == set()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/games.zip", "games.zip", "file:///games.zip"])
def test_an_address_where_nothing_answers(server: Server, tmp_path: Path, url: str):
    with pytest.raises(UserError, match=rf"^{url}: no answer .*check the address"):
        download(url, tmp_path / "games.zip")


def test_too_large_for_the_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cut(server, tmp_path / "games.zip", after=500_000)
    arrived = (tmp_path / "games.zip.part").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=200_000))
        with pytest.raises(UserError, match=r"1\.0 MB are still missing, 0\.2 MB are free: make room and run"):
            download(server.url, tmp_path / "games.zip")
    assert download(server.url, tmp_path / "games.zip") == SHA256
    assert server.asked == [f"bytes={arrived}-"] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("length", [True, False])
def test_the_disk_fills_up(server: Server, tmp_path: Path, length: bool):
    server.length = length
    (tmp_path / "games.zip.part").symlink_to("/dev/full")
    missing = r"1\.5 MB are still missing, " if length else ""
    with pytest.raises(UserError, match=rf"no space left for \S+games\.zip\.part: {missing}[\d,.]+ MB are free"):
        download(server.url, tmp_path / "games.zip")
    assert "games.zip" not in left(tmp_path)


def test_one_process_at_a_time(server: Server, tmp_path: Path):
    with (
        FileLock(tmp_path / ".games.zip.lock"),
        pytest.raises(UserError, match="another process downloads it"),
    ):
        download(server.url, tmp_path / "games.zip")
