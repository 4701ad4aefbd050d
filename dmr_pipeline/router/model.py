"""Routers: logits of the routed precisions at each step of a transcript.

There are three kinds. `lm` is a small causal LM over the transcript whose next token is a precision; `encoder` a Transformer
encoder over it (encoder.py); `probe` a head on the hidden states of the cheapest routed agent, on numbers that cost nothing
(features.py), or on both. All are given the agent's transcript with a routing token, one a routed rung, between each segment and
the action (which a probe's agent does not read):

    segment <precision:...> action segment <precision:...> action ...

A routing position is the last token of a segment; the routing token after it is the precision that really acted. Logits there
are in the order of the rungs from the cheapest up, so that an index counts the steps up from it. With the margin z of a rung,
its logit minus the cheapest's, its score is scale * z + offset (0 for the cheapest), and the probabilities are the softmax of
the scores. A threshold t takes the dearest rung that, together with all dearer ones, has a probability of at least t: of two
rungs, the dearer one where its probability is at least t. So one number goes through all budgets, from the dearest rung alone
(0) to the cheapest (above every sum), and at 0.5 it takes the median of the distribution along the ladder. The rule is ours, and
so are the other kinds: the paper's router is a Transformer encoder that chooses between two.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dmr_pipeline.agent.checkpoint import load_causal_lm, load_tokenizer, save_causal_lm
from dmr_pipeline.agent.formats import refuse_pickles
from dmr_pipeline.agent.logits import decoder_of, logits_of
from dmr_pipeline.agent.memory import in_pieces
from dmr_pipeline.errors import UserError, problems_of
from dmr_pipeline.frozen_model import FrozenModel
from dmr_pipeline.precision.pass_bytes import PassBytes, pass_bytes
from dmr_pipeline.precision.quantization import stored_bytes
from dmr_pipeline.recipe.kl_router import RouterModel
from dmr_pipeline.rollout.kv_cache.choice import positions_of, shared_streams
from dmr_pipeline.rollout.parallel import gather, in_processes, scatter
from dmr_pipeline.rollout.trajectory import Trajectory
from dmr_pipeline.router.budgets import Bar
from dmr_pipeline.router.encoder import TrajectoryEncoder, encoder_pass_bytes, new_encoder
from dmr_pipeline.router.features import numbers_of_steps
from dmr_pipeline.router.probe import ProbeConfig, ProbeHead, head_of, new_probe, probe_features
from dmr_pipeline.training.train import new_model

T = TypeVar("T")

SETTINGS_FILE = "router.json"
_MOST_STATES = 2**31
"""Bytes of hidden states that are held at once in each process: a pass tells those of all layers."""


class RouterSettings(FrozenModel):
    """What `router.json` holds beside the weights."""

    kind: Literal["lm", "probe", "encoder"] = "lm"
    tokens: dict[str, int] = Field(min_length=2)
    """Routed rung -> its routing token, dearest first."""
    scale: float = 1.0
    offsets: dict[str, float] = Field(default_factory=dict)
    """Rung -> offset of its score, 0 where it is not named; with `scale`: calibration, class weights undone, or tempering."""
    threshold: float = Field(0.5, ge=0.0, le=1.0)
    """See above."""
    target_ratio: float | None = None
    """Spend (see `ActingModels.spend`) that the threshold was calibrated to."""
    decides: Literal["before", "after"] = Field("before", exclude_if=lambda decides: decides == "before")
    """Whether the rung that is chosen writes the action, or checks the cheapest one's draft (see policies.py)."""
    force_search: bool = False
    """The dearest precision acts at search steps, whatever the router says (see search_steps.py)."""
    ties: float = Field(1.0, ge=0.0, le=1.0, exclude_if=lambda ties: ties == 1)
    """This and the next two as in `budgets.Bar`; routers that are trained here have none of them."""
    sample: bool = Field(False, exclude_if=lambda sample: not sample)
    strict: float | None = Field(None, gt=0.0, le=1.0, exclude_if=lambda strict: strict is None)

    @property
    def route(self) -> tuple[str, ...]:
        """The rungs, dearest first."""
        return tuple(self.tokens)

    @property
    def bar(self) -> Bar:
        return Bar(self.threshold, self.ties, self.sample, self.strict)

    @property
    def columns(self) -> list[int]:
        """The routing tokens in the order of logits: cheapest first."""
        return list(self.tokens.values())[::-1]

    @property
    def upper(self) -> tuple[str, ...]:
        """The rungs in the order of logits, without the cheapest."""
        return self.route[-2::-1]

    @property
    def shifts(self) -> list[float]:
        """Offsets of the `upper` rungs."""
        return [self.offsets.get(rung, 0.0) for rung in self.upper]

    def named(self, shifts: Sequence[float]) -> dict[str, float]:
        """`offsets` from those of the `upper` rungs."""
        return dict(zip(self.upper, shifts, strict=True))

    def scores(self, logits: Tensor) -> Tensor:
        """[n, rungs] from logits [n, rungs], both cheapest first."""
        margins = logits[:, 1:] - logits[:, :1]
        scores = self.scale * margins + torch.tensor(self.shifts, dtype=logits.dtype, device=logits.device)
        return torch.cat([torch.zeros_like(logits[:, :1]), scores], dim=1)

    def exceedance(self, logits: Tensor) -> Tensor:
        """`Decision.exceedance` [n, rungs - 1], dearest first, from logits [n, rungs], cheapest first."""
        scores = self.scores(logits)
        above = [
            torch.sigmoid(scores[:, k:].logsumexp(1) - scores[:, :k].logsumexp(1)) for k in range(1, scores.shape[1])
        ]
        return torch.stack(above[::-1], dim=1)

    def choose(self, exceedance: Sequence[float], bar: float) -> str:
        """The dearest rung whose exceedance is at least `bar`, else the cheapest."""
        return next((rung for rung, level in zip(self.route, exceedance, strict=False) if level >= bar), self.route[-1])


