"""Writes the tables of figures in README.md and docs/ from the JSON files in docs/ that the benchmarks wrote.

    python tests/benchmarks/tables.py    # writes the tables, docs/bench_linear.png and docs/rivals.png (needs matplotlib)

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`; nothing else is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import device_tables
import original_tables
import pictures
import quality_tables as quality
import rival_tables
import sweep_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "docs/speed.md",
    "docs/architectures.md",
    "docs/quality.md",
    "docs/research.md",
    "docs/methods.md",
    "docs/cuda.md",
)
PEERS = ("bf16", "fp16", "fp32", "aten_int4")
SUMMARY_SHAPE = (4096, 4096)
Data = dict[str, Any]


def read(name: str) -> Data:
    return json.loads((ROOT / "docs" / f"{name}.json").read_text())


def described(data: Data) -> str:
    """The machine, in words."""
    m = data["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, instruction set {m['isa']}, {m['threads']} threads, torch {m['torch']}"
    )


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---", *(["--:"] * (len(lines[0]) - 1))])
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def linear() -> str:
    """Every shape and number of rows; the closest peer is bold."""
    data = read("bench_linear")

    def row(r: Data) -> list[object]:
        closest = min(r["ratios"].values())
        cells = [times(r["ratios"].get(peer)) for peer in PEERS]
        cells = [
            f"**{cell}**" if r["ratios"].get(peer) == closest else cell for peer, cell in zip(PEERS, cells, strict=True)
        ]
        share = f"{r['share_of_read']:.0%}" if r["rows"] <= 4 else ""
        numbers = [f"{r['times']['ours'] * 1e6:.0f}", f"{r['gflops']:.0f}", share]
        return [f"{r['in']} x {r['out']}", r["rows"], *numbers, *cells, times(r["int8_ratios"]["bf16"])]

    head = (
        "in x out",
        "rows",
        "awq_ext, us",
        "GFLOP/s",
        "of read bandwidth",
        "bf16",
        "fp16",
        "fp32",
        "torch's int4",
        "int8: bf16",
    )
    return f"Measured on: {described(data)}.\n\n" + markdown(head, map(row, data["results"]))


def limits() -> str:
    """One row: what reading the weight once would take, and how far ahead of torch's int4 kernel that could be."""

    def row(r: Data) -> list[str]:
        t, nbytes = r["times"], r["bytes_per_second"] * r["times"]["ours"]
        floor = nbytes / r["read_bytes_per_second"]
        cells = [f"{nbytes / 1e6:.2f}", f"{r['read_bytes_per_second'] / 1e9:.1f}"]
        cells += [f"{seconds * 1e6:.0f}" for seconds in (floor, t["ours"], t["aten_int4"])]
        return [f"{r['in']} x {r['out']}", *cells, times(t["aten_int4"] / floor), times(r["ratios"]["aten_int4"])]

    head = (
        "one row",
        "MB",
        "plain read, GB/s",
        "plain read, us",
        "awq_ext, us",
        "torch's int4, us",
        "torch's int4 / read",
        "torch's int4 / awq_ext",
    )
    return markdown(head, (row(r) for r in read("bench_linear")["results"] if r["rows"] == 1))


def summary() -> str:
    """One shape, for the README."""
    data = read("bench_linear")
    chosen = [r for r in data["results"] if (r["in"], r["out"]) == SUMMARY_SHAPE]
    head = ("rows of activations", *(str(r["rows"]) for r in chosen))
    rows = [["microseconds", *(f"{r['times']['ours'] * 1e6:.0f}" for r in chosen)]]
    for peer, name in (("bf16", "faster than torch's bf16 Linear"), ("aten_int4", "faster than torch's int4 kernel")):
        rows.append([name, *(times(r["ratios"].get(peer)) for r in chosen)])
    rows.append(['`compute_dtype="int8"`, faster than bf16', *(times(r["int8_ratios"]["bf16"]) for r in chosen)])
    return markdown(head, rows) + f"\n\n{SUMMARY_SHAPE[0]} x {SUMMARY_SHAPE[1]}, groups of 128. {described(data)}."


def generate() -> str:
    data = read("bench_generate")
    head = ("tokens/s", *data["variants"], "int4 / bf16", "int8 / bf16")
    rows = []
    for name, title in (("decode", "decode, one sequence"), ("prefill", f"prefill of {data['prompt']} tokens")):
        speeds, ratios = data[name]["tokens_per_second"], data[name]["ratios"]
        rows.append(
            [title, *(f"{speeds[v]:.0f}" for v in data["variants"]), times(ratios["int4"]), times(ratios["int8"])]
        )
    return f"{data['model']}, groups of {data['group_size']}. {described(data)}.\n\n" + markdown(head, rows)


def model() -> str:
    return "\n\n".join(one_model(data) for data in read("bench_model").values())


