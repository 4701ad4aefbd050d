"""The `probe` router's weights: a head on the hidden states of the cheapest routed agent.

The agent has read the transcript anyway, and knows what it is about to do: a decision costs one of its forward passes where
another precision then acts, and next to nothing where it goes on itself. This form is ours: the paper's router
is an encoder of its own.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.kl_router import Feature, Probe
from dmr_pipeline.router.features import width_of

_TURN_FEATURES = 2
_ALIKE = 1e-3
"""Added to distances, in deviations: a step that has been met just so does not outvote all others."""
_LONGEST = 50
"""Turns that are told apart."""


class ProbeConfig(PreTrainedConfig):
    model_type = "dmr-probe"
    features: Sequence[Feature] = ()
    """Numbers beside the states and the turn, in their order (features.py). Of this and the next four nothing is written where
    they are as here."""
    activation: str = "gelu"
    """`none`: without one, so that the head is a product of two matrices."""
    neighbours: int = 0
    """That vote, where nothing is trained (`NeighboursHead`)."""
    stored: int = 0
    """Steps that are remembered."""
    classes: bool = False
    """Whether they vote for classes, or with effects."""

    def __init__(
        self,
        layers: list[int] | None = None,
        state_width: int = 1,
        hidden: int = 1,
        rungs: int = 2,
        features: list[Feature] | None = None,
        activation: str = "gelu",
        neighbours: int = 0,
        stored: int = 0,
        classes: bool = False,
        **rest: object,
    ) -> None:
        self.layers = [1] if layers is None else layers
        """Of the agent, from 1."""
        if features:
            self.features = features
        if activation != "gelu":
            self.activation = activation
        if neighbours:
            self.neighbours, self.stored, self.classes = neighbours, stored, classes
        self.state_width = state_width
        """Numbers in the states of all these layers."""
        self.hidden = hidden
        self.rungs = rungs
        """That it chooses from."""
        super().__init__(**rest)


AutoConfig.register("dmr-probe", ProbeConfig)  # AutoTokenizer looks at the config beside the tokenizer


class ProbeHead(PreTrainedModel):
    """Standardised features -> one hidden layer, or none -> logits of the routed rungs, cheapest first."""

    config_class = ProbeConfig
    generation_config = GenerationConfig()
    """trl asks every model for one, though nothing is generated here."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        width = config.state_width + _TURN_FEATURES + width_of(config.features, config.rungs)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self._make(config, width)
        self.post_init()

    def _make(self, config: ProbeConfig, width: int) -> None:
        self.inner = torch.nn.Linear(width, config.hidden) if config.hidden else None
        self.outer = torch.nn.Linear(config.hidden or width, config.rungs)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Linear layers keep torch's own initialisation."""

    def forward(self, features: Tensor) -> Tensor:
        """float32 [n, features] -> float32 [n, rungs]."""
        inner = self.standard(features)
        if self.inner is not None:
            inner = self.inner(inner)
            inner = torch.nn.functional.gelu(inner) if self.config.activation == "gelu" else inner
        return cast(Tensor, self.outer(inner))

    def standard(self, features: Tensor) -> Tensor:
        standard: Tensor = (features - self.mean) / self.deviation
        return standard

    def standardize(self, features: Tensor) -> None:
        """Make these features' means 0 and deviations 1."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0) + 1e-3)


class NeighboursHead(ProbeHead):
    """Nothing is trained: the remembered steps that are nearest vote (neighbours.py)."""

    def _make(self, config: ProbeConfig, width: int) -> None:
        for name, columns in (("points", width), ("values", config.rungs), ("weights", config.rungs)):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(config.stored, columns), requires_grad=False))

    def forward(self, features: Tensor) -> Tensor:
        config = self.config
        points = cast(Tensor, self.points)
        # By differences: the product of matrices that is quicker is off by too much for steps that are alike.
        apart = torch.cdist(self.standard(features), points, compute_mode="donot_use_mm_for_euclid_dist")
        distance, nearest = apart.topk(min(config.neighbours, len(points)), dim=1, largest=False)
        votes = (1 / (distance + _ALIKE))[:, :, None] * self.weights[nearest]  # [n, neighbours, rungs]
        means: Tensor = (votes * self.values[nearest]).sum(1) / votes.sum(1).clamp(min=1e-12)
        if not config.classes:
            return means
        return ((means + 1 / (config.neighbours * config.rungs)) / (1 + 1 / config.neighbours)).log()


def new_probe(section: Probe, rungs: int, agent: PreTrainedModel, seed: int) -> ProbeHead:
    """A head that has learned nothing.

    Raises:
        UserError: the agent has fewer layers.
    """
    text = agent.config.get_text_config()  # of some LLMs that see, too, it lies in another one
    if max(section.layers, default=0) > text.num_hidden_layers:
        raise UserError(
            f"kl_router.model.probe.layers: {list(section.layers)}, but the agent has {text.num_hidden_layers}"
        )
    torch.manual_seed(seed)
    width = len(section.layers) * text.hidden_size
    config = ProbeConfig(
        list(section.layers),
        width,
        section.hidden,
        rungs,
        list(section.features),
        section.activation,
        section.neighbours or 0,
    )
    return head_of(config)(config)


def head_of(config: ProbeConfig) -> type[ProbeHead]:
    return NeighboursHead if config.neighbours else ProbeHead


def probe_features(states: Tensor, turns: Tensor) -> Tensor:
    """States [n, state width], and the turn (from 0) in two scales, since little in the transcript tells it."""
    turn = turns.to(states).clamp(max=_LONGEST)
    return torch.cat([states, turn[:, None] / 10, turn.log1p()[:, None]], dim=1)
