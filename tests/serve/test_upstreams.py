"""Two precisions behind other servers, and all that can go wrong with them: what the client sees."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from pydantic import SecretStr

from dmr_pipeline.agent.checkpoint import load_tokenizer
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.router.model import load_router, new_router, routing_logits, routing_sequence, save_router
from dmr_pipeline.serve.metrics import Metrics
from dmr_pipeline.serve.run import running
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.serve.upstreams import Upstreams
from tests.helpers.probes import new_probe
from tests.helpers.routers import ARCHITECTURE, ROUTE
from tests.helpers.serving import SERVED, release, served_recipe, trained
from tests.helpers.upstreams import StandIn, stand_ins

FIRST = "You are in a room. Your task is to: put a mug in desk."


@contextmanager
def proxied(*ins: StandIn, **settings: object) -> Iterator[tuple[openai.OpenAI, Service]]:
    upstreams = {stand_in.name: stand_in.address for stand_in in ins}
    quick = {"retry_seconds": 0.01, "first_byte_seconds": 0.5, "router_seconds": 10.0, **settings}
    service = Service(ServeSettings(recipe=SERVED, port=0, upstreams=upstreams, **quick))
    with running(service) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), service


@pytest.fixture(scope="module")
def ins() -> Iterator[tuple[StandIn, StandIn]]:
    with stand_ins("float", "int2") as found:
        yield found["float"], found["int2"]


@pytest.fixture
def pair(ins: tuple[StandIn, StandIn], served_project: Path) -> tuple[StandIn, StandIn]:
    for stand_in in ins:
        stand_in.faults, stand_in.always, stand_in.tokens, stand_in.left, stand_in.asked = [], "", 0, 0, []
        stand_in.headers, stand_in.template, stand_in.retry_after = [], "{}", "0.05"
        stand_in.tool, stand_in.tool_type = "", "function"
        stand_in.model, stand_in.special = "", False
    return ins


def ask(client: openai.OpenAI, *texts: str, model: str = f"dmr/{SERVED}", **fields: object):
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return client.chat.completions.with_raw_response.create(model=model, messages=messages, **fields)


def streamed(client: openai.OpenAI, *texts: str, **fields: object) -> tuple[str, list]:
    chunks = list(ask(client, *texts, stream=True, **fields).parse())
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


@pytest.mark.parametrize("stream", [False, True])
def test_the_router_reads_the_conversation_and_the_precision_that_it_names_answers(
    pair: tuple[StandIn, StandIn], served_project: Path, stream: bool
) -> None:
    """Its probabilities are those of one plain forward pass over the transcript in the recipe's own words."""
    router = load_router(served_project / "data" / SERVED / "released_router" / "router", torch.device("cpu"))
    prompter = Prompter.of(router.tokenizer, served_recipe().agent.prompt)
    task, texts, found = "put a mug in desk", [FIRST], []
    seen = ["You are in a room.", "You see a mug 1.", "You open it.", "Nothing happens."]
    with proxied(*pair) as (client, service):
        for turn in range(4):
            raw = ask(client, *texts, stream=stream, extra_headers={"x-session-id": "a"}, tools=[])
            if stream:
                text = "".join(c.choices[0].delta.content or "" for c in raw.parse() if c.choices)
            else:
                text = raw.parse().choices[0].message.content
            found.append((raw.headers["x-dmr-precision"], float(raw.headers["x-dmr-probability"])))
            assert text == f"look {found[-1][0]}"
            texts += [text, seen[turn + 1]] if turn < 3 else []
        assert service.metrics.total("dmr_tokens_total", kind="completion") == 8
        said = client.post("/sessions/a/outcome", cast_to=object, body={
            "success": True, "task_id": "a/1", "task_type": "pick_and_place_simple", "observation": "Done."})  # fmt: skip
    assert said["logged"], said
    segments = [(prompter.turn if i else prompter.opening)(text, task) for i, text in enumerate(seen)]
    actions = [prompter.action(f"look {precision}") for precision, _ in found]
    sequence = routing_sequence(segments, actions, [precision for precision, _ in found], router.settings)
    with torch.no_grad():
        levels = router.settings.exceedance(routing_logits(router.model, [sequence], router.settings).double())[:, 0]
    assert [level for _, level in found] == pytest.approx(levels.tolist(), abs=1e-4)
    assert [p for p, _ in found] == ["float" if x >= router.settings.threshold else "int2" for x in levels.tolist()]
    (file,) = (served_project / "data" / "incoming" / SERVED).iterdir()
    episode = LoggedEpisode.model_validate_json(file.read_text())
    assert [step.precision for step in episode.steps] == [precision for precision, _ in found]
    assert [step.observation for step in episode.steps] == [*seen[1:], "Done."]
    passed = (pair[0].asked + pair[1].asked)[0]
    assert passed["model"] in ("float", "int2")
    assert passed["tools"] == []
    assert "metadata" not in passed


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_passed_on_and_are_the_commands_of_the_log(
    pair: tuple[StandIn, StandIn], served_project: Path, stream: bool
) -> None:
    pair[1].tool = "look_at"
    with proxied(*pair) as (client, service):
        raw = ask(client, FIRST, stream=stream, model=f"dmr/{SERVED}:int2", extra_headers={"x-session-id": "a"},
                  tools=[{"type": "function", "function": {"name": "look_at"}}])  # fmt: skip
        if stream:
            deltas = [chunk.choices[0].delta for chunk in raw.parse() if chunk.choices]
            calls = [call for delta in deltas for call in delta.tool_calls or []]
            name, arguments = calls[0].function.name, "".join(call.function.arguments for call in calls)
        else:
            (call,) = raw.parse().choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
        assert (name, json.loads(arguments)) == ("look_at", {"what": "int2"})
        measured = re.findall(r"^dmr_token_seconds_count (\d+)", service.metrics.text({}), re.M)
        assert measured == ["1"]
        client.post("/sessions/a/outcome", cast_to=object, body={
            "success": True, "task_id": "a/1", "task_type": "pick_and_place_simple"})  # fmt: skip
    (file,) = (served_project / "data" / "incoming" / SERVED).iterdir()
    (step,) = LoggedEpisode.model_validate_json(file.read_text()).steps
    assert step.command == 'look_at({"what": "int2"})'