def log_probabilities(scores: Tensor) -> Tensor:
    """Of the softmax of scores [n, rungs]; each against the rest, so that of two they are log-sigmoids."""
    rest = [torch.cat([scores[:, :k], scores[:, k + 1 :]], dim=1).logsumexp(1) for k in range(scores.shape[1])]
    return torch.nn.functional.logsigmoid(scores - torch.stack(rest, dim=1))


@dataclass(frozen=True)
class Router:
    """A router's weights (float32) and settings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """The agent's, with the routing tokens."""
    settings: RouterSettings
    agent: PreTrainedModel | None = None
    """The cheapest rung's agent, whose hidden states a probe reads."""

    @property
    def parameters(self) -> int:
        return int(self.model.num_parameters())

    @property
    def pass_bytes(self) -> PassBytes:
        """What the forward pass of one decision reads; nothing of the agent."""
        if isinstance(self.model, ProbeHead):
            return PassBytes(weights=sum(stored_bytes(self.model).values()))
        if isinstance(self.model, TrajectoryEncoder):
            return encoder_pass_bytes(self.model)
        return pass_bytes(self.model)


def new_router(
    section: RouterModel,
    route: Sequence[str],
    agent_tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    agent: PreTrainedModel | None = None,
    positions: int | None = None,
) -> Router:
    """A router that has not been trained yet, of random weights or from a pretrained LLM.

    Where the tokenizer has no routing tokens they are added, with random embeddings.

    Args:
        route: the rungs that it chooses from, dearest first.
        agent: the cheapest rung's, for a probe.
        positions: tokens that an LM's sequences may have: those of a transcript and one a step.

    Raises:
        UserError: the pretrained LLM cannot be loaded, has fewer positions, or does not share the agent's vocabulary; or a
            probe's layer is none.
    """
    if section.probe is not None:
        tokenizer = _with_routing_tokens(agent_tokenizer, route)
        model: PreTrainedModel = new_probe(section.probe, len(route), _given(agent), seed)
    elif section.encoder is not None:
        tokenizer = _with_routing_tokens(agent_tokenizer, route)
        model = new_encoder(section.encoder, len(tokenizer), len(route), seed)
    elif section.architecture is not None:
        tokenizer = _with_routing_tokens(agent_tokenizer, route)
        model = new_model(section.architecture, len(tokenizer), seed, positions)
    else:
        assert section.pretrained is not None
        source = section.pretrained
        model, tokenizer = load_causal_lm(source.model, source.revision, torch.device("cpu"))
        if not _same_words(tokenizer, agent_tokenizer, route):
            raise UserError(
                f"kl_router.model.pretrained: {source.model!r} and the agent have different vocabularies, but the"
                " router reads the agent's tokens; choose a smaller model of the same family"
            )
        most = positions_of(model.config)
        if positions is not None and most is not None and most < positions:
            raise UserError(
                f"kl_router.model.pretrained: {source.model!r} has positions for {most} tokens that a cache can hold, but the"
                f" transcripts with a routing token a step may have {positions}: choose a router with more, or set"
                f" agent.max_transcript_tokens lower by {positions - most}"
            )
        tokenizer = _with_routing_tokens(tokenizer, route)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokens = {rung: tokenizer.convert_tokens_to_ids(routing_token(rung)) for rung in route}
    kind: Literal["lm", "probe", "encoder"] = "probe" if section.probe else "encoder" if section.encoder else "lm"
    settings = RouterSettings(kind=kind, tokens=tokens, decides=section.decides)
    return Router(model.to(device), tokenizer, settings, agent)


