"""`dmr plan`: counts in closed form, and what is refused."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, T5Config

from dmr_pipeline.agent.checkpoint import save_causal_lm
from dmr_pipeline.artifacts.manifest import write_manifest
from dmr_pipeline.artifacts.resume import save_state
from dmr_pipeline.environments.benchmark import benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.plan import machine, predict, speed
from dmr_pipeline.plan.episodes import Episodes, tried_episodes
from dmr_pipeline.plan.predict import Plan, plan
from dmr_pipeline.plan.shapes import RungShape
from dmr_pipeline.plan.speed import Speed, measured_speed, weights_gone_through
from dmr_pipeline.plan.stages import Assumptions, Model, Need, Work, memory, seconds, works
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.agent import Agent, Finetune, Prompt
from dmr_pipeline.recipe.kl_router import Probe, RouterModel
from dmr_pipeline.recipe.model import Lora, Pretrained
from dmr_pipeline.recipe.precisions import Rung
from dmr_pipeline.recipe.sensitivity import Consequences
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.training.examples import expert_example
from dmr_pipeline.training.train import new_model
from dmr_pipeline.training.vocabulary import word_tokenizer
from tests.helpers.commands import dmr
from tests.helpers.kinds import KINDS
from tests.helpers.micro_recipe import RECIPE_YAML
from tests.helpers.routers import ARCHITECTURE, TOKENIZER

CPU = torch.device("cpu")
SPEED = Speed(read=1000.0, write=100.0, learn=500.0, measured=False)
EPISODES = Episodes(steps=3.0, opening=50.0, segment=20.0, action=5.0, environment_seconds=0.01, step_limit=4)
RECIPE = Recipe.model_validate({"name": "micro", **yaml.safe_load(RECIPE_YAML)})
MODEL = Model(
    parameters=10_000, vocabulary=64, hidden=16, feed_forward=32, layers=2, dtype=torch.float32, stored=torch.float16,
    cached_numbers=64, capacity=512, rungs={}, on_gpu=False,
)  # fmt: skip
FINETUNE = Finetune(
    updates=6, episodes_per_update=2, learning_rate=0.004, warmup_updates=2, dagger_from=4, dagger_every=2, dagger_episodes=2,
    dagger_steps=4, dagger_tokens=100, mistake_rate=0.1,
)  # fmt: skip
STAGES = [
    "benchmark_tasks", "agent", "quantized_checkpoints", "trajectories", "sensitivity_dataset", "kl_router",
    "grpo_router", "evaluation_report", "released_router",
]  # fmt: skip


def assumed(success: float = 0.5, processes: int = 1) -> Assumptions:
    return Assumptions(success, "said", EPISODES, SPEED, processes, program_bytes=100_000_000)


def own_memory(found: Plan) -> dict[str, int]:
    """Without the program's, which grows with what tests import."""
    return {need.stage: need.memory - found.assumed.program_bytes for need in found.stages}


def test_lengths_are_those_of_the_experts_episodes(tmp_path: Path) -> None:
    found, tokenizer = tried_episodes(RECIPE.benchmark, RECIPE.agent.prompt, word_tokenizer)
    benchmark = benchmark_of(RECIPE.benchmark)
    benchmark.make_tasks(tmp_path)
    tasks = benchmark.read_tasks(tmp_path, "validation")
    prompter = Prompter.of(tokenizer, RECIPE.agent.prompt)
    examples = [expert_example(task, prompter, 4, 0.0, random.Random(0)) for task in tasks]
    assert found.steps == pytest.approx(sum(e.steps for e in examples) / 4)
    assert found.tokens(found.steps) == pytest.approx(sum(len(e.tokens) for e in examples) / 4, rel=0.1)


def test_episodes_that_are_lost_take_all_steps() -> None:
    assert EPISODES.played(1.0) == 3.0
    assert EPISODES.played(0.25) == 0.25 * 3 + 0.75 * 4
    assert EPISODES.tokens(1) == 55
    assert EPISODES.tokens(3) == 50 + 2 * 20 + 3 * 5


