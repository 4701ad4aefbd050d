"""Rungs that were quantized elsewhere, on files that are written here from the formats' descriptions."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from dmr_pipeline import pipeline
from dmr_pipeline.agent import checkpoint
from dmr_pipeline.artifacts.provenance import provenance
from dmr_pipeline.errors import UserError
from dmr_pipeline.precision.acting import ActingModels
from dmr_pipeline.precision.imported import import_rung, inspect
from dmr_pipeline.precision.imported_bytes import ImportedBytes, imported_bytes
from dmr_pipeline.precision.packed_weights import Layout, dequantize_layer, unpack
from dmr_pipeline.precision.quantization import load_rung, stored_size
from dmr_pipeline.recipe import Recipe
from dmr_pipeline.recipe.precisions import Rung
from tests.helpers.checkpoints import word_tokenizer
from tests.helpers.quantized_files import AWQ_PLACES, write_gguf, write_packed

CPU = torch.device("cpu")
VOCABULARY, WIDTH, LAYERS = 40, 64, 2
TOKENS = torch.arange(60).reshape(4, 15) * 7 % VOCABULARY
TOKENIZER = word_tokenizer()
WORDS = ["<unk>", "go", "to", "shelf", *(f"[PAD{i}]" for i in range(4, VOCABULARY))]
LINEAR = LAYERS * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64)
"""Weights of all linear layers but the head."""


def float_model(
    config_class: type[PreTrainedConfig] = Qwen3Config, tied: bool = True, seed: int = 0, **changes: int
) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = config_class(**(sizes | heads | changes), tie_word_embeddings=tied, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = [3, 7]
    return model


def rung(source: Path, weights: str = "int4") -> Rung:
    return Rung.model_validate({"name": "bought", "weights": weights, "checkpoint": {"model": str(source)}})


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def imported(model: PreTrainedModel, source: Path, folder: Path, weights: str = "int4") -> PreTrainedModel:
    """The rung, which is the same when it is loaded again from its own folder alone."""
    made = import_rung(model, TOKENIZER, rung(source, weights), folder)
    moved = source.rename(source.with_name("moved"))
    loaded = load_rung(folder, CPU)
    moved.rename(source)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert_same(logits(loaded), logits(made))
    assert loaded.generation_config.eos_token_id == [3, 7], "it ends its texts as the agent does"
    return loaded


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_computes_what_its_integers_mean(
    tmp_path: Path, method: Literal["gptq", "gptq_v2"], bits: int, act_order: bool
) -> None:
    model = float_model()
    meant = write_packed(model, tmp_path / "source", method, bits, symmetric=bits == 4, act_order=act_order)
    loaded = imported(model, tmp_path / "source", tmp_path / "rung", f"int{bits}")
    assert_same(logits(loaded), logits(meant))
    groups = LINEAR // 32
    rest = 2 * (VOCABULARY * WIDTH + WIDTH * (1 + 2 * LAYERS) + 2 * 16 * LAYERS)
    order = 4 * LAYERS * (6 * 64 + 96)
    size = stored_size(loaded, tmp_path / "rung")
    assert size.bytes == LINEAR * bits // 8 + groups * bits // 8 + 2 * groups + order + rest
    assert size.quantized_share == LINEAR / model.num_parameters()
    assert size.bits_per_weight == 8 * size.bytes / model.num_parameters()


def test_gpt2s_layers_are_stored_as_linear_ones(tmp_path: Path) -> None:
    model = float_model(GPT2Config)
    meant = write_packed(model, tmp_path / "source", act_order=True)
    assert_same(logits(imported(model, tmp_path / "source", tmp_path / "rung")), logits(meant))


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("config_class", [Qwen3Config, LlamaConfig])
def test_awq_computes_what_its_integers_mean(tmp_path: Path, config_class: type, group: int) -> None:
    model = float_model(config_class, tied=False)
    meant = write_packed(model, tmp_path / "source", "awq", group=group)
    assert_same(logits(imported(model, tmp_path / "source", tmp_path / "rung")), logits(meant))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("config_class", [Qwen3Config, LlamaConfig])
def test_a_gguf_computes_what_its_blocks_mean(tmp_path: Path, config_class: type, kind: str, tied: bool) -> None:
    model = float_model(config_class, tied)
    meant, size = write_gguf(model, tmp_path / "model.gguf", kind, tokens=WORDS)
    loaded = imported(model, tmp_path / "model.gguf", tmp_path / "rung", f"int{kind[1]}")
    assert_same(logits(loaded), logits(meant))
    stored = imported_bytes(tmp_path / "rung")
    assert stored is not None
    assert stored.total == stored_size(loaded, tmp_path / "rung").bytes == size
    assert stored.embedding == VOCABULARY * WIDTH * 34 // 32
    assert stored.layers_and_head == (size if tied else size - stored.embedding)
    assert stored.quantized_weights == LINEAR + (1 if tied else 2) * VOCABULARY * WIDTH


def test_a_folder_of_several_files_is_one_checkpoint(tmp_path: Path) -> None:
    model = float_model()
    meant = write_packed(model, tmp_path / "source", files=3)
    assert_same(logits(imported(model, tmp_path / "source", tmp_path / "rung")), logits(meant))


def test_a_head_of_its_own_beside_tied_embeddings(tmp_path: Path) -> None:
    model = float_model()
    meant = write_packed(model, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    once = stored_size(imported(model, tmp_path / "source", tmp_path / "once"), tmp_path / "once")
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "source" / "model.safetensors")
    twice = imported(model, tmp_path / "source", tmp_path / "twice")
    assert_same(logits(twice), logits(meant))
    assert stored_size(twice, tmp_path / "twice") == once
    save_file(weights | {"lm_head.weight": 2 * embedding}, tmp_path / "source" / "model.safetensors")
    untied = imported(model, tmp_path / "source", tmp_path / "untied")
    assert_same(logits(untied), 2 * logits(meant))
    assert stored_size(untied, tmp_path / "untied").bytes == once.bytes + embedding.nbytes
    assert model.config.tie_word_embeddings, "the agent's own config is as it was"


def test_a_head_of_its_own_in_a_gguf(tmp_path: Path) -> None:
    model, untied = float_model(), float_model(tied=False)
    untied.load_state_dict(model.state_dict())
    _, once = write_gguf(model, tmp_path / "once.gguf")
    meant, _ = write_gguf(untied, tmp_path / "twice.gguf")
    for name in ("once", "twice"):
        loaded = imported(model, tmp_path / f"{name}.gguf", tmp_path / name)
        assert_same(logits(loaded), logits(meant))
        assert stored_size(loaded, tmp_path / name).bytes == once
    with torch.no_grad():
        untied.lm_head.weight *= 2
    meant, twice = write_gguf(untied, tmp_path / "other.gguf")
    loaded = imported(model, tmp_path / "other.gguf", tmp_path / "other")
    assert_same(logits(loaded), logits(meant))
    assert stored_size(loaded, tmp_path / "other").bytes == twice > once
    with pytest.raises(UserError, match=r"lm_head\.weight.*made from another model"):
        import_rung(untied, TOKENIZER, rung(tmp_path / "once.gguf"), tmp_path / "missing")


def test_a_hub_id_is_pinned_and_its_configs_are_looked_at_first(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("somebody/awq", "0" * 40)
        asked.append(allow_patterns)
        return str(packed)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    pinned = {"model": "somebody/awq", "revision": "0" * 40}
    bought = Rung.model_validate({"name": "bought", "weights": "int4", "checkpoint": pinned})
    assert inspect(float_model(), TOKENIZER, bought).path == packed
    assert asked[0] == ["*.json"]
    assert "*.safetensors" in asked[1]


def test_biases_of_zeros_that_quantizers_added_are_passed_over(tmp_path: Path) -> None:
    model = float_model()
    meant = write_packed(model, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96, dtype=torch.float16)}
    save_file(weights | bias, tmp_path / "source" / "model.safetensors")
    assert_same(logits(imported(model, tmp_path / "source", tmp_path / "rung")), logits(meant))
    save_file(weights | {name: zeros + 1 for name, zeros in bias.items()}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UserError, match=r"a model\.layers\.0\.mlp\.up_proj\.bias \(0 missing, 1 left over"):
        inspect(model, TOKENIZER, rung(tmp_path / "source"))


def test_three_bits_reach_from_word_to_word() -> None:
    """The 3 bits of integers 10 and 21 of 32 are in two words each: worked out by hand, all of them 0 but these."""
    integers = torch.zeros(32, dtype=torch.int32)
    integers[10], integers[21], integers[31] = 5, 6, 7
    signed = [0b01 << 30, 1 | (0b0 << 31), 0b11 | 0b111 << 29]
    words = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in signed]], dtype=torch.int32)
    assert unpack(words, 3)[0].tolist() == integers.tolist()


@pytest.mark.parametrize(
    ("bits", "words", "zeros"),
    [
        (4, [0x88888880 - 0x11111111], [0, 8, 8, 8, 8, 8, 8, 8]),
        (4, [0x77777777], [8] * 8),
        (8, [0x80800080 - 0x01010101], [128, 0, 128, 128]),
        (2, [0xAAAAAAA8 - 0x55555555], [0, *[2] * 15]),
    ],
    ids=["borrowed", "none is 0", "8 bits", "2 bits"],
)
def test_zeros_that_are_stored_less_one_may_have_borrowed(bits: int, words: list[int], zeros: list[int]) -> None:
    """As GPTQModel stores asymmetric weights: ones are taken from whole words."""
    stored = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in words]], dtype=torch.int32)
    parts = {
        "qweight": torch.zeros(bits, len(zeros), dtype=torch.int32),
        "qzeros": stored,
        "scales": torch.ones(1, len(zeros), dtype=torch.float16),
    }
    weight = dequantize_layer(Layout("gptq", bits, -1, zeros_less_one=True), parts)
    assert (-weight[:, 0]).tolist() == zeros


def test_a_word_of_awq_holds_every_other_output_first() -> None:
    word = sum(output << 4 * place for place, output in enumerate(AWQ_PLACES))
    parts = {
        "qweight": torch.tensor([[word]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert dequantize_layer(Layout("awq", 4, -1), parts)[:, 0].tolist() == list(range(8))


def test_the_rung_acts_and_its_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    model = float_model()
    meant = write_packed(model, tmp_path / "source")
    import_rung(model, TOKENIZER, rung(tmp_path / "source"), tmp_path / "checkpoints" / "bought")
    acting = ActingModels.load(tmp_path / "checkpoints", ["bought"], CPU)
    assert_same(logits(acting.models["bought"]), logits(meant))
    files = load_file(tmp_path / "source" / "model.safetensors")
    stored = imported_bytes(tmp_path / "checkpoints" / "bought")
    assert stored is not None
    assert stored.total == sum(tensor.nbytes for tensor in files.values())
    read, rows = acting.pass_bytes["bought"], model.get_input_embeddings().num_embeddings
    assert (read.weights, read.embedding_row) == (stored.layers_and_head, stored.embedding // rows)
    (tmp_path / "checkpoints" / "bought" / "imported.json").write_text("{")
    with pytest.raises(UserError, match=r"imported\.json is damaged"):
        imported_bytes(tmp_path / "checkpoints" / "bought")


def test_bytes_of_a_lookup_are_no_part_of_every_pass() -> None:
    stored = ImportedBytes(format="gptq", total=100, embedding=30, tied=False, quantized_weights=50)
    assert stored.layers_and_head == 70
    assert stored.model_copy(update={"tied": True}).layers_and_head == 100


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_settings(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, quantization_config=config["quantization_config"] | changes)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj"
REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("other method", lambda f: change_settings(f, quant_method="bitsandbytes"), "quantized by bitsandbytes; gptq, awq and"),
    ("marlin", lambda f: change_settings(f, checkpoint_format="marlin"), "gptq of the format 'marlin' in 4 bits; 'gptq' and"),
    ("marlin of old", lambda f: change_settings(f, is_marlin_format=True), "gptq of the format 'marlin'"),
    ("gemv", lambda f: change_settings(f, quant_method="awq", checkpoint_format="gemv"), "awq of the format 'gemv' in 4 bits"),
    ("5 bits", lambda f: change_settings(f, bits=5), "in 5 bits; 'gptq' and 'gptq_v2' in 2, 3, 4 or 8"),
    ("groups", lambda f: change_settings(f, group_size="x"), "its groups have 'x' inputs"),
    ("groups that do not fit", lambda f: change_settings(f, group_size=48), r"has the shape \[3, \d+\], where the agent ne"),
    ("bits by layer", lambda f: change_settings(f, dynamic={"+:.*": {"bits": 8}}), "settings of their own"),
    ("float", lambda f: change_config(f, quantization_config=None), "its weights are not quantized"),
    ("wrong bits", lambda f: change_settings(f, bits=2), r"up_proj\.q\w+ has the shape|has the shape"),
    ("type", lambda f: change_config(f, model_type="llama"), "its model_type is llama, the agent's qwen3"),
    ("heads", lambda f: change_config(f, num_attention_heads=8), "its num_attention_heads is 8, the agent's 4"),
    ("no config", lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    ("missing tensor", lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")), r"no model\.norm\.weight \(1 missing"),
    ("missing part", lambda f: change_weights(f, lambda w: w.pop(f"{UP}.scales")), r"up_proj\.weight is incomplete: g_idx, "),
    ("extra tensor", lambda f: change_weights(f, lambda w: w.update(x=torch.zeros(1))), r"it has a x \(0 missing, 1 left over"),
    ("dtype", lambda f: change_weights(f, lambda w: w.update({f"{UP}.qweight": w[f"{UP}.qweight"].short()})), "is stored as I16"),
    ("order", lambda f: change_weights(f, lambda w: w[f"{UP}.g_idx"].fill_(9)), "names groups from 9 to 9, but there are 2"),
    ("pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle"),
    ("cut", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "cannot be loaded"),
    ("other tokenizer", lambda f: _other_tokenizer(f), r"its tokenizer is not the agent's: 2 of 4 tokens differ, such as number"),
]  # fmt: skip


def _other_tokenizer(folder: Path) -> None:
    TOKENIZER.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"go": 2, "to": 1}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "source"
    write_packed(float_model(), folder)
    return folder


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_a_rung_is_one_line(
    tmp_path: Path, packed: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(packed, tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(UserError, match=message) as raised:
        import_rung(float_model(), TOKENIZER, rung(tmp_path / "source"), tmp_path / "rung")
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "source") in str(raised.value)
    assert not (tmp_path / "rung").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (float_model(vocab_size=48), "embeddings of 48 tokens, the agent of 40"),
        (float_model(num_hidden_layers=3), "its num_hidden_layers is 3, the agent's 2"),
        (float_model(hidden_size=96), "its hidden_size is 96, the agent's 64"),
        (float_model(head_dim=32), "has the shape|wide|of another shape|left over"),
        (
            float_model(seed=1),
            r"embeddings differ from the agent's by 14\d% of their norm: it was made from another model",
        ),
    ],
    ids=["vocabulary", "layers", "width", "head width", "weights"],
)
@pytest.mark.parametrize("kind", ["gptq", "gguf"])
def test_a_rung_of_another_model_is_refused(tmp_path: Path, other: PreTrainedModel, kind: str, message: str) -> None:
    source = tmp_path / f"model.{kind}"
    if kind == "gguf":
        write_gguf(other, source)
    else:
        write_packed(other, source)
    with pytest.raises(UserError, match=message) as raised:
        import_rung(float_model(), TOKENIZER, rung(source), tmp_path / "rung")
    assert "\n" not in str(raised.value)


def test_embeddings_that_were_trained_since_are_warned_of(
    tmp_path: Path, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = float_model()
    with caplog.at_level(logging.WARNING):
        import_rung(model, TOKENIZER, rung(packed), tmp_path / "one")
        assert not caplog.records
        with torch.no_grad():
            model.get_input_embeddings().weight *= 1.1
        import_rung(model, TOKENIZER, rung(packed), tmp_path / "two")
    assert "differ from the agent's by 9.1% of their norm" in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.5, 0.99], ids=str)
def test_a_gguf_that_is_cut_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "q4.gguf"
    write_gguf(float_model(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"q4\.gguf: it is no whole GGUF file \(.*\): is it cut\?") as raised:
        inspect(float_model(), TOKENIZER, rung(path))
    assert "\n" not in str(raised.value)


def test_a_gguf_of_other_tokens_bits_or_parts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(float_model(), path, tokens=["<unk>", "to", "go", *WORDS[3:]])
    with pytest.raises(UserError, match=r"2 of 4 tokens differ, such as number \d, '\w+' there"):
        inspect(float_model(), TOKENIZER, rung(path))
    write_gguf(float_model(), path)
    with pytest.raises(UserError, match=r"it stores 4 bits a weight \(gguf\): say `weights: int4`"):
        inspect(float_model(), TOKENIZER, rung(path, "int2"))
    write_gguf(float_model(), path, "F16")
    with pytest.raises(UserError, match="its layers are stored in F16, so it is no quantized model"):
        inspect(float_model(), TOKENIZER, rung(path))
    write_gguf(
        float_model(), path, also=lambda writer: writer.add_tensor("blk.0.strange.weight", np.ones(8, np.float32))
    )
    with pytest.raises(UserError, match=r"some are left over \(of .*strange\.weight"):
        inspect(float_model(), TOKENIZER, rung(path))
    with pytest.raises(UserError, match=r"folder of GGUF files: name one of them, such as model\.gguf"):
        inspect(float_model(), TOKENIZER, rung(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.gguf", r"rung 'bought': nowhere\.gguf: no such file"),
        ("nowhere", "'nowhere': no such folder; if it is a hub id, give its full commit hash"),
        (str(Path(__file__)), r"test_imported\.py is a file, but not a \.gguf"),
    ],
    ids=["gguf", "folder", "file"],
)
def test_what_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect(float_model(), TOKENIZER, rung(Path(source)))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"weights": "float"}, "a checkpoint that is imported is quantized"),
        ({"ranges": "mse"}, "leave out ranges"),
        ({"head": "int8"}, "leave out head"),
        ({"activations": "int8"}, "leave out activations"),
        ({"keep_float": ["lm_head", "*.down_proj"]}, "leave out keep_float"),
    ],
    ids=str,
)
def test_nothing_else_is_said_of_an_imported_rung(field: dict[str, object], message: str) -> None:
    said = {"name": "bought", "weights": "int4", "checkpoint": {"model": "models/q4"}}
    Rung.model_validate(said)
    with pytest.raises(ValidationError, match=message):
        Rung.model_validate(said | field)


def test_new_weights_in_the_file_make_the_ladder_stale(project: Recipe) -> None:
    stage = pipeline.find_stage("quantized_checkpoints", pipeline.STAGES)
    precisions = project.precisions.model_dump(mode="json")
    precisions["ladder"][-1] |= {"checkpoint": {"model": "models/q4.gguf"}}
    changed = project.model_copy(update={"precisions": type(project.precisions).model_validate(precisions)})
    before = provenance(stage, project, {})
    assert before.pretrained == provenance(stage, changed, {}).pretrained == {}
    assert "checkpoint" not in json.dumps(before.sections["precisions"])
    Path("models").mkdir()
    found = []
    for content in ("weights", "longer weights"):
        Path("models/q4.gguf").write_text(content)
        found.append(provenance(stage, changed, {}).pretrained["models/q4.gguf"])
    assert found[0] != found[1]
    assert provenance(stage, project, {}).pretrained == {}