def test_usage_is_shown_to_who_asks_for_it_alone(pair: tuple[StandIn, StandIn]) -> None:
    with proxied(*pair) as (client, _):
        _, chunks = streamed(client, FIRST)
        assert all(chunk.choices for chunk in chunks)
        assert {chunk.model for chunk in chunks} <= {f"dmr/{SERVED}:float", f"dmr/{SERVED}:int2"}
        _, chunks = streamed(client, FIRST, stream_options={"include_usage": True})
        assert chunks[-1].usage.completion_tokens == 2


def test_faults_of_the_cheaper_one_and_what_the_client_sees(pair: tuple[StandIn, StandIn]) -> None:
    """Tries again where nothing was sent; where it stays down the dearer one answers."""
    low = pair[1]
    low_model = {"model": f"dmr/{SERVED}:int2"}
    with proxied(*pair, retries=2) as (client, service):
        for number, (stream, fault) in enumerate(
            [(s, f) for s in (False, True) for f in ("500", "429", "503", "reset", "garbage")]
        ):
            session = {"extra_headers": {"x-session-id": f"mended-{number}"}}
            low.faults = [fault, fault]
            raw = ask(client, FIRST, stream=stream, **low_model, **session)
            assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("int2", "fixed"), (fault, stream)
        before = service.metrics.total("dmr_fail_open_total")
        for stream in (False, True):
            low.faults = ["500"] * 3
            raw = ask(client, FIRST, stream=stream, **low_model, extra_headers={"x-session-id": f"down-{stream}"})
            assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")
            assert "x-dmr-degraded" not in raw.headers
            parsed = next(iter(raw.parse())) if stream else raw.parse()
            assert parsed.model == f"dmr/{SERVED}:float"
        assert service.metrics.total("dmr_fail_open_total") - before == 2
        assert service.metrics.total("dmr_upstream_errors_total", kind="status_429") == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("times", [{}, {"first_byte_seconds": 60.0, "request_seconds": 4.0}])
def test_one_that_hangs_is_not_tried_again_and_the_dearer_one_answers_in_time(
    pair: tuple[StandIn, StandIn], stream: bool, times: dict[str, float]
) -> None:
    pair[1].always = "hang"
    with proxied(*pair, **times) as (client, service):
        raw = ask(client, FIRST, model=f"dmr/{SERVED}:int2", stream=stream)
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")
        assert len(pair[1].asked) == 1
        assert service.metrics.total("dmr_upstream_errors_total", kind="timeout") == 1