def test_work_of_the_stages() -> None:
    found = works(RECIPE, MODEL, assumed())
    steps = 3.5
    read, written = 50 + 2.5 * 20 + steps, steps * 4
    # Three behaviours on four games, each token read by both precisions, 13% of the actions looked up.
    collected = found["trajectories"]
    assert collected.written == pytest.approx(0.87 * 12 * written)
    assert collected.read == pytest.approx(0.87 * 12 * 2 * read)
    assert found["sensitivity_dataset"].read == pytest.approx(2 * 12 * EPISODES.tokens(steps))
    # Three rungs on four games, and the expert's steps of two of them, by the rung and the float model; four more games that
    # the second rung checks and the third one drafts.
    assert found["quantized_checkpoints"].written == pytest.approx((3 + 1) * 4 * written)
    assert found["quantized_checkpoints"].read == pytest.approx(3 * (4 * read + 4 * EPISODES.tokens(3)) + 4 * 2 * read)
    # Four updates of two expert episodes, two of one and a hundred own tokens.
    assert found["agent"].learned == pytest.approx((4 * 2 + 2 * 1) * EPISODES.tokens(3) + 2 * 100)
    # Two updates of two groups of two; three games at the start, to start from, twice while learning, for the threshold.
    assert found["grpo_router"].steps == pytest.approx(0.75 * steps * (2 * 2 * 2 + 3 * 4 + 3 * 4))


def test_comparing_precisions_and_rounding_them_are_counted() -> None:
    found = works(RECIPE, MODEL, assumed())
    # Of three behaviours on four games, each token that the dearest writes, with one cheaper rung.
    assert found["sensitivity_dataset"].compared == pytest.approx(12 * 3.5 * 5)
    # The expert's, on two games, with three rungs.
    assert found["quantized_checkpoints"].compared == pytest.approx(3 * 2 * 3 * 5)
    assert found["quantized_checkpoints"].rounded == 0
    ladder = [*RECIPE.precisions.ladder]
    ladder[1] = Rung(name="int4", weights="int4", rounding="gptq", head="int4")
    by_gptq = RECIPE.model_copy(update={"precisions": RECIPE.precisions.model_copy(update={"ladder": tuple(ladder)})})
    # Two layers of six matrices with 16 inputs and one with 32; a head of 64 outputs is as four matrices of 16 outputs.
    assert works(by_gptq, MODEL, assumed())["quantized_checkpoints"].rounded == 2 * (6 * 16 + 32) + 4 * 16


def test_curves_are_counted_where_there_are_some() -> None:
    section = RECIPE.evaluation
    curved = RECIPE.model_copy(
        update={
            "evaluation": section.model_copy(update={"budgets": (0.2, 0.4), "budget_games": 3, "rules": ("first",)})
        }
    )
    more = (
        works(curved, MODEL, assumed())["evaluation_report"].steps
        - works(RECIPE, MODEL, assumed())["evaluation_report"].steps
    )
    # Both routers and a rule: two budgets on four test games; on three others for levels, and three bars a budget.
    assert more == pytest.approx(0.5 * 3.5 * 3 * (2 * 4 + (1 + 3 * 2) * 3))


def test_seconds_are_shared_by_processes_but_for_learning() -> None:
    work = Work(read=1000, written=100, learned=500, steps=100)
    assert seconds(work, assumed()) == pytest.approx(1 + 1 + 1 + 1)
    assert seconds(work, assumed(processes=2)) == pytest.approx(1.5 + 1)
    more = Work(compared=60, rounded=900)
    assert seconds(more, assumed()) == 0, "no speed was said"
    both = replace(assumed(processes=2), speed=replace(SPEED, compare=10.0, round=300.0))
    assert seconds(more, both) == pytest.approx(3 + 3)


def test_a_shared_cache_is_read_once_and_held_once() -> None:
    shared = RECIPE.model_copy(update={"precisions": RECIPE.precisions.model_copy(update={"cache": "shared"})})
    apart, one = (works(recipe, MODEL, assumed())["trajectories"] for recipe in (RECIPE, shared))
    assert apart.read == 2 * one.read
    separate_memory, shared_memory = (own_memory(plan(recipe, Path("data"), 0.5, SPEED)) for recipe in (RECIPE, shared))
    assert shared_memory["trajectories"] < separate_memory["trajectories"]
    assert shared_memory["quantized_checkpoints"] < separate_memory["quantized_checkpoints"], "one drafts, one checks"
    assert shared_memory["agent"] == separate_memory["agent"]


def test_the_plan_of_a_recipe() -> None:
    found = plan(RECIPE, Path("data"), 0.9, SPEED)
    assert [need.stage for need in found.stages] == STAGES
    assert found.problems == ()
    by_name = {need.stage: need for need in found.stages}
    assert all(need.memory >= found.assumed.program_bytes for need in found.stages)
    assert all(need.gpu == 0 for need in found.stages)
    assert by_name["evaluation_report"].seconds > by_name["trajectories"].seconds > 0
    ladder = by_name["quantized_checkpoints"]
    assert 2.0 < ladder.disk / (found.parameters * 2) < 4.5, "float32, int4 and int2, with embeddings in float32"


