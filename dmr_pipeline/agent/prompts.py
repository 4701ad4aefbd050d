"""The append-only transcript: what the agent has read and done, as token ids.

Every segment is tokenized by itself and appended, so that nothing before it ever changes and caches stay valid. (The sliding
window of verl-agent's prompt would defeat them.)
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import Prompt


@dataclass(frozen=True)
class Prompter:
    """Turns observations into segments, and generated tokens into commands."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    end_token: int
    """Ends an action."""
    thought_token: int | None = None
    """Ends the thought before a command, for agents that think."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> "Prompter":
        """
        Raises:
            UserError: the end of an action or of a thought is not a single token of this tokenizer.
        """

        def single(field: str, text: str) -> int:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                raise UserError(f"agent.prompt.{field}: {text!r} is not a single token of this tokenizer ({tokens})")
            return int(tokens[0])

        thought = None if prompt.thought_end is None else single("thought_end", prompt.thought_end)
        return cls(tokenizer, prompt, single("action_end", prompt.action_end), thought)

    def opening(self, observation: str, task: str) -> list[int]:
        return self._encode(self.prompt.opening.format(observation=observation, task=task))

    def turn(self, observation: str, task: str) -> list[int]:
        return self._encode(self.prompt.turn.format(observation=observation, task=task))

    def action(self, command: str, thought: str = "") -> list[int]:
        """Tokens of a command, the end included; after a thought, for agents that think."""
        thinking = [] if self.thought_token is None else [*self._encode(thought), self.thought_token]
        return [*thinking, *self._encode(command), self.end_token]

    def command(self, action: list[int]) -> str:
        """The command in generated tokens: after the thought, up to the first end."""
        if self.end_token in action:
            action = action[: action.index(self.end_token)]
        if self.thought_token is not None and self.thought_token in action:
            action = action[action.index(self.thought_token) + 1 :]
        return str(self.tokenizer.decode(action, skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