def one_model(data: Data) -> str:
    head = ("", "MB", "decode", "prefill", 'decode, "int8"', 'prefill, "int8"')
    cells = [(compute, job) for compute in ("auto", "int8") for job in ("decode", "prefill")]
    rows = []
    for name, size in data["bytes"].items():
        figures = [(data[compute][job]["ms"][name], data[compute][job]["ratios"][name]) for compute, job in cells]
        rows.append([name, f"{size / 1e6:,.0f}", *(f"{ms:.1f} ({times(ratio)})" for ms, ratio in figures)])
    about = f"Milliseconds a token (speed beside bf16), prefill of {data['prompt']} tokens. {described(data)}."
    return f"{about}\n\n" + markdown(head, rows)


def int8() -> str:
    data = read("bench_int8")
    rows = [
        [text, *(f"{row[v]:.3f}" for v in ("float", "auto", "int8")), f"{row['int8'] / row['auto'] - 1:+.2%}"]
        for text, row in data["perplexity"].items()
    ]
    head = ("perplexity", "bf16 model", 'int4, "auto"', 'int4, "int8"', "int8 / auto")
    return f"{data['model']}, {data['tokens']} tokens of each text.\n\n" + markdown(head, rows)


def pack() -> str:
    data = read("bench_pack")
    rows = [
        [name, f"{r['seconds'] * 1e3:.2f}", f"{r['bytes'] / r['seconds'] / 1e9:.1f}", f"{r['share_of_read']:.0%}"]
        for name, r in data["results"].items()
    ]
    text = f"{data['out']} x {data['in']}. {described(data)}.\n\n"
    text += markdown(("", "ms", "GB/s, read and written", "of read bandwidth"), rows)
    if peer := data.get("autoawq"):
        text += (
            f"\n\nAutoAWQ {peer['version']}'s `WQLinear_GEMM.from_linear` on the same shape: {peer['seconds']:.2f} s; "
            f"quantizing, packing and tiling here: {data['results']['from float to layer']['seconds'] * 1e3:.1f} ms, "
            f"{peer['seconds'] / data['results']['from float to layer']['seconds']:.0f} times faster."
        )
    return text


def folds() -> str:
    """Every architecture: scale groups by what takes their 1/s."""
    groups = read("folds")["groups"]
    kinds = list(next(iter(groups.values())))
    rows = ([name, sum(counts.values()), *counts.values()] for name, counts in groups.items())
    return markdown(("architecture", "groups", *kinds), rows)


def folded() -> str:
    """For the README: architectures by the share of their groups that need no division at run time."""
    shares: dict[str, list[str]] = {"all": [], "half or more": [], "fewer": []}
    for name, counts in read("folds")["groups"].items():
        part, whole = counts["norm"] + counts["linear"], sum(counts.values()) - counts["unscaled"]
        key = "all" if part == whole else "half or more" if 2 * part >= whole else "fewer"
        shares[key].append(name if key == "all" else f"{name} ({part} of {whole})")
    return "| scale groups that fold | |\n| --- | --- |\n" + "\n".join(
        f"| {key} | {' · '.join(names)} |" for key, names in shares.items()
    )


def peers(name: str) -> str:
    data = read(name)
    return quality.peers(data, markdown, described(data))


def rivals() -> str:
    return rival_tables.all_machines(read("bench_rivals"), markdown, described)


TABLES = {
    "rivals": rivals,
    "device": lambda: device_tables.tables(read("bench_device"), markdown),
    "folds": folds,
    "folded": folded,
    "sweep": lambda: sweep_table.counts(read("sweep"), markdown),
    "linear": linear,
    "limits": limits,
    "summary": summary,
    "generate": generate,
    "model": model,
    "int8": int8,
    "pack": pack,
    "methods": lambda: quality.all_cells(read("bench_methods"), markdown),
    "methods_summary": lambda: quality.summary(read("bench_methods"), markdown),
    "choices": lambda: quality.choices(read("bench_choices"), markdown),
    "heads": lambda: quality.heads(read("bench_head"), markdown),
    "peers": lambda: peers("bench_peers"),
    "peers_blocks": lambda: peers("bench_peers_blocks"),
    "peers_learned": lambda: peers("bench_peers_learned"),
    "original_models": lambda: original_tables.sources(read("bench_original"), markdown),
    "original": lambda: original_tables.shares(read("bench_original"), markdown),
    "original_perplexity": lambda: original_tables.perplexities(read("bench_original"), markdown),
    "lm_eval": lambda: original_tables.tasks(read("bench_lm_eval"), markdown),
}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rendered(document: str) -> str:
    """The document's text with every table made anew."""
    text = (ROOT / document).read_text()
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    for document in DOCUMENTS:
        (ROOT / document).write_text(rendered(document))
    pictures.layer(read("bench_linear"), PEERS, ROOT / "docs" / "bench_linear.png")
    pictures.rivals(read("bench_rivals"), read("bench_peers_learned"), ROOT / "docs" / "rivals.png")


if __name__ == "__main__":
    main()
