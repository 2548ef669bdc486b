"""Results of the demo from made-up figures."""

from __future__ import annotations

import torch

from awq_ext.demo import run
from awq_ext.evaluation.bootstrap import Bootstrap, Measure
from awq_ext.evaluation.comparison import FLOAT, Comparison, Variant
from awq_ext.evaluation.evaluate import Evaluation

RESAMPLES = Bootstrap(resamples=500)


def scored(label: str, divergences: list[float] | None, windows: int) -> Variant:
    """A row of the comparison, from the divergence of each window in nats a byte; None for the float model."""
    ones = torch.ones(windows, dtype=torch.float64)
    measures = {"perplexity": Measure(ones, ones, torch.exp)}
    if divergences is not None:
        measures["kl"] = Measure(torch.tensor(divergences, dtype=torch.float64), ones)
    evaluation = Evaluation(measures, RESAMPLES, windows, windows, 0.1)
    config = None if divergences is None else run.METHODS[label]
    simulated = config is not None and not config["packed"]
    return Variant(label, config, 10_000, 1.0, simulated, {run.TEXT: evaluation})


def compared(rtn: list[float], awq: list[float], best: list[float]) -> Comparison:
    """RTN, AWQ and AWQ+GPTQ beside the float model, the same figures at all widths."""
    rows = [scored(FLOAT, None, len(rtn))]
    for bits in run.BITS:
        for method, divergences in ((run.RTN, rtn), *zip(run.OTHERS, (awq, best), strict=True)):
            rows.append(scored(f"{method} {bits} bit", divergences, len(rtn)))
    return Comparison(rows, [run.TEXT], 1, RESAMPLES)


def layer(decode: tuple[float, float], prefill: tuple[float, float]) -> run.LayerCost:
    """A layer of 4096 x 4096: seconds in bf16 and in int4."""
    took = {run.DECODE: decode, run.PREFILL: prefill}
    seconds = {rows: dict(zip(("float", "int4"), pair, strict=True)) for rows, pair in took.items()}
    return run.LayerCost(*run.LAYER, 2 * 4096 * 4096, 8_716_288, seconds)
