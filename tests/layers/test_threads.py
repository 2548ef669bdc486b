"""Quantized layers called from several Python threads at once: the results are those of one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
from torch import Tensor, nn

import awq_ext

THREADS = 8


def quantized(name: str, compute: str) -> tuple[nn.Module, list[Tensor]]:
    case = models.make(name)
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    return awq_ext.set_compute_dtype(model, compute), list(case.batches)


@pytest.mark.fault(
    "Processes and threads",
    "Two models are called from eight threads at once, compute={compute}",
    "The results are those of one call after the other",
)
@pytest.mark.parametrize("compute", ["auto", "int8"])
@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_two_models_in_eight_threads(compute: str, threads_of_torch: int) -> None:
    """Rows of many numbers, so that scratch memory is of many sizes."""
    pairs = [quantized("mlp", compute), quantized("llama", compute)]
    work = [(model, batch[:rows]) for model, batches in pairs for batch in batches for rows in (1, 2, 3)] * 10
    torch.set_num_threads(threads_of_torch)
    with torch.no_grad():
        expected = [model(x) for model, x in work]

    def run(item: tuple[nn.Module, Tensor]) -> Tensor:
        with torch.no_grad():
            return item[0](item[1])

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, work))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.fault(
    "Processes and threads",
    "Several models are quantized in threads at once",
    "The results are those of one after the other",
)
def test_models_are_quantized_in_several_threads() -> None:
    def run(seed: int) -> Tensor:
        model, batches = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        batches.append(torch.randn(40, 64, generator=generator))
        awq_ext.quantize(model, batches, group_size=16, n_grid=3, progress=False)
        return model(batches[0]).detach()

    expected = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
