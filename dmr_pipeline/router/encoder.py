"""The `encoder` router's weights: a Transformer encoder over the trajectory, from nothing.

It is the form that readers of the paper describe (two layers in its first version, no causal mask, a softmax over the
precisions); how much it reads, its positions and its sizes are our choices. Of a transcript that is longer than its window it
reads the beginning, which says what to do, and the end, half each. Nothing is kept from one decision to the next: what the last
tokens mean may depend on those after them, so that all of the window is read anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from dmr_pipeline.precision.pass_bytes import PassBytes
from dmr_pipeline.recipe.kl_router import Encoder


class EncoderConfig(PreTrainedConfig):
    model_type = "dmr-encoder"

    def __init__(
        self,
        vocab_size: int = 1,
        layers: int = 1,
        width: int = 1,
        heads: int = 1,
        feed_forward: int = 1,
        window: int = 2,
        rungs: int = 2,
        **rest: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.layers = layers
        self.width = width
        self.heads = heads
        self.feed_forward = feed_forward
        self.window = window
        """Tokens that are read at most."""
        self.rungs = rungs
        """That it chooses from."""
        super().__init__(**rest)


AutoConfig.register("dmr-encoder", EncoderConfig)  # AutoTokenizer looks at the config beside the tokenizer


class TrajectoryEncoder(PreTrainedModel):
    """Token ids -> embeddings, with those of their places from the end -> encoder -> logits of the routed rungs, at the last."""

    config_class = EncoderConfig
    generation_config = GenerationConfig()
    """trl asks every model for one, though nothing is generated here."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tokens = torch.nn.Embedding(config.vocab_size, config.width)
        self.places = torch.nn.Embedding(config.window, config.width)
        layer = torch.nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.feed_forward,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = torch.nn.LayerNorm(config.width)
        self.encoder = torch.nn.TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)
        self.head = torch.nn.Linear(config.width, config.rungs)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """`new_encoder` draws them."""

    def forward(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Windows as `window_of` cuts them -> float32 [windows, rungs]."""
        longest = max(map(len, windows))
        tokens = torch.zeros(len(windows), longest, dtype=torch.long)
        padding = torch.ones(len(windows), longest, dtype=torch.bool)
        for row, window in enumerate(windows):  # on the left, so that places from the end are columns
            tokens[row, longest - len(window) :] = torch.tensor(window)
            padding[row, longest - len(window) :] = False
        places = torch.arange(longest - 1, -1, -1, device=self.device)
        read = self.tokens(tokens.to(self.device)) + self.places(places)
        states: Tensor = self.encoder(read, src_key_padding_mask=padding.to(self.device))
        logits: Tensor = self.head(states[:, -1])
        return logits

    def window_of(self, tokens: Sequence[int]) -> list[int]:
        """What is read of a transcript."""
        size, half = self.config.window, self.config.window // 2
        return list(tokens) if len(tokens) <= size else [*tokens[:half], *tokens[half - size :]]


def new_encoder(section: Encoder, vocabulary: int, rungs: int, seed: int) -> TrajectoryEncoder:
    """An encoder that has learned nothing.

    Args:
        vocabulary: tokens, the routing tokens included.
    """
    sizes = section.model_dump()
    torch.manual_seed(seed)
    model = TrajectoryEncoder(EncoderConfig(vocabulary, rungs=rungs, **sizes))
    for name, weights in model.named_parameters():  # torch copies one layer's weights into all of them
        if name in ("tokens.weight", "places.weight"):
            torch.nn.init.normal_(weights, std=section.width**-0.5)
        elif weights.ndim > 1:
            torch.nn.init.xavier_uniform_(weights)
    return model


def encoder_pass_bytes(model: TrajectoryEncoder) -> PassBytes:
    """What a decision reads: all weights, and of the embeddings two rows a token of the window."""
    tables = [model.tokens.weight, model.places.weight]
    return PassBytes(
        weights=2 * (sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)),
        embedding_row=2 * 2 * model.config.width,
    )
