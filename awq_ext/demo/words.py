"""What the demo's figures say, in sentences that follow from the figures only."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.advice import SLOWER, one_sentence
from ..evaluation.comparison import Comparison
from .run import BITS, DECODE, OTHERS, PREFILL, RTN, LayerCost, divergence, removed
from .theory import Example


def which_hurts(example: Example) -> str:
    """Say which of two of RTN's errors costs more: that where activations are large, or a larger one where they are small."""
    loud, quiet = example.loud, example.quiet
    (one, cost), (other, other_cost) = (
        (float(example.rtn.errors[i]), float(example.rtn.costs[i])) for i in (loud, quiet)
    )
    figures = (
        f"RTN (rounding to nearest): an error of {one:.2f} where activations are {float(example.activations[loud]):g} "
        f"costs {cost:.2f}, an error of {other:.2f} where they are {float(example.activations[quiet]):g} costs {other_cost:.2f}. "
    )
    if cost > other_cost:
        return figures + f"The {'smaller' if one < other else 'first'} error hurts more."
    return figures + "The first error does not hurt more."


def what_scaling_does(example: Example) -> str:
    """Say what AWQ's scale does to the error where activations are large, and to all channels together."""
    if bool((example.scale == 1).all()):
        return "AWQ: the search finds no scale that costs less than RTN."
    loud, total, before = example.loud, example.awq.total, example.rtn.total
    lead = (
        f"AWQ: the weight with the large activation is multiplied by {float(example.scale[loud]):.1f} before it is rounded, its "
        f"activation divided by as much. The error there goes from {float(example.rtn.errors[loud]):.3f} to "
        f"{float(example.awq.errors[loud]):.3f}. "
    )
    if total < before:
        return lead + f"All channels together cost {total:.2f} instead of {before:.2f}."
    return lead + f"That does not pay here: all channels together cost {total:.2f}, with RTN {before:.2f}."


def verdict(found: Comparison, widths: Sequence[int] = BITS) -> str:
    """Say in a sentence what each method makes of RTN's divergence, as far as the scored windows can tell."""
    return "Of RTN's divergence, at the same size: " + "; ".join(_at(found, bits) for bits in widths) + "."


def _at(found: Comparison, bits: int) -> str:
    if divergence(found, f"{RTN} {bits} bit") == 0:
        return f"at {bits} bits there is none"
    return f"at {bits} bits " + ", ".join(_clause(found, method, bits) for method in OTHERS)


def _clause(found: Comparison, method: str, bits: int) -> str:
    here = removed(found, method, bits)
    if here.difference.within_noise:
        return f"{method} removes nothing that so little text can show"
    return (
        f"{method} removes {here.share:.0%}"
        if here.difference.value > 0
        else f"{method} removes none and adds {-here.share:.0%}"
    )


def layer_words(layer: LayerCost) -> str:
    """Say what int4 saves in memory and in time, then where it is slower."""
    parts = [f"int4 takes {layer.int4_bytes / layer.float_bytes:.0%} of the memory of bf16"]
    for name, rows in (("decode", DECODE), ("prefill", PREFILL)):
        faster = layer.seconds[rows]["float"] / layer.seconds[rows]["int4"]
        if faster > SLOWER:
            parts.append(f"{name} is {faster:.1f} times as fast")
        elif faster * SLOWER >= 1:
            parts.append(f"{name} takes about as long")
    slower = one_sentence({rows: dict(took) for rows, took in layer.seconds.items()})
    return " ".join([", ".join(parts) + ".", *([slower] if slower else [])])
