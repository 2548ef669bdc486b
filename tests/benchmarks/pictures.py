"""The pictures of README.md and docs/, from the JSON files in docs/ that the benchmarks wrote. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]
SHAPE = (4096, 4096)
TOOLS = {"awq_ext": "awq_ext", "vllm": "vLLM", "ark": "ARK", "openvino": "OpenVINO", "torch_int4": "torch int4"}
METHODS = {
    "rtn": "rounding to nearest",
    "llmcompressor gptq": "llm-compressor, GPTQ",
    "llmcompressor awq": "llm-compressor, AWQ",
    "awq_ext awq": "awq_ext, awq",
    "awq_ext gptq": "awq_ext, gptq",
    "awq_ext awq+gptq": "awq_ext, awq+gptq",
}
OURS, OTHERS = "#1f6feb", "#9aa4ae"
COLOURS = {"vllm": "#8250df", "ark": "#bc4c00", "openvino": "#1a7f37", "torch_int4": "#cf222e"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def layer(data: Data, peers: Sequence[str], path: Path) -> None:
    """Speed over rows, one panel a shape."""
    pyplot = _pyplot()
    results = data["results"]
    shapes = list(dict.fromkeys((r["in"], r["out"]) for r in results))
    size = (3.2 * len(shapes), 3.4)
    figure, axes = pyplot.subplots(1, len(shapes), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, (k, n) in zip(axes[0], shapes, strict=True):
        for name, label in (("ours", "awq_ext"), ("int8", "awq_ext, int8"), *((peer, peer) for peer in peers)):
            points = [r for r in results if (r["in"], r["out"]) == (k, n) and name in r["times"]]
            speed = [2 * r["rows"] * n * k / r["times"][name] / 1e9 for r in points]
            axis.loglog(
                [r["rows"] for r in points], speed, marker=".", linewidth=2 if name == "ours" else 1, label=label
            )
        axis.set(title=f"{k} x {n}", xlabel="rows", ylabel="GFLOP/s" if (k, n) == shapes[0] else "")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def rivals(speeds: Data, peers: Data, methods: Data, path: Path) -> None:
    """How fast one int4 layer is beside other tools', a panel for each processor, and how much perplexity 4 bits cost."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(speeds) + 1, figsize=(5 * (len(speeds) + 1), 3.6), layout="constrained")
    for axis, machine in zip(axes, speeds.values(), strict=False):
        _speed(axis, machine)
    _cost(axes[-1], peers, methods)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _speed(axis: Any, machine: Data) -> None:
    results = [r for r in machine["results"] if (r["in"], r["out"]) == SHAPE]
    for name, label in TOOLS.items():
        points = [(r["rows"], r["times"]["bf16"] / r["times"][name]) for r in results if name in r["times"]]
        ours = name == "awq_ext"
        style = {"color": OURS, "linewidth": 2.5} if ours else {"color": COLOURS[name], "linewidth": 1.2}
        axis.plot(*zip(*points, strict=True), marker=".", label=label, zorder=3 if ours else 2, **style)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["rows"] for r in results], [str(r["rows"]) for r in results])
    axis.set(title="One int4 layer: times as fast as torch bf16", xlabel=f"tokens at once\n{machine['processor']}")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _cost(axis: Any, peers: Data, methods: Data) -> None:
    """The mean over texts of how much larger than the float model's the perplexity is."""
    model, group_size = peers["settings"]["model"], peers["settings"]["group_size"]
    base = peers["results"]["float"]["perplexity"]
    plain = methods[model][f"W4 g{group_size}"]["rows"]["rtn"]["measures"]
    found = {"rtn": {text: plain[text]["perplexity"] for text in base}}
    found |= {name: peers["results"][name]["perplexity"] for name in METHODS if name in peers["results"]}
    cost = {name: 100 * statistics.mean(found[name][text] / base[text] - 1 for text in base) for name in METHODS}
    colours = [OURS if name.startswith("awq_ext") else OTHERS for name in METHODS]
    bars = axis.barh([METHODS[name] for name in METHODS], [cost[name] for name in METHODS], color=colours)
    axis.bar_label(bars, [f"{value:.0f} %" for value in cost.values()], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(
        title="Perplexity that 4 bits cost, less is better",
        xlabel=f"above the float model, mean of {len(base)} texts\n{model}, groups of {group_size}",
    )
    axis.spines[["top", "right"]].set_visible(False)
