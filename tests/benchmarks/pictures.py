"""The pictures of README.md and docs/, from the JSON files in docs/ that the benchmarks wrote. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Data = dict[str, Any]
SHAPE = (4096, 4096)
TOOLS = {"awq_ext": "awq_ext", "vllm": "vLLM", "ark": "ARK", "openvino": "OpenVINO", "torch_int4": "torch int4"}
PEERS = {"aten_int4": "torch int4"}
METHODS = {
    "llmcompressor gptq": "llm-compressor, GPTQ",
    "awq_ext rtn": "rounding to nearest",
    "auto-round": "AutoRound",
    "auto-round light": "AutoRound, light",
    "llmcompressor awq": "llm-compressor, AWQ",
    "awq_ext awq": "awq_ext, awq",
    "awq_ext awq+gptq": "awq_ext, awq+gptq",
    "awq_ext fast": "awq_ext, fast",
    "awq_ext balanced": "awq_ext, balanced",
    "awq_ext best": "awq_ext, best",
}
_ACROSS = 3  # panels
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
    lines = -(-len(shapes) // _ACROSS)
    size = (3.4 * _ACROSS, 3 * lines)
    figure, axes = pyplot.subplots(lines, _ACROSS, figsize=size, squeeze=False, layout="constrained", sharey=True)
    names = {"ours": "awq_ext", "int8": "awq_ext, int8", **{peer: PEERS.get(peer, f"torch {peer}") for peer in peers}}
    for axis, (k, n) in zip(axes.flat, shapes, strict=True):
        for name, label in names.items():
            points = [r for r in results if (r["in"], r["out"]) == (k, n) and name in r["times"]]
            speed = [2 * r["rows"] * n * k / r["times"][name] / 1e9 for r in points]
            axis.loglog(
                [r["rows"] for r in points], speed, marker=".", linewidth=2 if name == "ours" else 1, label=label
            )
        axis.set(title=f"{k} x {n}", xlabel="rows", ylabel="GFLOP/s" if axis in axes[:, 0] else "")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def rivals(speeds: Data, peers: Data, path: Path) -> None:
    """How fast one int4 layer is beside other tools', a panel for each processor, and how far 4 bits are from the float model."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(speeds) + 1, figsize=(5 * (len(speeds) + 1), 3.8), layout="constrained")
    for axis, machine in zip(axes, speeds.values(), strict=False):
        _speed(axis, machine)
    _cost(axes[-1], peers)
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
    axis.set(
        title="One int4 layer: times as fast as torch bf16", xlabel=f"tokens at once\n{_known(machine['processor'])}"
    )
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


# By what numbers a benchmark knows a processor -> the name by which people know it.
KNOWN = {
    "AuthenticAMD, family 25, model 17": "Zen 4",
    "GenuineIntel, family 6, model 207": "Emerald Rapids, with AMX",
}


def _known(processor: str) -> str:
    for numbers, name in KNOWN.items():
        processor = processor.replace(numbers, name)
    return processor


def _cost(axis: Any, peers: Data) -> None:
    """The mean over texts of the divergence from the float model, and the seconds that quantizing took."""
    model, group_size = peers["settings"]["model"], peers["settings"]["group_size"]
    found = {name: peers["results"][name] for name in METHODS}
    texts = len(peers["results"]["float"]["divergence"])
    cost = {name: statistics.mean(one["divergence"].values()) for name, one in found.items()}
    colours = [OURS if name.startswith("awq_ext") and name != "awq_ext rtn" else OTHERS for name in METHODS]
    bars = axis.barh([METHODS[name] for name in METHODS], [cost[name] for name in METHODS], color=colours)
    took = {name: "" if name == "awq_ext rtn" else f" ({_time(one['seconds'])})" for name, one in found.items()}
    axis.bar_label(bars, [f"{value:.2f}{took[name]}" for name, value in cost.items()], padding=3, fontsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set(
        title="Distance from the float model (time to quantize)",
        xlabel=f"mean KL divergence on {texts} texts, less is better\n{model}, 4 bits, groups of {group_size}",
    )
    axis.spines[["top", "right"]].set_visible(False)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