def test_the_disk_holds_what_trainings_are_resumed_from(tmp_path: Path) -> None:
    """By what AdamW's state takes as it is written."""
    model, saved = new_model(ARCHITECTURE, len(TOKENIZER), 0), tmp_path / "training.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    save_state(saved, {"model": dict(model.named_parameters()), "optimizers": [optimizer.state_dict()]})
    folder = tmp_path / "base"
    save_causal_lm(model, TOKENIZER, folder, torch.bfloat16)

    def agents_disk(finetune: Finetune | None) -> int:
        agent = Agent(pretrained=Pretrained(model=str(folder)), finetune=finetune, prompt=Prompt())
        (need,) = (
            n
            for n in plan(RECIPE.model_copy(update={"agent": agent}), Path("data"), 0.9, SPEED).stages
            if n.stage == "agent"
        )
        return need.disk

    brought, whole = agents_disk(None), agents_disk(FINETUNE)
    assert whole - brought == pytest.approx(2 * saved.stat().st_size, rel=0.1), (
        "the new one is written beside the old one"
    )
    assert agents_disk(FINETUNE.model_copy(update={"lora": Lora(rank=1)})) < whole


def test_more_games_take_longer_and_more_rows_more_memory() -> None:
    def need(**changes: object) -> tuple[dict[str, int], dict[str, Need]]:
        content = yaml.safe_load(RECIPE_YAML)
        content["benchmark"]["splits"] |= {"router_train": changes.get("games", 4)}
        content["runtime"] = {"batch_episodes": changes.get("rows", 64), "processes": 1}
        found = plan(Recipe.model_validate({"name": "micro", **content}), Path("data"), 0.9, SPEED)
        return own_memory(found), {need.stage: need for need in found.stages}

    (held_by_few, few), (held_by_many, many), (held_by_narrow, _) = need(), need(games=400), need(games=400, rows=2)
    assert many["trajectories"].seconds == pytest.approx(100 * few["trajectories"].seconds, rel=0.5), ()
    assert held_by_many["trajectories"] > held_by_few["trajectories"]
    assert held_by_narrow["trajectories"] < held_by_many["trajectories"]
    assert many["trajectories"].disk > 50 * few["trajectories"].disk


def held(changes: dict[str, dict[str, object]], success: float = 0.9, rows: int = 64) -> dict[str, int]:
    """Peaks by stage, where one process plays so many games at once."""
    content = yaml.safe_load(RECIPE_YAML) | {"runtime": {"processes": 1, "batch_episodes": rows}}
    for section, keys in changes.items():
        content[section] |= keys
    recipe = Recipe.model_validate({"name": "micro", **content})
    rungs = {rung.name: RungShape(file=1000, acting=4000, common=500) for rung in recipe.precisions.ladder}
    return {stage: of for stage, (of, _) in memory(recipe, replace(MODEL, rungs=rungs), assumed(success)).items()}


def test_a_rung_that_is_stopped_where_it_fails_plays_few_games_to_their_limit() -> None:
    """Those of `stop_beaten_after`, with the longest transcripts that there can be; the report leaves it out."""
    games: dict[str, dict[str, object]] = {
        "benchmark": {"splits": {"agent_train": 4, "router_train": 4, "validation": 64, "test": 64}},
        "agent": {"prompt": {"max_action_tokens": 100}},
    }
    rungs = [{"name": name, "weights": name} for name in ("float", "int8", "int2")]
    ladder = {"ladder": rungs, "route": ["float", "int8"], "kl_episodes": 1}
    whole, few, many = (
        held({**games, "precisions": {**ladder, **stop}}, rows=64)
        for stop in ({}, {"stop_beaten_after": 2}, {"stop_beaten_after": 60})
    )
    assert few["quantized_checkpoints"] < many["quantized_checkpoints"] < whole["quantized_checkpoints"]
    assert few["evaluation_report"] == many["evaluation_report"] < whole["evaluation_report"]


def test_stage_2_has_room_for_the_games_that_it_is_validated_on() -> None:
    groups = {"games_per_update": 2, "group_size": 4}
    games: dict[str, dict[str, object]] = {
        "benchmark": {"splits": {"agent_train": 4, "router_train": 4, "validation": 64, "test": 4}}
    }
    few, as_many, more = (
        held({**games, "grpo_router": {**groups, "validation_games": count}})["grpo_router"] for count in (4, 8, 32)
    )
    assert few == as_many < more


