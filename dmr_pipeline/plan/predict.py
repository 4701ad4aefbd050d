"""The plan of a recipe: what each stage needs, and whether there is so much."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig

from dmr_pipeline.agent.checkpoint import float_dtype, resolve_device
from dmr_pipeline.agent.formats import has_weights, stored_dtype
from dmr_pipeline.agent.memory import free_memory
from dmr_pipeline.artifacts.folders import artifact_folder
from dmr_pipeline.artifacts.manifest import verify
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.peak_memory import own_bytes
from dmr_pipeline.plan.episodes import tried_episodes
from dmr_pipeline.plan.machine import free_disk
from dmr_pipeline.plan.shapes import (
    brought_config,
    cached_numbers,
    config_folder,
    rung_shape,
    trained_config,
    without_weights,
)
from dmr_pipeline.plan.speed import Speed, measured_speed
from dmr_pipeline.plan.stages import Assumptions, Model, Need, disk, memory, seconds, works
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.rollout.kv_cache.choice import transcript_capacity
from dmr_pipeline.rollout.parallel import cores, processes_on
from dmr_pipeline.summaries import AgentSummary
from dmr_pipeline.training.finetuning import COMPUTE
from dmr_pipeline.training.vocabulary import exact_word_tokenizer, word_tokenizer

SUCCESS = 0.85
"""About what agents win that are worth routing; their steps follow from it."""
PROGRAM_BYTES = 120_000_000
"""Of Dagster and what else a run has loaded, beside what has loaded here."""


@dataclass(frozen=True)
class Plan:
    """Of a recipe, on this machine."""

    recipe: str
    device: str
    parameters: int
    stages: tuple[Need, ...]
    assumed: Assumptions
    free_memory: int
    free_gpu: int
    free_disk: int
    problems: tuple[str, ...]
    """What cannot fit, a line each; empty where all does."""


def plan(recipe: Recipe, data_root: Path, success: float | None, speed: Speed | None) -> Plan:
    """
    Args:
        data_root: with the agent's artifact, where there is one.
        success: share of the games that the agent is taken to win; by default that of the validation games that it has won.
        speed: where it is not to be measured.

    Raises:
        UserError: what the recipe names is not here or cannot act, or its prompt does not go with the tokenizer.
    """
    device = resolve_device(recipe.runtime.device)
    program = (own_bytes() or 0) + PROGRAM_BYTES
    agent = recipe.agent
    brought = brought_config(agent.pretrained) if agent.pretrained is not None else None
    new_tokenizer = exact_word_tokenizer if benchmark_of(recipe.benchmark).exact_words else word_tokenizer
    episodes, tokenizer = tried_episodes(
        recipe.benchmark, agent.prompt, lambda texts: brought[1] if brought is not None else new_tokenizer(texts)
    )
    if brought is not None:
        config = brought[0]
    else:
        assert agent.training is not None
        config = trained_config(agent.training, len(tokenizer), agent.max_transcript_tokens)
    dtype = float_dtype(device, agent.dtype)
    model = _model(recipe, config, dtype, device)
    main, on_gpu = free_memory(torch.device("cpu")), free_memory(device) if model.on_gpu else 0
    free = on_gpu if model.on_gpu else main
    if speed is None:
        learns_in = COMPUTE if agent.finetune is not None else torch.float32 if agent.training is not None else None
        rows, runtime = recipe.runtime.batch_episodes, recipe.runtime
        threads = runtime.all_threads if agent.finetune is not None else runtime.threads  # as stages/agent.py has them
        speed = measured_speed(config, dtype, device, episodes, model.capacity, rows, learns_in, threads, free)
    won, known_from = _success(success, artifact_folder("agent", recipe.name, data_root))
    processes = min(processes_on(device, recipe.runtime), cores())
    assumed = Assumptions(won, known_from, episodes, speed, processes, program)
    held, stored, work = memory(recipe, model, assumed), disk(recipe, model, assumed), works(recipe, model, assumed)
    needs = tuple(
        Need(name, *held.get(name, (program, 0)), stored[name], seconds(work[name], assumed) if name in work else 0.0)
        for name in stored
    )
    return Plan(
        recipe.name,
        device.type,
        model.parameters,
        needs,
        assumed,
        main,
        on_gpu,
        free_disk(data_root),
        (
            *recipe.kl_router.nothing_for_stage_2(),
            *_probe_layers(recipe, model.layers),
            *_problems(needs, main, on_gpu, free_disk(data_root), model.on_gpu),
        ),
    )


def _success(said: float | None, agent: Path) -> tuple[float, Literal["said", "agent", "nothing"]]:
    """Share of the games that the agent is taken to win, and whence it is known, as `Assumptions` has them.

    Args:
        agent: folder of its artifact; it need not exist.

    Raises:
        UserError: the artifact is not whole.
    """
    if said is not None:
        return said, "said"
    if agent.is_dir():
        won = AgentSummary.model_validate(verify(agent).manifest.summary).validation_success
        if won is not None:
            return won, "agent"
    return SUCCESS, "nothing"


def _model(recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Model:
    pretrained, stored = recipe.agent.pretrained, torch.float16
    if pretrained is not None:
        folder, _ = config_folder(pretrained)
        stored = stored_dtype(folder) if has_weights(folder) else config.dtype or torch.float32
    kernels = recipe.precisions.kernels is not None
    shaped, text = without_weights(config, dtype), config.get_text_config()
    return Model(
        parameters=sum(parameter.numel() for parameter in shaped.parameters()),
        vocabulary=shaped.get_input_embeddings().weight.shape[0],
        hidden=text.hidden_size,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        dtype=dtype,
        stored=stored,
        cached_numbers=cached_numbers(config),
        capacity=transcript_capacity(config, recipe.agent.max_transcript_tokens),
        rungs={rung.name: rung_shape(shaped, rung, device.type == "cpu", kernels) for rung in recipe.precisions.ladder},
        on_gpu=device.type == "cuda",
    )


def _probe_layers(recipe: Recipe, there: int) -> list[str]:
    """Of an agent that is brought: of others the recipe itself tells."""
    probe = recipe.kl_router.model.probe
    if probe is None or max(probe.layers, default=0) <= there:
        return []
    return [f"kl_router.model.probe.layers: {list(probe.layers)}, but the agent has {there}"]


def _problems(needs: tuple[Need, ...], free: int, gpu: int, disk_left: int, on_gpu: bool) -> list[str]:
    found = []
    most = max(needs, key=lambda need: need.memory)
    if most.memory > free:
        found.append(
            f"{most.stage} needs about {_gb(most.memory)} of memory, {_gb(free)} are free: set runtime.batch_episodes or"
            " runtime.processes lower, or take a smaller model"
        )
    most = max(needs, key=lambda need: need.gpu)
    if on_gpu and most.gpu > gpu:
        found.append(
            f"{most.stage} needs about {_gb(most.gpu)} of the GPU's memory, {_gb(gpu)} are free: set runtime.batch_episodes"
            " lower, or take a smaller model"
        )
    written = sum(need.disk for need in needs)
    if written > disk_left:
        found.append(f"all stages need about {_gb(written)} of disk, {_gb(disk_left)} are free: free some")
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
