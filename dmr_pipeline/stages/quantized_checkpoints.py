"""Stage `quantized_checkpoints`: the precision ladder of one float checkpoint, measured."""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from pydantic import JsonValue
from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import float_dtype, load_causal_lm, resolve_device
from dmr_pipeline.agent.memory import in_pieces
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.base import Task
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.evaluation.kept import KeptTables
from dmr_pipeline.evaluation.play import Arena, checking_entry, content, evaluate
from dmr_pipeline.precision.acting import acting_model, sharing
from dmr_pipeline.precision.frontier import (
    PLAYED,
    PLAYED_FILE,
    beaten_by,
    checked_facts,
    drafters,
    ladder_facts,
    rungs_played,
    to_deploy,
)
from dmr_pipeline.precision.gptq import GptqRun
from dmr_pipeline.precision.imported import import_rung, inspect
from dmr_pipeline.precision.ladder import LADDER_FILE, Checked, LadderFacts, RungFacts, RungPlayed
from dmr_pipeline.precision.pass_bytes import PassBytes, pass_bytes, stored_pass_bytes
from dmr_pipeline.precision.quantization import RungSize, load_rung, quantize_rung, save_rung, stored_size
from dmr_pipeline.pretrained import adapter_config, pretrained_hashes
from dmr_pipeline.progress import Bars
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import Gptq, Precisions, Rung
from dmr_pipeline.rollout.cost import a_pass_a_token, episode_cost
from dmr_pipeline.rollout.engine import ALONE, play_alone
from dmr_pipeline.rollout.failures import PARSE_FAILURES
from dmr_pipeline.rollout.kv_cache.choice import rows_that_fit, transcript_capacity
from dmr_pipeline.rollout.parallel import gather, in_processes, processes_on, scatter
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.rollout.trajectory import Trajectory, warn_of_outgrown, warn_of_parse_failures
from dmr_pipeline.training.examples import Example, expert_example
from dmr_pipeline.training.train import trained_logits

log = logging.getLogger(__name__)

KL_EPISODES_AT_ONCE = 8
"""Of the expert, whose steps are compared with the float model's."""
_NUMBERS_AT_ONCE = 1 << 23
"""Of the distributions that are compared; those of a large vocabulary are gone through in parts."""