def test_however_many_hang_the_dearest_is_asked_in_time() -> None:
    async def answering(found: dict[str, StandIn]) -> str:
        addresses = {name: stand_in.address for name, stand_in in found.items()}
        upstreams = Upstreams(
            ServeSettings(recipe=SERVED, upstreams=addresses, request_seconds=3.0), list(addresses), Metrics()
        )
        async with asyncio.timeout(3.0), AsyncExitStack() as stack:
            opened = await upstreams.open(stack, "int2", {"messages": []}, stream=False)
        await upstreams.close()
        return opened.precision

    with stand_ins("float", "int4", "int2") as found:
        found["int4"].always = found["int2"].always = "hang"
        assert asyncio.run(answering(found)) == "float"


@pytest.mark.parametrize("stream", [False, True])
def test_the_dearer_one_down_is_an_error_unless_degrading_is_allowed(
    pair: tuple[StandIn, StandIn], stream: bool
) -> None:
    high, low = pair
    high.always = "500"
    high_model = {"model": f"dmr/{SERVED}:float", "stream": stream}
    with proxied(*pair, retries=0) as (client, service):
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, FIRST, **high_model)
        assert error.value.status_code == 503
        assert error.value.body["code"] == "upstream_down"
        assert service.metrics.total("dmr_requests_total", outcome="error") == 1
    with proxied(*pair, retries=0, degrade=True) as (client, _):
        raw = ask(client, FIRST, **high_model)
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-degraded"]) == ("int2", "true")
        parsed = next(iter(raw.parse())) if stream else raw.parse()
        assert parsed.model_extra["dmr"] == {"degraded": True}
        assert raw.headers["x-dmr-reason"] == "fallback"
        low.always = "500"
        with pytest.raises(openai.InternalServerError):
            ask(client, FIRST, **high_model)


def test_how_long_an_upstream_wants_to_be_left_alone_is_passed_on_and_waited_for_if_it_is_not_long(
    pair: tuple[StandIn, StandIn],
) -> None:
    high, low = pair
    high.always, high.retry_after = "429", "30.5"
    low.always, low.retry_after = "429", "90"
    with proxied(*pair, retries=3) as (client, _):
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, FIRST, model=f"dmr/{SERVED}:int2")
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "31")
        assert (len(high.asked), len(low.asked)) == (1, 1)  # that long nobody waits here
        high.always = ""
        raw = ask(client, FIRST, model=f"dmr/{SERVED}:int2")
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")


def test_upstreams_get_a_key_of_their_own_and_a_wrong_one_is_not_the_clients_fault(
    pair: tuple[StandIn, StandIn],
) -> None:
    low = pair[1]
    with proxied(*pair, upstream_key=SecretStr("theirs"), retries=0) as (client, service):
        assert ask(client, FIRST, model=f"dmr/{SERVED}:int2").headers["x-dmr-precision"] == "int2"
        assert low.headers[0]["authorization"] == "Bearer theirs"
        low.always = "401"
        raw = ask(client, FIRST, model=f"dmr/{SERVED}:int2", extra_headers={"x-session-id": "b"})
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")
        assert service.metrics.total("dmr_upstream_errors_total", kind="status_401") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_upstream_refuses_is_the_clients(pair: tuple[StandIn, StandIn], stream: bool) -> None:
    pair[1].faults = ["400"]
    with proxied(*pair) as (client, _):
        with pytest.raises(openai.BadRequestError, match="fault 400"):
            ask(client, FIRST, model=f"dmr/{SERVED}:int2", stream=stream)
        assert len(pair[1].asked) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_cannot_hold_are_refused(pair: tuple[StandIn, StandIn], number: str) -> None:
    body = json.dumps({"model": f"dmr/{SERVED}", "messages": [{"role": "user", "content": FIRST}], "top_p": 0.5})
    with proxied(*pair) as (client, _):
        refused, fine = (
            httpx2.post(f"{client.base_url}chat/completions", content=body.replace("0.5", value))
            for value in (number, "0.5")
        )
    assert (refused.status_code, fine.status_code) == (400, 200)
    assert f"the number {number}," in refused.json()["error"]["message"]
    assert [asked["top_p"] for stand_in in pair for asked in stand_in.asked] == [0.5]


