import pytest

from dmr_pipeline.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("go to desk 1, « é 桌 🍎", "go to desk 1, « é 桌 🍎"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\r\nlines\u2028", r"two\r\nlines\u2028"),
        ("left\u202eto right\u200b", r"left\u202eto right\u200b"),
        (b"\xff.jsonl".decode(errors="surrogateescape"), r"\udcff.jsonl"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()
