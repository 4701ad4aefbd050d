"""DVC's side: `dvc.yaml` and what Git ignores of the data are rendered from the pipeline table, and what Dagster materialises is
committed to DVC.

All paths are relative to the project's folder, which is the working directory.
"""

import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dmr_pipeline import interrupts
from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder
from dmr_pipeline.artifacts.manifest import MANIFEST, Artifact
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.hashing import file_md5
from dmr_pipeline.recipe.reading import RECIPE_FOLDER
from dmr_pipeline.recipe.text import read_mapping
from dmr_pipeline.versioning import lock_file
from dmr_pipeline.versioning.dvc_project import dvc_at_rest, repository
from dmr_pipeline.versioning.lock_file import LOCK_FILE as LOCK_FILE

if TYPE_CHECKING:
    from dvc_data.hashfile.db import HashFileDB

log = logging.getLogger(__name__)

DVC_FILE = Path("dvc.yaml")
IGNORE_FILE = DATA_ROOT / ".gitignore"
NEVER_TRACKED = "# Resume state, new trajectories and packed official games.\n/scratch/\n/incoming/\n/official/\n"
HEADER = "# Rendered from the table in dmr_pipeline/pipeline.py by `dmr render`: change that, not this.\n"


def stage_address(stage: Stage, recipe: str) -> str:
    """DVC's name of a stage for one recipe, such as `agent@alfworld-tiny`: how DVC itself names a matrix stage."""
    return f"{group_name(stage, recipe)}@{recipe}"


def group_name(stage: Stage, recipe: str) -> str:
    """Name of the matrix in `dvc.yaml` that has a stage for a recipe.

    Whether an output is cached cannot vary within a matrix, so a stage whose artifacts lie in Git for some recipes has two:
    `agent` for these and `cached_agent` for the others.
    """
    cached = stage.committed_recipes and recipe not in stage.committed_recipes
    return f"cached_{stage.name}" if cached else stage.name


def stage_command(stage: Stage, recipe: str) -> str:
    """The code version is in the command, since DVC goes stale when a command changes."""
    return f"dmr materialize {stage.name} --recipe {recipe} --code-version {stage.code_version}"


def render(stages: Sequence[Stage], recipes: Sequence[str]) -> str:
    """Content of `dvc.yaml`: one matrix stage over all recipes for each row of the table, or two (see `group_name`).

    Raises:
        UserError: a recipe's name is more than a word to a shell, which runs the commands in the file.
    """
    for recipe in recipes:
        if shlex.quote(recipe) != recipe:
            raise UserError(
                f"{RECIPE_FOLDER}/{recipe}.yaml: its name would reach a shell through {DVC_FILE}: rename it"
            )
    rendered: dict[str, Any] = {}
    for stage in stages:
        for group in sorted({group_name(stage, recipe) for recipe in recipes}):
            members = [recipe for recipe in recipes if group_name(stage, recipe) == group]
            rendered[group] = _render_stage(stage, members, cached=members[0] not in stage.committed_recipes)
    return HEADER + yaml.safe_dump({"stages": rendered}, sort_keys=False, width=1000)


def render_ignored(stages: Sequence[Stage]) -> str:
    """Content of the data folder's `.gitignore`: of all artifacts, those that the table names are Git's."""
    committed = [f"!/{recipe}/{stage.name}/\n" for stage in stages for recipe in stage.committed_recipes]
    return f"{HEADER}/*\n!/.gitignore\n!/*/\n/*/*\n{''.join(committed)}{NEVER_TRACKED}"


def _render_stage(stage: Stage, recipes: Sequence[str], *, cached: bool) -> dict[str, Any]:
    recipe = "${item.recipe}"
    # `dvc repro` would delete an output before the command runs: `persist` leaves that to our own atomic replacement,
    # so that a kill loses nothing and an artifact that is still current is not made again.
    options: dict[str, bool] = {"persist": True}
    if not cached:
        options["cache"] = False
    return {
        "matrix": {"recipe": list(recipes)},
        "desc": stage.description,
        "cmd": stage_command(stage, recipe),
        **({"deps": [artifact_folder(name, recipe).as_posix() for name in stage.inputs]} if stage.inputs else {}),
        "params": [{f"{RECIPE_FOLDER}/{recipe}.yaml": list(stage.sections)}],
        "outs": [{artifact_folder(stage.name, recipe).as_posix(): options}],
    }


