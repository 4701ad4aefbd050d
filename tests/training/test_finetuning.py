"""Fine-tuning: what is trained and stored, and a killed one ends as an unbroken one does."""

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dmr_pipeline.agent.checkpoint import load_causal_lm, save_causal_lm
from dmr_pipeline.artifacts.resume import load_state
from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.benchmark import GeneratedAlfWorld, GeneratedGames
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import Agent, Finetune, Prompt
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.model import Architecture, Lora, Pretrained
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.stages import agent as stage
from dmr_pipeline.training import train as module
from dmr_pipeline.training.examples import Example, expert_example
from dmr_pipeline.training.finetuning import add_adapter, merged_copy, save_adapter
from dmr_pipeline.training.train import learn, new_model, schedule, trained_weights
from dmr_pipeline.training.vocabulary import word_tokenizer

TOKENIZER = word_tokenizer(alfworld_texts())
ARCHITECTURE = Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=32)
LORA = Lora(rank=4, alpha=8)
FINETUNE = Finetune(
    lora=LORA,
    updates=6,
    episodes_per_update=2,
    learning_rate=0.004,
    warmup_updates=2,
    dagger_from=4,
    dagger_every=2,
    dagger_episodes=2,
    dagger_steps=4,
    dagger_tokens=100,
    mistake_rate=0.1,
)
BENCHMARK = GeneratedAlfWorld(step_limit=8, splits=Splits(agent_train=12, router_train=1, validation=2, test=1))
pytestmark = pytest.mark.usefixtures("torch_threads")
CPU = torch.device("cpu")
TOKENS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path / "base"
    save_causal_lm(new_model(ARCHITECTURE, len(TOKENIZER), 1), TOKENIZER, folder, torch.bfloat16)
    return folder


def tuned(base: Path, folder: Path, finetune: Finetune = FINETUNE, processes: int = 1) -> Path:
    """The artifact of the stage."""
    recipe = load_recipe("alfworld-tiny").model_copy(
        update={
            "benchmark": BENCHMARK,
            "agent": Agent(pretrained=Pretrained(model=str(base)), finetune=finetune, prompt=Prompt()),
            "runtime": Runtime(batch_episodes=2, processes=processes),
        }
    )
    tasks = folder / "tasks"
    if not tasks.exists():
        tasks.mkdir(parents=True)
        GeneratedGames(BENCHMARK).make_tasks(tasks)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    stage.agent(StageContext(recipe, {"benchmark_tasks": tasks}, folder / "out", folder / "scratch"))
    return folder / "out"


