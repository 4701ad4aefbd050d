"""Rows of a file of episodes that anyone may have written: JSON lines, or Parquet. What they hold is not looked at here."""

import io
import json
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from dmr_pipeline.errors import UserError, printable

LINES_LIMIT = 1_000_000
_BYTES_A_VALUE = 16
"""What a value of a table counts beside its text, so that a table of nothing but empty ones has an end too."""
_WIDE_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""How UTF-16 and UTF-32 begin."""


def json_lines(content: bytes) -> list[tuple[str, bytes]]:
    """Each line that is not blank, and its place. A byte order mark before the first is passed over.

    Raises:
        UserError: it is no text of lines.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.startswith(_WIDE_TEXT) or b"\0" in content[:4]:
        raise UserError("not UTF-8, but UTF-16, UTF-32 or no text at all: save it as UTF-8")
    if content.lstrip().startswith(b"["):
        raise UserError("one JSON array: write its episodes a line each, such as by `jq -c '.[]'`")
    if (number := content.count(b"\n") + content.count(b"\r")) > LINES_LIMIT:
        raise UserError(f"it has {number:,} line breaks, but may have {LINES_LIMIT:,}: split it")
    return [(f"line {n}", line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]


def json_value(line: bytes) -> Any:  # noqa: ANN401 - whatever a line holds
    """What a line of JSON says.

    Raises:
        UserError: it is no JSON, or says something twice.
    """
    try:
        line.decode()
        value = from_json(line)
        json.loads(line, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise UserError(f"not JSON, since not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except ValueError as error:
        raise UserError(f"not JSON: {printable(error)}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> None:
    """Take a JSON object's pairs.

    Raises:
        ValueError: a key is there twice.
    """
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} is in an object twice")
        seen.add(key)


def parquet_rows(content: bytes, limit: int | None) -> list[dict[str, Any]]:
    """By pyarrow, since a damaged file can make polars abort the whole process. A null is a field left out.

    Args:
        limit: bytes that the table may take once it is unpacked; None for a file of our own.

    Raises:
        UserError: it is no Parquet file, a damaged one, one with values that no episode has, or too large once unpacked.
    """
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    try:
        metadata = pyarrow.parquet.read_metadata(io.BytesIO(content))
        if limit is not None:
            _check_declared(metadata, limit)
        # A text may lie in the file once and be used a million times: so it is read, and only then counted and copied.
        columns = [metadata.schema.column(n) for n in range(metadata.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content), read_dictionary=texts)
        _check_names(file.schema_arrow.names, "it")
        for field in file.schema_arrow:
            _check_type(field.type, field.name)
        size = 0
        for group in range(metadata.num_row_groups):  # one at a time: nested columns of this kind cannot be joined
            table = file.read_row_group(group, use_threads=False)
            size += sum(part for column in table.columns for chunk in column.chunks for part in _text_sizes(chunk))
            if limit is not None and size > limit:
                raise UserError(f"unpacked its texts have {size:,} bytes, more than a file may ({limit:,}): split it")
            rows += table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        raise UserError(f"not a Parquet file, or a damaged one: {printable(error)}") from error
    return [_without_nulls(row) for row in rows]


def _check_names(names: list[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{what} has two columns of one name: {', '.join(sorted(names))}")


def _check_type(type_: Any, where: str) -> None:  # noqa: ANN401 - a pyarrow.DataType
    """Nothing else is turned into Python's values: what dates and zones become there can fail for the whole file.

    Raises:
        UserError: no field of an episode has such values.
    """
    from pyarrow import types

    if (
        types.is_dictionary(type_)
        or types.is_list(type_)
        or types.is_large_list(type_)
        or types.is_fixed_size_list(type_)
    ):
        _check_type(type_.value_type, where)
    elif types.is_struct(type_):
        _check_names([field.name for field in type_], where)
        for field in type_:
            _check_type(field.type, f"{where}.{field.name}")
    elif not (
        types.is_string(type_)
        or types.is_large_string(type_)
        or types.is_string_view(type_)
        or types.is_boolean(type_)
        or types.is_integer(type_)
        or types.is_float32(type_)
        or types.is_float64(type_)
        or types.is_null(type_)
    ):
        raise UserError(f"column {where}: values of type {type_}, which no field of an episode has")


def _check_declared(metadata: Any, limit: int) -> None:  # noqa: ANN401 - pyarrow's FileMetaData
    """By what the file says of itself.

    Raises:
        UserError: that is too large.
    """
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    size = sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks)
    values = sum(max(chunk.num_values, 0) for chunk in chunks)
    if max(size, (values + metadata.num_rows) * _BYTES_A_VALUE) > limit:
        raise UserError(
            f"unpacked it has {size:,} bytes and {values:,} values, more than a file may ({limit:,} bytes): split it"
        )


def _text_sizes(array: Any) -> Iterator[int]:  # noqa: ANN401 - a pyarrow.Array
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        if types.is_string(array.type.value_type) or types.is_large_string(array.type.value_type):
            yield pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    elif types.is_struct(array.type):
        for part in array.flatten():
            yield from _text_sizes(part)
    elif types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        yield from _text_sizes(array.flatten())
    elif types.is_string(array.type) or types.is_large_string(array.type):
        yield pc.sum(pc.binary_length(array)).as_py() or 0


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - whatever a Parquet file holds
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value
