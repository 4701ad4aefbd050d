import importlib.util
from pathlib import Path

import pytest
import typer

from dmr_pipeline.cli.common import user_errors_exit_2
from dmr_pipeline.errors import printable
from dmr_pipeline.rollout.parallel import in_processes, scatter


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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_in_code_of_the_users_own_is_told_with_its_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    """A benchmark of one's own is no fault of this package, whose last line before says little."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / "mine.py"
    mine.write_text("def step() -> None:\n    {}['lamp']\n")
    spec = importlib.util.spec_from_file_location("mine", mine)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def work() -> None:
        in_processes(lambda part, _: module.step(), scatter([1, 2], processes))

    with pytest.raises(typer.Exit):
        user_errors_exit_2(work)()
    assert f", calling {mine}, line 2): this was not foreseen" in capsys.readouterr().err