def has_content(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def check_rendered(stages: Sequence[Stage], recipes: Sequence[str], file: Path = DVC_FILE) -> None:
    """Compare `dvc.yaml` with what it is rendered from.

    Raises:
        UserError: the file differs from the table or from the folder of recipes.
    """
    if not has_content(file, render(stages, recipes)):
        raise UserError(f"{file} is not what the pipeline table and {RECIPE_FOLDER}/ say: run `dmr render`")


def check_recipe_rendered(stages: Sequence[Stage], recipe: str, file: Path = DVC_FILE) -> None:
    """Compare what `dvc.yaml` says of one recipe with the table: others may be new, changed or gone while its stages run.

    Raises:
        UserError: it differs.
    """
    wanted = yaml.safe_load(render(stages, [recipe]))["stages"]
    try:
        written = yaml.safe_load(file.read_bytes())["stages"]
        there = {name: {**written[name], "matrix": {"recipe": [recipe]}} for name in wanted}
        listed = all(recipe in written[name]["matrix"]["recipe"] for name in wanted)
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        there, listed = {}, False
    if there != wanted or not listed:
        raise UserError(f"{file} is not what the pipeline table says of {recipe}: run `dmr render`")


def lock_entry(stage: Stage, recipe: str) -> Mapping[str, Any] | None:
    """What `dvc.lock` records of a stage; None where it has no entry.

    Raises:
        UserError: `dvc.lock` is unreadable; the message has the command that mends it.
    """
    return lock_file.read_entries().get(stage_address(stage, recipe))


def recorded_outputs(entry: Mapping[str, Any]) -> dict[str, str | None]:
    """Path -> hash of the outputs of an entry in `dvc.lock`."""
    return {out["path"]: out.get("md5") for out in entry.get("outs", [])}


def is_committed(stage: Stage, recipe: str, artifact: Artifact) -> bool:
    """Does `dvc.lock` record this artifact, made by this command from these inputs and parameters, as DVC would write it?"""
    return records(lock_file.read_entries(), stage, recipe, artifact)


def records(entries: lock_file.Entries, stage: Stage, recipe: str, artifact: Artifact) -> bool:
    """As `is_committed`, of entries that have been read: for whoever asks about many stages."""
    return entries.get(stage_address(stage, recipe)) == _expected_entry(stage, recipe, artifact)


def _expected_entry(stage: Stage, recipe: str, artifact: Artifact) -> dict[str, Any]:
    """With the keys in DVC's order."""
    recipe_file = RECIPE_FOLDER / f"{recipe}.yaml"
    content = read_mapping(recipe_file)
    inputs = sorted((artifact_folder(name, recipe), md5) for name, md5 in artifact.manifest.inputs.items())
    return {
        "cmd": stage_command(stage, recipe),
        **({"deps": [_expected_item(folder, md5) for folder, md5 in inputs]} if inputs else {}),
        "params": {recipe_file.as_posix(): {name: content.get(name) for name in sorted(stage.sections)}},
        "outs": [_expected_item(artifact.path, artifact.hash)],
    }


def _expected_item(folder: Path, md5: str) -> dict[str, str | int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"path": folder.as_posix(), "hash": "md5", "md5": md5, "size": sum(sizes), "nfiles": len(sizes)}


def inside_repro() -> bool:
    """Whether `dvc repro` has started this command: it brings the stage's inputs itself, and records what comes of it."""
    return "DVC_STAGE" in os.environ


def commit(stage: Stage, recipe: str, *, rebuilt: bool, artifact: Artifact) -> bool:
    """Record a materialised artifact in DVC; True where there was something to record. As `dvc commit` does, to the byte, but a
    kill at any moment leaves the old `dvc.lock` or the new one, an object of the cache that is damaged is replaced, and
    `dvc.yaml`, which takes longer to read than most artifacts to hash, stays closed.

    Inside `dvc repro` nothing is to be done: DVC records the stage itself when its command ends.

    Raises:
        UserError: DVC refuses; its reason is in the message. Or the artifact was changed meanwhile.
    """
    if inside_repro():
        return False
    if not rebuilt and is_committed(stage, recipe, artifact):
        return False
    with dvc_at_rest():
        lock_file.check_and_copy()
        if recipe not in stage.committed_recipes:
            _add_to_cache(artifact)
        with interrupts.held_back():  # short, and a commit that is done need not be done again
            lock_file.record(stage_address(stage, recipe), _expected_entry(stage, recipe, artifact))
    return True


def _add_to_cache(artifact: Artifact) -> None:
    """The files, as copies: what is published is not written again."""
    with repository() as repo:
        from dvc.fs import localfs
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.transfer import transfer

        cache = repo.cache.local
        source, _, tree = build(cache, str(artifact.path.absolute()), localfs, "md5", ignore=repo.dvcignore)
        if tree.hash_info.value != artifact.hash:
            raise UserError(f"{artifact.path} was changed while it was recorded: run again")
        manifest = file_md5(artifact.path / MANIFEST)
        drop_damaged(cache, [artifact.hash, manifest, *artifact.manifest.files.values()])
        transfer(source, cache, {tree.hash_info}, shallow=False)


def drop_damaged(cache: "HashFileDB", oids: Iterable[str]) -> list[str]:
    """Remove the objects whose content is not what their name says, since DVC itself looks only at their file mode."""
    damaged = [
        oid for oid in oids if cache.exists(oid) and file_md5(Path(cache.oid_to_path(oid))) != oid.removesuffix(".dir")
    ]
    for oid in damaged:
        log.warning("DVC's object %s is damaged and is removed", cache.oid_to_path(oid))
        cache.delete(oid)
    return damaged
