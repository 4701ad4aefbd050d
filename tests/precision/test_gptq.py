"""GPTQ against arithmetic by hand, against column-by-column OBQ with explicit inverses, and on whole models."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from optimum.quanto import MaxOptimizer, QLinear, qint2, qint4, qtype, qtypes
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dmr_pipeline.agent.logits import decoder_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision import gptq
from dmr_pipeline.precision.gptq import GptqRun, output_error, round_by_gptq
from dmr_pipeline.precision.packing import group_size, qint3, round_to_nearest
from dmr_pipeline.precision.quantization import MseRanges, load_rung, quantize_rung, rung_size, save_rung
from dmr_pipeline.recipe.precisions import Rung

CPU = torch.device("cpu")
KINDS = [qint2, qint3, qint4]
VOCABULARY = 40
TEXTS = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (50, 30, 60, 41)]
OTHER = torch.randint(VOCABULARY, (8, 50), generator=torch.Generator().manual_seed(0))


def test_a_case_by_hand() -> None:
    """Two outputs, three inputs, four levels: both rows span 0 to 3, so scale is 1, shift 0 and a level is its integer.

    A column's error e is made up for by e H_FF^-1 H_Fj, F the columns behind it. Behind column 0, H_FF is [[1, .6], [.6, 1]],
    its inverse [[1, -.6], [-.6, 1]] / .64, and H_F0 is [2, 0]: e (3.125, -1.875). Behind column 1 it is e times .6.

    Row 0: 1.4 -> 1, e = .4: 0 + 1.25 and 3 - .75. 1.25 -> 1, e = .25: 2.25 + .15 = 2.4 -> 2. Its error, of (.4, -1, 1), is
    10 * .16 + 1 + 1 + 2 * (2 * .4 * -1) + 2 * (.6 * -1 * 1) = .8; that of the nearest levels, of (.4, 0, 0), is 1.6.
    Row 1: 1.2 -> 1, e = .2: 3 + .625 and 0 - .375. 3.625 -> 3, the greatest, e = .625: -.375 + .375 = 0 -> 0.
    """
    weight = torch.tensor([[1.4, 0.0, 3.0], [1.2, 3.0, 0.0]])
    hessian = torch.tensor([[10, 2, 0], [2, 1, 0.6], [0, 0.6, 1]], dtype=torch.float64)
    levels = round_by_gptq(weight, hessian, qint2, MaxOptimizer(), damping=0)
    assert levels.integers.tolist() == [[1, 1, 2], [1, 3, 0]]
    assert (levels.scale.tolist(), levels.shift.tolist()) == ([[1.0], [1.0]], [[0.0], [0.0]])
    assert output_error(weight, levels.weights(weight.shape), hessian).tolist() == pytest.approx([0.8, 0.4], abs=1e-6)
    nearest = round_to_nearest(weight, qint2, MaxOptimizer())
    assert nearest.integers.tolist() == [[1, 0, 3], [1, 3, 0]]
    assert output_error(weight, nearest.weights(weight.shape), hessian).tolist() == pytest.approx([1.6, 0.4], abs=1e-6)


def case(seed: int, rows: int, width: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weights, and inputs [inputs, width] that go together, some of which are always 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    hidden = torch.randn(inputs, 5, generator=generator) @ torch.randn(5, width, generator=generator)
    hidden += 0.3 * torch.randn(inputs, width, generator=generator)
    hidden[:, ::7] = 0
    return weight, hidden


def obq(weight: np.ndarray, hessian: np.ndarray, bits: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Integers and weights of Optimal Brain Quantization in the order of the columns (the paper's equations 1 to 3), with the
    inverse of the remaining Hessian made anew for each, min-max levels of each group from the weights as they are then, and of
    each row the better of this and nearest rounding."""
    width = weight.shape[1]
    size = group_size(width) or width
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(width)
    results = []
    for corrected in (True, False):
        left, integers, stored = weight.astype(np.float64), np.zeros(weight.shape, int), np.zeros(weight.shape)
        for j in range(width):
            if j % size == 0:
                group = left[:, j : j + size].astype(np.float32)
                low, scale = group.min(1), (group.max(1) - group.min(1)) / np.float32(2**bits - 1)
            exact = left[:, j].astype(np.float32)
            integers[:, j] = np.clip(np.round((exact - low) / scale), 0, 2**bits - 1)
            stored[:, j] = scale * integers[:, j].astype(np.float32) + low
            if corrected:
                inverse = np.linalg.inv(damped[j:, j:])
                left[:, j:] -= np.outer((left[:, j] - stored[:, j]) / inverse[0, 0], inverse[0])
        change = weight - stored
        results.append((integers, stored, ((change @ hessian) * change).sum(1)))
    (integers, stored, error), (near_integers, near, near_error) = results
    better = (error <= near_error)[:, None]
    return np.where(better, integers, near_integers), np.where(better, stored, near)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([2, 5, 31, 160, 192]), st.sampled_from([0.01, 1.0])
)
def test_it_is_obq_column_by_column(seed: int, kind: qtype, width: int, damping: float) -> None:
    """Also in groups that 128 does not divide (192 inputs: 96), and over several blocks of columns."""
    weight, hidden = case(seed, 3, width, 80)
    hessian = hidden.double().T @ hidden.double()
    levels = round_by_gptq(weight, hessian, kind, MaxOptimizer(), damping)
    integers, stored = obq(weight.numpy(), hessian.numpy(), kind.bits, damping)
    np.testing.assert_array_equal(levels.integers.reshape(weight.shape).numpy(), integers)
    np.testing.assert_allclose(levels.weights(weight.shape).numpy(), stored, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([3, 31, 160]), st.integers(1, 60))
