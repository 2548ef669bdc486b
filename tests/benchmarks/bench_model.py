"""Milliseconds a token of a Llama in the shape of Llama-3.2-1B: bf16, and int4 blocks with a head of bf16, int8 or int4.

    python tests/benchmarks/bench_model.py [--blocks 16] [--vocabulary 128256] [--seconds 60] [--threads 2] [--json FILE]

Random weights, tied to the embedding, rounded to nearest: speed does not depend on their values. Decode: forwards of
one token each after a prompt of 16, with the model's cache. Prefill: one forward of --prompt tokens, logits of the last. All of it
also with compute_dtype="int8". The models share their float weights. One round runs every variant once; a time is the least over
all rounds, a ratio that of bf16's to its own.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_generate import decode, prefill
from bench_linear import machine, priority, write
from torch import nn

import awq_ext
from awq_ext.solving.codes import round_to_nearest

HEADS = {"float": 0, "int8": 8, "int4": 4}
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def float_model(blocks: int, vocabulary: int) -> nn.Module:
    """Built in bf16 from the start: it never takes more than it needs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=4096)
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def rounded(linear: nn.Linear, group_size: int, bits: int) -> awq_ext.QuantLinear:
    """A layer of the weight rounded to nearest, without the losses that quantize() would measure."""
    settings = awq_ext.AwqConfig(method="rtn", group_size=group_size, bits=bits)
    return awq_ext.QuantLinear.from_packed(linear, round_to_nearest(linear.weight.detach(), settings))


def variants(base: nn.Module, group_size: int) -> dict[str, nn.Module]:
    """Float and int4 models; those that differ in their heads share all else."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in base.parameters()}
    found, int4 = {"bf16": base}, copy.deepcopy(base, dict(shared))
    head = int4.get_output_embeddings()
    for name, linear in [(n, m) for n, m in int4.named_modules() if isinstance(m, nn.Linear) and m is not head]:
        int4.set_submodule(name, rounded(linear, group_size, 4))
    shared |= {id(t): t for t in (*int4.parameters(), *int4.buffers())}
    for label, bits in HEADS.items():
        found[f"int4, head {label}"] = model = copy.deepcopy(int4, dict(shared))
        if bits:
            model.set_output_embeddings(rounded(head, group_size, bits))
    return found


def least(function: Callable[[nn.Module], float], models: dict[str, nn.Module], seconds: float, compute: str) -> dict:
    """Milliseconds by variant, all in turn until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        if name != "bf16":
            awq_ext.set_compute_dtype(model, compute)
        function(model)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["bf16"]) < 3:
        for name, model in models.items():
            times[name].append(function(model))
    best = {name: min(values) for name, values in times.items()}
    return {
        "ms": {name: 1e3 * value for name, value in best.items()},
        "ratios": {name: best["bf16"] / value for name, value in best.items()},
        "rounds": len(times["bf16"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=8, help="tokens of one timed decode")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of decode and prefill, auto and int8")
    parser.add_argument("--realtime", action="store_true", help="before all other processes while timing (Linux, root)")
    parser.add_argument("--json", type=Path, help="put the figures into this file, beside those of other processors")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = float_model(args.blocks, args.vocabulary)
    ids = torch.randint(0, args.vocabulary, (1, max(args.prompt, 16 + args.new)))
    models = variants(base, args.group_size)
    sizes = {name: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for name, m in models.items()}
    data: dict[str, object] = {
        "machine": machine(),
        "shape": SHAPE | {"blocks": args.blocks, "vocabulary": args.vocabulary},
        "group_size": args.group_size,
        "prompt": args.prompt,
        "bytes": sizes,
    }
    prefill(base, ids[:, :16])  # every thread exists when priorities are set
    with priority(args.realtime):
        for compute in ("auto", "int8"):
            found = {
                "decode": least(lambda m: decode(m, ids, args.new), models, args.seconds, compute),
                "prefill": least(lambda m: prefill(m, ids[:, : args.prompt]), models, args.seconds, compute),
            }
            data[compute] = found
            for kind, figures in found.items():
                print(f"{kind}, {compute}, ms a token (bf16 / it), {figures['rounds']} rounds")
                for name, ms in figures["ms"].items():
                    print(f"  {name:18s} {ms:9.3f}  {figures['ratios'][name]:.2f}x", flush=True)
    if args.json:
        write(args.json, data)


if __name__ == "__main__":
    main()
