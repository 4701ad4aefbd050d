"""A causal LM in two halves: its decoder, which makes hidden states, and what makes logits of them.

The second half differs from model to model: a head alone (Llama, Qwen), logits that are scaled (Granite, Cohere) or capped
(Gemma), a head on transformed states (BERT). Here it is the model's own forward pass, run with its decoder's output given,
so that nothing of it is written down a second time.
"""

from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dmr_pipeline.errors import UserError

_TRIED = 12
"""Tokens of a text that a model is tried on."""
TEXTS = 8
"""On which it is tried, until one of them comes out right. In bfloat16 a model of thirty layers rounds apart, on a text that
means nothing to it, by nearly as much as a wrong mask makes it differ: but a wrong mask does so on all."""
MODEL_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise when they are called in a way that they do not know."""


@dataclass
class _Given(ModelOutput):
    """Hidden states, and None for whatever else a causal LM may look for in its decoder's output."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        return None


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The half that makes hidden states [rows, tokens, width] of tokens [rows, tokens]: `last_hidden_state` of its output."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """float32 logits [n, vocabulary] of a causal LM from its decoder's last hidden states [n, width]."""
    given = _Given(last_hidden_state=hidden[None])
    with patch.object(decoder_of(model), "forward", lambda *_, **__: given):
        logits: Tensor = model(inputs_embeds=hidden[None], use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def check_causal_lm(model: PreTrainedModel) -> None:
    """Try the model on a few tokens: both halves together give its own logits, and no token looks at a later one.

    Args:
        model: float, in evaluation mode.

    Raises:
        UserError: it is not such a model; the message says what differs.
    """
    looks_back, in_halves = False, False
    for text in range(TEXTS):
        tokens = some_tokens(model, _TRIED, text)
        try:
            whole = model(input_ids=tokens, use_cache=False).logits[0].float()
            begun = model(input_ids=tokens[:, : _TRIED // 2], use_cache=False).logits[0].float()
            halves = logits_of(model, decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[0])
        except torch.OutOfMemoryError:
            raise
        except MODEL_ERRORS as error:
            reason = (
                f"a forward pass over {_TRIED} tokens fails ({type(error).__name__}: {' '.join(str(error).split())})"
            )
            raise UserError(_refusal(model, reason)) from error
        if not whole.isfinite().all():
            raise UserError(_refusal(model, f"its logits are not finite in {str(model.dtype).removeprefix('torch.')}"))
        looks_back = looks_back or alike(begun, whole[: len(begun)], model.dtype)
        in_halves = in_halves or alike(halves, whole, model.dtype)
        if looks_back and in_halves:
            return
    if not looks_back:
        raise UserError(_refusal(model, "its logits depend on later tokens, as those of an encoder do"))
    raise UserError(_refusal(model, "its logits are not made of its decoder's last hidden states alone"))


def some_tokens(model: PreTrainedModel, count: int, text: int = 0) -> Tensor:
    """Token ids [1, count] that look random, the same at every call with this number, on the model's device."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(text)
    return torch.randint(vocabulary, (1, count), generator=generator).to(model.device)


def alike(logits: Tensor, others: Tensor, dtype: torch.dtype, slack: float = 1.0) -> bool:
    """Whether two float32 logits of one shape differ by no more than computing in `dtype` makes them differ; in float32
    `slack` times as much."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return float((logits - others).abs().max()) <= min(slack * tolerance, 5e-2) * float(others.abs().max())


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return f"model type {model.config.model_type!r} cannot act as an agent or a router: {reason}; choose another model"
