"""Weights of known kinds: what the products are compared with, and the layers of a real model."""

import pytest
import torch

from dmr_pipeline.gpu_check.decoding import random_model
from dmr_pipeline.gpu_check.kernels import TOLERANCE, low_bit_kernels, methods
from dmr_pipeline.gpu_check.record import Part
from dmr_pipeline.gpu_check.sizes import FULL, TINY

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(methods(CPU)))
def test_a_product_is_that_of_the_weights_it_says(method: str) -> None:
    """The product with the identity is the weights themselves, which is how quanto unpacks them."""
    product = methods(CPU)[method](128, 64)
    weights = product.apply(torch.eye(128, dtype=torch.bfloat16)).float().T
    assert weights.shape == product.weights().shape == (64, 128)
    assert float((weights - product.weights()).norm() / weights.norm()) < TOLERANCE
    assert float(weights.std()) > 0.01


def test_a_wrong_product_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: methods(CPU)[name] for name in ("bfloat16", "quanto int4")}
    monkeypatch.setattr("dmr_pipeline.gpu_check.kernels.methods", lambda device: found)
    right, wrong = Part(name="right"), Part(name="wrong")
    low_bit_kernels(TINY, CPU, right)
    assert {check.what.split(":")[0] for check in right.checks if check.passed} == set(found)
    assert {row["method"] for row in right.rows[1:]} == set(found)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda rows, weight, bias=None: rows @ weight.T * 1.1)
    low_bit_kernels(TINY, CPU, wrong)
    assert [check.passed for check in wrong.checks if check.what.startswith("bfloat16")] == [False]


def test_the_layers_are_those_of_the_models() -> None:
    for shape in (*FULL.shapes, *TINY.shapes):
        with torch.device("meta"):
            model = random_model(shape, torch.device("meta"))
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert set(shape.linear_layers.values()) == {(layer.in_features, layer.out_features) for layer in linear}
    parameters = [sum(p.numel() for p in random_model(s, torch.device("meta")).parameters()) for s in FULL.shapes]
    assert [round(n / 1e9, 2) for n in parameters] == [1.72, 4.02]  # as their model cards say: 1.7B and 4.0B
