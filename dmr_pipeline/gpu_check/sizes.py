"""How much a check measures: on a GPU, and with `--tiny` anywhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Qwen3 causal LM's sizes."""

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int
    tied: bool = True
    """The head shares the embedding's weights."""

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the linear layers, those of equal shape once."""
        attention = self.heads * self.head_width
        layers = {
            "q_proj": (self.width, attention),
            "k_proj, v_proj": (self.width, self.key_value_heads * self.head_width),
            "o_proj": (attention, self.width),
            "gate_proj, up_proj": (self.width, self.feed_forward),
            "down_proj": (self.feed_forward, self.width),
            "lm_head": (self.width, self.vocabulary),
        }
        by_shape: dict[tuple[int, int], str] = {}
        for name, shape in layers.items():
            by_shape[shape] = f"{by_shape[shape]}, {name}" if shape in by_shape else name
        return {name: shape for shape, name in by_shape.items()}


@dataclass(frozen=True)
class Sizes:
    seconds: float
    """That the whole check may take; what would take longer is left out, with that reason."""
    games: int
    """That the tiny agent plays on both devices, and at most at once in a batch."""
    compared_steps: int
    """Steps of an episode at most, where devices are compared and the router is trained."""
    timed_steps: int
    """Steps of an episode at most, where speed is measured."""
    batches: tuple[int, ...]
    """Episodes at once, where speed is measured."""
    copied_bytes: int
    """Of the copy that measures the memory's bandwidth."""
    rotated_bytes: int
    """Of weights that a kernel is timed over, so that they do not come from the cache."""
    shapes: tuple[Shape, ...]
    prompt_tokens: int
    new_tokens: int
    grpo_games: int
    """An update, and of its group."""


FULL = Sizes(
    seconds=340.0,
    games=64,
    compared_steps=15,
    timed_steps=5,
    batches=(1, 8, 64),
    copied_bytes=4 * 2**30,
    rotated_bytes=192 * 2**20,
    shapes=(
        Shape("Qwen3-1.7B", 28, 2048, 16, 8, 128, 6144, 151_936),
        Shape("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151_936),
    ),
    prompt_tokens=512,
    new_tokens=24,
    grpo_games=2,
)

TINY = Sizes(
    seconds=600.0,
    games=3,
    compared_steps=6,
    timed_steps=2,
    batches=(1, 2),
    copied_bytes=2**20,
    rotated_bytes=2**17,
    shapes=(Shape("two layers", 2, 128, 2, 1, 64, 256, 512),),
    prompt_tokens=16,
    new_tokens=4,
    grpo_games=2,
)
