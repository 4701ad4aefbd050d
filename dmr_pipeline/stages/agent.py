"""Stage `agent`: the float LLM, brought along as it is, fine-tuned here on the expert's actions, or trained on them from nothing
(see training/)."""

import polars as pl
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import float_dtype, load_causal_lm, local_folder, resolve_device, save_causal_lm
from dmr_pipeline.agent.memory import out_of_memory_names
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.pretrained import adapter_config
from dmr_pipeline.recipe.agent import Finetune, Imitation, Training
from dmr_pipeline.recipe.model import Pretrained
from dmr_pipeline.rollout.kv_cache.choice import transcript_capacity, way_of
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.examples import refuse_lost_commands
from dmr_pipeline.training.finetuning import COMPUTE, adam, add_adapter, merged_copy, save_adapter
from dmr_pipeline.training.train import make_optimizers, new_model, success_rate, train
from dmr_pipeline.training.vocabulary import exact_word_tokenizer, word_tokenizer

TRIED_GAMES = 50
"""Whose expert's commands are to come back from a tokenizer that was made here."""


def agent(context: StageContext) -> StageResult:
    section, device = context.recipe.agent, resolve_device(context.recipe.runtime.device)
    if section.training is not None:
        return _train(context, section.training, device)
    assert section.pretrained is not None
    if section.finetune is not None:
        return _finetune(context, section.pretrained, section.finetune, device)
    return _bring(context, section.pretrained)


def _bring(context: StageContext, source: Pretrained) -> StageResult:
    """As it is."""
    model, tokenizer = load_causal_lm(source.model, source.revision, torch.device("cpu"), stored_precision=True)
    _check(context, model, tokenizer)
    save_causal_lm(model, tokenizer, context.output / "model", model.dtype)
    return StageResult(summary={"source": source.model, "parameters": model.num_parameters()})


def _check(context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Prompter:
    """The prompter, once nothing speaks against acting with this model."""
    section = context.recipe.agent
    way_of(model)
    transcript_capacity(model.config, section.max_transcript_tokens)
    return Prompter.of(tokenizer, section.prompt, model.generation_config)


def _train(context: StageContext, training: Training, device: torch.device) -> StageResult:
    """From nothing."""
    recipe = context.recipe
    benchmark, dealt = benchmark_of(recipe.benchmark), context.inputs["benchmark_tasks"]
    tasks = benchmark.read_tasks(dealt, "agent_train")
    new_tokenizer = exact_word_tokenizer if benchmark.exact_words else word_tokenizer
    tokenizer = new_tokenizer(benchmark.texts(dealt))
    prompter = Prompter.of(tokenizer, recipe.agent.prompt)
    refuse_lost_commands(tasks[:TRIED_GAMES], prompter, recipe.benchmark.step_limit, benchmark.exact_words)
    with out_of_memory_names("agent.training.architecture"):
        positions = recipe.agent.max_transcript_tokens
        model = new_model(training.architecture, len(tokenizer), training.seed, positions).to(device)
        history = train(
            model,
            make_optimizers(model, training),
            tasks,
            prompter,
            training,
            recipe.benchmark,
            recipe.runtime,
            device,
            context.scratch,
        )
    save_causal_lm(model, tokenizer, context.output / "model", torch.float16)
    return _trained(context, prompter, training, history, device)


def _finetune(context: StageContext, source: Pretrained, finetune: Finetune, device: torch.device) -> StageResult:
    """From an LLM that exists; the artifact is an adapter, or a whole checkpoint."""
    if finetune.lora and adapter_config(local_folder(source.model, source.revision, weights=False)) is not None:
        raise UserError(
            f"agent.finetune.lora: {source.model} is an adapter itself, and one upon another cannot be stored: merge it into its"
            " base first, or leave out lora, which trains all weights"
        )
    torch.set_num_threads(context.recipe.runtime.all_threads)  # its matrices are large enough to share among cores
    recipe, folder = context.recipe, context.output / "model"
    tasks = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "agent_train")
    model, tokenizer = load_causal_lm(source.model, source.revision, torch.device("cpu"), stored_precision=True)
    stored, prompter = model.dtype, _check(context, model, tokenizer)
    adapted = add_adapter(model, finetune.lora, finetune.seed) if finetune.lora is not None else None
    model = adapted.get_base_model() if adapted is not None else model.float().requires_grad_()
    with out_of_memory_names("agent.pretrained"):
        model = model.to(device)
        history = train(
            model,
            [adam(model, finetune)],
            tasks,
            prompter,
            finetune,
            recipe.benchmark,
            recipe.runtime,
            device,
            context.scratch,
            COMPUTE,
            merged_copy,
        )
    if adapted is None:
        save_causal_lm(model, tokenizer, folder, stored)
    else:
        save_adapter(adapted, source, folder)
    del model, adapted  # before the one that was stored is loaded
    return _trained(context, prompter, finetune, history, device)


def _trained(
    context: StageContext, prompter: Prompter, imitation: Imitation, log: pl.DataFrame, device: torch.device
) -> StageResult:
    """Store how training went, and have the stored model play."""
    recipe = context.recipe
    log.write_parquet(context.output / "training.parquet")
    dtype = float_dtype(device, recipe.agent.dtype)
    validation = benchmark_of(recipe.benchmark).read_tasks(context.inputs["benchmark_tasks"], "validation")
    model, _ = load_causal_lm(context.output / "model", None, device, dtype=dtype)
    success = success_rate(model, validation, prompter, recipe.benchmark, recipe.runtime)
    return StageResult(
        summary={
            "parameters": model.num_parameters(),
            "updates": imitation.updates,
            "validation_games": len(validation),
            "validation_success": success,
            "final_loss": round(log["loss"].tail(50).mean(), 5),  # type: ignore[arg-type]
        }
    )