def quantized_checkpoints(context: StageContext) -> StageResult:
    recipe = context.recipe
    device = resolve_device(recipe.runtime.device)
    dtype = float_dtype(device, recipe.agent.dtype)
    float_model, tokenizer = load_causal_lm(context.inputs["agent"] / "model", None, device, dtype=dtype)
    tokenizer.save_pretrained(context.output / "tokenizer")
    prompter = Prompter.of(tokenizer, recipe.agent.prompt, float_model.generation_config)
    games = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "validation")
    capacity = transcript_capacity(float_model.config, recipe.agent.max_transcript_tokens)
    examples = expert_steps(games[: recipe.precisions.kl_episodes], prompter, recipe.benchmark.step_limit, capacity)
    for rung in recipe.precisions.ladder:
        if rung.checkpoint is not None:
            inspect(float_model, tokenizer, rung)
    calibrated = any(rung.calibrated for rung in recipe.precisions.ladder)
    calibration = _calibration_episodes(context, prompter, capacity) if calibrated else []
    kept = KeptTables(context.kept or context.scratch / "measured", _all_rungs_facts(context, device))
    read_by_float = pass_bytes(float_model)
    facts, measured = list[RungFacts](), list[pl.DataFrame]()
    with Bars() as progress:
        bar = progress.add_task("precision ladder", total=len(recipe.precisions.ladder) * len(games))
        for rung in recipe.precisions.ladder:
            progress.update(bar, description=f"{rung.name} plays validation games")
            gptq = None
            if rung.rounding is not None:
                layers = progress.add_task(f"{rung.name}: GPTQ, layer by layer", total=None)
                gptq = _gptq_run(context, rung, calibration, partial(_show_layers, progress, layers))
            acting, size, read, equal = _make_rung(
                float_model,
                tokenizer,
                rung,
                context.output / rung.name,
                examples[:1],
                device,
                calibration,
                gptq,
                recipe.precisions.kernels,
            )
            rung_facts = _rung_facts(rung, recipe)
            table = kept.read(**rung_facts)
            whole = [rows for rows in measured if len(rows) == len(games)]
            if table is None:
                table = _played_until_beaten(
                    rung,
                    games,
                    partial(
                        _play_rung,
                        rung=rung,
                        acting=acting,
                        read=read,
                        read_by_float=read_by_float,
                        to_float=divergence_to_float(
                            float_model, acting, examples, device, processes_on(device, recipe.runtime)
                        ),
                        prompter=prompter,
                        recipe=recipe,
                        device=device,
                        on_progress=partial(progress.advance, bar),
                    ),
                    whole,
                    recipe,
                    kept,
                    rung_facts,
                )
                progress.advance(bar, len(games) - len(table))
            else:
                log.info("rung %s: measured before, and not changed since", rung.name)
                progress.advance(bar, len(games))
                first = table[: recipe.precisions.stop_beaten_after]
                if recipe.precisions.may_stop(rung.name) and _is_beaten(first, whole, recipe):
                    table = first  # as if it had stopped there
            del acting  # before the next one is made
            measured.append(table)
            facts.append(
                RungFacts(
                    name=rung.name,
                    bytes=size.bytes,
                    pass_bytes=read.weights,
                    bits_per_weight=round(size.bits_per_weight, 4),
                    quantized_share=round(size.quantized_share, 4),
                    kl_to_float=round(table["divergence"][0], 6),
                    greedy_disagreement=round(table["disagreement"][0], 6),
                    reloads_equal=equal,
                )
            )
    del float_model  # before the two are loaded that draft and check
    unit = sum(measured[0]["float_bytes"]) / len(measured[0])  # the first rung is the dearest
    table = pl.concat(
        [played_rows(rung.name, table, unit) for rung, table in zip(recipe.precisions.ladder, measured, strict=True)]
    )
    table.write_parquet(context.output / PLAYED_FILE)
    rungs = rungs_played(facts, table, recipe.precisions)
    # What drafts and checks is loaded by it.
    _write(ladder_facts(rungs, [], table, unit, recipe.precisions), context.output)
    checked = _play_checked(rungs, context.output, games, recipe, kept.under(unit_bytes=unit))
    kept.drop_unused()
    ladder = ladder_facts(rungs, checked, table, unit, recipe.precisions)
    log.info("verdict: %s", ladder.verdict.text)  # all that follows takes longest
    _write(ladder, context.output)
    return StageResult(summary=ladder.model_dump(mode="json"))


