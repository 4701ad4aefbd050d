"""Whatever is dropped ends ingested, quarantined with its reason, or named by `dmr status`; what lies beside it is ingested."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from dmr_pipeline import pipeline
from dmr_pipeline.artifacts.materialize import materialize_stage
from dmr_pipeline.cli import app
from dmr_pipeline.ingestion.inbox import archive, lying_files, waiting_files
from dmr_pipeline.ingestion.incoming import FILE_LIMIT
from dmr_pipeline.ingestion.schema import EXAMPLE
from dmr_pipeline.recipe import Recipe
from tests.helpers.deadline import Hang, at_most_seconds
from tests.helpers.fake_project import RECIPE, RECIPE_YAML, fake_run

BENCHMARK = replace(pipeline.find_stage("benchmark_tasks", pipeline.STAGES), run=fake_run)
REAL = pipeline.find_stage("ingested_trajectories", pipeline.STAGES)
STEPS = EXAMPLE["steps"]
INGESTED = "ingested"

Build = Callable[[Path], None]
"""Puts something into the folder that files are dropped into."""


def episode(**changes: Any) -> dict[str, Any]:
    return {**EXAMPLE, "episode_id": "hostile", **changes}


def line(**changes: Any) -> bytes:
    return json.dumps(episode(**changes)).encode() + b"\n"


def step(**changes: Any) -> list[dict[str, Any]]:
    return [{"command": "look", "observation": "", "precision": "float", **changes}]


EARLIER, GOOD = line(episode_id="earlier"), line(episode_id="good")


def file(content: bytes, name: str = "hostile.jsonl") -> Build:
    return lambda folder: Path(folder, name).write_bytes(content) and None


def named(name: str | bytes, content: bytes | None = None) -> Build:
    def build(folder: Path) -> None:
        Path(folder, os.fsdecode(name)).write_bytes(line() if content is None else content)

    return build


TEXT = pa.string()
STEP = pa.struct([("command", TEXT), ("thought", TEXT), ("observation", TEXT), ("precision", TEXT)])
SCHEMA = pa.schema(
    [
        *((name, TEXT) for name in ("episode_id", "task_id", "task_type", "task", "observation")),
        ("steps", pa.list_(STEP)),
        ("success", pa.bool_()),
    ]
)


def table(**columns: Any) -> pa.Table:
    """The example, with columns added or in place of its own."""
    made = pa.Table.from_pylist([episode()], SCHEMA)
    for name, values in columns.items():
        values = values if isinstance(values, pa.Array) else pa.array(values)
        if name in made.column_names:
            made = made.set_column(made.column_names.index(name), name, values)
        else:
            made = made.append_column(name, values)
    return made


def parquet_bytes(made: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(made, buffer, **options)
    return buffer.getvalue()


def parquet(made: pa.Table, **options: Any) -> Build:
    return file(parquet_bytes(made, **options), "hostile.parquet")


def typed(type_: pa.DataType, field: str = "steps") -> pa.Table:
    return table(**{field: pa.array([episode()[field]], type_)})


def deep_type(levels: int) -> pa.Table:
    array = pa.array(["x"])
    for _ in range(levels):
        array = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array)
    return table(deep=array)


def repeated(number: int, text: str) -> pa.Table:
    steps = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int8)), [value])
            for value in (text, "", text, "float")
        ],
        ["command", "thought", "observation", "precision"],
    )
    return table(steps=pa.ListArray.from_arrays(pa.array([0, number], pa.int32()), steps))


def flipped(content: bytes, seed: int) -> bytes:
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(8):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def lied_about(content: bytes) -> bytes:
    """The file with its columns' sizes, unpacked, given as 0 in its footer."""
    for column in range(7):
        size = pq.read_metadata(io.BytesIO(content)).row_group(0).column(column).total_uncompressed_size * 2  # zigzag
        number = bytearray()
        while size > 127:
            number.append(size & 127 | 128)
            size >>= 7
        number.append(size)
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        nothing = b"\x80" * (len(number) - 1) + b"\0"
        if len(number) > 3:  # short ones are found elsewhere too
            content = content[:start] + content[start:].replace(bytes(number), nothing)
    return content


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.jsonl", content)
    return buffer.getvalue()


def polars_bytes() -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame([episode()]).write_parquet(buffer)
    return buffer.getvalue()


