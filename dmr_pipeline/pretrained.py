"""What an LLM that is brought along is read from: known without loading it, so that provenance can hash it."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from dmr_pipeline.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


class AdapterConfig(BaseModel):
    """What is read here of a PEFT adapter's config; PEFT reads the rest."""

    base_model_name_or_path: str | None = None
    """A folder, if relative then to the working directory, or a hub id."""
    revision: str | None = None
    """Of the base, where that is a hub id."""


def pretrained_folders(source: str | Path) -> list[Path]:
    """The local folders whose files make up a pretrained LLM: its own and, where that holds an adapter, its base's.

    None for a hub id, which its commit hash pins.

    Raises:
        UserError: the adapter's config is unreadable.
    """
    folder = Path(source)
    if not folder.is_dir():
        return []
    adapter = adapter_config(folder)
    base = adapter and adapter.base_model_name_or_path
    return [folder, Path(base)] if base and Path(base).is_dir() else [folder]


def adapter_config(folder: Path) -> AdapterConfig | None:
    """The config of the PEFT adapter in the folder; None where there is no adapter in it.

    Raises:
        UserError: the config is unreadable.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        return AdapterConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: not the config of an adapter: {error.errors()[0]['msg']}") from error
