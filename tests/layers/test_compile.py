"""A quantized Llama through torch.compile, torch.export, threads and training of an adapter."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext import QuantLinear
from awq_ext.demo.model import VOCABULARY, ByteLlama, ByteLlamaConfig


@pytest.fixture
def model() -> ByteLlama:
    config = ByteLlamaConfig(hidden=64, intermediate=96, blocks=2, query_heads=4, kv_heads=2, context=32)
    batches = [torch.randint(0, VOCABULARY, (2, 12)) for _ in range(2)]
    return awq_ext.quantize(ByteLlama(config).eval(), batches, group_size=32, n_grid=2, progress=False)


def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9))


@pytest.mark.parametrize("compute_dtype", ["auto", "int8"])
def test_compile_sees_one_graph(model: ByteLlama, compute_dtype: str) -> None:
    awq_ext.set_compute_dtype(model, compute_dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = text()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))


def test_compiled_training_reaches_the_norms(model: ByteLlama) -> None:
    ids = text()
    grads = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(ids).logsumexp(-1).sum().backward()
        grads.append(model.norm.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.exhaustive  # it compiles for half a minute
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in inductor's imports
def test_inductor(model: ByteLlama) -> None:
    """The default backend writes C++ for what surrounds the layers; its sums may be in another order."""
    ids = text()
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute_dtype", ["auto", "int8"])
def test_export_and_run(model: ByteLlama, compute_dtype: str) -> None:
    awq_ext.set_compute_dtype(model, compute_dtype)
    ids = text()
    with torch.no_grad():
        exported = torch.export.export(model, (ids,))
        torch.testing.assert_close(exported.module()(ids), model(ids))
    calls = [node for node in exported.graph.nodes if node.target is torch.ops.awq_ext.quant_linear.default]
    assert len(calls) == sum(isinstance(module, QuantLinear) for module in model.modules())
    assert all(("int8" in node.args) == (compute_dtype == "int8") for node in calls)


def test_calls_from_several_threads(model: ByteLlama) -> None:
    inputs = [text() for _ in range(4)]
    with torch.no_grad():
        expected = [model(ids) for ids in inputs]
        found: dict[int, bool] = {}

        def work(index: int) -> None:
            with torch.no_grad():
                found[index] = all(torch.equal(model(inputs[index]), expected[index]) for _ in range(5))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == dict.fromkeys(range(len(inputs)), True)


class Adapter(nn.Module):
    """LoRA: the frozen layer plus a product of two thin matrices."""

    def __init__(self, layer: QuantLinear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_an_adapter_learns_through_the_frozen_layers(model: ByteLlama) -> None:
    model.requires_grad_(False)
    for block in model.layers:
        block.mlp.up_proj = Adapter(block.mlp.up_proj, rank=4)
        block.mlp.down_proj = Adapter(block.mlp.down_proj, rank=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    ids, losses = text(), []
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
