"""The `lm` router: a small causal LM over the transcript whose next token is a precision.

Its sequence is the agent's transcript with a routing token, `<low>` or `<high>`, between each segment and the action:

    segment <route> action segment <route> action ...

A routing position is the last token of a segment; the routing token after it is the precision that really acted. With z
the logit of `<high>` minus that of `<low>` there, P(high) = sigmoid(scale * z + offset). Routing by an LM's next token
is ours: the paper's router is a Transformer encoder.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import load_causal_lm, save_causal_lm
from dmr_pipeline.agent.rollout import CAPACITY, Decision, Peek, Run, Trajectory, seeded_generator
from dmr_pipeline.agent.streams import Streams
from dmr_pipeline.agent.train import new_model
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe import RouterModel

LOW, HIGH = "<low>", "<high>"
SETTINGS_FILE = "router.json"
ROUTER_CAPACITY = CAPACITY + CAPACITY // 2
"""Tokens that a router's sequence may have: one more a step than the transcript's, and a step has at least two."""


class RouterSettings(BaseModel):
    """What `router.json` holds beside the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lm"] = "lm"
    low_token: int
    high_token: int
    scale: float = 1.0
    offset: float = 0.0
    """With `scale`: calibration, class weights undone, or tempering."""
    threshold: float = Field(0.5, ge=0.0, le=1.0)
    """High precision acts where P(high) is at least this."""
    target_ratio: float | None = None
    """High-precision ratio that the threshold was calibrated to."""

    @property
    def tokens(self) -> list[int]:
        """The routing tokens, low first, so that an index is a precision."""
        return [self.low_token, self.high_token]

    def probability(self, logits: Tensor) -> Tensor:
        """P(high) [n] from the routing tokens' logits [n, 2], low first."""
        return torch.sigmoid(self.scale * (logits[:, 1] - logits[:, 0]) + self.offset)


