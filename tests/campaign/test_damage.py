"""Damage in every kind of file that a project holds: each is found and said, or it is harmless, the result being what it
would have been without it."""

import json
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
import torch
from typer.testing import CliRunner

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts import MANIFEST, artifact_folder, hash_files, materialize_stage, sidecar_path, verify
from dmr_pipeline.cli import app
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe, load_recipe
from dmr_pipeline.resume import load_state, save_state
from dmr_pipeline.versioning import dvc_objects, dvc_stages, lock_file
from tests.fake_project import RECIPE
from tests.test_cli import fake_report  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

NAMES = [stage.name for stage in pipeline.STAGES]
ADDRESSES = {f"{name}@{RECIPE}" for name in NAMES}
STATE = Path("data/scratch/fake/agent/x/training.pt")
KEPT = ("data", ".dvc", "recipes", "dvc.lock", "dvc.yaml")
HANG_SECONDS = 120


@dataclass(frozen=True)
class Damage:
    kind: str
    what: str
    do: Callable[[random.Random], None]


def flip(path: Path) -> Callable[[random.Random], None]:
    def do(rng: random.Random) -> None:
        content = bytearray(path.read_bytes())
        position = rng.randrange(len(content))
        content[position] ^= 1 << rng.randrange(8)
        write(path, bytes(content))

    return do


def cut(path: Path, share: float) -> Callable[[random.Random], None]:
    return lambda rng: write(path, path.read_bytes()[: int(share * path.stat().st_size)])


def put(path: Path, content: bytes) -> Callable[[random.Random], None]:
    return lambda rng: write(path, content)


def remove(path: Path) -> Callable[[random.Random], None]:
    return lambda rng: path.unlink()


