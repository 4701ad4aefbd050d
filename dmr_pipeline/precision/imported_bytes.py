"""What the files of an imported rung store."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.frozen_model import FrozenModel

IMPORTED_FILE = "imported.json"


class ImportedBytes(FrozenModel):
    """The bytes of an imported rung's weights as its files store them: packed integers, scales, zeros, order of the inputs,
    and what is in float. A tied head that is stored beside an equal embedding counts once."""

    format: Literal["gptq", "awq", "gguf"]
    total: int
    """Of all weights."""
    embedding: int
    """Of the input embedding."""
    tied: bool
    """Whether the embedding is the head too, so that every pass reads all of it."""
    quantized_weights: int
    """Number of weights that are stored as integers."""

    @property
    def layers_and_head(self) -> int:
        """What every forward pass reads; of an embedding that is not the head it reads a token's row besides."""
        return self.total if self.tied else self.total - self.embedding


def imported_bytes(folder: Path) -> ImportedBytes | None:
    """Of the rung in the folder; None of one that was quantized here.

    Raises:
        UserError: the file that says it is damaged.
    """
    path = folder / IMPORTED_FILE
    if not path.is_file():
        return None
    try:
        return ImportedBytes.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {problems_of(error)[0]}") from error