@dataclass(frozen=True)
class Router:
    """A router's weights (float32) and settings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """The agent's, with the routing tokens."""
    settings: RouterSettings

    @property
    def parameters(self) -> int:
        return int(self.model.num_parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that the forward pass of one decision reads; tied weights count once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def new_router(
    section: RouterModel, agent_tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device
) -> Router:
    """A router that has not been trained yet, of random weights or from a pretrained LLM.

    Where the tokenizer has no routing tokens they are added, with random embeddings.

    Raises:
        UserError: the pretrained LLM cannot be loaded, or does not share the agent's vocabulary.
    """
    if section.architecture is not None:
        tokenizer = _with_routing_tokens(agent_tokenizer)
        model: PreTrainedModel = new_model(section.architecture, len(tokenizer), seed)
    else:
        assert section.pretrained is not None
        source = section.pretrained
        model, tokenizer = load_causal_lm(source.model, source.revision, torch.device("cpu"))
        if not _same_words(tokenizer, agent_tokenizer):
            raise UserError(
                f"kl_router.model.pretrained: {source.model!r} and the agent have different vocabularies, but the"
                " router reads the agent's tokens; choose a smaller model of the same family"
            )
        tokenizer = _with_routing_tokens(tokenizer)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    low, high = (tokenizer.convert_tokens_to_ids(token) for token in (LOW, HIGH))
    return Router(model.to(device), tokenizer, RouterSettings(low_token=low, high_token=high))


def save_router(router: Router, folder: Path) -> None:
    """Write config, float32 safetensors weights, tokenizer and router.json; equal routers give equal bytes."""
    save_causal_lm(router.model, router.tokenizer, folder, torch.float32)
    text = router.settings.model_dump_json(indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def load_router(folder: Path, device: torch.device) -> Router:
    """Read what `save_router` wrote; float32 on any device, in evaluation mode.

    Raises:
        UserError: a file is missing or malformed, or the weights are a pickle.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no router: it has no {SETTINGS_FILE}")
    try:
        settings = RouterSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {problems}; make the router anew") from error
    # Through the CPU, where weights are float32: a router is small, and its probabilities should be smooth.
    model, tokenizer = load_causal_lm(folder, None, torch.device("cpu"))
    return Router(model.to(device).eval(), tokenizer, settings)


@dataclass(frozen=True)
class RoutingSequence:
    """One episode as the router reads it."""

    tokens: list[int]
    """Up to the last routing token: what the last action was decides nothing."""
    positions: list[int]
    """Routing positions. The routing token of step t is `tokens[positions[t] + 1]`."""
    high: list[bool]
    """Precision that acted at each step."""


def routing_sequence(
    segments: Sequence[list[int]], actions: Sequence[list[int]], high: Sequence[bool], settings: RouterSettings
) -> RoutingSequence:
    """Interleave the segments, routing tokens and actions of one episode, each given a step."""
    tokens: list[int] = []
    positions = []
    for turn, (segment, taken) in enumerate(zip(segments, high, strict=True)):
        if turn:
            tokens += actions[turn - 1]
        tokens += segment
        positions.append(len(tokens) - 1)
        tokens.append(settings.tokens[taken])
    return RoutingSequence(tokens, positions, list(high))


def sequence_of_trajectory(trajectory: Trajectory, settings: RouterSettings) -> RoutingSequence:
    steps = trajectory.steps
    return routing_sequence([s.segment for s in steps], [s.action for s in steps], [s.high for s in steps], settings)


def sequences_of_steps(steps: pl.DataFrame, settings: RouterSettings) -> list[RoutingSequence]:
    """One for each episode of a table of steps (`trajectories.STEPS`), in the table's order."""
    episodes = steps.group_by("episode_id", maintain_order=True).agg("segment", "action", "high")
    columns = (episodes[name].to_list() for name in ("segment", "action", "high"))
    return [
        routing_sequence(segments, actions, high, settings) for segments, actions, high in zip(*columns, strict=True)
    ]


def routing_logits(model: PreTrainedModel, sequences: Sequence[RoutingSequence], settings: RouterSettings) -> Tensor:
    """Logits of the routing tokens, low first, at all routing positions: float32 [positions, 2], sequence by sequence.

    Padding is on the right and attention is causal: no mask is needed, and none keeps the fast attention path.
    """
    tokens = torch.zeros(len(sequences), max(len(s.tokens) for s in sequences), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
    rows = [row for row, sequence in enumerate(sequences) for _ in sequence.positions]
    columns = [position for sequence in sequences for position in sequence.positions]
    hidden = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state[rows, columns]
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits[:, settings.tokens].float()


@torch.no_grad()
def routing_margins(router: Router, sequences: Sequence[RoutingSequence], batch: int) -> list[list[float]]:
    """z, the logit of `<high>` minus that of `<low>`, at every step of each sequence; `batch` sequences at a time."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    margins: list[list[float]] = [[] for _ in sequences]
    router.model.eval()
    for first in range(0, len(order), batch):
        indices = order[first : first + batch]
        logits = routing_logits(router.model, [sequences[i] for i in indices], router.settings).double()
        steps = [len(sequences[i].high) for i in indices]
        for i, values in zip(indices, (logits[:, 1] - logits[:, 0]).split(steps), strict=True):
            margins[i] = values.tolist()
    return margins


class LmRouter:
    """The router as a `RoutingPolicy`: one cached forward pass a decision, over what is new since the last one.

    Args:
        slots: episodes at once, at least as many as the agents' streams have.
        sample: draw the precision, seeded by (seed, task, member, turn), instead of comparing with the threshold.
    """

    def __init__(self, router: Router, slots: int, sample: bool = False, seed: int = 0) -> None:
        self.router, self.sample, self.seed = router, sample, seed
        self._streams = Streams(router.model, slots, ROUTER_CAPACITY)
        self._runs: dict[int, Run] = {}
        self._turns: dict[int, int] = {}
        self._pending: dict[int, list[int]] = {}
        """Tokens that the stream of a slot has not read: the last step's routing token and action."""

    def begin(self, slot: int, run: Run) -> None:
        self._streams.reset([slot])
        self._runs[slot], self._turns[slot], self._pending[slot] = run, 0, []

    def decide(self, slots: Sequence[int], segments: Sequence[list[int]], peek: Peek) -> list[Decision]:
        settings = self.router.settings
        chunks = [self._pending[slot] + segment for slot, segment in zip(slots, segments, strict=True)]
        logits = self._streams.extend(slots, chunks)[:, settings.tokens]
        decisions = []
        for slot, probability in zip(slots, settings.probability(logits.double()).tolist(), strict=True):
            high = probability >= (self._draw(slot) if self.sample else settings.threshold)
            decisions.append(Decision(high, probability))
            self._pending[slot] = [settings.tokens[high]]
            self._turns[slot] += 1
        return decisions

    def acted(self, slot: int, action: list[int]) -> None:
        self._pending[slot] += action

    def _draw(self, slot: int) -> float:
        """In (0, 1], so that a probability of 0 is never taken."""
        task = self._runs[slot].task.task_id
        return 1.0 - seeded_generator("router", self.seed, task, self._runs[slot].member, self._turns[slot]).random()


def _with_routing_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that has both routing tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([token for token in (LOW, HIGH) if token not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def _same_words(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Same token ids, the routing tokens aside."""
    one, other = (
        {word: i for word, i in tokenizer.get_vocab().items() if word not in (LOW, HIGH)}
        for tokenizer in (first, second)
    )
    return one == other
