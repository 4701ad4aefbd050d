"""Damage in every kind of file that a project holds: each is found and said, or it is harmless, the result being what it
would have been without it."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.folders import artifact_folder, sidecar_path
from dmr_pipeline.artifacts.manifest import MANIFEST, Artifact, hash_files, verify
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.artifacts.resume import load_state, save_state
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.versioning import dvc_objects, dvc_stages, lock_file
from tests.helpers.commands import dmr
from tests.helpers.deadline import Hang, at_most_seconds
from tests.helpers.fake_project import RECIPE

pytestmark = pytest.mark.slow

NAMES = [stage.name for stage in pipeline.STAGES]
ADDRESSES = {dvc_stages.stage_address(stage, RECIPE) for stage in pipeline.STAGES}
STATE = Path("data/scratch/fake/agent/x/training.pt")
KEPT = ("data", ".dvc", "recipes", "dvc.lock", "dvc.yaml")
HANG_SECONDS = 120
LOCK_FIELDS = {
    "schema": "schema",
    "its version": "2[.]0",
    "stages": "(?<=\n)stages:",
    "a stage's name": "cached_agent@fake",
    "a stage of the end": "released_router@fake",
    "command": "(?<=cmd: )[^\n]+",
    "key of a list": "(?<=\n    )deps",
    "path": "(?<=path: )[^\n]+",
    "key of a hash's name": "hash(?=: md5)",
    "hash's name": "(?<=hash: )md5",
    "hash of a dependency": "(?<=\n      md5: )[^\n]+(?=\n      size: [0-9]+\n      nfiles: [0-9]+\n    params)",
    "size of a dependency": "(?<=\n      size: )[0-9]+(?=\n      nfiles: [0-9]+\n    params)",
    "files of a dependency": "(?<=\n      nfiles: )[0-9]+(?=\n    params)",
    "file of parameters": "(?<=\n      )recipes/fake[.]yaml",
    "key of a parameter": "agent_train",
    "parameter": "(?<=agent_train: )[0-9]+",
    "hash of an output": "(?<=\n      md5: )[^\n]+(?=\n      size: [0-9]+\n      nfiles: [0-9]+\n  [a-z])",
    "size of an output": "(?<=\n      size: )[0-9]+(?=\n      nfiles: [0-9]+\n  [a-z])",
    "files of an output": "(?<=\n      nfiles: )[0-9]+(?=\n  [a-z])",
    "size of the last output": "[0-9]+(?=\n      nfiles: [0-9]+\n$)",
    "files of the last output": "[0-9]+(?=\n$)",
}
"""A field of `dvc.lock` and where it is first found."""


@dataclass(frozen=True)
class Damage:
    kind: str
    what: str
    do: Callable[[random.Random], None]


def flip(path: Path, within: str = ".+") -> Callable[[random.Random], None]:
    """One bit of the file, in the first place of it that matches."""

    def do(rng: random.Random) -> None:
        content = bytearray(path.read_bytes())
        found = re.search(within.encode(), content, re.DOTALL)
        assert found is not None
        position = rng.randrange(*found.span())
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
    """An object of the stage's artifact is damaged in DVC's cache, and the folder comes from there."""

    def do(rng: random.Random) -> None:
        folder = artifact_folder(name, RECIPE)
        oid = rng.choice([hash_files(folder)["content.json"], hash_files(folder)[MANIFEST], verify(folder).hash])
        harm(Path(".dvc/cache/files/md5", oid[:2], oid[2:]))(rng)
        shutil.rmtree(folder)

    return do


def damages() -> Iterator[Damage]:
    for name in NAMES:
        content = artifact_folder(name, RECIPE) / "content.json"
        yield Damage("artifact", f"{name} flipped", flip(content))
        yield Damage("artifact", f"{name} cut", cut(content, 0.5))
        yield Damage("artifact", f"{name} removed", remove(content))
        yield Damage("artifact", f"{name} stray file", put(content.with_name("stray"), b"x"))
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
    for field, within in LOCK_FIELDS.items():
        for _ in range(2):
            yield Damage("dvc.lock", field, flip(Path("dvc.lock"), within))
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


def make_all(recipe: str, stages: list[str], *, force: bool = False) -> None:
    """What a run does, without Dagster around it."""
    for stage in pipeline.STAGES:

        def accept(artifact: Artifact) -> None:
            dvc_objects.check(pipeline.find_stage(artifact.path.name, pipeline.STAGES), recipe, artifact)

        lost = dvc_objects.ensure_history(stage, recipe)
        done = materialize_stage(stage, load_recipe(recipe), expected=lost, accept=accept)
        dvc_stages.commit(stage, recipe, artifact=done.artifact, rebuilt=not done.skipped)


@dataclass(frozen=True)
class Project:
    """What a user has of a run, in bytes and hashes."""

    recipe: bytes
    artifacts: dict[str, str]
    lock: bytes
    entries: dict[str, object]
    """Of `dvc.lock`, those of stages that there are."""

    @classmethod
    def read(cls) -> "Project":
        artifacts = {name: verify(artifact_folder(name, RECIPE)).hash for name in NAMES}
        entries = {address: entry for address, entry in lock_file.read_entries().items() if address in ADDRESSES}
        return cls(Path("recipes/fake.yaml").read_bytes(), artifacts, Path("dvc.lock").read_bytes(), entries)


def outcome(before: Project, state: dict[str, torch.Tensor]) -> str:
    """Said: by the status, by the run, or by an error of one line. Harmless: after a run all is, byte for byte, as it was
    before. An entry of `dvc.lock` that was lost, and said to be, comes back as it was, though in another place."""
    said = False
    for result in (dmr("status", RECIPE), dmr("run", RECIPE)):
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code == 2:
            return "said" if len(result.stderr.splitlines()) == 1 else "traceback"
        said = said or bool(re.search("damaged|stale|missing|has lost", result.output + result.stderr))
    try:
        loaded = load_state(STATE)
    except UserError as error:
        return "said" if "\n" not in str(error) else "traceback"
    if loaded is not None and not torch.equal(loaded["weights"], state["weights"]):
        return "silent"
    after = Project.read()
    if after == before:
        return "said" if said or loaded is None else "harmless"
    # Other results are right only where other ones were asked for.
    same = (after.artifacts, after.entries) == (before.artifacts, before.entries)
    return "said" if said and (same or after.recipe != before.recipe) else "silent"


def test_all_damage_is_found_or_harmless(
    finished_project: Recipe,
    fake_report: None,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("dmr_pipeline.cli.stages._materialize", make_all)
    rng, state = random.Random(20), {"weights": torch.arange(300.0)}
    STATE.parent.mkdir(parents=True)
    save_state(STATE, state)
    before, template = Project.read(), tmp_path_factory.mktemp("template")
    undamaged = {path: path.read_bytes() for path in (Path("dvc.lock"), Path("recipes/fake.yaml"))}
    for name in KEPT:
        copy(Path(name), template / name)

    counts: dict[str, Counter[str]] = {}
    wrong = []
    for damage in damages():
        damage.do(rng)
        lines = changed_lines(undamaged)
        try:
            with at_most_seconds(HANG_SECONDS):
                found = outcome(before, state)
        except Hang:
            found = "hang"
        except Exception as error:  # noqa: BLE001 - that is what is counted
            found = "traceback"
            wrong.append(f"{type(error).__name__}: {error}")
        counts.setdefault(damage.kind, Counter())[found] += 1
        if found not in ("said", "harmless"):
            wrong.append(f"{damage.kind}, {damage.what}: {found}: {lines}")
        for name in KEPT:
            remove_all(Path(name))
            copy(template / name, Path(name))
    total = sum(counts.values(), Counter())
    figures = ", ".join(f"{name} {total[name]}" for name in ("silent", "traceback", "hang"))
    with capsys.disabled():
        print(f"\nflips {total.total()}: {figures}", {kind: dict(counter) for kind, counter in counts.items()})  # noqa: T201
    assert total.total() >= 100
    assert not wrong


def changed_lines(undamaged: dict[Path, bytes]) -> list[bytes]:
    """To say which flip it was that nobody said."""
    now = [line for path in undamaged if path.exists() for line in path.read_bytes().splitlines()]
    before = {line for content in undamaged.values() for line in content.splitlines()}
    return [line for line in now if line not in before]


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
