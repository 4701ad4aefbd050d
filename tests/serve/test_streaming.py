"""Answers in pieces: what is shown while an action is written, and clients that leave."""

import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.serve.run import running
from dmr_pipeline.serve.service import Service
from dmr_pipeline.serve.settings import ServeSettings
from dmr_pipeline.serve.streaming import Pieces, cut
from tests.helpers.named_models import smollm_tokenizer
from tests.helpers.routers import TOKENIZER
from tests.helpers.serving import SERVED

FIRST = {"role": "user", "content": "You are in a room.\nYour task is to: put a mug in desk."}
BYTES = smollm_tokenizer()
PROMPTS = {
    "words": (TOKENIZER, {}),
    "a line": (BYTES, {"action_end": "\n"}),
    "a mark": (BYTES, {"action_end": "<|im_end|>"}),
    "a tag": (BYTES, {"action_end": " </action>"}),
    "a thought": (BYTES, {"action_end": "\n", "thought_end": "Action:"}),
}


def prompter(tokenizer: PreTrainedTokenizerFast, ends: dict[str, str]) -> Prompter:
    opening = "{observation}\n{task}\n> \n" if tokenizer is BYTES else Prompt().opening
    turn = "{observation}\n> \n" if tokenizer is BYTES else Prompt().turn
    return Prompter.of(tokenizer, Prompt(opening=opening, turn=turn, max_action_tokens=60, **ends))


@pytest.mark.parametrize("kind", PROMPTS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_pieces_are_the_beginning_of_the_answer_whatever_is_written(kind: str, data: st.DataObject) -> None:
    """And nothing of what ends it, or of a text that the client has named, is among them."""
    its = _prompter(kind)
    words = ["\n", " ", *["go", "to", "desk", "1", "ü", "你", "</action>", "</act", "Action:", "Action", "<|im_end|>"]]
    text = "".join(data.draw(st.lists(st.sampled_from([*words, *(f" {word}" for word in words)]), max_size=14)))
    tokens = list(its.tokenizer.encode(text, add_special_tokens=False))
    tokens += data.draw(st.lists(st.integers(0, len(its.tokenizer) - 1), max_size=4))
    stops = data.draw(st.lists(st.sampled_from(["esk", "k 1", " to", "tion:", "Action", "zz"]), max_size=2))
    end = next((n for n in range(1, len(tokens) + 1) if its.is_complete(tokens[:n])), len(tokens))
    answer = cut(its.command(tokens[:end]) if end else "", stops)
    pieces, shown = Pieces(its, stops), ""
    for n in range(1, end):
        shown += pieces.after(tokens[:n])
        assert answer.startswith(shown), (tokens, n)
    assert pieces.answer(its.command(tokens[:end]) if end else "") == answer


_PROMPTERS: dict[str, Prompter] = {}


def _prompter(kind: str) -> Prompter:
    if kind not in _PROMPTERS:
        _PROMPTERS[kind] = prompter(*PROMPTS[kind])
    return _PROMPTERS[kind]


def client_at(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


class Slow:
    """Holds the agent's tokens back until they are let through."""

    def __init__(self, service: Service) -> None:
        self.let, self.agents = threading.Semaphore(0), service.backend.agents
        streams = self.agents.batch.agents["int2"]
        real = streams.extend

        def extend(*args: object, **kwargs: object) -> object:
            assert self.let.acquire(timeout=60)
            return real(*args, **kwargs)

        streams.extend = extend


def test_tokens_are_shown_as_they_are_written(served_project: Path) -> None:
    """The first words are there while the agent is held back; together they are the answer that is not streamed."""
    low = {"model": f"dmr/{SERVED}:int2", "messages": [FIRST]}
    with running(Service(ServeSettings(recipe=SERVED, port=0))) as address:
        whole = client_at(address).chat.completions.create(**low, extra_headers={"x-session-id": "whole"})
    service = Service(ServeSettings(recipe=SERVED, port=0))
    with running(service) as address:
        slow = Slow(service)
        slow.let.release(2)
        stream = client_at(address).chat.completions.create(**low, stream=True, stream_options={"include_usage": True})
        shown = []
        for chunk in stream:
            shown.append(chunk)
            if len(shown) == 2:  # one command's word, and the agent waits
                assert service.table.find(next(iter(service.table._held))).session.turn == 0
                slow.let.release(1000)
    texts = [chunk.choices[0].delta.content for chunk in shown if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 2
    assert "".join(texts) == whole.choices[0].message.content
    assert shown[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in shown if c.choices][-1] == whole.choices[0].finish_reason


def test_a_client_that_leaves_ends_the_writing_and_the_step_is_not_taken(served_project: Path) -> None:
    """The turn can be asked again, and is what it would have been."""
    low = {"model": f"dmr/{SERVED}:int2", "messages": [FIRST]}
    with running(Service(ServeSettings(recipe=SERVED, port=0))) as address:
        whole = client_at(address).chat.completions.create(**low).choices[0].message.content
    service = Service(ServeSettings(recipe=SERVED, port=0))
    with running(service) as address:
        slow, headers = Slow(service), {"x-session-id": "a"}
        slow.let.release(2)
        url = f"{address}/v1/chat/completions"
        with httpx2.stream("POST", url, json={**low, "stream": True}, headers=headers, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            assert all(next(lines).startswith("data:") for _ in range(2))
        time.sleep(0.3)  # the server hears of it
        slow.let.release(1)
        deadline = time.monotonic() + 60
        while service._running and time.monotonic() < deadline:
            time.sleep(0.01)
        session = service.table.find("a").session
        assert (session.turn, session.actions, session.answers) == (0, [], [])
        slow.let.release(1000)
        raw = client_at(address).chat.completions.with_raw_response.create(**low, extra_headers=headers)
        assert (raw.headers["x-dmr-turn"], raw.parse().choices[0].message.content) == ("1", whole)
        assert service.metrics.total("dmr_tokens_total", kind="cached") == 0  # what was read for it is gone