def _play_rung(
    games: Sequence[Task],
    *,
    rung: Rung,
    acting: PreTrainedModel,
    read: PassBytes,
    read_by_float: PassBytes,
    to_float: tuple[float, float],
    prompter: Prompter,
    recipe: Recipe,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> pl.DataFrame:
    """Rows of `measured_rows` of a rung that plays these games alone, with what `divergence_to_float` has found (`to_float`) in
    columns of their own: divergence and disagreement."""
    played = _play_validation(acting, games, prompter, recipe, device, on_progress)
    warn_of_parse_failures(played, f"rung {rung.name}")
    rows = measured_rows(played, read, read_by_float, recipe.precisions)
    divergence, disagreement = map(pl.lit, to_float)
    return rows.with_columns(divergence=divergence, disagreement=disagreement)


def _played_until_beaten(
    rung: Rung,
    games: Sequence[Task],
    play: Callable[[Sequence[Task]], pl.DataFrame],
    dearer: Sequence[pl.DataFrame],
    recipe: Recipe,
    kept: KeptTables,
    facts: Mapping[str, JsonValue],
) -> pl.DataFrame:
    """What `play` returns of all games, or of the first ones, if the rung is beaten there and may stop.

    Args:
        dearer: such rows of rungs before it that have played all games.
        facts: what its games are kept under.
    """
    if not recipe.precisions.may_stop(rung.name):
        table = play(games)
        kept.write(table, **facts)
        return table
    first = games[: recipe.precisions.stop_beaten_after]
    begun = kept.read(**facts, first=len(first))
    if begun is None:
        begun = play(first)
        kept.write(begun, **facts, first=len(first))
    rest = games[len(first) :]
    if rest and _is_beaten(begun, dearer, recipe):
        log.info("rung %s: beaten on the first %d games, and stopped", rung.name, len(first))
        return begun
    table = pl.concat([begun, play(rest)]) if rest else begun
    kept.write(table, **facts)
    return table


def _is_beaten(first: pl.DataFrame, dearer: Sequence[pl.DataFrame], recipe: Recipe) -> bool:
    """Whether a rung is beaten on its first games by one that has played all."""
    mine, *others = (rows.rename({"bytes": "cost"}) for rows in (first, *dearer))
    return beaten_by(mine, dict(enumerate(others)), recipe.precisions.confidence) is not None


def _write(ladder: LadderFacts, folder: Path) -> None:
    summary = ladder.model_dump(mode="json")
    (folder / LADDER_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _play_checked(
    rungs: Sequence[RungPlayed], checkpoints: Path, games: Sequence[Task], recipe: Recipe, kept: KeptTables
) -> list[Checked]:
    """The rung to deploy checks what each rung that reads less drafts."""
    dear, found = to_deploy(rungs, recipe.precisions), []
    by_name = {rung.name: rung for rung in recipe.precisions.ladder}
    for drafter in drafters(rungs, dear):
        pair = (dear.name, drafter)
        arena = Arena.load(checkpoints, recipe, 0, pair)
        if not arena.rollouts.can_draft:
            return []
        entry = checking_entry(pair, pair, pair, recipe.precisions.speculative)
        of_pair = kept.under(pair=[_rung_facts(by_name[name], recipe) for name in pair], cache=recipe.precisions.cache)
        with Bars() as progress:
            played = evaluate([entry], arena, games, progress, " plays validation games", of_pair)[entry.name]
        found.append(checked_facts(drafter, played))
    return found


def _all_rungs_facts(context: StageContext, device: torch.device) -> dict[str, JsonValue]:
    """What all that is measured of any rung depends on."""
    recipe, adapter = context.recipe, adapter_config(context.inputs["agent"] / "model")
    base = None if adapter is None else adapter.base_model_name_or_path
    return {
        **recipe.precisions.model_dump(mode="json", include={"prompt_lookup"}),  # nothing, by default
        "agent": content(context.inputs["agent"]),
        "base": {} if base is None else dict(pretrained_hashes(base)),
        "games": content(context.inputs["benchmark_tasks"]),
        "sections": [section.model_dump(mode="json") for section in (recipe.benchmark, recipe.agent)],
        "kl_episodes": recipe.precisions.kl_episodes,
        "cache_bits": recipe.precisions.cache_bits,
        "kernels": recipe.precisions.kernels,
        "device": device.type,
    }


def _rung_facts(rung: Rung, recipe: Recipe) -> dict[str, JsonValue]:
    """What it depends on besides; not the rung's name, nor the other rungs."""
    return {
        "rung": rung.model_dump(mode="json", exclude={"name"}),
        "checkpoint": {} if rung.checkpoint is None else dict(pretrained_hashes(rung.checkpoint.model)),
        "gptq": _gptq(recipe).model_dump(mode="json") if rung.calibrated else None,
    }


def measured_rows(
    played: Sequence[Trajectory], read: PassBytes, read_by_float: PassBytes, precisions: Precisions
) -> pl.DataFrame:
    """An episode a row: task_id, success, steps, those of them whose action was none as the prompt wants it (`parse_failures`),
    the bytes that it read (`bytes`), those of them that are keys and values (`cache_bytes`), and what it would have read with
    float weights at a pass a token (`float_bytes`)."""
    rows = []
    for trajectory in played:
        cost = episode_cost(trajectory, {ALONE: read}, precisions.cache_bits)
        plain = trajectory if precisions.prompt_lookup is None else a_pass_a_token(trajectory)
        by_float = episode_cost(plain, {ALONE: read_by_float}, precisions.cache_bits)
        rows.append(
            {
                "task_id": trajectory.run.task.task_id,
                "success": trajectory.success,
                "steps": len(trajectory.steps),
                "parse_failures": sum(step.failure in PARSE_FAILURES for step in trajectory.steps),
                "bytes": cost.total,
                "cache_bytes": cost.cache,
                "float_bytes": by_float.total,
            }
        )
    return pl.DataFrame(rows)


def played_rows(rung: str, measured: pl.DataFrame, unit_bytes: float) -> pl.DataFrame:
    """Rows of `frontier.PLAYED` of a rung that played alone.

    Args:
        measured: as of `measured_rows`.
    """
    return measured.select(
        pl.lit(rung).alias("rung"),
        "task_id",
        "success",
        "steps",
        "parse_failures",
        (pl.col("bytes") / unit_bytes).alias("cost"),
        (pl.col("cache_bytes") / unit_bytes).alias("cost_cache"),
    ).cast(PLAYED)


def _calibration_episodes(context: StageContext, prompter: Prompter, capacity: int) -> list[Example]:
    """The expert's, of games of agent_train.

    Raises:
        UserError: there are none, or none fits into a transcript.
    """
    recipe = context.recipe
    games = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "agent_train")
    if not games:
        raise UserError("precisions.gptq: the split agent_train has no games, so there is nothing to calibrate on")
    try:
        return expert_steps(games[: _gptq(recipe).episodes], prompter, recipe.benchmark.step_limit, capacity)
    except UserError as error:
        raise UserError(f"precisions.gptq calibrates on agent_train: {error}") from error


def _gptq(recipe: Recipe) -> Gptq:
    return recipe.precisions.gptq or Gptq()


def _gptq_run(
    context: StageContext, rung: Rung, episodes: Sequence[Example], on_layer: Callable[[int, int], None]
) -> GptqRun:
    settings = _gptq(context.recipe)
    sequences, left = [], settings.tokens or sum(len(example.tokens) for example in episodes)
    for example in episodes:
        sequences.append(example.tokens[:left])
        left -= len(sequences[-1])
    return GptqRun(
        [tokens for tokens in sequences if tokens], settings.damping, context.scratch / "gptq" / rung.name, on_layer
    )


def _show_layers(progress: Progress, bar: TaskID, done: int, layers: int) -> None:
    progress.update(bar, completed=done, total=layers)


@torch.no_grad()
def _make_rung(
    float_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rung: Rung,
    folder: Path,
    compared: Sequence[Example],
    device: torch.device,
    calibration: Sequence[Example],
    gptq: GptqRun | None,
    kernels: Literal["low_bit"] | None,
) -> tuple[PreTrainedModel, RungSize, PassBytes, bool]:
    """Save a rung and load it again. Beside the float model there is never more than one other as large.

    Args:
        compared: on which the loaded weights' logits are compared with the saved ones'.
        calibration: what quantized activations get their scales by.

    Returns:
        What acts, the size of the weights, what a pass reads, and whether the loaded weights give the saved ones' logits, bit by
        bit.
    """
    if rung.checkpoint is not None:
        quantized = import_rung(float_model, tokenizer, rung, folder)
    else:
        quantized = quantize_rung(float_model, rung, partial(_read_alone, episodes=calibration, device=device), gptq)
        save_rung(quantized, folder)
    saved_logits, _ = trained_logits(quantized, compared, device)
    del quantized
    model = load_rung(folder, device)
    equal = torch.equal(saved_logits, trained_logits(model, compared, device)[0])
    size, read = stored_size(model, folder), stored_pass_bytes(model, folder)
    acting = float_model if rung.weights == "float" else sharing(acting_model(model, device, kernels), [float_model])
    return acting, size, read, equal


def _read_alone(model: PreTrainedModel, episodes: Sequence[Example], device: torch.device) -> None:
    """One by one: padding would be calibrated on too."""
    for example in episodes:
        trained_logits(model, [example], device)


def _play_validation(
    model: PreTrainedModel,
    games: Sequence[Task],
    prompter: Prompter,
    recipe: Recipe,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> list[Trajectory]:
    """One episode of each game by one rung."""
    capacity = transcript_capacity(model.config, recipe.agent.max_transcript_tokens)
    processes = processes_on(device, recipe.runtime)
    rows = rows_that_fit([model], capacity, recipe.runtime.batch_episodes, processes)

    def play_part(part: Sequence[Task], on_progress: Callable[[int], None]) -> list[Trajectory]:
        return play_alone(
            model,
            part,
            prompter,
            recipe.benchmark.step_limit,
            rows,
            recipe.agent.action,
            recipe.agent.temperature,
            capacity,
            on_progress,
            recipe.precisions.prompt_lookup,
        )

    played = gather(in_processes(play_part, scatter(games, processes), on_progress))
    warn_of_outgrown(played, capacity)
    return played


def expert_steps(games: Sequence[Task], prompter: Prompter, step_limit: int, capacity: int) -> list[Example]:
    """The expert's flawless episodes, its actions as targets; those of more tokens than the capacity are left out.

    Raises:
        UserError: none is left.
    """
    whole = [expert_example(game, prompter, step_limit, mistake_rate=0.0, rng=random.Random(0)) for game in games]
    fitting = [example for example in whole if len(example.tokens) <= capacity]
    if not fitting:
        shortest = min(len(example.tokens) for example in whole)
        raise UserError(
            f"none of the expert's {len(whole)} episodes fits into a transcript of {capacity} tokens (the shortest has"
            f" {shortest}): set agent.max_transcript_tokens higher, or choose a model with more positions"
        )
    if len(fitting) < len(whole):
        log.warning(
            "%d of the expert's episodes are left out: longer than %d tokens", len(whole) - len(fitting), capacity
        )
    return fitting


@torch.no_grad()
def divergence_to_float(
    float_model: PreTrainedModel,
    model: PreTrainedModel,
    examples: Sequence[Example],
    device: torch.device,
    processes: int = 1,
) -> tuple[float, float]:
    """Mean KL(float || model) of the expert's steps, in nats an action, and the share of tokens that are chosen otherwise."""

    def compare(piece: Sequence[Example]) -> list[tuple[float, int, int, int]]:
        p, wanted = trained_logits(float_model, piece, device)
        q, _ = trained_logits(model, piece, device)
        total, rows = 0.0, max(1, _NUMBERS_AT_ONCE // p.shape[1])
        for mine, other in zip(p.split(rows), q.split(rows), strict=True):
            log_p, log_q = mine.double().log_softmax(-1), other.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        different = int((p.argmax(-1) != q.argmax(-1)).sum())
        return [(total, different, len(wanted), sum(example.steps for example in piece))]

    def compare_pieces(pieces: Sequence[Sequence[Example]], _: object) -> list[list[tuple[float, int, int, int]]]:
        return [in_pieces(piece, len(piece), "expert episodes", compare) for piece in pieces]

    pieces = [examples[first : first + KL_EPISODES_AT_ONCE] for first in range(0, len(examples), KL_EPISODES_AT_ONCE)]
    compared = chain(*gather(in_processes(compare_pieces, scatter(pieces, processes))))
    total, different, tokens, steps = (sum(column) for column in zip(*compared, strict=True))
    return total / steps, different / tokens
