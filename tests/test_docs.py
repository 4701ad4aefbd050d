"""The tables of docs/what-works.md: each row names a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "docs/what-works.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not re.match(r"\|[ -]+\|[ -]+\|", line) and not line.endswith("| test |")
]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_names_a_test_that_exists(row: str) -> None:
    file, _, name = row.split("|")[4].strip().strip("`").partition("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {re.escape(name)}\(", source, re.M), row


def test_there_are_rows() -> None:
    assert len(ROWS) > 0
