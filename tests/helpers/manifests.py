"""Artifacts of stages that a test ran by itself."""

from pathlib import Path

from dmr_pipeline.artifacts.manifest import MANIFEST, Manifest, hash_files


def publish(folder: Path) -> None:
    """Write the manifest of what is in the folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = hash_files(folder)
    manifest = Manifest(
        stage=folder.name, recipe="tiny", code_version="1", sections={}, inputs={}, files=files, summary={}
    )
    (folder / MANIFEST).write_text(manifest.to_json())
