"""``awq-ext doctor``."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

from ..reporting.figures import key
from ..reporting.tables import counted
from .console import console_for, fact_table, fail, one_line_errors, write_json
from .options.types import JsonPath, Overwrite

# fp32 sums of some hundred terms in another order differ by about 1e-6; bf16 products would by 1e-2
SELF_TEST_TOLERANCE = 1e-4
FEW, MANY = 1, 512  # rows of a product: generating, and reading a prompt
BUSY = 1.5  # load for each core from which on others take much of our time
PROBE_MILLISECONDS = 400
PRODUCT = (2048, 4096)  # in and out features
# extra -> the modules it brings, as they are imported
EXTRAS = {"hf": ("transformers", "tokenizers"), "report": ("jinja2", "matplotlib")}  # plot is a part of report


def facts() -> list[tuple[str, str]]:
    """List what decides which code runs: (name, value)."""
    import torch

    from .. import _C, __version__, _abi
    from ..evaluation.processor import this_processor
    from ..kernels.cuda import state

    return [
        ("awq_ext", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", str(this_processor())),
        ("torch installed", torch.__version__),
        ("torch built against", _abi.built_version() or "unknown"),
        ("kernels in use", f"{_C.isa()}: {why_these_kernels()}"),
        ("kernels available", ", ".join(_C.available_isas())),
        ("CUDA kernels", state()),
        ("threads", str(torch.get_num_threads())),
        *((job, f"{kernel}: {reason}") for job, kernel, reason in _C.choices()),
    ]


def why_these_kernels() -> str:
    """Say whether the kernels in use were asked for, or are those that are fastest on this kind of processor, and why."""
    from .. import _C

    fastest, reason = _C.default_isa()
    return reason if _C.isa() == fastest else f"asked for by AWQ_EXT_ISA; without it {fastest}: {reason}"


def tile_facts() -> tuple[list[tuple[str, str]], list[str]]:
    """Hold AMX tiles while other threads take the processor away: what was seen, and what is wrong. Nothing without tiles."""
    from .. import _C

    holds, preempted, damaged = _C.probe_tiles(PROBE_MILLISECONDS)
    if not holds:
        return [], []
    seen = f"{preempted} of {counted(holds, 'hold')} interrupted, {damaged} damaged"
    wrong = (
        f"this machine loses AMX tiles when programs take turns on a core ({seen}): results would be wrong. "
        "Set AWQ_EXT_ISA=avx512_vnni"
    )
    return [("AMX tiles", seen if damaged else f"{seen}: safe to use")], [wrong] if damaged else []


def measured_facts(seconds: Mapping[int, Mapping[str, float]]) -> list[tuple[str, str]]:
    """List how fast this machine is: reading memory, measured here, and products of FEW and MANY rows, whose seconds are given."""
    from ..evaluation.cost import read_bandwidth

    found = [("memory read at", f"{read_bandwidth() / 1e9:.1f} GB/s")]
    for title, name in (("float bf16 product", "float"), ("int4 product", "int4")):
        speed = 2 * MANY * math.prod(PRODUCT) / seconds[MANY][name] / 1e9
        found.append(
            (title, f"{speed:,.0f} GFLOP/s with {MANY} rows, {seconds[FEW][name] * 1e6:,.0f} us for {FEW} row")
        )
    if busy := busy_words():
        found.append(("other programs", busy))
    return found


def busy_words() -> str:
    """Say that other programs keep the cores busy, as the load of the last minute tells; "" where they do not."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= BUSY * cores:
        return ""
    return f"load {load:.1f} on {counted(cores, 'core')}: the speeds above are lower than this machine's"


def wrong_kernels() -> list[str]:
    """Try each level of kernels, and those on a GPU, on a small layer; a line for every one whose result is not the reference's."""
    import torch

    from .. import _C, QuantLinear
    from ..kernels import cuda, reference
    from ..layers.quantized_weight import QuantizedWeight

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 192, generator=generator), torch.randn(5, 192, generator=generator)
    codes, scales, zeros = reference.quantize_weight(weight, 64)
    linear = torch.nn.Linear(192, 96, bias=False, device="meta")
    layer = QuantLinear.from_packed(linear, QuantizedWeight.of_codes(codes, scales, zeros, 64))
    expected = x @ reference.dequantize_weight(codes, scales, zeros, 64).T
    chosen, problems = _C.isa(), []
    try:
        for level in _C.available_isas():
            _C.set_isa(level)
            error = ((layer(x) - expected).norm() / expected.norm()).item()
            if not error < SELF_TEST_TOLERANCE:
                problems.append(f"the {level} kernels are off by {error:.2g}")
    finally:
        _C.set_isa(chosen)
    if cuda.found() is not None:
        error = ((layer.to("cuda")(x.cuda()).cpu() - expected).norm() / expected.norm()).item()
        if not error < SELF_TEST_TOLERANCE:
            problems.append(f"the CUDA kernels are off by {error:.2g}: AWQ_EXT_BACKEND=reference does without them")
    return problems


def extras() -> list[tuple[str, str]]:
    """List the optional parts: (extra, the versions it has, or what is missing)."""
    found = []
    for extra, names in EXTRAS.items():
        missing = [name for name in names if find_spec(name) is None]
        if missing:
            found.append((extra, f"missing {', '.join(missing)}: pip install 'awq-ext[{extra}]'"))
        else:
            found.append((extra, ", ".join(f"{name} {metadata.version(name)}" for name in names)))
    return found


@one_line_errors
def doctor(overwrite: Overwrite = False, json_path: JsonPath = None) -> None:
    """Print versions, processor, kernels, speeds and what is missing, and try the kernels; exit code 1 if something is wrong.

    The speeds take two seconds: reading memory, and the products of a bf16 Linear of 2048 x 4096 and of its int4 layer.

    AWQ_EXT_ISA=scalar (or another of the available levels) in the environment chooses other kernels.
    """
    from .. import _C
    from ..evaluation.advice import one_sentence
    from ..evaluation.cost import layer_seconds

    console = console_for(json_path)
    known, optional, problems = facts(), extras(), wrong_kernels()
    seconds = layer_seconds((FEW, MANY), *PRODUCT)
    known += measured_facts(seconds)
    tiles, damage = tile_facts()
    known, problems = [*known, *tiles], [*problems, *damage]
    slower = one_sentence(seconds)
    console.print(fact_table([*known, *((f"extra {extra}", state) for extra, state in optional)]))
    if slower:
        console.print(slower, markup=False, highlight=False)
    jobs = _C.choices()
    names = {job for job, _, _ in jobs}
    figures = {
        "facts": {key(name): value for name, value in known if name not in names},
        "jobs": [{"job": job, "kernel": kernel, "reason": reason} for job, kernel, reason in jobs],
        "extras": dict(optional),
        "problems": problems,
        "seconds": seconds,
        "slower": slower,
    }
    write_json(figures, json_path)
    if problems:
        raise fail("; ".join(problems))
    console.print("[green]every level of kernels computes what the reference computes[/green]")
