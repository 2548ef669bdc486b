"""Times the CUDA kernels beside torch and other tools: python tests/device/bench.py [--seconds N] [--json FILE] [--emulated].

Of a Linear: microseconds, the share of the memory's bandwidth with which its codes are read, and the share of cuBLAS's bf16 product
of the same sizes, all measured in one run; and microseconds of the kernels that every GPU and every group size has. Of quantizing:
seconds of each kernel and of one Llama-3.2-1B block, beside plain torch.
With --emulated all lines run, at tiny sizes, and the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu as device
import rivals
import torch
from llama import llama
from torch import Tensor, nn

import awq_ext
from awq_ext.kernels import cuda, reference

Row = dict[str, Any]
GROUP = 128
# (out_features, in_features) of Llama-3.2-1B, and of an 8B model
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
COLD_BYTES = 256 << 20  # of weights that take turns: several times a GPU's cache


def bandwidth(gpu: device.Gpu) -> float:
    """Bytes per second that are read and written when a large tensor is doubled: a kernel, as a mere copy in a graph is none."""
    source = torch.ones((1 << 28) if gpu.real else 1 << 14, device=gpu.device)
    target = torch.empty_like(source)
    return 8 * source.numel() / gpu.seconds([lambda: torch.add(source, source, out=target)])


def packed(n: int, k: int, bits: int, gpu: device.Gpu) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight in the compute layout."""
    width = k if bits == 8 else k // 2
    rows = torch.randint(0, 256, (n, width), dtype=torch.uint8, device=gpu.device)
    scales = torch.rand(n, k // GROUP, device=gpu.device).half() * 0.01
    zeros = torch.full((n, k // GROUP), 2 ** (bits - 1), dtype=torch.uint8, device=gpu.device)
    return cuda.tile_codes(rows, k, GROUP, bits), reference.tile_scales(scales), reference.tile_zeros(zeros, bits)


def bench_linear(gpu: device.Gpu, read: float, n: int, k: int, bits: int) -> Iterator[Row]:
    """Time a layer with each number of rows; rivals only beside four bits."""
    nbytes = n * k * bits // 8 + n * (k // GROUP) * 3
    copies = max(1, min(64, COLD_BYTES // nbytes)) if gpu.real else 2
    weights = [packed(n, k, bits, gpu) for _ in range(copies)]
    floats = [torch.randn(n, k, dtype=torch.bfloat16, device=gpu.device) for _ in range(max(1, min(copies, 8)))]
    others = rivals.make(gpu, n, k, GROUP, copies) if bits == 4 else {}
    for rows in ROWS if gpu.real else (1, 40):
        x = torch.randn(rows, k, dtype=torch.bfloat16, device=gpu.device)

        def ours(parts: tuple[Tensor, Tensor, Tensor], x: Tensor = x) -> Callable[[], object]:
            return lambda: cuda.quant_linear(x, *parts, None, None, k, n, GROUP, bits)

        seconds = gpu.seconds([ours(parts) for parts in weights])
        with device.wgmma("0"), device.asked("FEW", "0"):
            basic = gpu.seconds([ours(parts) for parts in weights])
        blas = gpu.seconds([lambda w=w, x=x: nn.functional.linear(x, w) for w in floats])
        row: Row = {"out_features": n, "in_features": k, "bits": bits, "rows": rows, "us": seconds * 1e6}
        row |= {
            "share_of_bandwidth": nbytes / seconds / read,
            "cublas_bf16_us": blas * 1e6,
            "cublas_over_ours": blas / seconds,
            "basic_us": basic * 1e6,
        }
        row["tflops"] = 2 * rows * n * k / seconds / 1e12
        for name, rival in others.items():
            row[name] = rival if isinstance(rival, str) else rivals.timed(gpu, rival, x)
        yield row


def quantizing(gpu: device.Gpu) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """The kernels of quantizing, as functions of the module that has them."""
    n, k, rows = (8192, 2048, 2048) if gpu.real else (9, 128, 20)
    x = torch.randn(rows, k, device=gpu.device).bfloat16()
    moment = x.float().T @ x.float() + torch.eye(k, device=gpu.device)
    weight = torch.randn(n, k, device=gpu.device).bfloat16()
    candidates = torch.rand(4, k, device=gpu.device) + 0.5
    ratios, order = torch.linspace(1, 0.5, 6, device=gpu.device), torch.arange(k, device=gpu.device)
    factor, parts = reference.gptq_factor(moment, order), reference.quantize_weight(weight, GROUP)
    some = weight[: max(1, n // 8)]
    yield "statistics", lambda f: f.ActivationStats(k, device=gpu.device).update(x)
    yield "quantize_weight", lambda f: f.quantize_weight(weight, GROUP)
    yield "tile_codes", lambda f: f.tile_codes(f.pack_int4(parts[0]), k, GROUP, 4)
    yield "scale_losses", lambda f: f.scale_losses(weight, candidates, moment, GROUP)
    yield "search_clip", lambda f: f.search_clip(some, moment, ratios, GROUP)
    yield "gptq_quantize", lambda f: f.gptq_quantize(some, factor, order, GROUP)
    some_parts = [part[: len(some)].contiguous() for part in parts]
    yield "refine_scales", lambda f: f.refine_quantized(some, *some_parts, moment, GROUP, scales_only=True)


def llama_block(gpu: device.Gpu) -> tuple[nn.Module, list[Tensor]]:
    """A model of one block, and its calibration batches."""
    model = llama(gpu, blocks=1, vocabulary=1024)
    length, count = (512, 32) if gpu.real else (16, 4)
    vocabulary = model.config.vocab_size
    return model, [torch.randint(0, vocabulary, (1, length), device=gpu.device) for _ in range(count)]


def block_seconds(gpu: device.Gpu, backend: str) -> list[float]:
    """Seconds of quantizing that block twice, with our kernels ("compiled") or plain torch ("reference").

    A time before, which does not count, libraries set themselves up.
    """
    return [quantized_block(gpu, backend) for _ in range(3 if gpu.real else 2)][1:]


def quantized_block(gpu: device.Gpu, backend: str) -> float:
    model, batches = llama_block(gpu)
    before = os.environ.get("AWQ_EXT_BACKEND")
    os.environ["AWQ_EXT_BACKEND"] = backend
    try:
        gpu.wait()
        start = time.perf_counter()
        awq_ext.quantize(model, batches, group_size=GROUP if gpu.real else 32, n_grid=20 if gpu.real else 2)
        gpu.wait()
        return time.perf_counter() - start
    finally:
        if before is None:
            del os.environ["AWQ_EXT_BACKEND"]
        else:
            os.environ["AWQ_EXT_BACKEND"] = before


def measure(gpu: device.Gpu, until: float) -> Iterator[tuple[str, Any]]:
    """Yield (kind, result) one after another, the most telling first; stops when the time is up."""
    read = bandwidth(gpu)
    yield "bandwidth", read
    for backend in ("compiled", "reference"):
        try:
            yield f"block_seconds_{backend}", block_seconds(gpu, backend)
        except Exception as error:
            yield "problem", f"block, {backend}: {type(error).__name__}: {error}"
    for name, run in quantizing(gpu):
        row: Row = {
            "name": name,
            "ours": gpu.eager(lambda run=run: run(cuda)),
            "torch": gpu.eager(lambda run=run: run(reference)),
        }
        yield "quantizing", row | {"torch_over_ours": row["torch"] / row["ours"]}
    for bits in (4, 8):
        for n, k in SHAPES if gpu.real else ((64, 128),):
            if time.perf_counter() > until:
                yield "problem", f"no time was left for {bits} bits, {n} x {k}"
                continue
            for row in bench_linear(gpu, read, n, k, bits):
                yield "linear", row


def main() -> None:
    """Run from the command line. The file is written anew after every result: what was measured stays if the run is stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new sizes are begun after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with device.chosen(options.emulated) as gpu:
        results: Row = {"facts": gpu.facts(), "linear": [], "quantizing": [], "problems": []}
        for kind, result in measure(gpu, time.perf_counter() + options.seconds):
            if kind in ("linear", "quantizing"):
                results[kind].append(result)
            elif kind == "problem":
                results["problems"].append(result)
            else:
                results[kind] = result
            print(kind, json.dumps(result), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