def test_no_outputs_error_is_above_that_of_the_nearest_levels(seed: int, kind: qtype, width: int, inputs: int) -> None:
    """On the inputs that it was calibrated on, measured as what comes out."""
    weight, hidden = case(seed, 8, width, inputs)
    for optimizer in (MaxOptimizer(), MseRanges()):
        nearest = round_to_nearest(weight, kind, optimizer)
        found = round_by_gptq(weight, hidden.double().T @ hidden.double(), kind, optimizer, 0.01)
        errors = [
            (hidden.double() @ (weight.double() - levels.weights(weight.shape).double()).T).square().sum(0)
            for levels in (found, nearest)
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("optimizer", [MaxOptimizer(), MseRanges()], ids=["min-max", "mse"])
@pytest.mark.parametrize("width", [31, 160, 192, 200])
def test_where_inputs_have_nothing_to_do_with_each_other_it_is_the_nearest(
    kind: qtype, optimizer: MaxOptimizer, width: int
) -> None:
    weight, _ = case(width, 9, width, 1)
    weight[0] = 0.5  # a row without a range
    nearest = round_to_nearest(weight, kind, optimizer)
    for hessian in (torch.eye(width).double(), 3 * torch.eye(width).double(), torch.zeros(width, width).double()):
        levels = round_by_gptq(weight, hessian, kind, optimizer, 0.01)
        for found, expected in zip(levels, nearest, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [31, 160, 192])
def test_weights_that_are_levels_already_keep_their_integers(kind: qtype, width: int) -> None:
    weight, hidden = case(width, 9, width, 80)
    levels = round_to_nearest(weight, kind, MaxOptimizer())
    again = round_by_gptq(levels.weights(weight.shape), hidden.double().T @ hidden.double(), kind, MaxOptimizer(), 0.01)
    assert torch.equal(again.integers, levels.integers)
    torch.testing.assert_close(again.weights(weight.shape), levels.weights(weight.shape))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [31, 160, 192])
def test_quanto_stores_the_integers_that_were_chosen(kind: qtype, width: int) -> None:
    weight, hidden = case(width, 9, width, 80)
    levels = round_by_gptq(weight, hidden.double().T @ hidden.double(), kind, MseRanges(), 0.01)
    stored = levels.packed(weight.shape, kind)
    assert torch.equal(stored._data.unpack(), levels.integers)
    assert torch.equal(stored.dequantize(), levels.weights(weight.shape))


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip


def of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def structured() -> PreTrainedModel:
    """A model whose hidden states go together, as those of an LLM do and of random weights do not: few directions matter."""
    model = of(Qwen3Config(**SMALL, initializer_range=0.15))
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn(VOCABULARY, 6) @ torch.randn(6, 64))
    model.lm_head.weight.copy_(torch.randn(VOCABULARY, 64) / 4)
    return model


MODEL = structured()


def rung(weights: str, **settings: object) -> Rung:
    return Rung.model_validate({"name": "rung", "weights": weights, **settings})


def run(scratch: Path, on_layer: Callable[[int, int], None] = lambda done, layers: None) -> GptqRun:
    return GptqRun(TEXTS, 0.01, scratch, on_layer)


