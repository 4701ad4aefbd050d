"""Both halves of a model together against its own forward pass."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from dmr_pipeline.agent.checkpoint import load_causal_lm
from dmr_pipeline.agent.logits import check_causal_lm, decoder_of, logits_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.router.model import RouterSettings, RoutingSequence, routing_logits
from dmr_pipeline.training.examples import IGNORED, Example
from dmr_pipeline.training.train import trained_logits
from tests.helpers.kinds import KINDS, VOCABULARY, model_of

CPU = torch.device("cpu")
TOKENS = [[3, 50, 17, 8, 29, 41, 5, 33], [7, 7, 60, 2]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
@torch.no_grad()
def test_logits_are_the_models_own(kind: str) -> None:
    model = model_of(kind)
    tokens = torch.tensor(TOKENS[:1])
    hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[0]
    assert torch.equal(logits_of(model, hidden), model(tokens, use_cache=False).logits[0])
    check_causal_lm(model)


@pytest.mark.parametrize("kind", ["qwen3", "granite", "cohere", "gemma2", "gemma3"])
@torch.no_grad()
def test_training_and_routing_see_the_models_own_logits(kind: str) -> None:
    model = model_of(kind)
    whole = [model(torch.tensor([tokens])).logits[0] for tokens in TOKENS]
    examples = [Example(tokens, [*tokens[1:], IGNORED], 1) for tokens in TOKENS]
    logits, targets = trained_logits(model, examples, CPU)
    assert targets.tolist() == TOKENS[0][1:] + TOKENS[1][1:]
    torch.testing.assert_close(logits, torch.cat([rows[:-1] for rows in whole]), atol=1e-4, rtol=1e-4)
    sequences = [RoutingSequence(tokens, [1, len(tokens) - 1], [1, 0]) for tokens in TOKENS]
    routed = routing_logits(model, sequences, RouterSettings(tokens={"float": 5, "int2": 4}))
    expected = torch.cat([rows[[1, -1]][:, [4, 5]] for rows in whole])
    torch.testing.assert_close(routed, expected, atol=1e-4, rtol=1e-4)


def test_gradients_go_through_both_halves() -> None:
    model = model_of("gemma3")
    examples = [Example(tokens, [*tokens[1:], IGNORED], 1) for tokens in TOKENS]
    logits, targets = trained_logits(model, examples, CPU)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for tokens in TOKENS:
        own = model(torch.tensor([tokens])).logits[0, :-1]
        torch.nn.functional.cross_entropy(own, torch.tensor(tokens[1:]), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-3, rtol=1e-3)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model type 'bert' cannot act .* depend on later tokens[^\n]*$"):
        check_causal_lm(model_of("bert"))


def test_numbers_that_are_none_are_named_as_such() -> None:
    model = model_of("qwen3")
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(UserError, match=r"^model type 'qwen3' .* not finite in float32"):
        check_causal_lm(model)


def test_logits_that_need_more_than_hidden_states_are_refused() -> None:
    model = model_of("qwen3")
    head = model.lm_head.forward
    calls = iter(range(1, 100))
    model.lm_head.forward = lambda hidden: head(hidden) * (2 if next(calls) % 3 == 0 else 1)
    with pytest.raises(UserError, match=r"^model type 'qwen3' .* not made of its decoder's last hidden states alone"):
        check_causal_lm(model)


def test_a_model_that_cannot_be_called_is_refused() -> None:
    model = model_of("gpt2")
    model.config.n_positions, model.transformer.wpe = 4, torch.nn.Embedding(4, 32)
    with pytest.raises(UserError, match=r"^model type 'gpt2' .* fails \(IndexError[^\n]*$"):
        check_causal_lm(model)


def test_an_encoder_decoder_is_refused_on_loading(tmp_path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is no causal LM with a head"):
        load_causal_lm(tmp_path, None, CPU)