def write(path: Path, content: bytes) -> None:
    """Whatever the file's mode, which stays: a disk asks nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode if path.exists() else 0o644
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def edit(path: Path, key: str) -> Callable[[random.Random], None]:
    """What a manifest says under a key."""

    def do(rng: random.Random) -> None:
        content = json.loads(path.read_text())
        content[key] = content[key] | {"added": "1"} if isinstance(content[key], dict) else content[key] + "1"
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    return do


def from_damaged_cache(
    name: str, harm: Callable[[Path], Callable[[random.Random], None]]
) -> Callable[[random.Random], None]:
    """An object of the stage's artefact is damaged in DVC's cache, and the folder comes from there."""

    def do(rng: random.Random) -> None:
        folder = artifact_folder(name, RECIPE)
        oid = rng.choice([hash_files(folder)["content.json"], hash_files(folder)[MANIFEST], verify(folder).hash])
        harm(Path(".dvc/cache/files/md5", oid[:2], oid[2:]))(rng)
        shutil.rmtree(folder)

    return do


def damages() -> Iterator[Damage]:
    for name in NAMES:
        content = artifact_folder(name, RECIPE) / "content.json"
        yield Damage("artefact", f"{name} flipped", flip(content))
        yield Damage("artefact", f"{name} cut", cut(content, 0.5))
        yield Damage("artefact", f"{name} removed", remove(content))
        yield Damage("artefact", f"{name} stray file", put(content.with_name("stray"), b"x"))
        yield Damage("manifest", f"{name} flipped", flip(content.with_name(MANIFEST)))
        yield Damage("run record", f"{name} flipped", flip(sidecar_path(content.parent)))
    for name in ("benchmark_tasks", "agent", "released_router", "evaluation_report"):
        manifest = artifact_folder(name, RECIPE) / MANIFEST
        for key in ("stage", "recipe", "code_version", "sections", "inputs", "files", "summary"):
            yield Damage("manifest", f"{name} {key}", edit(manifest, key))
        for harm, content in (("empty", b""), ("binary", b"\xff\x00\xfe"), ("another", b"{}")):
            yield Damage("manifest", f"{name} {harm}", put(manifest, content))
            yield Damage("run record", f"{name} {harm}", put(sidecar_path(manifest.parent), content))
    for number in range(12):
        yield Damage("dvc.lock", f"flip {number}", flip(Path("dvc.lock")))
        yield Damage("dvc.lock", f"cut at {number}/12", cut(Path("dvc.lock"), number / 12))
    yield Damage("dvc.lock", "removed", remove(Path("dvc.lock")))
    yield Damage("dvc.lock", "conflict", lambda rng: Path("dvc.lock").write_text("<<<<<<< a\n=======\n>>>>>>> b\n"))
    for harm, content in (("empty", b""), ("binary", b"\xff\x00\xfe")):
        yield Damage("rwlock", harm, put(Path(".dvc/tmp/rwlock"), content))
        yield Damage("copy of dvc.lock", harm, put(lock_file.COPY, content))
        yield Damage("dvc.yaml", harm, put(Path("dvc.yaml"), content))
        yield Damage("recipe", harm, put(Path("recipes/fake.yaml"), content))
    for number in range(10):
        yield Damage("recipe", f"flip {number}", flip(Path("recipes/fake.yaml")))
        yield Damage("resume state", f"flip {number}", flip(STATE))
        yield Damage("resume state", f"cut at {number}/10", cut(STATE, number / 10))
    for name in ("benchmark_tasks", "ingested_trajectories", "released_router", "kl_router"):
        for harm in (flip, remove, lambda path: cut(path, 0.5)):
            yield Damage("cache", name, from_damaged_cache(name, harm))


def make_all(recipe: Recipe) -> None:
    """What a run does, without Dagster around it."""
    for stage in pipeline.STAGES:

        def accept(artifact) -> None:
            dvc_objects.check(pipeline.find_stage(artifact.path.name, pipeline.STAGES), RECIPE, artifact)

        lost = dvc_objects.ensure_history(stage, RECIPE)
        done = materialize_stage(stage, recipe, expected=lost, accept=accept)
        dvc_stages.commit(stage, RECIPE, artifact=done.artifact, rebuilt=not done.skipped)


def result() -> dict[str, object]:
    """What decides whether DVC or a run makes a stage again; sizes in `dvc.lock` are only shown."""
    artefacts = {name: verify(artifact_folder(name, RECIPE)).hash for name in NAMES}
    recorded = {
        address: (entry["cmd"], entry["params"], [item["md5"] for item in (*entry.get("deps", []), *entry["outs"])])
        for address, entry in lock_file.read_entries().items()
        if address in ADDRESSES
    }
    return {"artefacts": artefacts, "recorded": recorded}


def outcome(before: dict[str, object], state: dict[str, torch.Tensor]) -> str:
    """Said: by the status, or by an error of one line. Harmless: a run then ends with what was there before."""
    status = CliRunner().invoke(app, ["status", RECIPE])
    if status.exception is not None and not isinstance(status.exception, SystemExit):
        raise status.exception
    said = status.exit_code == 2 or bool(re.search("damaged|stale|missing|has lost", status.output + status.stderr))
    try:
        make_all(load_recipe(RECIPE))
        dvc_stages.check_rendered(pipeline.STAGES, [RECIPE])
        loaded = load_state(STATE)
    except UserError as error:
        return "said" if "\n" not in str(error) else "traceback"
    if loaded is not None and not torch.equal(loaded["weights"], state["weights"]):
        return "silent"
    if result() == before:
        return "said" if said or loaded is None else "harmless"
    # Other results are right only where other ones were asked for.
    asked = Path("recipes/fake.yaml").read_bytes() != RECIPE_BEFORE[0]
    return "said" if said and asked else "silent"


RECIPE_BEFORE = [b""]


def test_all_damage_is_found_or_harmless(
    finished_project: Recipe, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    rng, state = random.Random(20), {"weights": torch.arange(300.0)}
    STATE.parent.mkdir(parents=True)
    save_state(STATE, state)
    lock_file.read_entries()
    before, template = result(), tmp_path_factory.mktemp("template")
    RECIPE_BEFORE[0] = Path("recipes/fake.yaml").read_bytes()
    for name in KEPT:
        copy(Path(name), template / name)

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    counts: dict[str, Counter[str]] = {}
    wrong = []
    signal.signal(signal.SIGALRM, give_up)
    for damage in damages():
        damage.do(rng)
        signal.alarm(HANG_SECONDS)
        try:
            found = outcome(before, state)
        except TimeoutError:
            found = "hang"
        except Exception as error:  # noqa: BLE001 - that is what is counted
            found = "traceback"
            wrong.append(f"{type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        counts.setdefault(damage.kind, Counter())[found] += 1
        if found not in ("said", "harmless"):
            wrong.append(f"{damage.kind}, {damage.what}: {found}")
        for name in KEPT:
            remove_all(Path(name))
            copy(template / name, Path(name))
    total = sum(counts.values(), Counter())
    figures = ", ".join(f"{name} {total[name]}" for name in ("silent", "traceback", "hang"))
    with capsys.disabled():
        print(f"\nflips {total.total()}: {figures}", {kind: dict(counter) for kind, counter in counts.items()})  # noqa: T201
    assert total.total() >= 100
    assert not wrong


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def remove_all(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
