"""Show the demo in the terminal: four parts, each a small table and what its figures say."""

from __future__ import annotations

import time

import torch
from rich.console import Console, RenderableType

from ..evaluation.bootstrap import Estimate
from ..evaluation.comparison import FLOAT, Comparison, plus_minus
from ..reporting.tables import Cell, Table, counted, shared_scales
from .run import (
    BITS,
    DECODE,
    OTHERS,
    PREFILL,
    RTN,
    TEXT,
    DemoResult,
    LayerCost,
    compare_methods,
    measure_layer,
)
from .theory import Example, example
from .words import layer_words, verdict, what_scaling_does, which_hurts

ROW_TITLE = "1. Which rounding hurts: a row of {weights} weights, rounded to {bits} bits"
ROW = "A rounding error costs error x activation at the output."
MODEL_TITLE = "Divergence (KL, in nats a byte)"
MODEL_NOTE = f"""\
±: half the 95% interval over windows of text. MB: of the file. seconds: to
quantize to {BITS[0]} bits; RTN is calibrated too, to report its errors. *: simulated,
weights are rounded but kept as floats; MB is what they would take packed."""
LAYER_TITLE = "3. A layer of an 8B model, {shape}, on this machine ({threads})"
MODEL = """\
[bold]2. A whole model: how far is it from the float model?[/bold]

A byte-level Llama of 1.3 million parameters, trained on the source of Python's
standard library, is quantized with {scales}. It predicts
source that neither training nor calibration has seen. Divergence is how far its
predictions are from the float model's; 0 is the same.
"""
NEXT = """\
[bold]4. Your model[/bold]

A Hugging Face directory, or a name on the hub (needs awq-ext\\[hf]). TEXT.txt is
some of the text that the model will see; more accurate: --effort balanced.

  [cyan]awq-ext quantize MODEL OUT --calib TEXT.txt[/cyan]

Any nn.Module, with any iterable of input batches:

  [cyan]import awq_ext[/cyan]
  [cyan]model = awq_ext.quantize(model, batches)[/cyan]
  [cyan]awq_ext.save(model, "my-model-int4")[/cyan]
"""


def row_table(found: Example) -> Table:
    """Show the channel with the large activation, another one, and the sum over all."""
    header = ["channel", "activation", "weight", "RTN error", "costs", "AWQ scale", "error", "costs"]
    rows = []
    for name, i in (("large activation", found.loud), ("small activation", found.quiet)):
        figures = [f"{float(found.activations[i]):g}", f"{float(found.weights[i]):.2f}"]
        figures += [f"{float(found.rtn.errors[i]):.3f}", f"{float(found.rtn.costs[i]):.2f}"]
        figures += [
            f"{float(found.scale[i]):.2f}",
            f"{float(found.awq.errors[i]):.3f}",
            f"{float(found.awq.costs[i]):.2f}",
        ]
        rows.append([Cell(name), *map(Cell, figures)])
    best = found.awq.total < found.rtn.total
    totals = [Cell(f"{found.rtn.total:.2f}", not best), Cell(""), Cell(""), Cell(f"{found.awq.total:.2f}", best)]
    rows.append([Cell(f"all {len(found.weights)} together"), *[Cell("")] * 3, *totals])
    title = ROW_TITLE.format(weights=len(found.weights), bits=found.bits)
    return Table(title, header, rows)


def model_table(found: Comparison) -> Table:
    """Show the divergence of each method at each width, the least of each in bold, and how long quantizing took."""
    header = ["method"]
    for bits in BITS:
        simulated = "*" if found[f"{RTN} {bits} bit"].simulated else ""
        header += [f"{bits} bits{simulated}", "MB"]
    header.append("seconds")
    original = f"{found[FLOAT].size_bytes / 1e6:.2f}"
    rows = [[Cell(FLOAT), *[Cell("0"), Cell(original)] * len(BITS), Cell("")]]
    best = {bits: min((RTN, *OTHERS), key=lambda method, bits=bits: _kl(found, method, bits).value) for bits in BITS}
    for method in (RTN, *OTHERS):
        cells = [Cell(method)]
        for bits in BITS:
            cells.append(Cell(plus_minus(_kl(found, method, bits)), best[bits] == method))
            cells.append(Cell(f"{found[f'{method} {bits} bit'].size_bytes / 1e6:.2f}"))
        rows.append([*cells, Cell(f"{found[f'{method} {BITS[0]} bit'].seconds:.1f}")])
    return Table(MODEL_TITLE, header, rows)


def _kl(found: Comparison, method: str, bits: int) -> Estimate:
    return found[f"{method} {bits} bit"].evaluations[TEXT]["kl"]


def layer_table(layer: LayerCost) -> Table:
    """Show what a layer takes in bf16 and in int4."""
    rows = [("weights, MB", f"{layer.float_bytes / 1e6:.1f}", f"{layer.int4_bytes / 1e6:.1f}")]
    calls = {"decode: 1 row, a token at a time, µs": DECODE, f"prefill: {PREFILL} rows, a prompt at once, µs": PREFILL}
    for name, count in calls.items():
        took = layer.seconds[count]
        rows.append((name, *(f"{took[kind] * 1e6:,.0f}" for kind in ("float", "int4"))))
    shape = f"{layer.in_features} x {layer.out_features}"
    title = LAYER_TITLE.format(shape=shape, threads=counted(torch.get_num_threads(), "thread"))
    return Table(title, ["", "bf16", "int4"], [list(map(Cell, row)) for row in rows])


def run_and_show(tokens: int, group_size: int, console: Console) -> DemoResult:
    """Run the whole demo and print each part as soon as it is known."""

    def say(*parts: RenderableType) -> None:
        console.print(*parts, sep="\n", highlight=False)

    began = time.perf_counter()
    one = example()
    say(row_table(one).to_rich(), ROW, f"- {which_hurts(one)}", f"- {what_scaling_does(one)}", "")
    say(MODEL.format(scales=shared_scales(group_size)))
    found = compare_methods(tokens, group_size, progress=console.is_terminal)
    say(model_table(found).to_rich(), MODEL_NOTE, f"- {verdict(found)}", "")
    layer = measure_layer()
    say(layer_table(layer).to_rich(), f"- {layer_words(layer)}", "", NEXT)
    result = DemoResult(one, found, layer, group_size, time.perf_counter() - began)
    say(f"[dim]{result.seconds:.0f} s in all. All figures were computed just now.[/dim]")
    return result