def test_a_reset_in_mid_stream_ends_with_an_error_and_the_turn_can_be_asked_again(
    pair: tuple[StandIn, StandIn],
) -> None:
    pair[1].faults = ["midway"]
    with proxied(*pair) as (client, service):
        fields = {"model": f"dmr/{SERVED}:int2", "extra_headers": {"x-session-id": "a"}}
        with pytest.raises(openai.APIError, match="broke off"):
            streamed(client, FIRST, **fields)
        assert len(pair[1].asked) == 1  # nothing is tried again once something was sent
        text, _ = streamed(client, FIRST, **fields)
        assert text == "look int2"
        raw = ask(client, FIRST, text, "Nothing happens.", **fields)
        assert raw.headers["x-dmr-turn"] == "2"
        # An answer that did not come through, although it was sent: it is asked for anew, and is one turn.
        raw = ask(client, FIRST, text, "Nothing happens.", **fields)
        assert raw.headers["x-dmr-turn"] == "2"
        assert service.table.find("a").session.turn == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_upstreams_work(pair: tuple[StandIn, StandIn], stream: bool) -> None:
    low = pair[1]
    low.always = "endless" if stream else "hang"
    with proxied(*pair, first_byte_seconds=30.0) as (client, _):
        body = {"model": f"dmr/{SERVED}:int2", "stream": stream, "messages": [{"role": "user", "content": FIRST}]}
        url, headers = f"{client.base_url}chat/completions", {"x-session-id": "a"}
        if stream:
            with httpx2.stream("POST", url, json=body, headers=headers) as response:
                assert next(response.iter_lines()).startswith("data:")
        else:
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url, json=body, headers=headers, timeout=0.5)
        deadline = time.monotonic() + 30
        while not low.left and time.monotonic() < deadline:
            time.sleep(0.01)
        assert low.left == 1
        low.always = ""
        assert ask(client, FIRST, model=f"dmr/{SERVED}:int2", extra_headers=headers).headers["x-dmr-turn"] == "1"


def test_a_turn_that_no_upstream_answered_is_decided_as_if_it_had_not_been_asked(pair: tuple[StandIn, StandIn]) -> None:
    """The router has read its observation by then, and reads it again."""
    told = (FIRST, "look", "You see a mug 1.")
    with proxied(*pair, retries=0) as (client, _):
        for name in ("a", "b"):
            session = {"extra_headers": {"x-session-id": name}}
            texts = [FIRST, ask(client, FIRST, **session).parse().choices[0].message.content, told[2]]
            if name == "b":
                pair[0].faults, pair[1].faults = ["500", "500"], ["500", "500"]
                for _ in range(2):
                    with pytest.raises(openai.InternalServerError):
                        ask(client, *texts, **session)
            found = ask(client, *texts, **session).headers
            if name == "a":
                undisturbed = found
    assert found["x-dmr-turn"] == "2"
    assert found["x-dmr-probability"] == undisturbed["x-dmr-probability"]


def test_an_answer_that_is_no_step_is_told_and_holds_nobody_up(pair: tuple[StandIn, StandIn]) -> None:
    low, session = pair[1], {"model": f"dmr/{SERVED}:int2", "extra_headers": {"x-session-id": "a"}}
    low.tool, low.tool_type = "look_at", "custom"
    with proxied(*pair, request_seconds=20.0) as (client, _):
        with pytest.raises(openai.BadRequestError, match="tool_calls"):
            ask(client, FIRST, **session)
        low.tool = ""
        assert ask(client, FIRST, **session).headers["x-dmr-turn"] == "1"
        called = [{"type": "custom"}]
        messages = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": None, "tool_calls": called},
                    {"role": "user", "content": "Nothing happens."}]  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="tool_calls"):
            client.chat.completions.create(model=f"dmr/{SERVED}:int2", messages=messages)


