"""The append-only transcript: what the agent has read and done, as token ids.

Every segment is tokenized by itself and appended, so that nothing before it ever changes and caches stay valid. (The sliding
window of verl-agent's prompt would defeat them.)
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dmr_pipeline.environments.base import SEPARATOR
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import PageView, Prompt


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
        return self._encode(self.prompt.opening.format(observation=self._shown(observation, task), task=task))

    def turn(self, observation: str, task: str) -> list[int]:
        return self._encode(self.prompt.turn.format(observation=self._shown(observation, task), task=task))

    def action(self, command: str, thought: str = "") -> list[int]:
        """Tokens of a command, the end included; after a thought, for agents that think."""
        return [*self.thought(thought), *self._encode(command), self.end_token]

    def thought(self, text: str) -> list[int]:
        """Tokens of a thought, its end included; none for agents that do not think."""
        return [] if self.thought_token is None else [*self._encode(text), self.thought_token]

    def command(self, action: list[int]) -> str:
        """The command in generated tokens: after the thought, up to the first end."""
        if self.end_token in action:
            action = action[: action.index(self.end_token)]
        if self.thought_token is not None and self.thought_token in action:
            action = action[action.index(self.thought_token) + 1 :]
        return str(self.tokenizer.decode(action, skip_special_tokens=True)).strip()

    def _shown(self, observation: str, task: str) -> str:
        return observation if self.prompt.page is None else shown(observation, task, self.prompt.page)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def shown(observation: str, task: str, page: PageView) -> str:
    """The truncation policy: what an agent reads of an observation.

    Hidden segments of the page are left out, the others cut to their first words, and of these the first ones stay, up to the
    limit for the whole observation. Nothing marks where text was cut; a segment without a word left goes with its separator.
    """
    hidden = {segment.replace("{task}", task) for segment in page.hide}
    left = page.observation_words
    kept = []
    for segment in observation.split(SEPARATOR):
        if not segment or segment in hidden:
            continue
        # Split at blanks alone, so that what is not cut stays as it is.
        words = segment.split(" ")[: page.segment_words][:left]
        if left is not None:
            left -= len(words)
        if words:
            kept.append(" ".join(words))
    return SEPARATOR.join(kept)


def truncation_policy(page: PageView | None) -> str:
    """What `shown` does, in a line for reports."""
    if page is None:
        return "observations are shown in full"
    limits = [f"{page.segment_words} words a segment"] if page.segment_words else []
    limits += [f"{page.observation_words} words in all"] if page.observation_words else []
    policy = f"observations are cut to {' and '.join(limits)}" if limits else "observations are not cut"
    return policy + (f"; hidden: {', '.join(map(repr, page.hide))}" if page.hide else "")