def link(target: str, name: str = "hostile.jsonl") -> Build:
    return lambda folder: Path(folder, name).symlink_to(target)


def fifo(name: str) -> Build:
    return lambda folder: os.mkfifo(folder / name)


def hard_links(folder: Path) -> None:
    named("a.jsonl")(folder)
    (folder / "b.jsonl").hardlink_to(folder / "a.jsonl")


def unix_socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("hostile.jsonl")
    finally:
        os.chdir(here)


def device(folder: Path) -> None:
    try:
        os.mknod(folder / "hostile.jsonl", 0o20666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:  # only root may
        os.mkfifo(folder / "hostile.jsonl")


def sparse(size: int) -> Build:
    def build(folder: Path) -> None:
        path = folder / "hostile.jsonl"
        path.touch()
        os.truncate(path, size)

    return build


def folder_of(name: str, *files: str) -> Build:
    def build(folder: Path) -> None:
        (folder / name).mkdir()
        for inner in files:
            (folder / name / inner).write_bytes(line())

    return build


def together(*builds: Build) -> Build:
    def build(folder: Path) -> None:
        for one in builds:
            one(folder)

    return build


def elsewhere(name: str) -> Build:
    """Our folder is on another file system where there is one."""

    def build(folder: Path) -> None:
        other = Path("/dev/shm", f"dmr-{os.getpid()}-{name}")
        other.mkdir(exist_ok=True)
        (folder / name).symlink_to(other)

    return build


def keys(text: str) -> bytes:
    return json.dumps(episode())[:-1].encode() + b", " + text.encode() + b"}\n"


NO_TEXT, NO_JSON, NO_PARQUET = "not UTF-8", "not JSON", "not a Parquet file"
NS, US = "timestamp[ns]", "timestamp[us]"


def kinds() -> dict[str, tuple[str, Build]]:
    """What it is -> what must be said of it, and who makes it. `named: ` stands before what only `dmr status` says."""
    return {
        # Text that is none, or no lines of JSON
        "empty": ("holds no episodes", file(b"")),
        "blanks": ("holds no episodes", file(b"\n \r\n\t\n")),
        "byte order mark alone": ("holds no episodes", file(b"\xef\xbb\xbf")),
        "zeros, as after a crash": (NO_TEXT, file(b"\0" * 4096)),
        "random bytes": (NO_JSON, file(b"{" + random.Random(0).randbytes(4096))),
        "UTF-16": (NO_TEXT, file(line().decode().encode("utf-16"))),
        "UTF-16 without a mark": (NO_TEXT, file(line().decode().encode("utf-16-le"))),
        "UTF-16 big end first": (NO_TEXT, file(line().decode().encode("utf-16-be"))),
        "UTF-32": (NO_TEXT, file(line().decode().encode("utf-32"))),
        "Latin-1": (NO_TEXT, file(json.dumps(episode(task="café"), ensure_ascii=False).encode("latin-1"))),
        "overlong UTF-8": (NO_TEXT, file(line().replace(b"kitchen/17", b"kitchen\xc0\xaf17"))),
        "half a character": (NO_TEXT, file(line(task="x\u00e9").replace(b"\\u00e9", b"\xc3"))),
        "byte order mark": (INGESTED, file(b"\xef\xbb\xbf" + line())),
        "two byte order marks": (NO_JSON, file(b"\xef\xbb\xbf" * 2 + line())),
        "byte order mark in the middle": (NO_JSON, file(line() + b"\xef\xbb\xbf" + line(episode_id="b"))),
        "CRLF": (INGESTED, file(line().replace(b"\n", b"\r\n"))),
        "CR": (INGESTED, file(line().replace(b"\n", b"\r") + line(episode_id="b"))),
        "no line end": (INGESTED, file(line().strip())),
        "line separator in a text": (INGESTED, file(json.dumps(episode(task="a\u2028b"), ensure_ascii=False).encode())),
        "array": ("one JSON array", file(b"[" + line() + b"]")),
        "array on many lines": ("one JSON array", file(json.dumps([episode()], indent=1).encode())),
        "object on many lines": (NO_JSON, file(json.dumps(episode(), indent=1).encode())),
        "cut": (NO_JSON, file(EARLIER.replace(b"earlier", b"a") + line()[:-30])),
        "two on a line": (NO_JSON, file(line().strip() + line(episode_id="b"))),
        "comma at the end": (NO_JSON, file(line().replace(b"false}", b"false,}"))),
        "single quotes": (NO_JSON, file(repr(episode()).encode())),
        "comment": (NO_JSON, file(b"// a comment\n" + line())),
        "raw zero in a text": (NO_JSON, file(line().replace(b"apple", b"app\0le"))),
        "raw tab in a text": (NO_JSON, file(line().replace(b"apple", b"app\tle"))),
        "lone surrogate": (NO_JSON, file(line().replace(b"apple", rb"app\ud800le"))),
        "zero in a text": (INGESTED, file(line(observation="a\0b"))),
        "nested lists": (NO_JSON, file(keys('"a": ' + "[" * 100_000 + "]" * 100_000))),
        "nested objects": (NO_JSON, file(keys('"a": ' + '{"a":' * 100_000 + "1" + "}" * 100_000))),
        "nested lists and no end": (NO_JSON, lambda folder: file(b'{"a":' + b"[" * 1_000_000)(folder)),
        "number of 5,000 digits": (NO_JSON, file(keys('"reward": ' + "9" * 5000))),
        "number of 5,000 digits as probability": (
            NO_JSON,
            file(line(steps=step(probability=0.5)).replace(b"0.5", b"9" * 5000)),
        ),
        "a million line ends": ("line breaks", lambda folder: file(line() + b"\n" * 1_000_001)(folder)),
        "a line of 5 MB": (NO_JSON, file(b"x" * 5_000_000)),
        # JSON that is no episode
        "number": ("valid dictionary", file(b"1\n")),
        "text": ("valid dictionary", file(b'"hello"\n')),
        "null": ("valid dictionary", file(b"null\n")),
        "true": ("valid dictionary", file(b"true\n")),
        "empty object": ("episode_id: Field required", file(b"{}\n")),
        "key twice": ("twice", file(keys('"success": true'))),
        "key of a step twice": ("twice", file(line().replace(b'"command":', b'"command": "look", "command":', 1))),
        "empty key": ("Extra inputs", file(keys('"": 1'))),
        "another key": ("colour: Extra inputs", file(line(colour="red"))),
        "key that colours the terminal": (r"\\x1b\[31m", file(keys(r'"\u001b[31m": 1'))),
        "key with markup": (r"\[red\]", file(keys('"[red]": 1'))),
        "100,000 other keys": (
            "key99: Extra inputs",
            lambda folder: file(line(**{f"key{n}": n for n in range(100_000)}))(folder),
        ),
        "thought null": (INGESTED, file(line(steps=step(thought=None)))),
        "reward null": (INGESTED, file(line(reward=None))),
        "probability null": (INGESTED, file(line(steps=step(probability=None)))),
        "success null": ("success", file(line(success=None))),
        "id null": ("episode_id", file(line(episode_id=None))),
        "id a number": ("episode_id: Input should be a valid string", file(line(episode_id=1))),
        "id a list": ("episode_id", file(line(episode_id=["a"]))),
        "id empty": ("episode_id", file(line(episode_id=""))),
        "id of two lines": ("episode_id", file(line(episode_id="a\nb"))),
        "id with blanks around": ("episode_id", file(line(episode_id=" a "))),
        "id of a million letters": (INGESTED, file(line(episode_id="a" * 1_000_000))),
        "id that colours the terminal": (INGESTED, file(line(episode_id="\x1b[31mred"))),
        "id with markup": (INGESTED, file(line(episode_id="[red]x[/]"))),
        "id twice in a file": ("in this file twice", file(line() + line())),
        "id of an earlier episode": ("an earlier file has brought", file(line(episode_id="earlier", success=True))),
        "steps an object": ("steps", file(line(steps={"0": step()[0]}))),
        "steps texts": ("steps.0", file(line(steps=["look"]))),
        "steps in steps": ("steps.0", file(line(steps=[step()]))),
        "no steps": ("steps", file(line(steps=[]))),
        "51 steps": ("51 steps", file(line(steps=step() * 51))),
        "100,000 steps": ("100000 steps", file(line(steps=step() * 100_000))),
        "100,000 broken steps": ("steps.99.command", file(line(steps=[{}] * 100_000))),
        "empty command": (INGESTED, file(line(steps=step(command="")))),
        "command of two lines": (INGESTED, file(line(steps=step(command="go to desk 1\nlook")))),
        "observation of 400,000 words": (INGESTED, file(line(steps=step(observation="apple " * 400_000)))),
        "blank first observation": ("observation", file(line(observation=" \n"))),
        "reward NaN": ("finite number", file(line(reward=float("nan")))),
        "reward infinite": ("finite number", file(line(reward=float("inf")))),
        "reward minus infinite": ("finite number", file(line(reward=-float("inf")))),
        "reward 1e400": ("finite number", file(keys('"reward": 1e400'))),
        "reward a text": ("reward", file(line(reward="0.5"))),
        "reward against success": ("success is False", file(line(reward=1))),
        "reward true": ("reward", file(line(reward=True))),
        "success 1": ("success", file(line(success=1))),
        "success a text": ("success", file(line(success="false"))),
        "probability 2": ("probability", file(line(steps=step(probability=2)))),
        "probability NaN": ("probability", file(line(steps=step(probability=float("nan"))))),
        "probability a text": ("probability", file(line(steps=step(probability="0.5")))),
        "task type unknown": ("none of the benchmark's", file(line(task_type="juggle"))),
        "rung unknown": ("not on the recipe's ladder", file(line(steps=step(precision="int8")))),
        "rung with markup": ("not on the recipe's ladder", file(line(steps=step(precision="[/]")))),
        "held-out game": ("held out, in the split test", file(line(task_id="test-game"))),
        "held-out game with a slash": ("held out", file(line(task_id="./TEST-game/"))),
        "held-out game by its path": ("held out", file(line(task_id="/data/json_2.1.1/train/test-game/game.tw-pddl"))),
        "held-out game of another split": (
            "called valid_seen",
            file(line(task_id="json_2.1.1\\valid_seen\\a\\b\\game.tw-pddl")),
        ),
        "game of no split": (INGESTED, file(line(task_id="mars/1"))),
        # Other formats under our suffixes, ours under others
        "no suffix": ("use .jsonl or .parquet", file(line(), "hostile")),
        "JSON": ("use .jsonl or .parquet", file(line(), "hostile.json")),
        "upper case": ("use .jsonl or .parquet", file(line(), "HOSTILE.JSONL")),
        "CSV": ("use .jsonl or .parquet", file(b"a,b\n", "hostile.csv")),
        "gzip": ("use .jsonl or .parquet", file(gzip.compress(line()), "hostile.jsonl.gz")),
        "gzip bomb": (
            "use .jsonl or .parquet",
            lambda folder: file(gzip.compress(b"\0" * 100_000_000), "hostile.jsonl.gz")(folder),
        ),
        "gzip called JSON lines": (NO_TEXT, file(gzip.compress(line()))),
        "zip called JSON lines": (NO_JSON, file(zipped(line()))),
        "pickle called JSON lines": (NO_JSON, file(pickle.dumps(episode()))),
        "Parquet called JSON lines": (NO_JSON, file(parquet_bytes(table()))),
        "JSON lines called Parquet": (NO_PARQUET, file(line(), "hostile.parquet")),
        "zip called Parquet": (NO_PARQUET, file(zipped(line()), "hostile.parquet")),
        # Parquet
        "Parquet: empty": (NO_PARQUET, file(b"", "hostile.parquet")),
        "Parquet: magic alone": (NO_PARQUET, file(b"PAR1PAR1", "hostile.parquet")),
        "Parquet: cut": (NO_PARQUET, file(parquet_bytes(table())[:-100], "hostile.parquet")),
        "Parquet: the end alone": (NO_PARQUET, file(parquet_bytes(table())[-200:], "hostile.parquet")),
        "Parquet: footer of 4 GB": (NO_PARQUET, file(b"PAR1" + b"\xff" * 4 + b"PAR1", "hostile.parquet")),
        "Parquet: encrypted": (
            NO_PARQUET,
            file(b"PARE" + random.Random(1).randbytes(300) + b"\x40\0\0\0PARE", "hostile.parquet"),
        ),
        "Parquet: no rows": ("holds no episodes", parquet(table().slice(0, 0))),
        "Parquet: no columns": ("holds no episodes|required", parquet(table().select([]))),
        "Parquet: another column": ("colour: Extra inputs", parquet(table(colour=["red"]))),
        "Parquet: an empty column": (INGESTED, parquet(table(colour=pa.nulls(1)))),
        "Parquet: pandas' index": ("Extra inputs", parquet(table(__index_level_0__=[0]))),
        "Parquet: a column is missing": ("task_id: Field required", parquet(table().drop_columns(["task_id"]))),
        "Parquet: two columns of a name": ("two columns", parquet(table().append_column("task", pa.array(["a"])))),
        "Parquet: a name that colours": (r"\\x1b", parquet(table(**{"\x1b[31m": ["red"]}))),
        "Parquet: null": ("task: Field required", parquet(table(task=pa.array([None], TEXT)))),
        "Parquet: a null step": ("steps.0", parquet(table(steps=pa.array([[None]], pa.list_(STEP))))),
        "Parquet: texts of bytes": ("valid string|type binary", parquet(table(task=[b"put"]))),
        "Parquet: text not UTF-8": (NO_PARQUET, parquet(table(task=pa.array([b"\xff"]).view(TEXT)))),
        "Parquet: dates": ("type date32", parquet(table(when=pa.array([0], pa.int32()).cast(pa.date32())))),
        "Parquet: dates out of range": (
            "type date32",
            parquet(table(when=pa.array([2**31 - 1], pa.int32()).view(pa.date32()))),
        ),
        "Parquet: times": ("type time64", parquet(table(when=pa.array([10**15], pa.int64()).view(pa.time64("us"))))),
        "Parquet: durations": ("type duration", parquet(table(when=[timedelta(days=1)]))),
        "Parquet: timestamps": (f"type {re.escape(US)}", parquet(table(when=[datetime(2026, 11, 24)]))),
        "Parquet: timestamps out of range": (
            "type timestamp",
            parquet(table(when=pa.array([2**62], pa.int64()).view(pa.timestamp("us")))),
        ),
        "Parquet: timestamps of nanoseconds": (
            "type timestamp",
            parquet(table(when=pa.array([-(2**62)], pa.int64()).view(pa.timestamp("ns")))),
        ),
        "Parquet: an unknown zone": (
            "type timestamp",
            parquet(table(when=pa.array([0], pa.timestamp("us", "Mars/Phobos")))),
        ),
        "Parquet: dates in steps": (
            "steps.when: values of type date32",
            parquet(
                table(
                    steps=pa.array(
                        [[step()[0] | {"when": 2**31 - 1}]], pa.list_(pa.struct([*STEP, pa.field("when", pa.int32())]))
                    ).cast(pa.list_(pa.struct([*STEP, pa.field("when", pa.date32())])))
                )
            ),
        ),
        "Parquet: decimals": ("type decimal", parquet(table(reward=pa.array([0], pa.decimal128(38, 10))))),
        "Parquet: half floats": ("type halffloat", parquet(table(reward=pa.array([np.float16(0.5)])))),
        "Parquet: maps": ("type map", parquet(table(more=pa.array([[("a", 1)]], pa.map_(TEXT, pa.int64()))))),
        "Parquet: UUIDs": (
            "type extension|type fixed_size_binary",
            parquet(table(more=pa.array([b"0" * 16], pa.uuid()))),
        ),
        "Parquet: float32": (INGESTED, parquet(table(reward=pa.array([0.5], pa.float32())))),
        "Parquet: whole numbers": (INGESTED, parquet(table(reward=pa.array([0], pa.int8())))),
        "Parquet: success a number": ("success", parquet(table(success=pa.array([0])))),
        "Parquet: NaN": ("finite number", parquet(table(reward=[float("nan")]))),
        "Parquet: dictionaries": (INGESTED, parquet(table(task=pa.array(["put it"]).dictionary_encode()))),
        "Parquet: large texts": (INGESTED, parquet(table(task=pa.array(["put it"], pa.large_string())))),
        "Parquet: views of texts": (INGESTED, parquet(table(task=pa.array(["put it"], pa.string_view())))),
        "Parquet: large lists": (INGESTED, parquet(typed(pa.large_list(STEP)))),
        "Parquet: lists of two": (INGESTED, parquet(typed(pa.list_(STEP, 2)))),
        "Parquet: by polars": (INGESTED, file(polars_bytes(), "hostile.parquet")),
        "Parquet: steps as JSON": ("steps: Input should be a valid list", parquet(table(steps=[json.dumps(STEPS)]))),
        "Parquet: steps as columns": ("steps", parquet(table(steps=pa.array([{"command": ["a"]}])))),
        "Parquet: 100 levels": (NO_PARQUET, lambda folder: parquet(deep_type(100))(folder)),
        "Parquet: a text a million times": (
            "more than a file may",
            lambda folder: parquet(repeated(1_000_000, "x" * 2000))(folder),
        ),
        "Parquet: 100 million values": (
            "more than a file may",
            lambda folder: parquet(repeated(20_000_000, ""))(folder),
        ),
        "Parquet: zeros, packed": (
            "more than a file may",
            lambda folder: parquet(table(task=["x" * (FILE_LIMIT + 1)]), compression="zstd", use_dictionary=False)(
                folder
            ),
        ),
        "Parquet: zeros, packed and lied about": (
            "more than a file may",
            lambda folder: file(
                lied_about(
                    parquet_bytes(table(task=["x" * (FILE_LIMIT + 1)]), compression="zstd", use_dictionary=False)
                ),
                "hostile.parquet",
            )(folder),
        ),
        "Parquet: zeros, packed by gzip": (
            "more than a file may",
            lambda folder: parquet(table(task=["x" * (FILE_LIMIT + 1)]), compression="gzip")(folder),
        ),
        "Parquet: 1,000 row groups": (
            INGESTED,
            lambda folder: parquet(
                pa.Table.from_pylist([episode(episode_id=str(n)) for n in range(1000)], SCHEMA), row_group_size=1
            )(folder),
        ),
        "Parquet: 10 MB of metadata": (
            INGESTED,
            lambda folder: parquet(table().replace_schema_metadata({"a": "x" * 10_000_000}))(folder),
        ),
        # Names
        **{f"name of {n} bytes": (INGESTED, named("n" * (n - 6) + ".jsonl")) for n in (200, 226, 230, 240, 255)},
        **{
            f"bad, name of {n} bytes": (NO_JSON, named("n" * (n - 6) + ".jsonl", b"x"))
            for n in (200, 226, 230, 240, 255)
        },
        "bad, long name of other letters": (NO_JSON, named("桌" * 83 + ".jsonl", b"x")),
        "bad, long suffix": ("use .jsonl", named("a." + "s" * 253, b"x")),
        "name not UTF-8": (INGESTED, named(b"caf\xe9.jsonl")),
        "bad, name not UTF-8": (NO_JSON, named(b"caf\xe9.jsonl", b"x")),
        "name of two lines": (INGESTED, named("two\nlines.jsonl")),
        "bad, name of two lines": (NO_JSON, named("two\nlines.jsonl", b"x")),
        "bad, name that colours the terminal": (NO_JSON, named("\x1b[31mred.jsonl", b"x")),
        "bad, name with markup": (NO_JSON, named("[red]x[/red][/].jsonl".replace("/", "\\"), b"x")),
        "bad, name that turns direction": (NO_JSON, named("a\u202elnosj.jsonl", b"x")),
        "name like an option": (INGESTED, named("-rf.jsonl")),
        "name like a command": (INGESTED, named("$(touch PWNED);'\".jsonl")),
        "name with blanks": (INGESTED, named(" .jsonl")),
        "bad, names that differ in case": (NO_JSON, together(named("a.jsonl", b"x"), named("A.jsonl", b"y"))),
        "bad, name like a reason": ("use .jsonl", named("a.jsonl.reason.txt", b"x")),
        "file called quarantine": ("use .jsonl or .parquet", named("quarantine")),
        "file called ingested": ("use .jsonl or .parquet", named("ingested")),
        "files called quarantine and its other name": (
            "use .jsonl or .parquet",
            together(named("quarantine"), named("quarantine.0", b"y")),
        ),
        "link called quarantine": ("a link", link("/nowhere", "quarantine")),
        "link to a file called quarantine": ("a link", link("/etc/hostname", "quarantine")),
        "pipe called quarantine": ("a named pipe", fifo("quarantine")),
        "pipe called ingested": ("a named pipe", fifo("ingested")),
        # What is no file, or no sound one
        "pipe": ("a named pipe", fifo("hostile.jsonl")),
        "socket": ("a socket", unix_socket),
        "device": ("a device|a named pipe", device),
        "link to a file": ("a link", link("/etc/hostname")),
        "link to nowhere": ("a link", link("/nowhere")),
        "link to itself": ("a link", link("hostile.jsonl")),
        "link to a folder": ("a link", link("/tmp")),
        "link into /proc": ("a link", link("/proc/self/environ")),
        "link to the kernel's messages": ("a link", link("/proc/kmsg")),
        "link to zeros without end": ("a link", link("/dev/zero", "hostile.parquet")),
        "8 GB of nothing": ("8,589,934,592 bytes", sparse(8 << 30)),
        "8 TB of nothing": ("bytes, but a file", sparse(8 << 40)),
        "a byte too large": ("bytes, but a file", sparse(FILE_LIMIT + 1)),
        "as large as may be, of zeros": (NO_TEXT, sparse(FILE_LIMIT)),
        "the same content twice": (INGESTED, together(named("a.jsonl"), named("b.jsonl"))),
        "the same content as an earlier file": (INGESTED, file(EARLIER)),
        "two names of one file": (
            INGESTED,
            hard_links,
        ),
        "quarantine on another file system": (NO_JSON, together(elsewhere("quarantine"), file(b"x"))),
        "link, quarantine on another file system": ("a link", together(elsewhere("quarantine"), link("/nowhere"))),
        "ingested on another file system": (INGESTED, together(elsewhere("ingested"), file(line()))),
        # What has to stay
        "folder": ("named: it is a folder", folder_of("hostile")),
        "folder of files": ("named: it is a folder", folder_of("hostile", "a.jsonl", "b.jsonl")),
        "folder called as a file": ("named: it is a folder", folder_of("hostile.jsonl")),
        "quarantine cannot be written": (
            "named: cannot be moved",
            together(link("/proc/self", "quarantine"), file(b"x")),
        ),
        "pipe, quarantine on another file system": (
            "named: cannot be moved",
            together(elsewhere("quarantine"), fifo("hostile.jsonl")),
        ),
        "ingested cannot be written": ("named: it is ingested", together(link("/proc/self", "ingested"), file(line()))),
        **{
            f"Parquet: bits flipped ({n})": ("any", file(flipped(parquet_bytes(table()), n), "hostile.parquet"))
            for n in range(12)
        },
        **{f"bits flipped ({n})": ("any", file(flipped(line(), n))) for n in range(4)},
    }


def is_reason(path: Path) -> bool:
    return path.name.endswith(".reason.txt") and os.path.lexists(str(path).removesuffix(".reason.txt"))


def below(incoming: Path) -> list[Path]:
    """Everything in the folder and in ours in it, which may be links, but never into /proc."""
    places = [incoming, *(incoming / name for name in ("quarantine", "ingested"))]
    sound = [place for place in places if place.is_dir() and not os.path.realpath(place).startswith("/proc")]
    return [path for place in sound for path in place.iterdir() if path not in places or not path.is_dir()]


def contents(incoming: Path) -> set[str]:
    """What there is: sha256 of every file, or what else tells it apart."""
    found = set()
    for path in below(incoming):
        kind = stat.S_IFMT(path.lstat().st_mode)
        if kind != stat.S_IFREG:
            found.add(f"{kind} {path.readlink() if path.is_symlink() else ''}")
        elif not is_reason(path):
            size = path.stat().st_size
            found.add(str(size) if size > FILE_LIMIT else hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def end_of(incoming: Path, before: set[str]) -> str:
    """What became of everything in the folder, in a word and its reasons; raises where something is lost or left silently."""
    data = incoming.parent.parent
    lying = lying_files(data, RECIPE)
    places = ("quarantine", "ingested")
    stray = [
        path.name
        for path in incoming.iterdir()
        if not (path.name in places and path.is_dir()) and not any(path.name in line for line in lying)
    ]
    assert not stray, f"silent: {stray}"
    assert not waiting_files(data, RECIPE), "silent: still waiting"
    quarantined = [path for path in below(incoming) if path.parent.name == "quarantine" and not is_reason(path)]
    reasons = [path.with_name(f"{path.name}.reason.txt") for path in quarantined]
    assert all(reason.is_file() for reason in reasons), f"silent: {quarantined}"
    lost = before - contents(incoming)
    assert not lost, f"lost: {lost}"
    if lying:
        return f"named: {' '.join(lying)}"
    return " ".join(reason.read_text() for reason in reasons) or INGESTED


def episode_ids(data: Path) -> list[str]:
    files = (data / RECIPE / "ingested_trajectories" / "episodes").glob("*.parquet")
    return sorted(id_ for file in files for id_ in pl.read_parquet(file)["episode_id"])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A data folder in which something was ingested."""
    data = tmp_path_factory.mktemp("template")
    materialize_stage(BENCHMARK, recipe, data)
    (data / "incoming" / RECIPE).mkdir(parents=True)
    (data / "incoming" / RECIPE / "earlier.jsonl").write_bytes(EARLIER)
    materialize_stage(REAL, recipe, data)
    return data


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate({"name": RECIPE, **yaml.safe_load(RECIPE_YAML)})


def tried(build: Build, expected: str, data: Path, recipe: Recipe) -> str | None:
    """What went wrong: 'silent', 'lost', 'traceback' or 'wrong', and what; None where nothing did."""
    incoming = data / "incoming" / RECIPE
    shutil.rmtree(incoming / "ingested")  # some bring their own
    build(incoming)
    (incoming / "zz-good.jsonl").write_bytes(GOOD)
    before = contents(incoming)
    try:
        with at_most_seconds(120):
            materialize_stage(REAL, recipe, data)
            archive(data, RECIPE)
            ended = end_of(incoming, before)
    except AssertionError as error:
        return str(error)
    except (Exception, Hang) as error:  # noqa: BLE001 - this is what is looked for
        return f"traceback: {error!r}"
    if "good" not in episode_ids(data):
        return "wrong: what lay beside it was not ingested"
    if expected == INGESTED and len(episode_ids(data)) < 2:
        return "wrong: not in the artifact"
    if expected != "any" and not re.search(
        expected if expected == INGESTED else expected.removeprefix("named: "), ended
    ):
        return f"wrong: {ended[:500]}"
    if expected.startswith("named: ") != ended.startswith("named: ") and expected != "any":
        return f"wrong: {ended[:500]}"
    return None


@pytest.mark.slow
def test_each_kind_ends_as_it_should(
    template: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    troubles: dict[str, str] = {}
    started = kinds()
    for number, (kind, (expected, build)) in enumerate(started.items()):
        data = tmp_path / str(number)
        shutil.copytree(template, data, symlinks=True)
        trouble = tried(build, expected, data, recipe)
        if trouble is not None:
            troubles[kind] = trouble
        shutil.rmtree(data)
        for name in ("quarantine", "ingested"):
            shutil.rmtree(Path("/dev/shm", f"dmr-{os.getpid()}-{name}"), ignore_errors=True)
    count = Counter(trouble.partition(":")[0] for trouble in troubles.values())
    with capsys.disabled():
        print(  # noqa: T201
            f"\nhostile files {len(started)}: "
            + ", ".join(f"{how} {count[how]}" for how in ("silent", "traceback", "lost", "wrong"))
        )
    assert len(started) >= 118
    assert not troubles


@pytest.mark.slow
def test_all_kinds_in_one_folder(project: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Each under a name of its own where it has one; the command line then names what is left in plain lines."""
    materialize_stage(BENCHMARK, project)
    incoming = Path("data/incoming") / RECIPE
    incoming.mkdir(parents=True)
    (incoming / "0.jsonl").write_bytes(EARLIER)
    (incoming / "zz.jsonl").write_bytes(GOOD)
    for number, (kind, (_, build)) in enumerate(kinds().items()):
        if "quarantine" in kind or "ingested" in kind or "8 TB" in kind:
            continue  # one folder has one of each
        apart = incoming / f".{number}"
        apart.mkdir()
        build(apart)
        for path in apart.iterdir():
            suffix = path.suffix if len(path.suffix) < 10 and path.name.isprintable() else ".jsonl"
            path.rename(incoming / (path.name if "name" in kind else f"{number}-{path.stem[:9]}{suffix}"))
        apart.rmdir()
    before = contents(incoming)
    with at_most_seconds(300):
        materialize_stage(REAL, project)
        ended = end_of(incoming, before)
    assert ended.startswith("named: ")
    assert {"earlier", "good"} <= set(episode_ids(Path("data")))
    (incoming / "[red]\x1b[31mx[/]".replace("/", "\\")).mkdir()
    done = CliRunner().invoke(app, ["status", RECIPE])
    assert done.exit_code == 0, done.output
    named = [line for line in done.output.splitlines() if "it is a folder, no file" in line]
    assert len(named) == 4
    assert done.output.replace("\n", "").isprintable()
    assert materialize_stage(REAL, project).skipped
