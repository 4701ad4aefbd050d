import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.rows import json_lines, json_value, parquet_rows

LIMIT = 1_000_000


def parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def lines(content: bytes) -> list[object]:
    return [json_value(line) for _, line in json_lines(content)]


@pytest.mark.parametrize("content", [b"1\n2\n", b"1\r\n2", b"1\r2\r", b"\xef\xbb\xbf1\n\n \n2", b"1\n2\n\n"])
def test_lines_of_any_system(content: bytes) -> None:
    assert lines(content) == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-32-be"), "UTF-32"),
        (b"\0" * 100, "no text at all"),
        (b" [{}]", "one JSON array"),
        (b"\n" * 1_000_001, "1,000,001 line breaks"),
        (b'"\xe9"', "not UTF-8: .* at byte 2"),
        (rb'"\ud800"', "not JSON: unexpected end of hex escape"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is in an object twice"),
        (b'{"a":' * 100_000, "not JSON: recursion limit"),
        (b"9" * 5000, "not JSON: number out of range"),
        (b'{"\\u001b": ', "not JSON: EOF"),
        (b"{'a': 1}", "not JSON"),
    ],
)
def test_what_is_no_json(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        lines(content)
    assert str(caught.value).isprintable()


NOTHING = pa.nulls(1)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62], pa.int64()).view(pa.timestamp("us")),
        pa.array([0], pa.timestamp("ns", "Mars/Phobos")),
        pa.array([2**31 - 1], pa.int32()).view(pa.date32()),
        pa.array([[{"when": 0}]], pa.list_(pa.struct([("when", pa.date64())]))),
        pa.array([0], pa.decimal128(38)),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([b"x"]),
        pa.array([b"x" * 16], pa.uuid()),
    ],
    ids=lambda values: str(values.type),
)  # fmt: skip
def test_types_that_no_episode_has(values: pa.Array) -> None:
    with pytest.raises(UserError, match=r"column odd.*: values of type .*, which no field of an episode has"):
        parquet_rows(parquet(pa.table({"odd": values})), LIMIT)


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.struct([("a", pa.string()), ("b", pa.null())])),
        pa.large_list(pa.struct([("a", pa.large_string())])),
        pa.list_(pa.struct([("a", pa.string())]), 2),
        pa.list_(pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))])),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"use_dictionary": False}, {"compression": "gzip"}])
def test_other_types_of_the_same_values(type_: pa.DataType, options: dict[str, object]) -> None:
    rows = [{"steps": [{"a": "x"}, {"a": "é" * 100}]}, {"steps": [{"a": "y"}, {"a": "y"}]}]
    if pa.types.is_dictionary(type_.value_type.field(0).type):  # which pyarrow does not make of Python's values
        codes = pa.array(["x", "é" * 100, "y", "y"]).dictionary_encode()
        table = pa.table({"steps": pa.ListArray.from_arrays([0, 2, 4], pa.StructArray.from_arrays([codes], ["a"]))})
    else:
        table = pa.Table.from_pylist(rows, pa.schema([("steps", type_)]))
    assert parquet_rows(parquet(table, **options), LIMIT) == rows


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (pa.table({"a": ["x" * 2000] * 1000}), {}),
        (pa.table({"a": ["x" * 2000] * 1000}), {"row_group_size": 500}),
        (pa.table({"a": [[{"b": "x" * 2000}] * 1000]}), {}),
        (pa.table({"a": ["x" * 2_000_000]}), {"compression": "zstd", "use_dictionary": False}),
        (pa.table({"a": pa.nulls(100_000)}), {}),
        (pa.table({"a": [True] * 100_000}), {}),
    ],
)
def test_a_small_file_that_unpacks_to_a_large_one(table: pa.Table, options: dict[str, object]) -> None:
    content = parquet(table, **options)
    assert len(content) < 20_000
    with pytest.raises(UserError, match=r"unpacked .* more than a file may \("):
        parquet_rows(content, LIMIT)
    assert len(parquet_rows(content, limit=None)) == len(table)


def test_two_columns_of_a_name() -> None:
    for table in (
        pa.table([NOTHING, NOTHING], ["a", "a"]),
        pa.table({"s": pa.StructArray.from_arrays([NOTHING] * 2, ["a", "a"])}),
    ):
        with pytest.raises(UserError, match="two columns of one name: a, a"):
            parquet_rows(parquet(table), LIMIT)


def test_json_lines_keep_their_numbers() -> None:
    content = b"\n".join([b"", json.dumps("a\u2028b", ensure_ascii=False).encode(), b" ", b"2"])
    assert json_lines(content) == [("line 2", '"a\u2028b"'.encode()), ("line 4", b"2")]
