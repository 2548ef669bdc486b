"""Show a DemoResult in the terminal: its tables, how to read them, and what each model writes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from ..evaluation.comparison import FLOAT, Comparison
from .run import BITS, PROMPT, TEXT, DemoResult, run_demo

INTRODUCTION = (
    "A byte-level Llama of 1.3 million parameters, trained on the source of Python's standard library, is rounded to 4 "
    "and to 3 bits, {groups}: to the nearest value ([bold]RTN[/bold]), and after protecting the channels that matter to its "
    "activations ([bold]AWQ[/bold]). Each is then scored on modules that neither training nor calibration has seen."
)
COLUMNS = """\
MB          of the file: what is not quantized counts as bf16
seconds     to quantize; RTN is calibrated too, to report its errors
tokens/s    a token is a byte: 8 windows of text at once, or a single byte at
            a time, as when generating
perplexity  how many bytes the model hesitates between; lower is better
kl, top1    how far its predictions are from the float model's, and how often
            both find the same byte most likely"""


def group_words(group_size: int) -> str:
    """How many weights share a scale."""
    return "one scale a row" if group_size == -1 else f"in groups of {group_size}"


def verdict(found: Comparison, bits: int) -> str:
    """One sentence on RTN and AWQ at one width, as far as the scored windows can tell."""
    rtn, awq = f"RTN {bits} bit", f"AWQ {bits} bit"
    gain, closed = found.difference(rtn, awq, TEXT), found.gap_closed(awq, TEXT, rtn)
    one, other = (found[label].evaluations[TEXT].measures["perplexity"].value for label in (rtn, awq))
    figures = f"({one:.4f} against {other:.4f})"
    lead = f"[bold]{bits} bits[/bold]: "
    if closed is None:
        lead += "RTN costs nothing that this many bytes can show, so there is no gap to close; "
        if gain.within_noise:
            return lead + "AWQ does not differ from it measurably either."
        return lead + f"AWQ is {'better' if gain.value > 0 else 'worse'} by {abs(gain.value):.4f}."
    if gain.within_noise:
        return lead + f"RTN hurts, but AWQ and RTN differ {figures} by less than the noise of this many bytes."
    if gain.value < 0:
        return lead + f"[red]AWQ is worse than RTN here[/red] {figures}."
    return lead + f"AWQ closes [green]{closed:.0%}[/green] of the gap that RTN opens {figures}."


def reading_guide(found: Comparison) -> str:
    """What the tables say, in words that follow from their figures only."""
    packed = found["AWQ 4 bit"]
    own, beside = packed.speeds["steps"]
    lines = [
        *(verdict(found, bits) for bits in BITS),
        f"[bold]size[/bold]: 4 bits take {packed.size_bytes / found[FLOAT].size_bytes:.0%} of bf16 (embedding and head "
        "stay as they are, and in a model this small they count).",
        f"[bold]speed[/bold]: one byte at a time, int4 runs at {own / beside:.2f} x the speed of fp32. This model fits in "
        "the processor's cache; int4 saves memory traffic, which is what bounds models of billions of weights.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def printable(continuation: bytes) -> str:
    """Bytes of the model as terminal text: no control characters but newlines."""
    decoded = continuation.decode("utf-8", "replace")
    return "".join(c if c == "\n" or c.isprintable() else "·" for c in decoded)


def completions(written: Mapping[str, bytes]) -> Text:
    """The prompt, and what each model writes next; yellow once it leaves the float model's words."""
    text = Text(printable(PROMPT), style="dim")
    of_float = printable(written[FLOAT])
    for label, continuation in written.items():
        shown = printable(continuation)
        same = next((i for i, (a, b) in enumerate(zip(shown, of_float, strict=False)) if a != b), len(shown))
        text.append(f"\n{label}\n", style="not dim bold cyan")
        text.append(shown[:same], style="not dim")
        text.append(shown[same:] + "\n", style="not dim bold yellow")
    return text


def show(result: DemoResult, console: Console) -> None:
    """Print everything."""
    console.print(result.comparison)
    console.print(COLUMNS, style="dim")
    console.print("\n[bold]How to read it[/bold]")
    console.print(reading_guide(result.comparison))
    console.print("\n[bold]What each one writes[/bold] [dim](yellow once it leaves the float model's words)[/dim]")
    console.print(completions(result.completions))
    yours = "The same for your model: awq_ext.compare(model, calib_loader, traffic)"
    console.print(f"[dim]{result.seconds:.0f} s in all. {yours}[/dim]")


def run_and_show(tokens: int, group_size: int, console: Console) -> DemoResult:
    """The whole demo: say what happens, do it with a progress bar, print the result."""
    console.print(INTRODUCTION.format(groups=group_words(group_size)) + "\n")
    result = run_demo(tokens, group_size, progress=console.is_terminal)
    show(result, console)
    return result