def save_router(router: Router, folder: Path) -> None:
    """Write config, float32 safetensors weights, tokenizer and router.json; equal routers give equal bytes."""
    save_causal_lm(router.model, router.tokenizer, folder, torch.float32)
    text = router.settings.model_dump_json(indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def read_settings(folder: Path) -> RouterSettings:
    """
    Raises:
        UserError: they are missing or malformed.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no router: it has no {SETTINGS_FILE}")
    try:
        return RouterSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(problems_of(error))}; make the router anew") from error


def load_router(folder: Path, device: torch.device, agent: PreTrainedModel | None = None) -> Router:
    """Read what `save_router` wrote; float32 on any device, in evaluation mode.

    Args:
        agent: the cheapest rung's, for a probe.

    Raises:
        UserError: a file is missing or malformed, or the weights are a pickle.
    """
    settings = read_settings(folder)
    if settings.kind == "lm":
        # Through the CPU, where weights are float32: a router is small, and its probabilities should be smooth.
        model, tokenizer = load_causal_lm(folder, None, torch.device("cpu"))
        return Router(model.to(device).eval(), tokenizer, settings)
    refuse_pickles(folder)
    try:
        probe = settings.kind == "probe"
        of_kind: type[PreTrainedModel] = head_of(ProbeConfig.from_pretrained(folder)) if probe else TrajectoryEncoder
        own: PreTrainedModel = of_kind.from_pretrained(folder, use_safetensors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"router {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    needed = _given(agent) if probe else None
    return Router(own.to(device).eval(), load_tokenizer(folder), settings, needed)


@dataclass(frozen=True)
class RoutingSequence:
    """One episode as the router reads it."""

    tokens: list[int]
    """Up to the last routing token: what the last action was decides nothing."""
    positions: list[int]
    """Routing positions. The routing token of step t is `tokens[positions[t] + 1]`."""
    acted: list[int]
    """Precision that acted at each step, in steps up from the cheapest."""
    features: Tensor | None = field(default=None, compare=False)
    """What a probe decides on, float32 [steps, features]; the other kinds read the tokens instead."""
    written: list[int] = field(default_factory=list, compare=False)
    """Tokens of each step's action."""


def routing_sequence(
    segments: Sequence[list[int]], actions: Sequence[list[int]], precisions: Sequence[str], settings: RouterSettings
) -> RoutingSequence:
    """Interleave the segments, routing tokens and actions of one episode, each given a step."""
    tokens: list[int] = []
    positions = []
    for turn, (segment, taken) in enumerate(zip(segments, precisions, strict=True)):
        if turn:
            tokens += actions[turn - 1]
        tokens += segment
        positions.append(len(tokens) - 1)
        tokens.append(settings.tokens[taken])
    up = {rung: place for place, rung in enumerate(reversed(settings.route))}
    return RoutingSequence(tokens, positions, [up[rung] for rung in precisions], written=list(map(len, actions)))


def sequence_of_trajectory(trajectory: Trajectory, router: Router) -> RoutingSequence:
    """With what a probe decided on, if it was one that acted; zeros at steps at which it was not asked."""
    steps = trajectory.steps
    precisions = [s.precision for s in steps]
    sequence = routing_sequence([s.segment for s in steps], [s.action for s in steps], precisions, router.settings)
    if not isinstance(router.model, ProbeHead):
        return sequence
    nothing = np.zeros(len(router.model.mean), np.float32)
    rows = [nothing if s.features is None else s.features for s in steps]
    return replace(sequence, features=torch.from_numpy(np.stack(rows)))


def sequences_of_steps(steps: pl.DataFrame, settings: RouterSettings) -> list[RoutingSequence]:
    """One for each episode of a table of steps (`rollout.tables.STEPS`), in the table's order."""
    episodes = steps.group_by("episode_id", maintain_order=True).agg("segment", "action", "precision")
    columns = (episodes[name].to_list() for name in ("segment", "action", "precision"))
    return [
        routing_sequence(segments, actions, precisions, settings)
        for segments, actions, precisions in zip(*columns, strict=True)
    ]


def with_features(
    router: Router,
    sequences: Sequence[RoutingSequence],
    batch: int,
    processes: int = 1,
    sharing: Mapping[str, PreTrainedModel] | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[RoutingSequence]:
    """The sequences with what a probe decides on, from plain forward passes of its agent, but for the numbers that cost nothing
    (`with_numbers`); those of other kinds as they are.

    Args:
        batch: sequences in one forward pass, or as many as have `_MOST_STATES`.
        sharing: the agents of all rungs, dearest first, where they have one cache. Then features are what the probe's agent
            reads if it is asked at each step, and goes on from what those have read that acted.
        on_progress: called with the number of sequences that have just been read, where any have to be.
    """
    if not isinstance(router.model, ProbeHead):
        return list(sequences)
    agent, layers = _given(router.agent), router.model.config.layers
    if not layers:
        turns = (torch.arange(len(s.positions)) for s in sequences)
        bare = (probe_features(torch.empty(len(its), 0), its) for its in turns)
        return [replace(s, features=its) for s, its in zip(sequences, bare, strict=True)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    text = agent.config.get_text_config()
    state_bytes = (text.num_hidden_layers + 1) * text.hidden_size * agent.dtype.itemsize  # of a token

    @torch.no_grad()
    def read_piece(indices: Sequence[int]) -> list[NDArray[np.float32]]:
        read_now = [sequences[i] for i in indices]
        if sharing is not None:
            return _read_in_turns(read_now, sharing, layers, router.settings.decides == "after")
        # The agent does not see the routing tokens: each that is left out moves what follows one place to the front.
        routed = [{position + 1 for position in s.positions} for s in read_now]
        tokens = [[t for i, t in enumerate(s.tokens) if i not in out] for s, out in zip(read_now, routed, strict=True)]
        positions = [[position - turn for turn, position in enumerate(s.positions)] for s in read_now]
        output = decoder_of(agent)(input_ids=_padded(tokens, agent.device), use_cache=False, output_hidden_states=True)
        features = []
        for row, at in enumerate(positions):
            states = torch.cat([output.hidden_states[layer][row, at] for layer in layers], dim=-1).float()
            features.append(probe_features(states, torch.arange(len(at))).cpu().numpy())
        return features

    def read(indices: Sequence[int], on_progress: Callable[[int], None]) -> list[NDArray[np.float32]]:
        def read_and_tell(piece: Sequence[int]) -> list[NDArray[np.float32]]:
            found = read_piece(piece)
            on_progress(len(piece))
            return found

        longest = max((len(sequences[i].tokens) for i in indices), default=1)
        rows = _MOST_STATES // (state_bytes * longest)
        return in_pieces(indices, max(1, min(batch, rows)), "episodes", read_and_tell)

    found = dict(zip(order, gather(in_processes(read, scatter(order, processes), on_progress)), strict=True))
    return [replace(s, features=torch.from_numpy(found[i])) for i, s in enumerate(sequences)]


def with_numbers(
    router: Router,
    sequences: Sequence[RoutingSequence],
    steps: pl.DataFrame,
    drafts: pl.DataFrame,
    command: Callable[[list[int]], str],
) -> list[RoutingSequence]:
    """The sequences of these steps, their features with the numbers that cost nothing behind them, for a probe that wants such.
    Arguments as of `features.numbers_of_steps`."""
    if not isinstance(router.model, ProbeHead) or not router.model.config.features:
        return list(sequences)
    rows = numbers_of_steps(router.model.config.features, router.settings.route, steps, drafts, command)
    return [
        replace(s, features=torch.cat([_given(s.features), torch.from_numpy(its)], dim=1))
        for s, its in zip(sequences, rows, strict=True)
    ]


def _read_in_turns(
    sequences: Sequence[RoutingSequence], agents: Mapping[str, PreTrainedModel], layers: Sequence[int], checked: bool
) -> list[NDArray[np.float32]]:
    """What a probe decides on at each step, [steps, features] of each sequence: the cheapest of these agents reads what is new
    into their one cache, and who acted then its own action; where it has checked a draft, all of the step."""
    # The agents read no routing tokens.
    streams = shared_streams(agents, len(sequences), max(len(s.tokens) - len(s.positions) for s in sequences))
    *_, cheapest = agents
    own, rows = streams[cheapest].reader, [list[Tensor]() for _ in sequences]
    texts, trails = [list[int]() for _ in sequences], [bytearray() for _ in sequences]
    for turn in range(max(len(s.positions) for s in sequences)):
        live = [i for i, s in enumerate(sequences) if turn < len(s.positions)]
        for i in live:
            s, start = sequences[i], 0
            if turn:
                # Who acted has read the transcript's last token again, and all but the last one that it wrote.
                actor = own - s.acted[turn - 1]
                trails[i] += bytes([actor if checked else own]) * (len(texts[i]) - 1 - len(trails[i]))
                trails[i] += bytes([actor]) * s.written[turn - 1]
                start = s.positions[turn - 1] + 2
            texts[i] += s.tokens[start : s.positions[turn] + 1]
        left = streams.catch_up(cheapest, live, [texts[i] for i in live], [trails[i] for i in live])
        _, states = streams[cheapest].read(live, left, layers)
        for i, row in zip(live, states, strict=True):
            rows[i].append(row)
    return [probe_features(torch.stack(its), torch.arange(len(its))).cpu().numpy() for its in rows]


def routing_logits(model: PreTrainedModel, sequences: Sequence[RoutingSequence], settings: RouterSettings) -> Tensor:
    """Logits of the routing tokens, cheapest first, at all routing positions: float32 [positions, rungs], sequence by sequence.

    An LM's padding is on the right and its attention is causal: no mask is needed, and none keeps the fast attention path.
    """
    if isinstance(model, ProbeHead):
        return cast(Tensor, model(torch.cat([_given(s.features) for s in sequences]).to(model.device)))
    if isinstance(model, TrajectoryEncoder):
        return cast(Tensor, model([model.window_of(s.tokens[: place + 1]) for s in sequences for place in s.positions]))
    rows = [row for row, sequence in enumerate(sequences) for _ in sequence.positions]
    columns = [position for sequence in sequences for position in sequence.positions]
    tokens = _padded([s.tokens for s in sequences], model.device)
    hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[rows, columns]
    return logits_of(model, hidden)[:, settings.columns]


@torch.no_grad()
def routing_margins(router: Router, sequences: Sequence[RoutingSequence], batch: int) -> list[NDArray[np.float64]]:
    """The margins z, in the order of logits without the cheapest rung: [steps, rungs - 1] of each sequence; `batch` sequences at
    a time."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    router.model.eval()

    def read(indices: Sequence[int]) -> list[NDArray[np.float64]]:
        logits = routing_logits(router.model, [sequences[i] for i in indices], router.settings).double()
        steps = [len(sequences[i].acted) for i in indices]
        return [margins.cpu().numpy() for margins in (logits[:, 1:] - logits[:, :1]).split(steps)]

    found = dict(zip(order, in_pieces(order, batch, "episodes", read), strict=True))
    return [found[i] for i in range(len(sequences))]


def _given(needed: T | None) -> T:
    """What a probe cannot do without."""
    if needed is None:
        raise TypeError("a probe needs the cheapest rung's agent, and features from it")
    return needed


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids int64 [rows, longest], padded on the right with 0."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens.to(device)


def routing_token(rung: str) -> str:
    return f"<precision:{rung}>"


def _with_routing_tokens(tokenizer: PreTrainedTokenizerBase, route: Sequence[str]) -> PreTrainedTokenizerBase:
    """A copy that has all routing tokens."""
    tokenizer, tokens = copy.deepcopy(tokenizer), [routing_token(rung) for rung in reversed(route)]
    tokenizer.add_tokens([token for token in tokens if token not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def _same_words(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, route: Sequence[str]) -> bool:
    """Same token ids, the routing tokens aside."""
    routing = {routing_token(rung) for rung in route}
    one, other = (
        {word: i for word, i in tokenizer.get_vocab().items() if word not in routing} for tokenizer in (first, second)
    )
    return one == other
