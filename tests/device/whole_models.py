"""Whole models on a GPU: python tests/device/whole_models.py [--blocks N] [--json FILE] [--emulated], as run.sh runs it.

Prints one line of JSON after another: microseconds of one call of nn.Linear and QuantLinear, with Python's part; milliseconds for
each token that a Llama with random weights generates in bf16 and in 4 bits; seconds and memory of quantizing it; the divergence of
the demo's model by each method, on the GPU and on the CPU. With --emulated all lines run, at tiny sizes, and times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu as device
import torch
from llama import llama
from torch import nn

import awq_ext
from awq_ext.demo import data
from awq_ext.demo.model import load_demo_model

METHODS: dict[str, dict[str, str]] = {name: {"method": name} for name in ("rtn", "awq", "gptq", "awq+gptq")} | {
    name: {"effort": name} for name in ("fast", "balanced", "best")
}
VOCABULARY = 32_000  # smaller than Llama-3.2-1B's
WHOLE = ("awq", "awq+gptq", "balanced")
Result = dict[str, Any]


def seconds_of_a_call(call: Callable[[], object], gpu: device.Gpu, count: int) -> float:
    for _ in range(count // 10 + 1):
        call()
    gpu.wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    gpu.wait()
    return (time.perf_counter() - start) / count


def calls(gpu: device.Gpu) -> Iterator[Result]:
    size, count = (2048, 1000) if gpu.real else (64, 3)
    linear = nn.Linear(size, size, bias=False, device=gpu.device, dtype=torch.bfloat16)
    quantized = awq_ext.QuantLinear(size, size, 32, bias=False, device=gpu.device, dtype=torch.bfloat16)
    for rows in (1, 40):
        x = torch.randn(1, rows, size, device=gpu.device, dtype=torch.bfloat16)
        for name, layer in (("linear", linear), ("quant_linear", quantized)):
            yield {"call": name, "rows": rows, "us": seconds_of_a_call(lambda f=layer, x=x: f(x), gpu, count) * 1e6}


def milliseconds_a_token(model: nn.Module, gpu: device.Gpu) -> float:
    prompt, count = (128, 64) if gpu.real else (4, 2)
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), device=gpu.device)
    with torch.no_grad():
        out = model(tokens, use_cache=True)

        def step() -> None:
            nonlocal out
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

        return seconds_of_a_call(step, gpu, count) * 1e3


def whole_models(gpu: device.Gpu, blocks: int) -> Iterator[Result]:
    model = llama(gpu, blocks, VOCABULARY)
    length, count = (512, 16) if gpu.real else (16, 2)
    batches = [torch.randint(0, model.config.vocab_size, (1, length), device=gpu.device) for _ in range(count)]
    size = {} if gpu.real else {"group_size": 32}
    before = min(milliseconds_a_token(model, gpu) for _ in range(3))
    for name in WHOLE:
        model = llama(gpu, blocks, VOCABULARY)
        if gpu.real:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        awq_ext.quantize(model, batches, progress=False, **METHODS[name], **size)
        gpu.wait()
        row: Result = {"model": name, "blocks": blocks, "seconds": time.perf_counter() - start}
        if gpu.real:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if name == WHOLE[0]:
            after = min(milliseconds_a_token(model, gpu) for _ in range(3))
            row |= {"bf16_ms_a_token": before, "int4_ms_a_token": after}
        yield row


def demo_models(gpu: device.Gpu) -> Iterator[Result]:
    tokens, count, names = (16384, 8, list(METHODS)) if gpu.real else (512, 1, ["rtn", "awq"])
    for place in (gpu.device, "cpu"):
        windows = [window.to(place) for window in data.held_out_tokens(tokens).split(8)]
        batches = [batch.to(place) for batch in data.calibration_batches(count)]
        model = load_demo_model(torch.float32).to(place)
        for name in names:
            other = load_demo_model(torch.float32).to(place)
            awq_ext.quantize(other, batches, group_size=64, progress=False, **METHODS[name])
            found = awq_ext.evaluate(other, windows, reference=model)
            yield {"demo": name, "device": place, "kl": found.measures["kl"].value}


def main() -> None:
    """Run from the command line. The file is written anew after every line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU, at tiny sizes")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="calibrated without the texts that ship with the package"
    )  # no tokenizer here
    found: list[Result] = []
    with device.chosen(options.emulated) as gpu:
        for part in (calls(gpu), whole_models(gpu, options.blocks if gpu.real else 1), demo_models(gpu)):
            for row in part:
                found.append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
