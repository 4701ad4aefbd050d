"""A real engine behind `dmr serve`: llama.cpp's server, with one model in F16 and in Q4_0."""

import asyncio
import json
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from pydantic import SecretStr

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.serve.upstreams import Upstreams
from tests.helpers.llama_cpp import llama_servers
from tests.helpers.named_models import smollm_tokenizer, tiny_llama
from tests.helpers.needs import llama_cpp
from tests.helpers.quantized_files import write_gguf
from tests.helpers.routers import enlarge
from tests.helpers.serving import SERVED, dmr_serve, play_by_client

KEY = "theirs"
FIRST = {"role": "user", "content": "You see a desk 1.\nYour task is to: put a mug in desk."}


@llama_cpp
@pytest.mark.slow
def test_two_precisions_behind_llama_cpp(served_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMR_UPSTREAM_KEY", KEY)
    tokenizer, model = smollm_tokenizer(), tiny_llama(500)
    with torch.no_grad():
        enlarge(model)
    files = {"float": tmp_path / "f16.gguf", "int2": tmp_path / "q4_0.gguf", "other": tmp_path / "other.gguf"}
    write_gguf(model, files["float"], "F16", tokenizer=tokenizer)
    write_gguf(model, files["int2"], "Q4_0", tokenizer=tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_start|>' + message", "'<|im_start|> ' + message")
    write_gguf(model, files["other"], "F16", tokenizer=tokenizer)
    games = benchmark_of(load_recipe(SERVED).benchmark).read_tasks(
        served_project / "data" / SERVED / "benchmark_tasks", "router_train"
    )
    with llama_servers(KEY, **files) as engines:
        assert "different chat templates" in differences(engines["float"].address, engines["other"].address)[0]
        ups = [text for rung in ("float", "int2") for text in ("--upstream", f"{rung}={engines[rung].address}/v1")]
        with dmr_serve(*ups, "--retries", "0") as (address, _):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            played = [play_by_client(client, games[i], f"dmr/{SERVED}", stream=i == 0, step_limit=2) for i in (0, 1)]
            answers_are_the_engines_own(client, {rung: engines[rung].address for rung in ("float", "int2")})
            with pytest.raises(openai.BadRequestError, match="exceeds the available context"):
                client.chat.completions.create(
                    model=f"dmr/{SERVED}", messages=[FIRST, said("look"), {"role": "user", "content": "a " * 600}]
                )
            leave(address, engines["int2"].address)
            engines["int2"].process.kill()
            engines["int2"].process.wait()
            raw = client.chat.completions.with_raw_response.create(model=f"dmr/{SERVED}:int2", messages=[FIRST])
            assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")
    logged = [
        LoggedEpisode.model_validate_json(file.read_text())
        for file in (served_project / "data" / "incoming" / SERVED).glob("*.jsonl")
    ]
    found = {e.task_id: [(step.command, step.precision) for step in e.steps] for e in logged}
    assert found == {games[i].task_id: played[i] for i in (0, 1)}
    assert all(step.reason == "router" and 0 < step.probability < 1 for e in logged for step in e.steps)


def differences(one: str, another: str) -> list[str]:
    upstreams = {"float": f"{one}/v1", "int2": f"{another}/v1"}
    settings = ServeSettings(recipe=SERVED, upstreams=upstreams, upstream_key=SecretStr(KEY))
    return asyncio.run(Upstreams(settings, list(upstreams), Metrics()).check())


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answers_are_the_engines_own(client: openai.OpenAI, engines: dict[str, str]) -> None:
    """Turn by turn of one session, each by another precision; the last one as JSON of a schema."""
    messages, found = [FIRST], {}
    schema = {"type": "string", "enum": ["look", "wait"]}
    as_json = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    for turn, (rung, fields) in enumerate([("int2", {}), ("float", {}), ("int2", as_json)], 1):
        asked = {"messages": messages, "temperature": 0, "max_tokens": 20 if fields else 6, **fields}
        raw = client.chat.completions.with_raw_response.create(
            model=f"dmr/{SERVED}:{rung}", **asked, extra_headers={"x-session-id": "a"}
        )
        told = [raw.headers[f"x-dmr-{name}"] for name in ("precision", "turn", "switched")]
        assert told == [rung, str(turn), str(turn > 1).lower()]
        text, usage = raw.parse().choices[0].message.content, raw.parse().usage
        for one, address in engines.items():
            own = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY).chat.completions.create(model="any", **asked)
            found[turn, one] = own.choices[0].message.content
            if one == rung:
                assert usage.prompt_tokens == own.usage.prompt_tokens
        assert text == found[turn, rung]
        messages = [*messages, said(text), {"role": "user", "content": "Nothing happens."}]
    assert json.loads(text) in ("look", "wait")
    assert any(found[turn, "float"] != found[turn, "int2"] for turn in (1, 2)), "the precisions are told apart"


def leave(address: str, engine: str) -> None:
    """A client that goes while the engine writes: the engine stops."""
    for stream in (False, True):
        body = {"model": f"dmr/{SERVED}:int2", "messages": [FIRST], "stream": stream, "ignore_eos": True}
        body |= {"max_tokens": 100_000, "id_slot": 0}
        url, headers = f"{address}/v1/chat/completions", {"x-session-id": f"leaves-{stream}"}
        if stream:
            with httpx2.stream("POST", url, json=body, headers=headers, timeout=60) as response:
                assert next(response.iter_lines()).startswith("data:")
        else:
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url, json=body, headers=headers, timeout=0.5)
        deadline = time.monotonic() + 60
        while any(slot["is_processing"] for slot in slots(engine)):
            assert time.monotonic() < deadline
            time.sleep(2)  # llama.cpp looks for those who have left once nothing else happened for a second


def slots(engine: str) -> list[dict[str, object]]:
    return httpx2.get(f"{engine}/slots", headers={"authorization": f"Bearer {KEY}"}, timeout=60).json()