def broken_off(base: Path, folder: Path, finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `tuned`, killed in its sixth update."""

    def killed(update: int, training: Finetune) -> float:
        if update == 5:
            raise KeyboardInterrupt
        return schedule(update, training)

    with monkeypatch.context() as patch:
        patch.setattr(module, "schedule", killed)
        with pytest.raises(KeyboardInterrupt):
            tuned(base, folder, finetune)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for path in folder.glob("model/*.safetensors") for name, w in load_file(path).items()}


@pytest.mark.parametrize("saved_every", [0, 300])
@pytest.mark.parametrize("lora", [LORA, None])
def test_a_killed_fine_tuning_ends_as_an_unbroken_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Lora | None, saved_every: int
) -> None:
    monkeypatch.setattr(module, "_SAVED_EVERY", saved_every)  # seconds: after each update, or before collections only
    finetune = FINETUNE.model_copy(update={"lora": lora})
    whole = tuned(base, tmp_path / "whole", finetune)
    broken_off(base, tmp_path / "broken", finetune, monkeypatch)
    state = load_state(tmp_path / "broken" / "scratch" / "training.pt")
    assert state is not None
    assert state["update"] == (5 if saved_every == 0 else 4)
    resumed = tuned(base, tmp_path / "broken", finetune)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_model_with_dropout_resumes_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=512, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5)
    base = tmp_path / "base"
    save_causal_lm(GPT2LMHeadModel(config), TOKENIZER, base, torch.bfloat16)
    monkeypatch.setattr(module, "_SAVED_EVERY", 0)
    finetune = FINETUNE.model_copy(update={"lora": None})
    whole = weights(tuned(base, tmp_path / "whole", finetune))
    broken_off(base, tmp_path / "broken", finetune, monkeypatch)
    torch.rand(7)  # another process has another state
    resumed = weights(tuned(base, tmp_path / "broken", finetune))
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())
    assert whole


def test_a_model_learns_from_episodes_that_it_has_positions_for(tmp_path: Path) -> None:
    """One with learned positions has none for the tokens after."""
    prompter = Prompter.of(TOKENIZER, Prompt())
    GeneratedGames(BENCHMARK).make_tasks(tmp_path)
    games = GeneratedGames(BENCHMARK).read_tasks(tmp_path, "agent_train")
    lengths = sorted(
        len(expert_example(game, prompter, BENCHMARK.step_limit, 0.0, random.Random(0)).tokens) for game in games
    )
    base, room = tmp_path / "base", lengths[len(lengths) // 2]
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=room, n_embd=32, n_layer=2, n_head=2)
    save_causal_lm(GPT2LMHeadModel(config), TOKENIZER, base, torch.bfloat16)
    finetune = FINETUNE.model_copy(update={"lora": None, "mistake_rate": 0.0, "episodes_per_update": 12})
    assert lengths[-1] > room
    assert weights(tuned(base, tmp_path / "run", finetune))


def test_an_llm_learns_with_the_cores_of_all_processes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(update: int, training: Finetune) -> float:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "schedule", noted)
    with pytest.raises(KeyboardInterrupt):
        tuned(base, tmp_path, processes=2)
    assert seen == [2]


def test_smaller_pieces_go_through_where_memory_does_not_suffice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed try has left in the gradients is not learned from, and the pieces stay small."""
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 1250)
    small = tuned(base, tmp_path / "small")
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 2500)
    tried = []

    def scarce(model: PreTrainedModel, batch: list[Example], *rest: Any) -> tuple[float, float]:
        tried.append(rest[-1])
        if rest[-1] > 1250:
            learn(model, batch, *rest)
            raise torch.OutOfMemoryError
        return learn(model, batch, *rest)

    monkeypatch.setattr(module, "learn", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    folder = tuned(base, tmp_path / "scarce")
    assert tried == [2500, *[1250] * FINETUNE.updates]
    assert (folder / "training.parquet").read_bytes() == (small / "training.parquet").read_bytes()
    new, old = weights(folder), weights(small)
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_the_artifact_is_the_adapter_that_was_trained(base: Path, tmp_path: Path) -> None:
    """Loaded by peft itself upon the base, it computes what the merged agent does, which the base does not."""
    folder = tuned(base, tmp_path / "run") / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "peft_version" not in config
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 8)
    merged, _ = load_causal_lm(folder, None, CPU)
    plain, _ = load_causal_lm(base, None, CPU)
    before = plain(input_ids=TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(plain, folder)(input_ids=TOKENS).logits
    ours = merged(input_ids=TOKENS).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_all_weights_are_trained_without_an_adapter(base: Path, tmp_path: Path) -> None:
    """And stored as those that they began from."""
    old, new = (
        load_file(base / "model.safetensors"),
        weights(tuned(base, tmp_path / "run", FINETUNE.model_copy(update={"lora": None}))),
    )
    assert old.keys() == new.keys()
    assert all(w.dtype == torch.bfloat16 for w in new.values())
    assert all(not torch.equal(old[name], new[name]) for name in old if "proj" in name)


def test_an_adapter_begins_as_nothing_and_is_all_that_learns() -> None:
    model = new_model(ARCHITECTURE, len(TOKENIZER), 1)
    with torch.no_grad():
        before = model.to(torch.bfloat16)(input_ids=TOKENS).logits.clone()
        adapted = add_adapter(model, LORA, 0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(adapted(input_ids=TOKENS).logits, before)
    trained = trained_weights(adapted.get_base_model())
    assert all("lora_" in name and w.dtype == torch.float32 for name, w in trained.items())
    shapes = [(w.shape[0] + w.shape[1]) for name, w in model.named_parameters() if "base_layer" in name]
    assert len(shapes) == 2 * 7, "every linear layer of a block, and not the head"
    assert sum(w.numel() for w in trained.values()) == sum(size * LORA.rank for size in shapes)


def test_it_learns(base: Path, tmp_path: Path) -> None:
    """The head and the embeddings of a random model are of no use, and still its adapter learns what comes often."""
    import polars as pl

    folder = tuned(base, tmp_path / "run", FINETUNE.model_copy(update={"updates": 40, "dagger_from": 40}))
    losses = pl.read_parquet(folder / "training.parquet")["loss"].drop_nulls()
    assert losses[-5:].mean() < losses[0] - 0.2


@torch.no_grad()
def test_a_merged_copy_acts_as_the_adapted_model_and_leaves_it_alone() -> None:
    model = add_adapter(new_model(ARCHITECTURE, len(TOKENIZER), 1), LORA, 0).get_base_model()
    for weight in trained_weights(model).values():
        weight.normal_(std=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = model(input_ids=TOKENS).logits
        merged = merged_copy(model)(input_ids=TOKENS).logits
        again = model(input_ids=TOKENS).logits
    assert torch.equal(adapted, again)
    scale = adapted.float().std()
    assert (merged - adapted).abs().mean() < 0.05 * scale, "but for bfloat16's rounding"


def test_a_target_that_fits_no_layer_is_refused_in_one_line() -> None:
    model: PreTrainedModel = new_model(ARCHITECTURE, len(TOKENIZER), 1)
    with pytest.raises(UserError, match=r"^agent.finetune.lora.targets: .*quark_proj[^\n]*$"):
        add_adapter(model, Lora(targets=("quark_proj",)), 0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_weights_that_two_layers_have_is_refused(target: str, tied: bool) -> None:
    """It would be merged into both, which is another model than the one that was trained."""
    model: PreTrainedModel = new_model(ARCHITECTURE, len(TOKENIZER), 1)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    lora = Lora(targets=("q_proj", target))
    if tied:
        with pytest.raises(UserError, match=r"^agent.finetune.lora.targets: the model's head is its embedding"):
            add_adapter(model, lora, 0)
    else:
        add_adapter(model, lora, 0)


def test_an_adapter_upon_an_adapter_is_refused_before_it_is_trained(base: Path, tmp_path: Path) -> None:
    first = tuned(base, tmp_path / "first") / "model"
    with pytest.raises(UserError, match=r"agent.finetune.lora: .*first/out/model is an adapter itself"):
        tuned(first, tmp_path / "second")
    assert (tuned(first, tmp_path / "third", FINETUNE.model_copy(update={"lora": None})) / "model").is_dir()


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        adapted = add_adapter(
            new_model(ARCHITECTURE, len(TOKENIZER), 1), Lora(targets=("q_proj", "k_proj", "v_proj")), 3
        )
        save_adapter(adapted, Pretrained(model="x/y", revision="0" * 40), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == "0" * 40
