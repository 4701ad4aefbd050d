"""The other way to act: transformers' `generate`, called at each step with the whole transcript, one episode at a time."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


class Generate:
    """Writes greedy actions after a transcript that grows.

    Args:
        ends: tokens that end an action; without any, an action has `longest` tokens.
        longest: tokens that an action may have.
        keep_cache: hand the keys and values of one step to the next, so that only what is new is read; without, `generate`
            reads the whole transcript at each step.
    """

    def __init__(self, model: PreTrainedModel, ends: Sequence[int], longest: int, *, keep_cache: bool) -> None:
        self.model, self.longest, self.keep_cache = model, longest, keep_cache
        self.ends = list(ends) or None
        self.begin()

    def begin(self) -> None:
        """Another transcript."""
        self.cache = DynamicCache(config=self.model.config) if self.keep_cache else None

    @torch.no_grad()
    def action(self, transcript: Sequence[int]) -> list[int]:
        """Tokens of the action, the end included.

        Args:
            transcript: token ids; it begins with what was given at the step before and what was written there.
        """
        prompt = torch.tensor([transcript], device=self.model.device)
        written = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            do_sample=False,
            max_new_tokens=self.longest,
            eos_token_id=self.ends,
            pad_token_id=0,
        )
        return list(written[0, len(transcript) :].tolist())
