"""Routers that were trained at some time, by the hash of their artifact `grpo_router`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmr_pipeline.artifacts.folders import DATA_ROOT, artifact_folder
from dmr_pipeline.artifacts.manifest import folder_hash, hash_files
from dmr_pipeline.recipe.reading import load_recipe


@contextmanager
def trained_router(recipe: str, wanted: str, data_root: Path = DATA_ROOT) -> Iterator[Path]:
    """A folder with the artifact of this hash: the present one, or a restored one for as long as needed.

    Raises:
        UserError: it is neither there, nor in DVC's cache, nor in the recipe's remote.
    """
    present = artifact_folder("grpo_router", recipe, data_root)
    if present.is_dir() and folder_hash(hash_files(present)) == wanted:
        yield present
        return
    from dmr_pipeline.versioning import dvc_objects

    with tempfile.TemporaryDirectory(prefix=".restored-", dir=present.parent) as folder:  # no further disk is needed
        restored = Path(folder) / present.name
        dvc_objects.restore(wanted, restored, load_recipe(recipe).versioning.remote)
        yield restored