def test_streams_that_go_on_are_counted_among_the_requests(pair: tuple[StandIn, StandIn]) -> None:
    low = pair[1]
    low.always = "endless"
    with proxied(*pair, requests=1) as (client, _):
        body = {"model": f"dmr/{SERVED}:int2", "stream": True, "messages": [{"role": "user", "content": FIRST}]}
        with httpx2.stream("POST", f"{client.base_url}chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            assert httpx2.get(f"{client.base_url}models").status_code == 429
        deadline = time.monotonic() + 30
        while httpx2.get(f"{client.base_url}models").status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx2.get(f"{client.base_url}models").status_code == 200


@pytest.mark.parametrize("said", ["inf", "nan", "tomorrow"])
def test_waits_that_are_no_number_of_seconds_are_not_passed_on(pair: tuple[StandIn, StandIn], said: str) -> None:
    for stand_in in pair:
        stand_in.always, stand_in.retry_after = "429", said
    with proxied(*pair, retries=0) as (client, _):
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, FIRST, model=f"dmr/{SERVED}:int2")
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(("low_on_failure", "rung"), [(False, "float"), (True, "int2")])
@pytest.mark.parametrize(("fault", "stream"), [("raises", False), ("raises", True), ("hangs", False), ("hangs", True)])
def test_a_router_that_fails_or_hangs_lets_the_recipes_side_act(
    pair: tuple[StandIn, StandIn],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    stream: bool,
    low_on_failure: bool,
    rung: str,
) -> None:
    waiting = threading.Event()
    with proxied(*pair, router_seconds=0.3, low_on_failure=low_on_failure) as (client, service):
        ask(client, FIRST, extra_headers={"x-session-id": "a"})  # the router is loaded
        policy = service.backend.deciders.current.policy

        def decide(*_: object) -> None:
            if fault == "hangs":
                waiting.wait(30)
            raise ValueError

        with monkeypatch.context() as patch:
            patch.setattr(policy, "decide", decide)
            raw = ask(client, FIRST, stream=stream, extra_headers={"x-session-id": "b"})
            waiting.set()
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == (rung, "fallback")
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse()) if stream else None
        assert (answer or raw.parse().choices[0].message.content) == f"look {rung}"
        assert service.metrics.total("dmr_fail_open_total") == 1
        deadline = time.monotonic() + 30
        while service.backend.deciding.failures < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        again = ask(client, FIRST, f"look {rung}", "A mug.", extra_headers={"x-session-id": "b"})
        assert again.headers["x-dmr-reason"] == "router"


