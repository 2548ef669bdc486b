"""Mixed 4 and 8 bits under a budget beside plain 4 bits: stored bits a weight and KL divergence from the float model.

    python tests/benchmarks/bench_mixed.py MODEL_DIR --calib calib.txt --traffic code.txt de=multi-de.txt ...
        [--budget 5] [--mixed 32 64] [--group-size 32 64 128] [--method awq+gptq awq] [--joined] [--w8a8] [--save DIR]
        [--json out.json]

MODEL_DIR: a local Transformers directory. For each size in --mixed `sensitivity` measures every layer alone, on --probes windows,
and `keep(bits=BUDGET, upper=8)` chooses the layers of 8 bits; the rest is quantized by the first --method. Then each method with
4 bits throughout, in groups of each --group-size. Bits are those of the quantized weights, scales and zeros counted. The
divergence is the mean over the first --tokens tokens of each text. "smaller" is the share of the divergence that a mixed model
saves, with its interval over the windows of all texts. --save writes the mixed models, as compressed-tensors.
--w8a8: layers of 8 bits have one symmetric scale a row, and a mixed model is scored three times: with activations as they are,
with those of its layers of 8 bits rounded to 8 bits by this package's kernel (a scale for each 256 channels of a row), and as
vLLM rounds them (a scale for each row). --save then writes compressed-tensors-w8a8.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.evaluation.evaluate import Evaluation
from awq_ext.reporting.sizes import stored_bits
from awq_ext.reporting.tables import Cell, Table

Scores = dict[str, dict[str, Any]]


def quantized(base: nn.Module, calib: list[Any], **settings: Any) -> tuple[nn.Module, float, float]:
    """A quantized copy, its stored bits a weight, and the seconds it took."""
    model, began = copy.deepcopy(base), time.perf_counter()
    awq_ext.quantize(model, calib, progress=False, fold="always", **settings)
    layers = [row for row in model.awq_report.layers if row.status != "float"]
    return model, stored_bits(layers), time.perf_counter() - began


def eight_bits(model: nn.Module) -> list[awq_ext.QuantLinear]:
    """The layers of 8 bits."""
    return [layer for layer in model.modules() if isinstance(layer, awq_ext.QuantLinear) and layer.bits == 8]


def round_rows(model: nn.Module) -> None:
    """Give the layers of 8 bits inputs that are rounded to 8 bits, one scale for each row; their products stay float32."""

    def rounded(layer: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        x = given[0].float()
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
        return (torch.round(x / scale) * scale,)

    for layer in eight_bits(model):
        layer.compute = "auto"
        layer.register_forward_pre_hook(rounded)
        layer.register_forward_hook(lambda layer, given, y: y.to(layer.dtype))


def shown(scores: Scores, found: dict[str, Evaluation], names: list[str]) -> Table:
    """A line for each model, the mean divergence on each text, and what a mixed one saves of a plain one's."""
    mixed = [label for label in scores if label.startswith("mixed")]  # with their activations in 8 bits, too
    rows = []
    for label, row in scores.items():
        means = [row["kl"][name] for name in names]
        cells = [label, f"{row['bits']:.3f}", *(f"{kl:.4f}" for kl in means), f"{sum(means) / len(means):.4f}"]
        for other in mixed:
            ratio = None if label in mixed else found[other].ratio(found[label], "kl")
            cells.append(
                "" if ratio is None else f"{1 - ratio.value:.0%} ({1 - ratio.high:.0%} to {1 - ratio.low:.0%})"
            )
        rows.append([Cell(cell) for cell in cells])
    head = ["model", "bits a weight", *names, "mean", *(f"{label} is smaller by" for label in mixed)]
    return Table("KL divergence from the float model, nats a token", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, nargs="+", required=True)
    parser.add_argument("--traffic", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--mixed", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--method", nargs="+", default=["awq+gptq", "awq"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--joined", action="store_true", help="one width for q, k and v, as servers want it")
    parser.add_argument(
        "--w8a8", action="store_true", help="layers of 8 bits in whole rows, their activations in 8 bits"
    )
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer, base = hf.load_tokenizer(args.model), hf.load_model(args.model, "auto")
    calib = texts.windows(args.calib, tokenizer, args.samples, args.seq)
    count = -(-args.tokens // args.seq)
    named = {n: texts.windows([p], tokenizer, count, args.seq) for n, p in hf.named_texts(args.traffic).items()}
    scores, whole = Scores(), dict[str, Evaluation]()

    def score(label: str, model: nn.Module, bits: float, seconds: float) -> None:
        each = {name: awq_ext.evaluate(model, windows, reference=base) for name, windows in named.items()}
        measures = [one.measures["kl"] for one in each.values()]
        joined = type(measures[0])(*(torch.cat([getattr(m, part) for m in measures]) for part in ("totals", "counts")))
        some = next(iter(each.values()))
        whole[label] = Evaluation({"kl": joined}, some.bootstrap, len(joined.counts), 0, seconds)
        kl = {name: one["kl"].value for name, one in each.items()}
        scores[label] = {"bits": bits, "seconds": seconds, "kl": kl}
        print(f"{label}: {bits:.3f} bits, {seconds:.0f} s, KL {kl}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"settings": vars(args), "scores": scores}, indent=1, default=str) + "\n")

    for size in args.mixed:
        probe = {"group_size": size, "samples": args.probes, "progress": False}
        found = awq_ext.sensitivity(base, calib, **probe)
        kept = found.keep(bits=args.budget, upper=8, joined=args.joined, whole_rows=args.w8a8)
        print(f"groups of {size}: {kept}", flush=True)
        model, bits, seconds = quantized(base, calib, method=args.method[0], group_size=size, **kept.settings)
        score(f"mixed g{size}", model, bits, seconds)
        if args.save:
            format = "compressed-tensors-w8a8" if args.w8a8 else "compressed-tensors"
            awq_ext.save_pretrained(model, args.save / f"mixed-g{size}", format, tokenizer=tokenizer, verify=True)
        if args.w8a8:
            for layer in eight_bits(model):
                layer.compute = "int8"
            score(f"mixed g{size}, activations of 8 bits", model, bits, seconds)
            round_rows(model)
            score(f"mixed g{size}, activations of 8 bits, a scale a row", model, bits, seconds)
    for size in args.group_size:
        for method in args.method:
            score(f"{method} g{size}", *quantized(base, calib, method=method, group_size=size))
    print(shown(scores, whole, list(named)).to_markdown())


if __name__ == "__main__":
    main()
