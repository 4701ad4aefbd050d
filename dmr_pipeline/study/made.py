"""What a study makes before it plays: its ladder, where it has precisions of its own; its games, where they are another
benchmark's; and its routers. Each stage runs once for all that it is the same for, and not where the recipe's own artifact, or
another study's, is what it would make."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import link
from pathlib import Path

from pydantic import ValidationError

from dmr_pipeline.artifacts.folders import artifact_folder, locked
from dmr_pipeline.artifacts.manifest import MANIFEST, Manifest, verify
from dmr_pipeline.artifacts.materialize import kept_folder, materialize_stage
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.artifacts.stage import Stage
from dmr_pipeline.errors import UserError
from dmr_pipeline.pipeline import STAGES, find_stage
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.study.design import Study, games_recipe, ladder_recipe, variant_recipe

log = logging.getLogger(__name__)

TASKS = "benchmark_tasks"
CHECKPOINTS = "quantized_checkpoints"


@dataclass(frozen=True)
class Made:
    """What a study plays with."""

    recipe: Recipe
    """With the study's precisions."""
    checkpoints: Path
    """The artifact of its ladder."""
    tasks: Path
    """The artifact of the recipe's games."""
    games: Path | None
    """The artifact of the benchmark that the study names; None where it names none."""
    routers: Mapping[tuple[str, int], Path]
    """(Router, training seed) -> artifact."""


def make(study: Study, data_root: Path, folder: Path) -> Made:
    """Make what is missing.

    Args:
        data_root: with the recipe's own artifacts.
        folder: of the study's, in one of its own beside those of other studies.

    Raises:
        UserError: as `materialize_stage`.
    """
    # An agent that lies in Git comes without the games that it was trained on. Under the study's own name they would be other
    # inputs than that agent's, and another one would be trained.
    materialize_stage(find_stage(TASKS, STAGES), load_recipe(study.recipe), data_root)
    _refuse_stale(load_recipe(study.recipe), ["agent"] if study.precisions else ["agent", CHECKPOINTS], data_root)
    recipe = ladder_recipe(study)
    own = folder if study.precisions else data_root
    if study.precisions:
        _make_ladder(study, recipe, data_root, folder)
    of_games = games_recipe(study)
    return Made(
        recipe,
        artifact_folder(CHECKPOINTS, recipe.name, own),
        artifact_folder(TASKS, recipe.name, own),
        None if of_games is None else _make(TASKS, of_games, study, data_root, folder),
        _train(study, data_root, folder),
    )


def _refuse_stale(recipe: Recipe, names: Sequence[str], data_root: Path) -> None:
    """Routers would be trained on what the recipe says now, and play with what it said then."""
    for name in names:
        stage, folder = find_stage(name, STAGES), artifact_folder(name, recipe.name, data_root)
        inputs = {other: verify(artifact_folder(other, recipe.name, data_root)).hash for other in stage.inputs}
        if difference := provenance(stage, recipe, inputs).difference(verify(folder).manifest):
            raise UserError(
                f"{folder} is not what the recipe says now ({difference}): `dmr ladder {recipe.name}` makes it again"
            )


def _make_ladder(study: Study, recipe: Recipe, data_root: Path, folder: Path) -> None:
    """Rungs that the recipe's own ladder has are not measured again."""
    kept = kept_folder(CHECKPOINTS, recipe.name, folder)
    measured = kept_folder(CHECKPOINTS, study.recipe, data_root)
    if measured.is_dir() and not kept.is_dir():
        shutil.copytree(measured, kept, copy_function=link)
    _make(CHECKPOINTS, recipe, study, data_root, folder)


def _train(study: Study, data_root: Path, folder: Path) -> dict[tuple[str, int], Path]:
    return {
        (name, seed): _make(variant.stage, variant_recipe(study, name, seed), study, data_root, folder)
        for name, variant in study.routers.items()
        for seed in study.seeds
    }


def _make(wanted: str, recipe: Recipe, study: Study, data_root: Path, folder: Path) -> Path:
    """The artifact of a stage; the stages that it needs are made too."""
    for stage in _up_to(wanted):
        _adopt(stage, recipe, artifact_folder(stage.name, study.recipe, data_root), folder)
        artifact = materialize_stage(stage, recipe, folder).artifact
    return artifact.path


def _up_to(wanted: str) -> list[Stage]:
    """The stages that this one needs, and itself, in the pipeline's order."""
    stages = {stage.name: stage for stage in STAGES}
    needed = {wanted}
    for stage in reversed(STAGES):
        if stage.name in needed:
            needed |= set(stage.inputs)
    return [stages[name] for name in stages if name in needed]


def _adopt(stage: Stage, recipe: Recipe, base: Path, folder: Path) -> None:
    """Let the study's folder have an artifact that is already what the stage would make there: the same files, which nobody
    changes in place."""
    wanted_at = artifact_folder(stage.name, recipe.name, folder)
    wanted_at.parent.mkdir(parents=True, exist_ok=True)
    with locked(wanted_at):
        if wanted_at.is_dir():
            return
        inputs = {name: verify(artifact_folder(name, recipe.name, folder)).hash for name in stage.inputs}
        wanted = provenance(stage, recipe, inputs)
        for candidate in [base, *sorted(folder.parents[1].glob(f"*/{folder.name}/*/{stage.name}"))]:
            manifest = _manifest(candidate)
            if manifest is not None and wanted.difference(manifest) is None:
                log.info("%s of %s: that of %s", stage.name, recipe.name, candidate)
                new = wanted_at.with_name(f".{stage.name}.linked")
                shutil.rmtree(new, ignore_errors=True)
                shutil.copytree(verify(candidate).path, new, copy_function=link)
                new.rename(wanted_at)
                return


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
