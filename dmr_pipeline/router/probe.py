"""The `probe` router's weights: a head on the hidden states of the cheapest routed agent.

The agent has read the transcript anyway, and knows what it is about to do: a decision costs one of its forward passes where
another precision then acts, and next to nothing where it goes on itself. This form is ours: the paper's router
is an encoder of its own.
"""

from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Probe

_TURN_FEATURES = 2
_LONGEST = 50
"""Turns that are told apart."""


class ProbeConfig(PreTrainedConfig):
    model_type = "dmr-probe"

    def __init__(
        self, layers: list[int] | None = None, state_width: int = 1, hidden: int = 1, rungs: int = 2, **rest: object
    ) -> None:
        self.layers = layers or [1]
        """Of the agent, from 1."""
        self.state_width = state_width
        """Numbers in the states of all these layers."""
        self.hidden = hidden
        self.rungs = rungs
        """That it chooses from."""
        super().__init__(**rest)


AutoConfig.register("dmr-probe", ProbeConfig)  # AutoTokenizer looks at the config beside the tokenizer


class ProbeHead(PreTrainedModel):
    """Standardised features -> one hidden layer -> logits of the routed rungs, cheapest first."""

    config_class = ProbeConfig
    generation_config = GenerationConfig()
    """trl asks every model for one, though nothing is generated here."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        width = config.state_width + _TURN_FEATURES
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.inner = torch.nn.Linear(width, config.hidden)
        self.outer = torch.nn.Linear(config.hidden, config.rungs)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Linear layers keep torch's own initialisation."""

    def forward(self, features: Tensor) -> Tensor:
        """float32 [n, features] -> float32 [n, rungs]."""
        standard = (features - self.mean) / self.deviation
        return cast(Tensor, self.outer(torch.nn.functional.gelu(self.inner(standard))))

    def standardize(self, features: Tensor) -> None:
        """Make these features' means 0 and deviations 1."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0) + 1e-3)


def new_probe(section: Probe, rungs: int, agent: PreTrainedModel, seed: int) -> ProbeHead:
    """A head that has learned nothing.

    Raises:
        UserError: the agent has fewer layers.
    """
    if max(section.layers) > agent.config.num_hidden_layers:
        raise UserError(
            f"kl_router.model.probe.layers: {list(section.layers)}, but the agent has {agent.config.num_hidden_layers}"
        )
    torch.manual_seed(seed)
    width = len(section.layers) * agent.config.hidden_size
    return ProbeHead(ProbeConfig(layers=list(section.layers), state_width=width, hidden=section.hidden, rungs=rungs))


def probe_features(states: Tensor, turns: Tensor) -> Tensor:
    """States [n, state width], and the turn (from 0) in two scales, since little in the transcript tells it."""
    turn = turns.to(states).clamp(max=_LONGEST)
    return torch.cat([states, turn[:, None] / 10, turn.log1p()[:, None]], dim=1)
