"""What LLMs and routers are made from, in recipes."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from dmr_pipeline.recipe.fields import Section, Size, Text


class Architecture(Section):
    """A Qwen3-architecture causal LM, made from nothing."""

    layers: Size = Field(description="decoder layers")
    width: Size = Field(description="hidden size; decides quanto's group size (see precision/quantization.py)")
    heads: Size = Field(description="attention heads")
    key_value_heads: Size = Field(description="heads of keys and values, each shared by as many attention heads")
    head_width: Size = Field(description="even: rotary positions turn its numbers in pairs")
    feed_forward: Size = Field(description="intermediate size")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.heads % self.key_value_heads:
            yield "key_value_heads", f"{self.key_value_heads} does not divide the {self.heads} heads, which share them"
        if self.head_width % 2:
            yield "head_width", f"{self.head_width} is odd, but rotary positions turn its numbers in pairs"
        attention = 2 * self.width * self.head_width * (self.heads + self.key_value_heads)
        parameters = self.layers * (attention + 3 * self.width * self.feed_forward)
        if parameters > 10**10:
            yield "", f"{parameters:,} weights, in float32, are no model that is trained here: bring one along"

    def linear_layers(self) -> list[str]:
        """Names of the linear layers of the model that is made of it."""
        parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        return ["lm_head", *(f"model.layers.{layer}.{part}" for layer in range(self.layers) for part in parts)]


class Pretrained(Section):
    """An LLM that exists: one that is known by name, a checkpoint folder, that of an adapter, or a hub id with a pinned
    revision."""

    model: Text = Field(
        description="a name that `dmr models list` knows, such as smollm2-135m; a folder with config, tokenizer and safetensors"
        " weights; or a hub id such as Qwen/Qwen3-1.7B"
    )
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(
        None,
        description="full commit hash; required for a hub id, also for one that is the base of an adapter's folder",
    )


LINEAR_LAYERS = "all-linear"
"""peft's name of all linear layers but the head."""


class Lora(Section):
    """A low-rank adapter (Hu et al., 2021): W becomes W + (alpha / rank) B A at each layer, and B and A are trained."""

    rank: Size = Field(8, description="rows of A, columns of B")
    alpha: Size = Field(16, description="what the adapter is scaled by, times 1 / rank")
    targets: tuple[Text, ...] = Field(
        (LINEAR_LAYERS,),
        min_length=1,
        max_length=100,
        description="ends of the names of the layers that are adapted, such as q_proj; all-linear: all but the head",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if LINEAR_LAYERS in self.targets and len(self.targets) > 1:
            yield "targets", f"{LINEAR_LAYERS} has all layers in it: name it alone, or leave it out"

    @property
    def target_modules(self) -> str | list[str]:
        """As peft wants them."""
        return LINEAR_LAYERS if self.targets == (LINEAR_LAYERS,) else list(self.targets)
