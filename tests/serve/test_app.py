"""The server's interface, by the official client and by hand."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from pydantic import SecretStr
from starlette.types import Message

from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.ingestion.schema import LoggedEpisode
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.rollout.playing import Rollouts
from dmr_pipeline.rollout.policy import SinglePrecision
from dmr_pipeline.rollout.trajectory import RolloutRequest, Trajectory
from dmr_pipeline.router.budgets import NOBODY, AtBar
from dmr_pipeline.router.model import save_router
from dmr_pipeline.router.policies import routing_policy
from dmr_pipeline.router.rules import rule_at_bar, rules
from dmr_pipeline.serve import release as releases
from dmr_pipeline.serve.app import make_app, refuse_open_door
from dmr_pipeline.serve.run import running
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from tests.helpers.serving import SERVED, chat, client_of, play_by_client, release, trained

GAMES = 4


@pytest.fixture
def games(served_project: Path):
    return benchmark_of(load_recipe(SERVED).benchmark).read_tasks(
        served_project / "data" / SERVED / "benchmark_tasks", "router_train"
    )


def by_the_pipeline(games, policy=None) -> list[Trajectory]:
    project = Path.cwd() / "data" / SERVED
    rollouts = Rollouts.load(project / "quantized_checkpoints", load_recipe(SERVED))
    router = releases.load(project / "released_router" / "router", rollouts)
    return rollouts.play([RolloutRequest(game) for game in games], policy or routing_policy(router, GAMES), 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_plays_what_the_pipeline_plays(served_project: Path, games, stream: bool) -> None:
    """All games at once, greedily; and the log holds what was done."""
    played = by_the_pipeline(games)
    with running(Service(ServeSettings(recipe=SERVED, port=0, slots=2))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(GAMES) as threads:
            found = list(threads.map(lambda game: play_by_client(client, game, f"dmr/{SERVED}", stream, 5), games))
    assert found == [[(step.command, step.precision) for step in trajectory.steps] for trajectory in played]
    assert {precision for steps in found for _, precision in steps} == {"float", "int2"}
    files = sorted((served_project / "data" / "incoming" / SERVED).iterdir())
    assert len(files) == GAMES
    logged = {e.task_id: e for e in (LoggedEpisode.model_validate_json(file.read_text()) for file in files)}
    for game, trajectory in zip(games, played, strict=True):
        episode = logged[game.task_id]
        assert (episode.observation, episode.task) == (trajectory.opening, game.instruction)
        assert (episode.success, episode.task_type) == (trajectory.success, game.task_type)
        for step, other in zip(episode.steps, trajectory.steps, strict=True):
            assert (step.command, step.observation, step.precision) == (
                other.command, other.observation, other.precision)  # fmt: skip
            assert step.probability == pytest.approx(other.exceedance[0], abs=1e-4)
            assert (step.propensity, step.reason, step.release) == (1.0, "router", 1)


@pytest.mark.parametrize(("static", "acts"), [("int2", "int2"), ("float<int2", "float"), ("verdict", "int2")])
def test_what_needs_no_router_is_served_without_one(served_project: Path, games, static: str, acts: str) -> None:
    """The verdict on agents that babble is to deploy the cheapest."""
    played = by_the_pipeline(games[:1], SinglePrecision(acts, ("float", "int2")))[0]
    named = acts if static == "verdict" else static
    with client_of(static=static) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        rungs = [f"dmr/{SERVED}:float", f"dmr/{SERVED}:int2"] if "<" in named else []
        assert names == [f"dmr/{SERVED}", *rungs, f"dmr/{SERVED}:{named}"]
        answer = chat(client, games[0].episode().first_observation())
        assert answer.json()["choices"][0]["message"]["content"] == played.steps[0].command
        assert (answer.headers["x-dmr-precision"], answer.headers["x-dmr-reason"]) == (acts, "fixed")
        none = chat(client, games[0].episode().first_observation(), model=f"dmr/{SERVED}@1")
        assert (none.status_code, "no releases" in none.json()["error"]["message"]) == (404, True)


def test_another_router_than_the_released_one_is_served_and_releases_change_nothing(
    served_project: Path, games
) -> None:
    folder = served_project / "set-to-a-budget"
    save_router(trained(served_project / "data" / SERVED, 1.0), folder)
    first = games[0].episode().first_observation()
    with client_of() as client:
        assert chat(client, first, headers={"x-session-id": "a"}).headers["x-dmr-release"] == "1"
    with client_of(router=folder) as client:
        for session in ("b", "c"):
            said = chat(client, first, headers={"x-session-id": session}).headers
            assert (said["x-dmr-precision"], said["x-dmr-reason"], said["x-dmr-threshold"]) == (
                "int2",
                "router",
                "1.000000",
            )
            assert "x-dmr-release" not in said
            if session == "b":
                release(served_project, 0.0)
        none = chat(client, first, model=f"dmr/{SERVED}@1")
        assert (none.status_code, f"{folder} decides here" in none.json()["error"]["message"]) == (404, True)
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == [f"dmr/{SERVED}", *(f"dmr/{SERVED}:{name}" for name in ("float", "int2", "float<int2"))]
    with pytest.raises(UserError, match=r"no router: it has no router\.json"):
        Service(ServeSettings(recipe=SERVED, router=served_project))


def test_a_rule_that_nobody_trained_is_served_and_logged(served_project: Path, games) -> None:
    """Where its draft is doubtful the dearest precision checks it; as the pipeline plays it."""
    rollouts = Rollouts.load(Path("data") / SERVED / "quantized_checkpoints", load_recipe(SERVED))
    there = rules(rollouts.route, rollouts.step_limit, rollouts.prompter, True, 0)
    runs = [RolloutRequest(game) for game in games]
    met = rollouts.play(runs, AtBar(there["margin"], rollouts.route, NOBODY), 0)
    level = sorted(step.exceedance[0] for trajectory in met for step in trajectory.steps)
    middle = f"{(level[len(level) // 2 - 1] + level[len(level) // 2]) / 2:.6g}"
    played = rollouts.play(runs, rule_at_bar(f"margin>{middle}", there, rollouts.route), 0)
    with running(Service(ServeSettings(recipe=SERVED, port=0, slots=2, static=f"margin>{middle}"))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(GAMES) as threads:
            found = list(threads.map(lambda game: play_by_client(client, game, f"dmr/{SERVED}", False, 5), games))
        raw = client.chat.completions.with_raw_response.create(
            model=f"dmr/{SERVED}", messages=[{"role": "user", "content": games[0].episode().first_observation()}]
        )
    assert found == [[(step.command, step.precision) for step in trajectory.steps] for trajectory in played]
    assert {precision for steps in found for _, precision in steps} == {"float", "int2"}
    said = raw.headers
    assert (said["x-dmr-reason"], float(said["x-dmr-threshold"])) == ("rule", pytest.approx(float(middle), abs=1e-5))
    assert float(said["x-dmr-probability"]) == pytest.approx(played[0].steps[0].exceedance[0], abs=1e-4)
    logged = [
        LoggedEpisode.model_validate_json(file.read_text()) for file in Path("data/incoming", SERVED).glob("*.jsonl")
    ]
    assert len(logged) == GAMES
    assert {step.reason for episode in logged for step in episode.steps} == {"rule"}
    with pytest.raises(UserError, match="no rule that can be deployed"):
        Service(ServeSettings(recipe=SERVED, static="sense>0.5"))


def test_there_are_as_many_places_as_were_asked_for(served_project: Path) -> None:
    """Whatever the recipe plays at once, offline."""
    recipe = served_project / "recipes" / f"{SERVED}.yaml"
    recipe.write_text(recipe.read_text().replace("runtime:", "runtime:\n  batch_episodes: 2"))
    assert load_recipe(SERVED).runtime.batch_episodes == 2
    service = Service(ServeSettings(recipe=SERVED, slots=5))
    assert service.backend.agents.slots == 5
    service.backend.stop()


def test_one_precision_a_release_and_what_there_is_none_of(served_project: Path, games) -> None:
    world = games[0].episode()
    with client_of() as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == [f"dmr/{SERVED}", f"dmr/{SERVED}@1", f"dmr/{SERVED}:float", f"dmr/{SERVED}:int2",
                         f"dmr/{SERVED}:float<int2"]  # fmt: skip
        played = by_the_pipeline(games[:1], SinglePrecision("int2", ("float", "int2")))[0]
        low = chat(client, world.first_observation(), model=names[3])
        assert low.json()["choices"][0]["message"]["content"] == played.steps[0].command
        assert low.headers["x-dmr-reason"] == "fixed"
        assert "x-dmr-probability" not in low.headers
        assert "x-dmr-release" not in low.headers
        high, checks = (chat(client, world.first_observation(), model=name) for name in (names[2], names[4]))
        assert checks.json()["choices"] == high.json()["choices"]
        assert checks.headers["x-dmr-precision"] == "float"
        assert chat(client, world.first_observation(), model=names[1]).headers["x-dmr-release"] == "1"
        for name in (f"dmr/{SERVED}@2", f"dmr/{SERVED}:int3", "dmr/other", f"dmr/{SERVED}@x", "gpt"):
            missing = chat(client, world.first_observation(), model=name)
            assert missing.status_code == 404, name
            assert missing.json()["error"]["code"] == "not_found"


def test_a_released_router_is_taken_up_between_two_turns_and_a_rollback_too(served_project: Path, games) -> None:
    world = games[0].episode()
    texts = [world.first_observation()]
    found = []
    with client_of() as client:
        for turn in range(4):
            if turn in (1, 3):
                release(served_project, {1: 0.0, 3: 1.0}[turn])
            answer = chat(client, *texts)
            text = answer.json()["choices"][0]["message"]["content"]
            found.append((answer.headers["x-dmr-release"], answer.headers["x-dmr-precision"]))
            texts += [text, world.step(text)[0]]
        session = answer.headers["x-session-id"]
        assert answer.headers["x-dmr-session-source"] == "derived"
        assert "dmr_releases_taken_up_total 2" in client.get("/metrics").text
        done = client.post(f"/v1/sessions/{session}/outcome",
                           json={"success": False, "task_id": "a/b", "task_type": games[0].task_type})  # fmt: skip
    assert [number for number, _ in found] == ["1", "2", "2", "3"]
    assert [precision for _, precision in found[1:]] == ["float", "float", "int2"]
    (file,) = (served_project / "data" / "incoming" / SERVED).iterdir()
    assert done.json()["file"] == file.name
    assert [step.release for step in LoggedEpisode.model_validate_json(file.read_text()).steps] == [1, 2, 2, 3]


def test_what_would_be_decided_runs_nothing_and_is_what_is_decided(served_project: Path, games) -> None:
    world = games[1].episode()
    texts = [world.first_observation()]
    with client_of() as client:
        for turn in range(3):
            messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
            asked = {"model": f"dmr/{SERVED}", "messages": messages}
            decided = [client.post("/v1/decision", json=asked).json() for _ in range(2)]
            assert decided[0] == pytest.approx(decided[1])
            answer = chat(client, *texts)
            assert decided[0]["precision"] == answer.headers["x-dmr-precision"]
            assert decided[0]["probability"] == pytest.approx(float(answer.headers["x-dmr-probability"]), abs=1e-4)
            assert (decided[0]["turn"], answer.headers["x-dmr-turn"]) == (turn + 1, str(turn + 1))
            text = answer.json()["choices"][0]["message"]["content"]
            texts += [text, world.step(text)[0]]


def test_a_request_that_comes_again_gets_the_same_answer_and_a_rewritten_history_another_session(
    served_project: Path, games
) -> None:
    world = games[2].episode()
    first = world.first_observation()
    with client_of() as client:
        answer = chat(client, first, temperature=1.0)
        text = answer.json()["choices"][0]["message"]["content"]
        again = chat(client, first, temperature=1.0)
        assert again.json()["choices"] == answer.json()["choices"]
        assert client.service.metrics.total("dmr_tokens_total", kind="completion") == 6
        going_on = chat(client, first, text, "Nothing happens.")
        assert (going_on.headers["x-dmr-turn"], going_on.status_code) == ("2", 200)
        rewritten = chat(client, first, "look", "Nothing happens.")
        assert rewritten.headers["x-dmr-turn"] == "2"
        assert rewritten.headers["x-session-id"] == going_on.headers["x-session-id"]
        assert client.service.metrics.total("dmr_episodes_total", outcome="unknown") == 1
        done = client.post(f"/v1/sessions/{rewritten.headers['x-session-id']}/outcome", json={"success": True}).json()
        assert done["logged"] is False
        assert "played elsewhere" in done["why"]
    folder = served_project / "data" / "incoming" / SERVED
    (aside,) = folder.iterdir()
    assert aside.name.startswith(".served-")
    assert len(LoggedEpisode.model_validate_json(aside.read_text()).steps) == 2


def test_an_outcome_can_be_posted_twice_and_refusals_are_told(served_project: Path, games) -> None:
    game = games[0]
    held_out = json.loads(json.dumps({"task_id": "x/valid_seen/y", "task_type": game.task_type}))
    with client_of() as client:
        answer = chat(client, game.episode().first_observation(), metadata={"session_id": "a/b c"})
        assert answer.headers["x-dmr-session-source"] == "given"
        assert client.post("/v1/sessions/other/outcome", json={"success": True}).status_code == 404
        assert client.post("/v1/sessions/a/b c/outcome", json={"success": True, "reward": 7}).status_code == 400
        refused = client.post("/v1/sessions/a/b c/outcome", json={"success": True, **held_out}).json()
        assert (refused["logged"], "held out" in refused["why"]) == (False, True)
        assert client.post("/v1/sessions/a/b c/outcome", json={"success": True}).json() == refused
        chat(client, game.episode().first_observation(), metadata={"session_id": "a"})
        mistyped = client.post("/v1/sessions/a/outcome", json={"success": True, "task_type": "pick_and_placed"})
        assert (mistyped.status_code, "none of" in mistyped.json()["error"]["message"]) == (400, True)
        unknown = client.post("/v1/sessions/a/outcome", json={"success": True})
        assert (unknown.status_code, "task_type: 'unknown'" in unknown.json()["error"]["message"]) == (400, True)
        assert client.service.metrics.total("dmr_episodes_refused_total") == 1
        assert client.service.metrics.total("dmr_episodes_total") == 1
    (aside,) = (served_project / "data" / "incoming" / SERVED).iterdir()
    assert aside.name.endswith(".unended"), "it goes on"


def test_what_an_outcome_can_mend_is_refused_and_mended(served_project: Path, games) -> None:
    game = games[0]
    fine = {"success": True, "reward": 1.0, "task_id": "a/b", "task_type": game.task_type}
    with client_of() as client:
        for number, (fields, said) in enumerate(
            [
                ({"reward": 0.8}, "success is True, but the reward is 0.8; 1 means success: post the outcome again"),
                ({"success": False}, "success is False, but the reward is 1.0"),
                ({"task_id": "a/b "}, "task_id: Value error, is to be one line without white space around it"),
                ({"task_type": "cooking"}, "post the outcome again with one of these"),
                ({"task_type": None}, "'unknown' is none of"),
            ]
        ):
            chat(client, game.episode().first_observation(), metadata={"session_id": str(number)})
            refused = client.post(f"/v1/sessions/{number}/outcome", json={**fine, **fields})
            assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True), refused.text
            assert client.post(f"/v1/sessions/{number}/outcome", json=fine).json()["logged"] is True
        assert client.service.metrics.total("dmr_episodes_refused_total") == 0
    files = (served_project / "data" / "incoming" / SERVED).glob("*.jsonl")
    assert [LoggedEpisode.model_validate_json(file.read_text()).task_id for file in files] == ["a/b"] * 5


def test_a_task_that_the_log_would_not_take_is_refused_at_the_first_turn(served_project: Path, games) -> None:
    first = games[0].episode().first_observation()
    with client_of() as client:
        for field, value in (
            ("task", "a\nb"),
            ("task", "a "),
            ("task_id", "\ta"),
            ("task_type", "a\n"),
            ("task_type", "a"),
        ):
            for path in ("/v1/chat/completions", "/v1/decision"):
                body = {
                    "model": f"dmr/{SERVED}",
                    "messages": [{"role": "user", "content": first}],
                    "metadata": {field: value},
                }
                refused = client.post(path, json=body)
                said = "'a' is none of" if value == "a" else f"{field}: Value error, is to be one line"
                assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True), refused.text
        windows = first.replace("\n", "\r\n") + "\r\n"
        chat(client, windows, metadata={"session_id": "a", "task_type": games[0].task_type})
        assert client.post("/v1/sessions/a/outcome", json={"success": True}).json()["logged"] is True


def test_episodes_that_are_not_logged_are_counted_and_the_log_says_why(
    served_project: Path, games, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of() as client:
        named = {"session_id": "a", "task_id": "x/valid_seen/y", "task_type": games[0].task_type}
        chat(client, games[0].episode().first_observation(), metadata=named)
        assert client.post("/v1/sessions/a/outcome", json={"success": True}).json()["logged"] is False
        assert "dmr_episodes_refused_total 1" in client.get("/metrics").text
    assert "the episode is not logged: " in caplog.text
    assert "held out" in caplog.text


def test_length_stop_budget_and_what_an_agent_here_cannot_do(served_project: Path, games) -> None:
    first = games[0].episode().first_observation()
    with client_of() as client:
        whole = chat(client, first, metadata={"session_id": "whole"}).json()["choices"][0]
        assert whole["finish_reason"] == "length"  # it babbles to the end
        short = chat(client, first, max_tokens=2, metadata={"session_id": "short"}).json()
        assert short["usage"]["completion_tokens"] == 2
        text = whole["message"]["content"]
        stopped = chat(client, first, stop=[text[3:], "zzz"], metadata={"session_id": "stop"}).json()["choices"][0]
        assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[:3], "stop")
        release(served_project, 0.0)
        bound = chat(client, first, headers={"x-dmr-high-ratio": "0.2", "x-session-id": "bound"})
        assert (bound.headers["x-dmr-precision"], bound.headers["x-dmr-reason"]) == ("int2", "budget")
        assert "x-dmr-cost-left" not in bound.headers
        impossible = {"x-dmr-cost": "0.000001", "x-session-id": "impossible"}
        texts, left = [first], []
        for _ in range(2):  # the cheapest precision acts whatever it takes, and is told to have overspent
            answer = chat(client, *texts, headers=impossible)
            assert (answer.headers["x-dmr-precision"], answer.headers["x-dmr-reason"]) == ("int2", "budget")
            left.append(float(answer.headers["x-dmr-cost-left"]))
            texts += [answer.json()["choices"][0]["message"]["content"], "Nothing happens."]
        done = client.post(
            "/v1/sessions/impossible/outcome", json={"success": False, "task_type": games[0].task_type}
        ).json()
        assert left[0] == pytest.approx(1e-6)
        assert left[1] < 0
        assert done["cost"] > 1e-6 - left[1]
        for fields, said in (
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"n": 2}, "n: an episode"),
            ({"temperature": -1}, "temperature"),
            ({"stop": ["a"] * 5}, "stop: Value error, name at most 4 texts"),
            ({"stop": "a" * 1001}, "1,000 characters"),
            ({"metadata": {"high_ratio": "2"}}, "high_ratio"),
            ({"metadata": {"session_id": "a\nb"}}, "session_id"),
            ({"metadata": {"session_id": "é"}}, "session_id"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user", "content": "a room"}]}, "no task"),
            ({"messages": [{"role": "assistant", "content": "look"}]}, "assistant"),
            ({"messages": [{"role": "poet", "content": "look"}]}, "no role"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "pictures"),
        ):
            refused = client.post(
                "/v1/chat/completions",
                json={"model": f"dmr/{SERVED}", "messages": [{"role": "user", "content": first}], **fields},
            )
            assert refused.status_code == 400, fields
            assert said in refused.json()["error"]["message"]
        assert client.post("/v1/chat/completions", content=b"{").status_code == 400
        assert client.get("/nothing").status_code == 404


def test_who_may_ask_and_how_much(served_project: Path) -> None:
    with client_of(api_key=SecretStr("s3cret"), host="0.0.0.0") as client:
        assert client.get("/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer other"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
    with client_of(request_bytes=1000) as client:
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
        assert "1,000 bytes" in chat(client, "x" * 2000).json()["error"]["message"]
    with pytest.raises(UserError, match="DMR_API_KEY"):
        refuse_open_door(ServeSettings(recipe=SERVED, host="0.0.0.0"))
    refuse_open_door(ServeSettings(recipe=SERVED, host="0.0.0.0", api_key=SecretStr("k")))


@pytest.mark.parametrize(("leaves", "status"), [(False, 408), (True, 499)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/decision", "/v1/sessions/a/outcome"])
def test_a_body_that_does_not_come_gives_its_place_back(
    served_project: Path, path: str, leaves: bool, status: int
) -> None:
    app = make_app(Service(ServeSettings(recipe=SERVED, requests=1, request_seconds=0.2)))

    async def asked(method: str, path: str) -> tuple[int, bytes]:
        parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])
        said: list[Message] = []

        async def receive() -> Message:
            if (part := next(parts, None)) is not None:
                return part
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            said.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        await app(scope, receive, send)
        return said[0]["status"], said[1]["body"]

    async def one_after_the_other() -> None:
        found, body = await asyncio.wait_for(asked("POST", path), 30)
        assert found == status
        assert leaves or b"has not come within 0.2 s" in body
        assert (await asked("GET", "/v1/models"))[0] == 200

    asyncio.run(one_after_the_other())


def test_pages_of_other_hosts_may_ask_only_where_a_key_is_needed(served_project: Path, games) -> None:
    body = {"model": f"dmr/{SERVED}", "messages": [{"role": "user", "content": games[0].episode().first_observation()}]}
    content = {"content": json.dumps(body), "headers": {"content-type": "text/plain", "x-session-id": "a"}}
    with client_of() as client:
        for origin in ("https://evil.example", "http://127.0.0.1.evil.example:8000", "null", "http://[", "file://"):
            content["headers"]["origin"] = origin
            for path in ("/v1/chat/completions", "/v1/decision", "/v1/sessions/a/outcome"):
                refused = client.post(path, **content)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden_origin"), origin
                assert "DMR_API_KEY" in refused.json()["error"]["message"]
        assert len(client.service.table) == 0
        for origin in ("http://127.0.0.1:8000", "http://localhost:3000", "http://[::1]:8000"):
            content["headers"]["origin"] = origin
            assert client.post("/v1/chat/completions", **content).status_code == 200, origin
    with client_of(api_key=SecretStr("s3cret")) as client:
        foreign = {"origin": "https://ours.example"}
        assert client.get("/v1/models", headers=foreign).status_code == 401
        assert client.get("/v1/models", headers={**foreign, "authorization": "Bearer s3cret"}).status_code == 200


def test_sessions_are_bounded_and_those_that_go_are_set_aside(served_project: Path, games) -> None:
    with client_of(sessions=2) as client:
        for number, game in enumerate(games):
            assert chat(client, game.episode().first_observation(), metadata={"session_id": str(number)}).is_success
            assert len(client.service.table) == min(number + 1, 2)
        assert client.post("/v1/sessions/0/outcome", json={"success": True}).status_code == 404
        text = client.get("/metrics").text
        assert 'dmr_episodes_total{outcome="unknown"} 2' in text
        assert "dmr_sessions 2" in text
        client.service.table.seconds = -1.0
        assert "dmr_sessions 0" in client.get("/metrics").text
    kept = list((served_project / "data" / "incoming" / SERVED).iterdir())
    assert all(path.name.endswith(".unknown") for path in kept)


def test_no_text_of_a_prompt_is_logged_or_measured(served_project: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "xyzzy"
    with client_of() as client, caplog.at_level("DEBUG"):
        chat(client, f"A {secret}. Your task is to: find the {secret}.", metadata={"session_id": secret})
        chat(client, "A room.", f"{secret}", metadata={"task": secret})
        client.service.backend.agents.batch.capacity = 3
        chat(client, f"A {secret}. Your task is to: find it.")
        assert secret not in client.get("/metrics").text
    assert secret not in caplog.text


def test_a_full_disk_is_told_and_the_outcome_can_be_posted_again(
    served_project: Path, games, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real, full = os.fsync, threading.Event()

    def fsync(handle: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("dmr_pipeline.serve.journal.os.fsync", fsync)
    game = games[0]
    with client_of() as client:
        named = {"session_id": "a", "task_id": "b/c", "task_type": game.task_type}
        chat(client, game.episode().first_observation(), metadata=named)
        full.set()
        refused = client.post("/v1/sessions/a/outcome", json={"success": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        assert list((served_project / "data" / "incoming" / SERVED).iterdir()) == []
        full.clear()
        assert client.post("/v1/sessions/a/outcome", json={"success": True}).json()["logged"] is True
        assert client.service.metrics.total("dmr_log_errors_total") == 1
