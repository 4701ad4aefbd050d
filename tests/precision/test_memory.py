"""What of the ladder is in memory, and how often."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimum.quanto.nn import QModuleMixin
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dmr_pipeline.precision import quantization
from dmr_pipeline.precision.acting import ActingModels, acting_model
from dmr_pipeline.precision.quantization import load_rung, quantize_rung, save_rung
from dmr_pipeline.recipe.precisions import Rung

CPU = torch.device("cpu")
TOKENS = torch.arange(30).reshape(2, 15)
LADDER = [
    Rung(name="float", weights="float"),
    Rung(name="int8", weights="int8", head="int8"),
    Rung(name="int4", weights="int4", head="int8"),
    Rung(name="int3", weights="int3", ranges="mse"),
]


def llama(tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def held(*models: PreTrainedModel) -> int:
    """Bytes of all different weights."""
    return sum({p.data_ptr(): p.nbytes for model in models for p in model.parameters()}.values())


def matrices() -> int:
    """Bytes of all float matrices that anything holds and that have memory."""
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.ndim == 2 and o.is_floating_point()]
    return sum({p.data_ptr(): p.nbytes for p in alive if p.device.type != "meta"}.values())


@pytest.mark.parametrize("rung", LADDER[1:], ids=lambda rung: rung.name)
def test_a_rung_shares_with_the_float_model_what_is_not_quantized(rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze, seen = QModuleMixin.freeze, set[int]()

    def watched(layer: QModuleMixin) -> None:
        if not layer.frozen:
            seen.add(layer.weight.data_ptr())
        freeze(layer)

    if rung.weights != "int3":  # whose layers are quantized before they are frozen
        monkeypatch.setattr(QModuleMixin, "freeze", watched)
    made = quantize_rung(model, rung)
    assert seen <= {parameter.data_ptr() for parameter in model.parameters()}, "no float matrix is there twice"
    assert len(seen) == (0 if rung.weights == "int3" else 7 * 3 + 1)
    for name in ("model.embed_tokens", "model.layers.2.input_layernorm", "model.norm"):
        assert made.get_submodule(name).weight is model.get_submodule(name).weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the float model stays as it is"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
def test_a_rung_is_loaded_without_the_weights_that_a_model_is_built_with(
    tmp_path: Path, rung: Rung, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tied)
    save_rung(quantize_rung(model, rung), tmp_path)
    fill, before, seen = quantization._fill, matrices(), list[int]()

    def watched(empty: PreTrainedModel, stored: dict[str, torch.Tensor]) -> None:
        seen.append(matrices() - before)
        fill(empty, stored)

    monkeypatch.setattr(quantization, "_fill", watched)
    loaded = load_rung(tmp_path, CPU)
    assert seen == [0]
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert loaded.get_output_embeddings() is not loaded.get_input_embeddings()
    same = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same == (tied and rung.head is None)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters() if type(p.data) is torch.Tensor)


@torch.no_grad()
def test_what_is_equal_between_rungs_is_in_memory_once(tmp_path: Path) -> None:
    model = llama()
    for rung in LADDER:
        save_rung(quantize_rung(model, rung), tmp_path / rung.name)
    names = [rung.name for rung in LADDER]
    acting = ActingModels.load(tmp_path, names, CPU)
    alone = {name: acting_model(load_rung(tmp_path / name, CPU), CPU) for name in names}
    for name in names:
        for one, other in zip(acting.models[name].parameters(), alone[name].parameters(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(acting.models[name](TOKENS).logits, alone[name](TOKENS).logits)
    whole = held(model)
    embedding = model.get_input_embeddings().weight.nbytes
    layers = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2) - embedding
    # Of the four, all have the embedding and the norms, and two the same head of int8.
    assert held(*acting.models.values()) == whole + 3 * layers + embedding
    assert held(*alone.values()) == 4 * whole + 2 * embedding


PEAKS = """
import sys
import torch
from pathlib import Path
from transformers import LlamaConfig
from dmr_pipeline.agent.checkpoint import random_causal_lm
from dmr_pipeline.peak_memory import peak_bytes
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.quantization import load_rung, quantize_rung, save_rung
from dmr_pipeline.recipe.precisions import Rung

CPU, folder, part = torch.device("cpu"), Path(sys.argv[1]), sys.argv[2]

def resident(kind):
    line = next(line for line in open("/proc/self/status") if line.startswith(kind))
    return int(line.split()[1]) * 1024

before = resident("RssAnon")
if part == "make":
    model = random_causal_lm(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    ), CPU)
    assert resident("RssAnon") - before < 1.1 * 4 * model.num_parameters()
    save_rung(model, folder / "float")
    print(model.num_parameters() * 4)
    before = resident("VmRSS")
    with torch.no_grad():
        made = quantize_rung(model, Rung(name="int4", weights="int4", head="int8"))
    print(peak_bytes() - before)
    save_rung(made, folder / "int4")
elif part == "load":
    before = peak_bytes()
    load_rung(folder / "int4", CPU)
    print(peak_bytes() - before)
else:
    ActingModels.load(folder, ["float", "int4"], CPU)
    print(resident("RssAnon") - before)
"""


@pytest.mark.slow
def test_peaks_of_a_model_of_135m(tmp_path: Path) -> None:
    def run(part: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", PEAKS, str(tmp_path), part], capture_output=True, text=True, check=True, timeout=300
        )
        return [int(line) for line in done.stdout.split()]

    model, quantizing = run("make")
    (loading,), (acting,) = run("load"), run("act")
    assert quantizing < 0.75 * model, "beside the float model"
    assert loading < 1.1 * model, "the file's pages among it"
    assert acting < 2.2 * model, "two rungs, one with a head of its own"
