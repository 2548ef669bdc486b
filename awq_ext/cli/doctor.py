"""``awq-ext doctor``."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec

from .options import JsonPath, Overwrite, console_for, fact_table, fail, one_line_errors, write_json

# fp32 sums of some hundred terms in another order differ by about 1e-6; bf16 products would by 1e-2
SELF_TEST_TOLERANCE = 1e-4
# extra -> the modules it brings, as they are imported
EXTRAS = {"hf": ("transformers", "tokenizers"), "report": ("jinja2", "matplotlib"), "plot": ("matplotlib",)}


def facts() -> list[tuple[str, str]]:
    """List what decides which code runs: (name, value)."""
    import torch

    from .. import _C, __version__, _abi
    from ..evaluation.cost import read_bandwidth

    return [
        ("awq_ext", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch installed", torch.__version__),
        ("torch built against", _abi.built_version() or "unknown"),
        ("kernels in use", _C.isa()),
        ("kernels available", ", ".join(_C.available_isas())),
        ("threads", str(torch.get_num_threads())),
        ("memory read at", f"{read_bandwidth() / 1e9:.1f} GB/s"),
    ]


def wrong_kernels() -> list[str]:
    """Try each level of kernels on a small layer; a line for every one whose result is not the reference's."""
    import torch

    from .. import _C, QuantLinear
    from ..kernels import reference
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
    """Print versions, kernels, threads, memory speed and what is missing, and try the kernels; exit code 1 if something is wrong.

    AWQ_EXT_ISA=scalar (or another of the available levels) in the environment chooses other kernels.
    """
    console = console_for(json_path)
    known, optional, problems = facts(), extras(), wrong_kernels()
    console.print(fact_table([*known, *((f"extra {extra}", state) for extra, state in optional)]))
    write_json({"facts": dict(known), "extras": dict(optional), "problems": problems}, json_path)
    if problems:
        raise fail("; ".join(problems))
    console.print("[green]every level of kernels computes what the reference computes[/green]")
