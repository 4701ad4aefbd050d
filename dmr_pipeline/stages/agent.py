"""Stage `agent`: the float LLM, brought along or trained here on the expert's actions (see training/train.py)."""

import torch

from dmr_pipeline.agent.checkpoint import load_causal_lm, resolve_device, save_causal_lm
from dmr_pipeline.agent.memory import out_of_memory_names
from dmr_pipeline.artifacts.stage import StageContext, StageResult
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.rollout.kv_cache.choice import transcript_capacity, way_of
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.train import success_rate, train
from dmr_pipeline.training.vocabulary import exact_word_tokenizer, word_tokenizer


def agent(context: StageContext) -> StageResult:
    recipe, section = context.recipe, context.recipe.agent
    device = resolve_device(recipe.runtime.device)
    folder = context.output / "model"
    if section.pretrained is not None:
        source = section.pretrained
        model, tokenizer = load_causal_lm(source.model, source.revision, torch.device("cpu"), stored_precision=True)
        way_of(model)
        transcript_capacity(model.config, section.max_transcript_tokens)
        Prompter.of(tokenizer, section.prompt, model.generation_config)
        save_causal_lm(model, tokenizer, folder, model.dtype)
        return StageResult(summary={"source": source.model, "parameters": model.num_parameters()})
    assert section.training is not None
    benchmark, dealt = benchmark_of(recipe.benchmark), context.inputs["benchmark_tasks"]
    tasks = benchmark.read_tasks(dealt, "agent_train")
    new_tokenizer = exact_word_tokenizer if benchmark.exact_words else word_tokenizer
    tokenizer = new_tokenizer(benchmark.texts(dealt))
    prompter = Prompter.of(tokenizer, section.prompt)
    with out_of_memory_names("agent.training.architecture"):
        model, log = train(
            tasks,
            prompter,
            section.training,
            recipe.benchmark,
            recipe.runtime,
            device,
            context.scratch,
            section.max_transcript_tokens,
        )
    save_causal_lm(model, tokenizer, folder, torch.float16)
    log.write_parquet(context.output / "training.parquet")
    validation = benchmark.read_tasks(dealt, "validation")
    model, _ = load_causal_lm(folder, None, device)
    success = success_rate(model, validation, prompter, recipe.benchmark, recipe.runtime)
    return StageResult(
        summary={
            "parameters": model.num_parameters(),
            "updates": section.training.updates,
            "validation_games": len(validation),
            "validation_success": success,
            "final_loss": round(log["loss"].tail(50).mean(), 5),  # type: ignore[arg-type]
        }
    )
