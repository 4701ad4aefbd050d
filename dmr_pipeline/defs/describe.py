"""What the Dagster UI shows of an artifact: where it is, its summary, tables, pictures, and the run that made it."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import dagster as dg
from pydantic import JsonValue

from dmr_pipeline.artifacts.manifest import Artifact
from dmr_pipeline.artifacts.materialize import Materialized
from dmr_pipeline.artifacts.run_record import read_run_record

MAIN_TABLES = ("steps.parquet", "episodes.parquet", "training.parquet")
"""The table that stands for an artifact in the catalogue: the first of these that it has."""

PICTURE_WIDTH = 1100
"""In pixels: Dagster's dialog is little wider, and cuts off what is."""


def describe(done: Materialized) -> dict[str, dg.MetadataValue]:
    artifact = done.artifact
    metadata: dict[str, dg.MetadataValue] = {
        "path": dg.MetadataValue.path(artifact.path),
        "hash": dg.MetadataValue.text(artifact.hash),
        "size_bytes": dg.MetadataValue.int(artifact.size),
        "files": dg.MetadataValue.int(len(artifact.manifest.files)),
        "was_up_to_date": dg.MetadataValue.bool(done.skipped),
        **_summary(artifact.manifest.summary),
        **_tables(artifact.path),
    }
    table = artifact.path / "table.md"
    if table.is_file():
        metadata["table"] = dg.MetadataValue.md(table.read_text(encoding="utf-8"))
    report = artifact.path.with_name("report.html")
    if table.is_file() and report.is_file():
        metadata["report"] = dg.MetadataValue.path(report)
    for picture in sorted(artifact.path.rglob("*.png")):
        metadata[f"picture/{picture.stem}"] = _picture(picture)
    return metadata | _run(artifact)


def typed(value: JsonValue) -> dg.MetadataValue:
    if isinstance(value, bool):
        return dg.MetadataValue.bool(value)
    if isinstance(value, int):
        return dg.MetadataValue.int(value)
    if isinstance(value, float):
        return dg.MetadataValue.float(value)
    if isinstance(value, str):
        return dg.MetadataValue.text(value)
    if _is_table(value):
        return dg.MetadataValue.table([dg.TableRecord(_texts_first(row)) for row in value])
    return dg.MetadataValue.json(value or {})


def _summary(summary: Mapping[str, JsonValue]) -> dict[str, dg.MetadataValue]:
    """A key for each fact, also for those of a mapping, so that Dagster plots the numbers among them."""
    facts: dict[str, JsonValue] = {}
    for key, value in summary.items():
        facts |= {f"{key}/{part}": fact for part, fact in value.items()} if isinstance(value, dict) else {key: value}
    return {f"summary/{key}": typed(fact) for key, fact in facts.items() if fact is not None}


def _is_table(value: JsonValue) -> TypeGuard[list[dict[str, Any]]]:
    """Rows of the same columns, nothing nested in them."""
    return (
        isinstance(value, list)
        and len({frozenset(row) for row in value if isinstance(row, dict)}) == 1
        and all(
            isinstance(row, dict) and not any(isinstance(cell, dict | list) for cell in row.values()) for row in value
        )
    )


def _texts_first(row: Mapping[str, Any]) -> dict[str, Any]:
    """Manifests are sorted by key; a reader looks for the name first."""
    return dict(sorted(row.items(), key=lambda cell: not isinstance(cell[1], str)))


def _picture(path: Path) -> dg.MetadataValue:
    from PIL import Image

    small = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
        picture.save(small, "PNG", optimize=True)
    encoded = base64.b64encode(small.getvalue()).decode()
    return dg.MetadataValue.md(f"![{path.stem}](data:image/png;base64,{encoded})")


def _tables(folder: Path) -> dict[str, dg.MetadataValue]:
    """Rows of every table, and the columns of the main one where Dagster's catalogue looks for them."""
    from pyarrow import parquet

    tables = {path.relative_to(folder).as_posix(): parquet.ParquetFile(path) for path in folder.rglob("*.parquet")}
    metadata: dict[str, dg.MetadataValue] = {
        f"rows/{name.removesuffix('.parquet')}": dg.MetadataValue.int(table.metadata.num_rows)
        for name, table in sorted(tables.items())
    }
    main = next((name for name in MAIN_TABLES if name in tables), None)
    if main is not None:
        columns = [dg.TableColumn(field.name, str(field.type)) for field in tables[main].schema_arrow]
        metadata["dagster/column_schema"] = dg.MetadataValue.table_schema(dg.TableSchema(columns))
        metadata["dagster/row_count"] = dg.MetadataValue.int(tables[main].metadata.num_rows)
    return metadata


def _run(artifact: Artifact) -> dict[str, dg.MetadataValue]:
    """The run that made the artifact; a committed artifact of a fresh clone has none on this machine."""
    record = read_run_record(artifact)
    if record is None:
        return {}
    shown = record.model_dump(mode="json", include={"started", "finished", "seconds", "git", "measured"})
    return {f"run/{key}": typed(value) for key, value in shown.items() if value not in (None, {})}
