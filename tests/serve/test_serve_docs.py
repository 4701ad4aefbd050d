"""`dmr serve` as a process: the examples of docs/serve.md, and its end."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from dmr_pipeline.cli import app
from dmr_pipeline.serve.run import running
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.serving import SERVED, dmr_serve
from tests.helpers.upstreams import stand_ins

EXAMPLES = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/serve.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_of_the_documentation(served_project: Path) -> None:
    assert len(EXAMPLES) == 4
    with running(Service(ServeSettings(recipe=SERVED, port=0))) as address:
        shown = [
            subprocess.run(
                example.replace("http://127.0.0.1:8000", address).replace("alfworld-tiny", SERVED),
                shell=True, capture_output=True, text=True, check=True,
            ).stdout
            for example in EXAMPLES
        ]  # fmt: skip
    turn, decision, outcome, rest = shown
    assert "x-dmr-reason: router" in turn
    assert json.loads(turn.splitlines()[-1])["model"].startswith(f"dmr/{SERVED}:")
    assert json.loads(decision)["reason"] == "router"
    assert json.loads(outcome)["logged"] is True
    assert f"dmr/{SERVED}@1" in rest
    assert '{"status":"ok"}' in rest
    assert 'dmr_episodes_total{outcome="failure"} 1' in rest
    assert len(list((served_project / "data" / "incoming" / SERVED).glob("*.jsonl"))) == 1


def test_the_command_ends_by_a_signal_once_open_streams_have_ended(served_project: Path) -> None:
    with stand_ins("float", "int2") as ins:
        options = [text for name, one in ins.items() for text in ("--upstream", f"{name}={one.address}")]
        ins["int2"].pause = 0.3
        with dmr_serve(*options) as (address, process):
            body = {
                "model": f"dmr/{SERVED}:int2",
                "stream": True,
                "messages": [{"role": "user", "content": "A room.\nYour task is to: put a mug in desk."}],
            }
            with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                shown = [next(lines)]
                process.send_signal(signal.SIGTERM)
                shown += [line for line in lines if line]
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert shown[-1] == "data: [DONE]"
    deltas = [json.loads(line[5:])["choices"][0]["delta"] for line in shown[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "look int2"
    (aside,) = (served_project / "data" / "incoming" / SERVED).iterdir()
    assert aside.name.endswith(".unended")


def test_what_is_wrong_is_a_line(served_project: Path) -> None:
    for arguments, said in (
        (["--host", "0.0.0.0"], "DMR_API_KEY"),
        (["--upstream", "float"], "RUNG=URL"),
        (["--epsilon", "2"], "epsilon"),
    ):
        done = CliRunner().invoke(app, ["serve", SERVED, *arguments])
        assert done.exit_code == 2
        assert said in done.output
        assert done.output.count("\n") == 1, done.output
