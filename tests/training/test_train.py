"""Training the agent: it learns, and a killed training ends as an unbroken one does."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dmr_pipeline.artifacts.stage import StageContext
from dmr_pipeline.environments.alfworld.benchmark import GeneratedAlfWorld, GeneratedGames
from dmr_pipeline.environments.alfworld.generator import generate_game
from dmr_pipeline.environments.alfworld.words import alfworld_texts
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.agent import Prompt, Training
from dmr_pipeline.recipe.benchmark import Splits
from dmr_pipeline.recipe.model import Architecture
from dmr_pipeline.recipe.reading import load_recipe
from dmr_pipeline.recipe.runtime import Runtime
from dmr_pipeline.rollout.prompts import Prompter
from dmr_pipeline.stages import agent as stage
from dmr_pipeline.training import train as module
from dmr_pipeline.training.examples import IGNORED, Example
from dmr_pipeline.training.train import learn, make_optimizers, new_model, schedule, train
from dmr_pipeline.training.vocabulary import word_tokenizer

PROMPTER = Prompter.of(word_tokenizer(alfworld_texts()), Prompt())
GAMES = [generate_game(seed)[0] for seed in range(12)]
BENCHMARK = GeneratedAlfWorld(step_limit=50, splits=Splits(agent_train=1, router_train=1, validation=1, test=1))
TRAINING = Training(
    architecture=Architecture(layers=2, width=32, heads=2, key_value_heads=1, head_width=16, feed_forward=32),
    updates=6,
    episodes_per_update=2,
    learning_rate=0.004,
    warmup_updates=2,
    looks_per_update=0,
    looks_alone_until=0,
    short_until=2,
    short_steps=20,
    dagger_from=4,
    dagger_every=2,
    dagger_episodes=2,
    dagger_steps=4,
    dagger_tokens=100,
    mistake_rate=0.1,
)
CPU = torch.device("cpu")


def run(scratch: Path, training: Training = TRAINING) -> tuple[PreTrainedModel, list[float]]:
    model = new_model(training.architecture, len(PROMPTER.tokenizer), training.seed)
    optimizers = make_optimizers(model, training)
    log = train(model, optimizers, GAMES, PROMPTER, training, BENCHMARK, Runtime(batch_episodes=2), CPU, scratch)
    return model, log["loss"].drop_nulls().to_list()


@pytest.mark.parametrize("state", ["whole", "empty", "cut"])
@pytest.mark.parametrize("killed_before", [3, 5])
def test_a_killed_training_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: int, state: str
) -> None:
    """Where its resume state is damaged too, it starts anew."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, losses = run(tmp_path / "whole")

    def killed(update: int, training: Training) -> float:
        if update == killed_before:
            raise KeyboardInterrupt
        return schedule(update, training)

    with monkeypatch.context() as patch:
        patch.setattr(module, "schedule", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken")
    saved = tmp_path / "broken" / "training.pt"
    if state != "whole":
        saved.write_bytes(saved.read_bytes()[: 0 if state == "empty" else 1000])
    resumed, resumed_losses = run(tmp_path / "broken")
    assert resumed_losses == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_it_learns(tmp_path: Path) -> None:
    _, losses = run(tmp_path, TRAINING.model_copy(update={"updates": 60, "dagger_from": 50, "dagger_every": 50}))
    assert losses[0] > 4.5
    assert sum(losses[-5:]) / 5 < 2.5


def test_the_gradient_is_that_of_the_mean_over_trained_positions() -> None:
    """In pieces of similar length or in one padded batch, with the pad tokens' targets left out."""
    model = new_model(TRAINING.architecture, 50, seed=0)
    examples = [
        Example(tokens=list(range(1, n)), targets=[IGNORED] + [(3 * i) % 50 for i in range(n - 2)], steps=1)
        for n in (4, 9, 5, 13, 7, 6)
    ]
    model.zero_grad()
    loss, _ = learn(model, examples, CPU)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    total, count = torch.tensor(0.0), 0
    for example in examples:
        logits = model(torch.tensor([example.tokens])).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[1:], torch.tensor(example.targets[1:]), reduction="sum"
        )
        count += len(example.targets) - 1
    (total / count).backward()
    assert loss == pytest.approx(float((total / count).detach()), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


def test_muon_takes_the_layers_matrices_and_nothing_else() -> None:
    model = new_model(TRAINING.architecture, 50, seed=0)
    muon, adamw = make_optimizers(model, TRAINING)
    matrices = muon.param_groups[0]["params"]
    assert len(matrices) == 2 * 7
    assert all(p.ndim == 2 and p.shape[0] != 50 for p in matrices)
    taken = len(matrices) + len(adamw.param_groups[0]["params"])
    assert taken == len(list(model.parameters()))


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    training = TRAINING.model_copy(update={"updates": 100, "warmup_updates": 10})
    factors = [schedule(update, training) for update in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:70] == [1.0] * 60
    assert factors[85] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.05


def test_a_training_that_does_not_fit_a_gpu_names_its_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    recipe = load_recipe("alfworld-tiny", Path(__file__).parents[2] / "recipes")
    monkeypatch.setattr(GeneratedGames, "read_tasks", lambda *_: [])
    monkeypatch.setattr(stage, "train", out_of_memory)
    with pytest.raises(UserError, match=r"make agent\.training\.architecture smaller"):
        stage.agent(StageContext(recipe, {"benchmark_tasks": tmp_path}, tmp_path, tmp_path))


def test_games_that_are_never_short_end_the_training_in_one_line(tmp_path: Path) -> None:
    """Every expert episode is too long, so a batch of short ones would be looked for for ever."""
    with pytest.raises(UserError, match=r"short_steps: next to none of 400 expert episodes took 2 steps or fewer"):
        run(tmp_path, TRAINING.model_copy(update={"short_steps": 2}))
