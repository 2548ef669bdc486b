"""The tables of tests/device/bench.py's figures on one GPU, from docs/bench_device.json: what bench.py writes, and the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
Markdown = Callable[[Iterable[str], Iterable[Iterable[object]]], str]
ROWS = (1, 8, 16, 64, 512, 2048)


def layers(data: Data, bits: int, markdown: Markdown) -> str:
    """A line for each size: microseconds, and in brackets how many times as long cuBLAS (bf16) and torch's int4 kernel take."""
    found = {(r["out_features"], r["in_features"], r["rows"]): r for r in data["linear"] if r["bits"] == bits}

    def cell(r: Data | None) -> str:
        if r is None:
            return ""
        rivals = ("cublas_bf16_us", "int4pack_mm_us")[: 2 if r["rows"] <= 64 else 1]
        ratios = [r[name] / r["us"] for name in rivals if name in r]
        return f"{r['us']:.1f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"

    sizes = sorted({(n, k) for n, k, _ in found}, key=lambda size: (size[0] * size[1], size[0]))
    lines = [[f"{k} x {n}", *(cell(found.get((n, k, rows))) for rows in ROWS)] for n, k in sizes]
    return markdown(("in x out", *(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS)), lines)


def tables(data: Data, markdown: Markdown) -> str:
    facts = data["facts"]
    ours, torch = (
        " and ".join(f"{seconds:.2f}" for seconds in data[f"block_seconds_{name}"])
        for name in ("compiled", "reference")
    )
    parts = [
        f"{facts['device']}, torch {facts['torch']}, groups of 128, bf16 activations, many copies of the weight in "
        "turn, so that none is in a cache. "
        f"Measured at commit {data['commit']}. The memory reads and writes {data['bandwidth'] / 1e12:.1f} TB/s.",
        "Microseconds of a layer with 4 bits. In brackets: how many times as fast it is as cuBLAS in bf16 and, up to 64 rows, as "
        "torch's int4 kernel. A row is a token.",
        layers(data, 4, markdown),
        "The same with 8 bits, cuBLAS only:",
        layers(data, 8, markdown),
        "Milliseconds of a kernel of quantizing, for a weight of 2048 x 8192, the last three for one of 2048 x 1024:",
        markdown(
            ("", "awq_ext", "plain torch", "times faster"),
            (
                [f"`{r['name']}`", *(f"{1e3 * r[who]:.3f}" for who in ("ours", "torch")), f"{r['torch_over_ours']:.1f}"]
                for r in data["quantizing"]
            ),
        ),
        "A block of Llama-3.2-1B, method `awq`, 32 x 512 tokens, groups of 128, two runs after a first that sets libraries up: "
        f"{ours} s; plain torch {torch} s.",
    ]
    return "\n\n".join(parts)