def test_failures_of_the_router_at_the_same_time_are_counted_once_each(
    pair: tuple[StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = 6
    with proxied(*pair) as (client, service):
        ask(client, FIRST, extra_headers={"x-session-id": "loads the router"})

        def decide(*_: object) -> None:
            time.sleep(0.1)  # the others wait
            raise ValueError

        monkeypatch.setattr(service.backend.deciders.current.policy, "decide", decide)
        with ThreadPoolExecutor(sessions) as threads:
            found = list(
                threads.map(lambda n: ask(client, FIRST, extra_headers={"x-session-id": str(n)}), range(sessions))
            )
        assert [raw.headers["x-dmr-reason"] for raw in found] == ["fallback"] * sessions
        assert service.metrics.total("dmr_fail_open_total") == sessions


def test_budgets_hold_behind_upstreams_and_a_cost_is_refused(
    pair: tuple[StandIn, StandIn], served_project: Path
) -> None:
    release(served_project, 0.0)
    with proxied(*pair) as (client, _):
        texts, found = [FIRST], []
        for _ in range(5):
            raw = ask(client, *texts, metadata={"high_ratio": "0.4", "session_id": "a"})
            found.append(raw.headers["x-dmr-precision"])
            texts += [raw.parse().choices[0].message.content, "Nothing happens."]
        assert found == ["int2", "int2", "float", "int2", "float"]
        # Of a session that this server does not hold it is not known who acted: the dearest is assumed.
        for turns, precision in ((2, "int2"), (5, "int2")):
            headers = ask(
                client, *texts[: 2 * turns + 1], metadata={"high_ratio": "0.4", "session_id": f"b{turns}"}
            ).headers
            assert (headers["x-dmr-precision"], headers["x-dmr-reason"]) == (precision, "budget")
        with pytest.raises(openai.BadRequestError, match="high_ratio"):
            ask(client, FIRST, metadata={"cost": "1", "session_id": "b"})


def test_what_cannot_be_served_by_upstreams_is_refused_with_the_reason(
    pair: tuple[StandIn, StandIn], served_project: Path
) -> None:
    folder = served_project / "probe"
    save_router(new_probe(), folder)
    with pytest.raises(UserError, match="an agent that acts in this process"), proxied(*pair, router=folder):
        pass
    for upstreams, said in (({"float": "x", "int3": "y"}, "no such rung"), ({"float": "x"}, "two precisions")):
        with pytest.raises(UserError, match=said):
            Service(ServeSettings(recipe=SERVED, upstreams=upstreams))


def test_a_router_in_a_folder_decides_in_place_of_the_released_one(
    pair: tuple[StandIn, StandIn], served_project: Path
) -> None:
    folder = served_project / "set-to-a-budget"
    save_router(trained(served_project / "data" / SERVED, 1.0), folder)
    with proxied(*pair, router=folder) as (client, _):
        found = ask(client, FIRST).headers
        assert (found["x-dmr-precision"], found["x-dmr-threshold"], found["x-dmr-reason"]) == (
            "int2",
            "1.000000",
            "router",
        )
        assert "x-dmr-release" not in found


def test_a_router_of_other_tokens_does_not_decide_for_sessions_that_go_on(
    pair: tuple[StandIn, StandIn], served_project: Path
) -> None:
    tokenizer = load_tokenizer(served_project / "data" / SERVED / "quantized_checkpoints" / "tokenizer")
    tokenizer.add_tokens(["mug 1"])
    folder = served_project / "other"
    save_router(new_router(RouterModel(architecture=ARCHITECTURE), ROUTE, tokenizer, 3, torch.device("cpu")), folder)
    with proxied(*pair) as (client, service):
        before = ask(client, FIRST).headers["x-dmr-probability"]
        with pytest.raises(UserError, match="other tokens"):
            service.backend._load(folder)
        assert ask(client, FIRST, extra_headers={"x-session-id": "b"}).headers["x-dmr-probability"] == before


def test_a_router_of_another_version_is_one_line_and_the_agent_acts(
    pair: tuple[StandIn, StandIn], served_project: Path
) -> None:
    folder = served_project / "newer"
    save_router(trained(served_project / "data" / SERVED, 1.0), folder)
    settings = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps(settings | {"of_tomorrow": 1}))
    with (
        proxied(*pair) as (_, service),
        pytest.raises(UserError, match=r"router.json: .*of_tomorrow.*make the router anew"),
    ):
        service.backend._load(folder)


def test_a_model_that_was_replaced_is_asked_for_by_its_new_name(pair: tuple[StandIn, StandIn]) -> None:
    low = pair[1]
    low.model = "qwen-awq"
    with proxied(*pair, retries=1) as (client, _):
        for number, model in enumerate(["qwen-awq", "qwen-awq-v2"]):
            low.model = model
            raw = ask(client, FIRST, model=f"dmr/{SERVED}:int2", extra_headers={"x-session-id": f"{number}"})
            assert raw.headers["x-dmr-precision"] == "int2"
            assert low.asked[-1]["model"] == model
    with proxied(*pair, retries=1, upstream_models={"int2": "mistyped"}) as (client, _):
        raw = ask(client, FIRST, model=f"dmr/{SERVED}:int2")
        assert (raw.headers["x-dmr-precision"], raw.headers["x-dmr-reason"]) == ("float", "fallback")


def test_other_tokenizers_are_found_at_the_start(pair: tuple[StandIn, StandIn]) -> None:
    high, low = pair

    def differences(**addresses: str) -> list[str]:
        settings = ServeSettings(recipe=SERVED, upstreams=addresses)
        return asyncio.run(Upstreams(settings, list(addresses), Metrics()).check())

    high.special = True  # by default vLLM begins a text where llama.cpp does not
    assert differences(float=high.address, int2=low.address) == []
    low.template = "<{}>"
    (said,) = differences(float=high.address, int2=low.address)
    assert "different chat templates" in said
    low.tokens, low.template = 1, "{}"
    (said,) = differences(float=high.address, int2=low.address)
    assert "different tokenizers" in said
    assert differences(float=high.address, int2="http://127.0.0.1:1/v1") == []  # it does not tell


def test_many_sessions_lose_no_request_where_one_in_ten_fails(pair: tuple[StandIn, StandIn]) -> None:
    faults = ["500", "reset", "garbage", "429", "503"]
    for stand_in in pair:
        stand_in.faults = [faults[n // 10 % 5] if n % 10 == 3 else "" for n in range(300)]
    with proxied(*pair, retries=3) as (client, service):

        async def play(number: int, http: httpx2.AsyncClient) -> None:
            texts = [FIRST]
            for turn in range(4):
                messages = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]
                body = {"model": f"dmr/{SERVED}", "messages": messages}
                answer = await http.post("chat/completions", json=body, headers={"x-session-id": str(number)})
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-dmr-turn"] == str(turn + 1)
                texts += [answer.json()["choices"][0]["message"]["content"], "Nothing happens."]

        async def all_of_them() -> None:
            async with httpx2.AsyncClient(base_url=str(client.base_url), timeout=60) as http:
                await asyncio.gather(*(play(number, http) for number in range(24)))

        asyncio.run(all_of_them())
        assert service.metrics.total("dmr_requests_total", outcome="ok") == 96
        assert service.metrics.total("dmr_upstream_errors_total") > 3
        assert json.dumps(service.gauges()["dmr_sessions"]).endswith("24]")
