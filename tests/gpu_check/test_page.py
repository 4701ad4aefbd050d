"""The committed figures: the page's tables are those of its JSON, and so are the numbers in its text."""

from pathlib import Path

import pytest

from dmr_pipeline.gpu_check.page import tables
from dmr_pipeline.gpu_check.record import Part, Record

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MARK = "<!-- figures -->\n"


@pytest.fixture
def record() -> Record:
    return Record.model_validate_json((RESULTS / "gpu-check-h100.json").read_text(encoding="utf-8"))


def part(record: Record, name: str) -> Part:
    [found] = [part for part in record.parts if part.name == name]
    return found


def test_the_tables_are_those_of_the_json(record: Record) -> None:
    _, figures = (RESULTS / "gpu-check.md").read_text(encoding="utf-8").split(MARK)
    assert figures == "\n" + tables(record)


def test_every_figure_of_a_table_is_where_it_belongs(record: Record) -> None:
    lines = [line.strip("| ").split(" | ") for line in tables(record).splitlines() if line.startswith("|")]
    for row in part(record, "decoding at the shapes of real models").rows:
        [line] = [line for line in lines if line[0] == row["model"]]
        assert float(line[3]) == row["streams"]
        assert float(line[5]) == row["generate"]
    speed = part(record, "steps a second").rows
    [header] = [line for line in lines if line[0].startswith("steps a second, ")]
    for row in speed:
        [line] = [line for line in lines if line[0] == row["acting"]]
        assert float(line[header.index(str(row["episodes"]))]) == row["steps_a_second"]
    [failed] = [line for line in lines if line[0] == "out of memory"]
    assert failed[1] == "failed"


def test_the_text_says_what_was_found(record: Record) -> None:
    text = " ".join((RESULTS / "gpu-check.md").read_text(encoding="utf-8").split(MARK)[0].split())
    assert all(check.passed for check in part(record, "quantize, save, reload").checks)
    actions = part(record, "actions equal to the CPU's")
    assert actions.checks[0].found.startswith("24 of 24 equal")
    shares = [row["equal_actions"] for row in actions.rows if "equal_actions" in row]
    assert "99.4% of the actions" in text
    assert "93.5% with int4 and 80.2% with int2" in text
    assert [round(100 * float(share), 1) for share in shares] == [99.4, 93.5, 80.2]

    decoding = part(record, "decoding at the shapes of real models").rows
    milliseconds, times = ([float(row[name]) for row in decoding] for name in ("streams", "streams_over_limit"))
    assert f"took {min(milliseconds):.0f} to {max(milliseconds):.0f} ms" in text
    assert f"{min(times):.0f} to {max(times):.0f} times what reading the weights takes" in text

    rates = {
        (row["acting"], row["episodes"]): float(row["steps_a_second"]) for row in part(record, "steps a second").rows
    }
    gains = [rate / rates[acting, 1] for (acting, episodes), rate in rates.items() if episodes == 64]
    assert f"64 at once made {min(gains):.0f} to {max(gains):.0f} times the steps of one" in text

    products = {(row["layer"], row["method"], row["rows"]): float(row["time"]) for row in kernels(record)}

    def span(method: str, rows: int) -> str:
        shares = [
            time / products[layer, "bfloat16", rows]
            for (layer, name, count), time in products.items()
            if (name, count) == (method, rows)
        ]
        return f"{min(shares):.2f} to {max(shares):.2f}"

    assert f"in groups of 128 took {span('torch int4, groups of 128', 1)} of bfloat16's time" in text
    assert f"8 rows {span('torch int4, groups of 128', 8)}" in text
    assert f"one row took {span('quanto int8', 1)} and {span('quanto int2', 1)} of bfloat16's time" in text
    assert f"torch's int8 kernel {span('torch int8', 1)}" in text
    assert "62 of 64" in text
    assert "62 of 64" in part(record, "out of memory").checks[1].found


def kernels(record: Record) -> list[dict]:
    return [row for row in part(record, "low-bit kernels").rows if "method" in row]
