"""What is timed is what the rows say, and a way that fails does not stop the others."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from typer.testing import CliRunner

from dmr_pipeline.acting_bench import actors, run
from dmr_pipeline.acting_bench.actors import BFLOAT16, CHEAP, Actor, forms, held_bytes, read_bytes
from dmr_pipeline.acting_bench.reading import episodes, history
from dmr_pipeline.acting_bench.record import ActingRecord, Row
from dmr_pipeline.agent.checkpoint import random_causal_lm
from dmr_pipeline.cli import app
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.precision.quantization import quantize_rung
from dmr_pipeline.recipe.agent import Prompt
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.vocabulary import word_tokenizer

CPU = torch.device("cpu")
WIDTH, FEED_FORWARD, LAYERS = 64, 96, 2


@pytest.fixture(scope="module")
def actor() -> Actor:
    tokenizer = word_tokenizer(alfworld_texts())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=FEED_FORWARD, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Actor("small", random_causal_lm(config, CPU), Prompter.of(tokenizer, Prompt(max_action_tokens=4)))


def bench(actor: Actor, cell: run.Cell, seconds: float | None = None) -> dict[tuple[str, str], Row]:
    rows = list(run.bench_acting(actor, CPU, 1e9, [cell], seconds))
    assert len({(row.way, row.cache) for row in rows}) == len(rows)
    return {(row.way, row.cache): row for row in rows}


@pytest.mark.parametrize("tokens", [200, 1000])
def test_a_history_is_as_long_as_it_can_be(actor: Actor, tokens: int) -> None:
    past = history(actor.prompter, tokens)
    (one, other), (later, _) = episodes(past, 2, 0, 3), episodes(past, 2, 1, 3)
    task = one.instruction
    assert tokens - 150 < len(actor.prompter.opening(past, task)) <= tokens
    assert past.count("<end>") == past.count("<act>") > 3
    for reading in (one, other, later):
        assert reading.observations[0].startswith(past)
        assert len(reading.observations) == 4
    assert len({one.observations, other.observations, later.observations}) == 3


def test_bytes_by_hand(actor: Actor) -> None:
    models = {form.name: actor.acting(form, CPU) for form in forms(CPU) if form.name in (BFLOAT16, CHEAP)}
    vocabulary = len(actor.prompter.tokenizer)
    head = vocabulary * WIDTH
    layers = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * FEED_FORWARD)
    norms = (2 * LAYERS + 1) * WIDTH
    plain, low = read_bytes(models[BFLOAT16]), read_bytes(models[CHEAP])
    assert plain.weights == 2 * (head + layers + norms)
    assert plain.cached_numbers == low.cached_numbers == LAYERS * WIDTH
    # By the kernel half a byte a weight, and 4 for each group: 64 inputs of a layer have one, 96 three of 32.
    groups = LAYERS * (2 * WIDTH + WIDTH + 2 * FEED_FORWARD + 3 * WIDTH)
    assert low.weights == layers // 2 + 4 * groups + head + 2 * vocabulary + 2 * norms
    assert held_bytes(models[BFLOAT16]) == plain.weights
    assert held_bytes(models[CHEAP]) == low.weights + 2 * (2 * head + layers)
    # As quanto holds them: a byte, and a scale of two bytes an output.
    quantos = quantize_rung(models[BFLOAT16], Rung(name="int8", weights="int8"))
    outputs = LAYERS * (3 * WIDTH + WIDTH + 2 * FEED_FORWARD)
    assert read_bytes(quantos).weights == held_bytes(quantos) == layers + 2 * outputs + 2 * (head + norms)


def test_rows_of_a_cell(actor: Actor) -> None:
    rows = bench(actor, run.Cell(1, 200, 1))
    first = rows[BFLOAT16, ""]
    assert all(row.problem is None and row.steps == run.TIMED_STEPS and row.ms_a_step > 0 for row in rows.values())
    assert first.equal == first.compared == run.TIMED_STEPS
    one_by_one, generated = rows[f"{BFLOAT16} 1 by 1", ""], rows[f"{BFLOAT16} generate", ""]
    for row in (one_by_one, generated):
        assert row.passes_of_dear == row.action <= 4
        assert row.segment == first.segment
        assert row.equal >= 3, "but for rounding"
    assert first.passes_of_dear <= one_by_one.passes_of_dear
    for cache in run.CACHES:
        checked = rows[f"{BFLOAT16} checks {CHEAP.removesuffix(' kernels')}", cache]
        assert 0 < checked.accepted <= checked.drafted
        assert 1 <= checked.passes_of_dear < one_by_one.passes_of_dear
        assert checked.passes_of_cheap >= 1
        mixed = rows[f"1/3 {BFLOAT16}, else {CHEAP.removesuffix(' kernels')}", cache]
        assert mixed.passes_of_dear < mixed.passes_of_cheap
    separate, shared = (rows[f"{BFLOAT16} checks {CHEAP.removesuffix(' kernels')}", cache] for cache in run.CACHES)
    assert separate.cache_bytes == 2 * shared.cache_bytes == pytest.approx(2 * first.cache_bytes, rel=0.05)
    # Each of the passes read all weights, and what was there of one transcript of 200 to 300 tokens.
    weights = 2 * sum(parameter.numel() for parameter in actor.model.parameters())
    cached = 2 * LAYERS * WIDTH
    assert one_by_one.bytes_a_step / one_by_one.passes_of_dear - weights == pytest.approx(250 * cached, rel=0.3)
    assert one_by_one.limit_ms == one_by_one.bytes_a_step / 1e6


def test_many_at_once_act_as_each_alone(actor: Actor) -> None:
    several = bench(actor, run.Cell(3, 200, 1))
    assert several[BFLOAT16, ""].compared == several[BFLOAT16, ""].equal == 3 * run.TIMED_STEPS
    assert not any(way.endswith("generate") for way, _ in several)


def test_what_fails_is_a_row_and_the_others_go_on(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel\nhere")

    monkeypatch.setattr(run, "shared_streams", broken)
    rows = bench(actor, run.Cell(1, 200, 1))
    for (_, cache), row in rows.items():
        assert row.problem == ("no such kernel here" if cache == "shared" else None)
        assert (row.steps > 0) == (cache != "shared")
    record = RECORD.model_copy(update={"rows": list(rows.values())})
    assert not record.passed


def test_after_its_seconds_nothing_is_begun(actor: Actor) -> None:
    rows = bench(actor, run.Cell(1, 200, 1), seconds=1e-9)
    assert {row.problem for row in rows.values()} == {"left out: the time is over"}
    assert RECORD.model_copy(update={"rows": list(rows.values())}).passed


def test_every_precision_acts_alone_once() -> None:
    alone = [way.dear for way in run.ways(run.Cell(1, 500, 1, all_forms=True), CPU) if way.kind == "writes"]
    assert sorted(alone) == sorted(form.name for form in forms(CPU))
    assert alone[0] == BFLOAT16
    on_a_gpu = {form.name for form in forms(torch.device("cuda"))}
    assert {"int4 quanto", "int4 kernels", BFLOAT16} <= on_a_gpu
    assert "float32" not in on_a_gpu


def test_bandwidth_is_bytes_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.9] * 6 + [0.0, 0.5])
    monkeypatch.setattr("time.process_time", lambda: next(seconds))
    assert run.bandwidth(CPU, 4000) == 8000


ROW = Row(
    way="someone", at_once=1, history=480, steps=4, ms_a_step=250.0, segment=30, action=8, passes_of_dear=8, compared=4,
    equal=4, bytes_a_step=1e9, limit_ms=50.0, weight_bytes=270_000_000, cache_bytes=11_000_000,
)  # fmt: skip
RECORD = ActingRecord(
    date="2026-01-02T03:04:05Z", git=None, machine={"system": "s", "cpu": "c", "cores": 2}, versions={}, model="small",
    device="a CPU", bandwidth=2e10,
)  # fmt: skip


def command(rows: list[Row], monkeypatch: pytest.MonkeyPatch, *options: str):
    monkeypatch.setattr(actors, "load_actor", lambda *_, **__: None)
    monkeypatch.setattr(run, "prepare", lambda _: None)
    monkeypatch.setattr(run, "new_acting_record", lambda *_: RECORD.model_copy(update={"rows": []}))
    monkeypatch.setattr(run, "bench_acting", lambda *_: iter(rows))
    return CliRunner().invoke(app, ["bench", "acting", "--device", "cpu", *options], env={"COLUMNS": "110"})


def test_the_command_shows_rows_and_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = ROW.model_copy(
        update={
            "way": "checks",
            "cache": "shared",
            "ms_a_step": 100.0,
            "passes_of_cheap": 2.5,
            "drafted": 4,
            "accepted": 3,
        }
    )
    left = Row(way="later", at_once=1, history=480, problem="left out: the time is over")
    result = command([ROW, checks, left], monkeypatch, "--json", str(tmp_path / "made" / "rows.json"))
    assert result.exit_code == 0, result.output
    assert re.search(r"someone +250 +1\.00 +50 +8\.0 +4/4 +270 +11\.0", result.stdout)
    assert re.search(r"checks +shared +100 +2\.50 +50 +8\.0 \+ 2\.5 +75% +4/4", result.stdout)
    assert "later: left out: the time is over" in result.stdout
    assert "20.0 GB/s" in result.stdout
    written = ActingRecord.model_validate_json((tmp_path / "made" / "rows.json").read_text(encoding="utf-8"))
    assert written.rows == [ROW, checks, left]


def test_the_command_fails_where_a_part_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command([ROW, ROW.model_copy(update={"problem": "no kernel"})], monkeypatch).exit_code == 1
    assert command([], monkeypatch).exit_code == 1


def test_a_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["bench", "acting", "--device", "cpu", "--model", "nowhere"])
    assert result.exit_code == 2
    assert "--model nowhere: no folder nowhere" in result.stderr


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "acting", "--quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    )
    assert result.exit_code == 0, result.output
    written = ActingRecord.model_validate_json((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert len(written.rows) == sum(len(run.ways(cell, CPU)) for cell in run.QUICK)
    assert all(isinstance(row.ms_a_step, float) and row.steps for row in written.rows)


def test_a_copy_in_another_dtype_has_the_rotary_frequencies_of_the_model(actor: Actor) -> None:
    (form,) = [form for form in forms(CPU) if form.name == BFLOAT16]
    copied = actor.acting(form, CPU)
    for ours, theirs in zip(copied.buffers(), actor.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32
    assert isinstance(copied.get_output_embeddings(), nn.Linear)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
