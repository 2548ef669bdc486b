"""The tables of bench_rivals.py's figures: for each processor its machine, what was not measured there, and two classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Data = dict[str, Any]
Markdown = Callable[[Iterable[str], Iterable[Iterable[object]]], str]
# What of a processor's instructions decides which kernels tools can use (torch's name) -> in words. Figures of one kind say nothing
# about another.
KINDS = {
    "amx_bf16": "x86 with AMX (Intel Xeon from Sapphire Rapids on)",
    "avx512_bf16": "x86 with AVX-512 and its bf16 products, without AMX (AMD from Zen 4 on)",
    "avx512_f": "x86 with AVX-512, without its bf16 products (Intel's Skylake, Cascade Lake and Ice Lake)",
    "avx2": "x86 with AVX2 only",
    "other": "ARM and others",
}
NAMES = {
    "vllm": "vLLM",
    "ark": "ARK",
    "openvino": "OpenVINO",
    "torch_int4": "torch int4",
    "bf16": "torch bf16",
    "vllm_int8": "vLLM W4A8",
    "ark_int8": "ARK int8",
    "openvino_int8": "OpenVINO int8",
}
CLASSES = {
    "W4A16": ("awq_ext", ("vllm", "ark", "openvino", "torch_int4", "bf16")),
    "W4A8": ("awq_ext_int8", ("vllm_int8", "ark_int8", "openvino_int8", "bf16")),
}
TITLES = {
    "W4A16": "Activations as they are (W4A16)",
    "W4A8": 'Activations in eight bits (W4A8), `compute_dtype="int8"`',
}


def table(machine: Data, kind: str, markdown: Markdown) -> str:
    """One class: our microseconds, and how many times as long each rival takes; the closest is bold."""
    ours, rivals = CLASSES[kind]
    rivals = tuple(name for name in rivals if name in machine["errors"])

    def row(r: Data) -> list[object]:
        ratios = r["ratios"][kind]
        closest = min(ratios.values(), default=None)
        shown = {name: f"**{ratio:.2f}x**" if ratio == closest else f"{ratio:.2f}x" for name, ratio in ratios.items()}
        cells = [shown.get(name, "") for name in rivals]
        return [f"{r['in']} x {r['out']}", r["rows"], f"{r['times'][ours] * 1e6:.0f}", *cells]

    error = ["relative error", "", *(f"{machine['errors'][name]:.4f}" for name in (ours, *rivals))]
    head = ("in x out", "rows", "awq_ext, us", *(NAMES[name] for name in rivals))
    return f"{TITLES[kind]}:\n\n" + markdown(head, [error, *map(row, machine["results"])])


def one_machine(machine: Data, markdown: Markdown, described: Callable[[Data], str]) -> str:
    versions = machine["versions"]
    tools = ", ".join(f"{NAMES[name]} {version}" for name, version in versions.items() if name in NAMES)
    lines = [f"### {machine['processor']}", f"Measured on: {described(machine)}; {tools or 'no other tool'}."]
    lines += [f"Not measured here: {NAMES[name]}. Reason: {reason}." for name, reason in machine["missing"].items()]
    return "\n\n".join([*lines, *(table(machine, kind, markdown) for kind in CLASSES)])


def all_machines(data: Data, markdown: Markdown, described: Callable[[Data], str]) -> str:
    """Every processor that there are figures of, then the kinds that there are none of."""
    have = {machine["kind"] for machine in data.values()}
    none = [words for kind, words in KINDS.items() if kind not in have]
    parts = [one_machine(machine, markdown, described) for machine in data.values()]
    if none:
        parts.append("No figures yet of: " + "; ".join(none) + ".")
    return "\n\n".join(parts)
