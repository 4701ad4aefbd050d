"""The figures of a check as Markdown tables."""

from collections.abc import Callable, Sequence

from dmr_pipeline.gpu_check.record import Part, Record, Value

Rows = Sequence[dict[str, Value]]


def tables(record: Record) -> str:
    """All parts, and the figures of those that have a table of their own."""
    blocks = [f"{record.hardware.get('gpu', 'CPU')}, {record.date}. {record.note}".rstrip(), _parts(record.parts)]
    for part in record.parts:
        if part.name in _TABLES and part.rows:
            blocks += [f"### {part.name[0].upper()}{part.name[1:]}", _TABLES[part.name](part.rows)]
    return "\n\n".join(blocks) + "\n"


def _parts(parts: Sequence[Part]) -> str:
    return _table(
        ["part", "outcome", "seconds", "GPU memory at most, GB", "why"],
        [
            [
                part.name,
                part.outcome,
                f"{part.seconds:.0f}",
                "" if part.peak_gpu_bytes is None else f"{part.peak_gpu_bytes / 1e9:.2f}",
                "; ".join([*([part.problem] if part.problem else []), *part.left_out]),
            ]
            for part in parts
        ],
    )


def _reloads(rows: Rows) -> str:
    header = ["model", "rung", "weights are", "bits a weight", "logits' distance from the dequantized weights'"]
    return _table(
        header,
        [
            [row["model"], row["rung"], row["weights"], row["bits_per_weight"], row["error_to_dequantized"]]
            for row in rows
        ],
    )


def _actions(rows: Rows) -> str:
    return _table(
        ["compared with the CPU's float32", "computed in", "steps", "equal actions"],
        [[row["compared"], row["dtype"], row["steps"], row.get("equal_actions", "")] for row in rows],
    )


def _speed(rows: Rows) -> str:
    return _crossed(rows, "acting", "episodes", "steps_a_second", "steps a second, episodes at once:")


def _kernels(rows: Rows) -> str:
    products = [row for row in rows if "method" in row]
    blocks = [f"A large copy reads and writes {rows[0]['speed']} GB/s together. µs a product:"]
    for count in dict.fromkeys(row["rows"] for row in products):
        chosen = [row | {"at": f"{row['layer']}: {row['shape']}"} for row in products if row["rows"] == count]
        blocks.append(_crossed(chosen, "at", "method", "time", f"{count} row{'s' if count != 1 else ''}"))
    return "\n\n".join(blocks)


def _decoding(rows: Rows) -> str:
    columns = ("model", "weights", "limit", "streams", "rollout", "generate", "streams_over_limit")
    header = ["model", "bytes read", "limit, ms a token", "`Streams`", "rollout", "`generate`", "`Streams` / limit"]
    return _table(header, [[row[column] for column in columns] for row in rows])


def _crossed(rows: Rows, down: str, across: str, cell: str, corner: str) -> str:
    """A row for each value of one column, and for each of another a column of the figures."""
    named = list(dict.fromkeys(row[across] for row in rows))
    found = {(row[down], row[across]): row[cell] for row in rows}
    lines = list(dict.fromkeys(row[down] for row in rows))
    return _table(
        [corner, *map(str, named)], [[line, *(found.get((line, name), "") for name in named)] for line in lines]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Value) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


_TABLES: dict[str, Callable[[Rows], str]] = {
    "quantize, save, reload": _reloads,
    "actions equal to the CPU's": _actions,
    "steps a second": _speed,
    "low-bit kernels": _kernels,
    "decoding at the shapes of real models": _decoding,
}