@torch.no_grad()
def divergence(model: PreTrainedModel, quantized: PreTrainedModel) -> float:
    """Mean KL(float || quantized) a token, on text that is not the calibration's."""
    p, q = (m(OTHER).logits.double().log_softmax(-1) for m in (model, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_loses_less_than_nearest_rounding(tmp_path: Path) -> None:
    """The order that was measured on SmolLM2-135M-Instruct: GPTQ makes int3 a rung, and is better at int4 and int2 as well."""
    nearest, by_gptq = {}, {}
    for weights in ("int4", "int3", "int2"):
        nearest[weights] = divergence(MODEL, quantize_rung(MODEL, rung(weights, ranges="mse")))
        quantized = quantize_rung(MODEL, rung(weights, ranges="mse", rounding="gptq"), None, run(tmp_path / weights))
        by_gptq[weights] = divergence(MODEL, quantized)
    assert nearest["int2"] > nearest["int3"] > nearest["int4"]
    assert by_gptq["int2"] > by_gptq["int3"] > by_gptq["int4"]
    for weights in nearest:
        assert by_gptq[weights] < 0.6 * nearest[weights]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("weights", ["int4", "int3", "int2"])
def test_it_is_stored_as_nearest_rounding_is(tmp_path: Path, weights: str) -> None:
    quantized = quantize_rung(MODEL, rung(weights, rounding="gptq", head="int8"), None, run(tmp_path / "scratch"))
    plain = quantize_rung(MODEL, rung(weights, head="int8"))
    assert rung_size(quantized) == rung_size(plain)
    save_rung(quantized, tmp_path / "gptq")
    save_rung(plain, tmp_path / "plain")
    mine, others = content(tmp_path / "gptq"), content(tmp_path / "plain")
    assert mine["quantization_map.json"] == others["quantization_map.json"]
    assert mine["model.safetensors"] != others["model.safetensors"]
    with torch.no_grad():
        assert torch.equal(load_rung(tmp_path / "gptq", CPU)(OTHER).logits, quantized(OTHER).logits)


@pytest.mark.parametrize("weights", ["int4", "int3"])
def test_a_head_is_rounded_on_what_the_rounded_decoder_makes_of_the_text(tmp_path: Path, weights: str) -> None:
    """As any layer is on what comes to it."""
    by_gptq = rung(weights, rounding="gptq", ranges="mse", head=weights)
    quantized = quantize_rung(MODEL, by_gptq, None, run(tmp_path / "scratch"))
    same = quantize_rung(MODEL, rung(weights, rounding="gptq", ranges="mse"), None, run(tmp_path / "float-head"))
    with torch.no_grad():
        hidden = torch.cat([same.model(torch.tensor([text])).last_hidden_state[0] for text in TEXTS])
        float_head = MODEL.lm_head.weight
        expected = round_by_gptq(
            float_head, hidden.double().T @ hidden.double(), qtypes[f"q{weights}"], MseRanges(), 0.01
        )
        torch.testing.assert_close(
            quantized.lm_head.weight.dequantize(), expected.weights(float_head.shape), rtol=0, atol=1e-5
        )
    assert torch.equal(MODEL.lm_head.weight, float_head)
    save_rung(quantized, tmp_path / "rung")
    with torch.no_grad():
        assert torch.equal(load_rung(tmp_path / "rung", CPU)(OTHER).logits, quantized(OTHER).logits)


def test_a_tied_head_is_rounded_and_its_embedding_is_not(tmp_path: Path) -> None:
    model = of(Qwen3Config(**SMALL | {"tie_word_embeddings": True}, initializer_range=0.15))
    before = model.get_input_embeddings().weight.detach().clone()
    heard = list[tuple[int, int]]()
    settings = rung("int4", rounding="gptq", head="int3")
    made = quantize_rung(model, settings, None, run(tmp_path, lambda *layers: heard.append(layers)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(made.get_input_embeddings().weight, before)
    assert made.lm_head.weight.qtype == qtypes["qint3"]
    assert not made.config.tie_word_embeddings
    again = quantize_rung(model, settings, None, run(tmp_path))  # from what the first has kept
    assert torch.equal(again.lm_head.weight.dequantize(), made.lm_head.weight.dequantize())


def test_a_model_whose_last_states_do_not_go_through_one_norm_keeps_its_head(tmp_path: Path) -> None:
    model = of(OPTConfig(**OPT, word_embed_proj_dim=32))
    with pytest.raises(UserError, match="not found what comes between the last layer and the head"):
        quantize_rung(model, rung("int4", rounding="gptq", head="int4"), None, run(tmp_path))


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int3 = rung("int3", rounding="gptq")
    save_rung(quantize_rung(MODEL, int3, None, run(tmp_path / "unbroken")), tmp_path / "expected")
    heard = []

    def killed(done: int, layers: int) -> None:
        heard.append((done, layers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_rung(MODEL, int3, None, run(tmp_path / "killed", killed))
    calibrated, hessians = [], gptq._hessians

    def counted(linear: dict, *rest: object) -> object:
        calibrated.append(sorted(linear))
        return hessians(linear, *rest)

    monkeypatch.setattr(gptq, "_hessians", counted)
    again = run(tmp_path / "killed", lambda done, layers: heard.append((done, layers)))
    save_rung(quantize_rung(MODEL, int3, None, again), tmp_path / "found")
    assert heard == [(1, 2), (1, 2), (2, 2)]
    assert [names[0] for names in calibrated] == ["model.layers.1.mlp.down_proj"]
    assert content(tmp_path / "found") == content(tmp_path / "expected")


def test_one_layers_hessians_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hessians, made = gptq._hessians, list[weakref.ref]()

    def watched(*args: object) -> object:
        gc.collect()
        assert all(reference() is None for reference in made)
        found = hessians(*args)
        made.extend(weakref.ref(tensor) for tensor in found._sums.values())
        return found

    monkeypatch.setattr(gptq, "_hessians", watched)
    quantize_rung(MODEL, rung("int4", rounding="gptq"), None, run(tmp_path))
    assert len(made) == 2 * 4, "queries, keys and values share one, gate and up another"


def test_each_layer_is_calibrated_on_what_rounded_layers_make_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(weight: Tensor, hessian: Tensor, *rest: object) -> object:
        seen.append(hessian)
        return round_by_gptq(weight, hessian, *rest)

    monkeypatch.setattr(gptq, "round_by_gptq", watched)
    kept = ["lm_head", "*.layers.1.*"]
    quantized = quantize_rung(MODEL, rung("int2", rounding="gptq", keep_float=kept), None, run(tmp_path))
    assert not isinstance(quantized.model.layers[1].mlp.up_proj, QLinear)
    assert len(seen) == 7, "layer 1 is kept in float"
    seen.clear()
    quantize_rung(MODEL, rung("int2", rounding="gptq"), None, run(tmp_path / "anew"))
    into: list[Tensor] = []
    hook = quantized.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: into.append(args[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            quantized(torch.tensor([text]))
    hook.remove()
    hidden = torch.cat(into).double()
    torch.testing.assert_close(seen[-1], hidden.T @ hidden, rtol=1e-4, atol=1e-4)


OPT = {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS_OF_MODELS: list[PretrainedConfig] = [
    GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    Gemma3TextConfig(**SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    OPTConfig(**OPT),
    MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
    BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", KINDS_OF_MODELS, ids=lambda config: config.model_type)
def test_layers_are_gone_through_as_the_model_does(tmp_path: Path, config: PretrainedConfig) -> None:
    """Masks that differ from layer to layer, layers that are called by name: what comes out of the last is the model's own."""
    model, last = of(config), list[Tensor]()
    layers = gptq._layers_of(model)
    with torch.no_grad():
        states, calls = gptq._start(model, layers, TEXTS[:2])
        layers[-1].register_forward_hook(lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out))
        for text, hidden, of_text in zip(TEXTS, states, calls, strict=False):
            decoder_of(model)(input_ids=torch.tensor([text]), use_cache=False)
            expected = last[-1]
            for layer, call in zip(layers, of_text, strict=True):
                hidden = call.output(layer, hidden)
            assert torch.equal(hidden, expected)
    nearest = quantize_rung(model, rung("int3"))
    assert divergence(model, quantize_rung(model, rung("int3", rounding="gptq"), None, run(tmp_path))) < divergence(
        model, nearest
    )


def test_models_and_texts_that_it_cannot_work_with(tmp_path: Path) -> None:
    int4 = rung("int4", rounding="gptq")
    with pytest.raises(UserError, match=r"^rung 'rung': rounding: gptq needs calibration episodes$"):
        quantize_rung(MODEL, int4)
    with pytest.raises(UserError, match=r"^rounding: gptq: there is no text to calibrate on$"):
        quantize_rung(MODEL, int4, None, GptqRun([], 0.01, tmp_path))
    model = structured()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(UserError, match="those of model type 'qwen3' do not follow one another; leave it out"):
        quantize_rung(model, int4, None, run(tmp_path))
    model = structured()
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="those of model type 'qwen3' are not found; leave it out"):
        quantize_rung(model, int4, None, run(tmp_path))
    model = structured()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.inf
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj has inputs that are not finite"):
        quantize_rung(model, int4, None, run(tmp_path))