def test_labels_go_through_the_longest_episodes_first() -> None:
    """Where enough are lost to fill all rows, it holds as much as where all are."""
    games: dict[str, dict[str, object]] = {
        "benchmark": {"splits": {"agent_train": 4, "router_train": 40, "validation": 4, "test": 4}}
    }
    all_lost, most_won, all_won = (held(games, success, rows=8) for success in (0.0, 0.8, 1.0))
    assert all_lost["sensitivity_dataset"] == most_won["sensitivity_dataset"] > all_won["sensitivity_dataset"]
    assert most_won["kl_router"] < all_lost["kl_router"], "episodes that are played come as they are"


def test_the_agent_wins_what_its_artifact_says(tmp_path: Path) -> None:
    easy = RECIPE.benchmark.model_copy(update={"step_limit": 30})  # such games are found at once
    recipe = RECIPE.model_copy(update={"benchmark": easy})

    def told(success: float | None) -> tuple[float, str]:
        found = plan(recipe, tmp_path, success, SPEED).assumed
        return found.success, found.success_from

    assert told(None) == (predict.SUCCESS, "nothing")
    folder = tmp_path / RECIPE.name / "agent"
    folder.mkdir(parents=True)
    write_manifest(folder, summary={"validation_success": 0.4, "validation_games": 4})
    assert told(None) == (0.4, "agent")
    assert told(0.7) == (0.7, "said")
    write_manifest(folder, summary={})
    assert told(None) == (predict.SUCCESS, "nothing"), "an LLM that was brought along has played none yet"


