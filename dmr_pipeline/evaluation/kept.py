"""Tables that outlive the run that made them, each under all that it depends on: who asks with anything changed finds nothing.

They spare work and are no artifact: where one is missing or damaged, what it holds is computed again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl
from pydantic import JsonValue

from dmr_pipeline.hashing import file_md5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptTables:
    """Parquet files `<hash of the facts>.<md5 of the file>.parquet` in one folder."""

    folder: Path
    """It need not exist."""
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    """What all tables that are read and written here depend on."""
    used: set[str] = field(default_factory=set)
    """Keys that were read or written, also by others of the same folder (`under`)."""

    def under(self, **facts: JsonValue) -> "KeptTables":
        """The same folder, for tables that depend on these facts too."""
        return replace(self, facts={**self.facts, **facts})

    def read(self, **facts: JsonValue) -> pl.DataFrame | None:
        """What was written under the same facts; None where there is nothing, or nothing that is whole."""
        key = self._key(facts)
        for path in sorted(self.folder.glob(f"{key}.*.parquet")):
            # By the whole file's hash: a damaged Parquet file can make polars abort the process.
            if file_md5(path) == path.name.split(".")[1]:
                return pl.read_parquet(path)
            log.warning("%s is damaged: it is dropped, and what it held is computed again", path)
            path.unlink()
        return None

    def write(self, table: pl.DataFrame, **facts: JsonValue) -> None:
        key = self._key(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{key}.{os.getpid()}.part"
        table.write_parquet(part)
        part.replace(self.folder / f"{key}.{file_md5(part)}.parquet")

    def drop_unused(self) -> None:
        """Remove what nobody has asked for."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.suffix == ".part" or path.name.split(".")[0] not in self.used:
                    path.unlink()

    def _key(self, facts: Mapping[str, JsonValue]) -> str:
        text = json.dumps({**self.facts, **facts}, sort_keys=True, allow_nan=False)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.used.add(key)
        return key