def test_what_cannot_fit_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/micro.yaml").write_text(RECIPE_YAML)
    options = ["plan", "micro", "--read-speed", "1000", "--write-speed", "100"]
    done = dmr(*options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [need["stage"] for need in found["stages"]] == STAGES
    assert not found["assumed"]["speed"]["measured"]
    done = dmr(*options)
    assert "as given" in " ".join(done.stdout.split())
    assert all(stage in done.stdout for stage in STAGES)

    monkeypatch.setattr(predict, "free_memory", lambda device: 1000)
    monkeypatch.setattr(predict, "free_disk", lambda folder: 1000)
    done = dmr(*options)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "of memory, 0.00 GB are free: set runtime.batch_episodes" in done.stderr
    assert "of disk, 0.00 GB are free" in done.stderr
    assert dmr("plan", "micro", "--read-speed", "1000").exit_code == 2


def llama(layers: int, **others: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, **others,
    )  # fmt: skip


def test_speed_is_measured_with_random_weights() -> None:
    config = llama(8)
    whole = measured_speed(config, torch.float32, CPU, EPISODES, 10_000, 4, torch.float32, threads=2, free=10**9)
    assert whole.compare is not None
    assert whole.round is not None
    assert min(whole.read, whole.write, whole.learn, whole.compare, whole.round) > 0
    assert whole.read > whole.write, "a segment is read in one pass"
    assert config.num_hidden_layers == 8
    assert measured_speed(config, torch.float32, CPU, EPISODES, 10_000, 4, None, threads=1, free=10**9).learn == 0


def test_a_model_with_few_positions_is_tried_as_far_as_they_go() -> None:
    config, long = llama(1, max_position_embeddings=300), replace(EPISODES, opening=500.0)
    assert measured_speed(config, torch.float32, CPU, long, 300, 2, torch.float32, threads=1, free=10**9).learn > 0
    wide = replace(EPISODES, segment=150.0)  # a page of a shop
    assert measured_speed(config, torch.float32, CPU, wide, 300, 2, None, threads=1, free=10**9).read > 0


def test_a_hub_model_is_planned_before_its_weights_are_here(tmp_path: Path) -> None:
    """By its config alone, in whose dtype they are taken to be stored."""
    folder = tmp_path / "there"
    save_causal_lm(new_model(ARCHITECTURE, len(TOKENIZER), 0), TOKENIZER, folder, torch.bfloat16)
    recipe = RECIPE.model_copy(update={"agent": Agent(pretrained=Pretrained(model=str(folder)), prompt=Prompt())})
    with_weights = plan(recipe, Path("data"), 0.9, SPEED)
    (folder / "model.safetensors").unlink()
    without = plan(recipe, Path("data"), 0.9, SPEED)
    assert [need.disk for need in without.stages] == [need.disk for need in with_weights.stages]


def test_what_is_no_causal_lm_is_refused_by_its_config(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    recipe = RECIPE.model_copy(update={"agent": Agent(pretrained=Pretrained(model=str(tmp_path)), prompt=Prompt())})
    with pytest.raises(UserError, match=r"type 't5' is no causal LM with a head for its tokens[^\n]*$"):
        plan(recipe, Path("data"), 0.9, SPEED)


def test_layers_that_a_probe_reads_and_a_brought_model_has_not_are_a_problem(tmp_path: Path) -> None:
    """Not only once the router is to be trained, after ladder, trajectories and labels."""
    save_causal_lm(new_model(ARCHITECTURE, len(TOKENIZER), 0), TOKENIZER, tmp_path / "there", torch.bfloat16)
    layers = ARCHITECTURE.layers
    for probed, problems in ((layers, ()), (9, (f"kl_router.model.probe.layers: [9], but the agent has {layers}",))):
        router = RECIPE.kl_router.model_copy(update={"model": RouterModel(probe=Probe(layers=(probed,)))})
        brought = Agent(pretrained=Pretrained(model=str(tmp_path / "there")), prompt=Prompt())
        found = plan(RECIPE.model_copy(update={"agent": brought, "kl_router": router}), Path("data"), 0.9, SPEED)
        assert found.problems == problems


def test_a_router_that_stage_2_cannot_train_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only after all stages before it; a study, and stage 1 by itself, take it."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    content = yaml.safe_load(RECIPE_YAML)
    content["kl_router"]["model"] = {"probe": {"layers": [1], "neighbours": 3}}
    Path("recipes/micro.yaml").write_text(yaml.safe_dump(content))
    assert dmr("recipe", "check", "micro").exit_code == 0
    for command in (["run", "micro"], ["plan", "micro", "--read-speed", "1000", "--write-speed", "100"]):
        done = dmr(*command)
        assert done.exit_code == 2
        assert "kl_router.model.probe.neighbours: neighbours have no weights for stage 2 to train" in done.stderr
    assert not Path("data").exists()


def test_learning_is_timed_with_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_learning", lambda *_: float(torch.get_num_threads()))
    before = torch.get_num_threads()
    config = llama(1)
    found = measured_speed(
        config, torch.float32, CPU, EPISODES, 10_000, 4, torch.float32, threads=before + 1, free=10**9
    )
    assert found.learn == before + 1
    assert torch.get_num_threads() == before


def test_a_model_that_is_too_large_is_tried_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama(8, tie_word_embeddings=True)
    layer = (weights_gone_through(config, torch.float32) - 4 * (50 * 32 + 32)) // 8
    few, share = speed._few_layers(config, torch.float32, most=4 * (50 * 32 + 32) + 3 * layer)
    assert few.num_hidden_layers == 2
    assert share == pytest.approx((4 * (50 * 32 + 32) + 2 * layer) / (4 * (50 * 32 + 32) + 8 * layer))


@pytest.mark.parametrize("kind", ["gemma3", "falcon-h1", "mamba"])
def test_kinds_of_layers_are_as_many_as_the_layers(kind: str) -> None:
    """Whether the config lists them or makes them of the number of layers."""
    few, share = speed._few_layers(KINDS[kind](), torch.float32, most=1)
    assert few.num_hidden_layers == len(few.layer_types) == 1
    assert 0 < share < 1


def test_a_folder_that_is_not_there_yet_has_its_disks_space(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "a" / "b") == pytest.approx(machine.free_disk(tmp_path), rel=0.01)


def test_the_agent_wins_as_often_as_is_said() -> None:
    sure, bad = (works(RECIPE, MODEL, replace(assumed(), success=success))["trajectories"] for success in (1.0, 0.0))
    assert sure.steps / 3 == pytest.approx(bad.steps / 4)


def test_swapped_steps_are_played_on() -> None:
    plain = works(RECIPE, MODEL, assumed())["sensitivity_dataset"]
    section = Consequences(games=2, share=0.5)
    sensitivity = RECIPE.sensitivity.model_copy(update={"consequences": section})
    found = works(RECIPE.model_copy(update={"sensitivity": sensitivity}), MODEL, assumed())["sensitivity_dataset"]
    # Three behaviours on two games of 3.5 steps; 40% differ, half of them are drawn; two branches, each half known.
    assert found.steps - plain.steps == pytest.approx(3 * 2 * 3.5 * 0.4 * 0.5 * 3.5)
