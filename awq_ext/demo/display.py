"""A DemoResult as a table, a reading guide and the completions, in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .run import FLOAT_NAME, PROMPT, Comparison, DemoResult, Row, run_demo

INTRODUCTION = (
    "A byte-level Llama of 1.3 million parameters, trained on the source of Python's standard library, is rounded to 4 "
    "and to 3 bits: to the nearest value ([bold]RTN[/bold]), and after protecting the channels that matter to its "
    "activations ([bold]AWQ[/bold]). Each is then scored on modules that neither training nor calibration has seen."
)


def group_words(group_size: int) -> str:
    """How many weights share a scale."""
    return "one scale a row" if group_size == -1 else f"groups of {group_size}"


def results_table(result: DemoResult) -> Table:
    """The measurements, one variant a line; narrow enough for 80 columns."""
    threads = f"{result.threads} thread{'s' * (result.threads != 1)}"
    title = f"{result.tokens:,} held-out bytes, {group_words(result.group_size)}, {threads}"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("weights", "perplexity", "vs float", "MB", "seconds", "scoring", "stepping"):
        table.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=True)
    baseline = result.rows[0]
    for row in result.rows:
        table.add_row(*cells(row, baseline), end_section=row is baseline or row.name == "AWQ 4 bit")
    return table


def cells(row: Row, baseline: Row) -> list[str]:
    """One line of the table."""
    dash = "[dim]-[/dim]"
    speed = lambda value: dash if value is None else f"{value:,.0f}/s"  # noqa: E731
    return [
        row.name,
        f"{row.perplexity:.4f}",
        dash if row is baseline else f"{row.perplexity / baseline.perplexity - 1:+.2%}",
        f"{row.size_bytes / 1e6:.2f}{'*' if row.simulated else ' '}",
        dash if row.seconds is None else f"{row.seconds:.1f}",
        speed(row.scoring_speed),
        speed(row.stepping_speed),
    ]


COLUMNS = """\
perplexity  how many bytes the model hesitates between; lower is better
seconds     to quantize; RTN is calibrated too, to report its errors
scoring     bytes a second, 8 windows of text at once
stepping    bytes a second, one at a time, as when generating
*           simulated: 3-bit values in float weights; the size is what packed
            codes, scales and zeros would take"""


def verdict(comparison: Comparison, rtn: Row, awq: Row) -> str:
    """One sentence on RTN and AWQ at one width, as far as the number of scored bytes can tell."""
    lead = f"[bold]{comparison.bits} bits[/bold]: "
    if not comparison.rtn_hurts:
        lead += "RTN costs nothing that this many bytes can show, so there is no gap to close; "
        if not comparison.decided:
            return lead + "AWQ does not differ from it measurably either."
        word = "better" if comparison.awq_gain > 0 else "worse"
        return lead + f"AWQ is {word} by {abs(comparison.awq_gain):.4f} nats a byte."
    figures = f"({rtn.perplexity:.4f} against {awq.perplexity:.4f})"
    if not comparison.decided:
        return lead + f"RTN hurts, but AWQ and RTN differ {figures} by less than the noise of this many bytes."
    if comparison.awq_gain < 0:
        return lead + f"[red]AWQ is worse than RTN here[/red] {figures}."
    return lead + f"AWQ closes [green]{comparison.gap_closed:.0%}[/green] of the gap that RTN opens {figures}."


def reading_guide(result: DemoResult) -> str:
    """What the table says, in words that follow from its figures only."""
    rows = {row.name: row for row in result.rows}
    lines = [verdict(c, rows[f"RTN {c.bits} bit"], rows[f"AWQ {c.bits} bit"]) for c in result.comparisons]
    plain, packed = rows[FLOAT_NAME], rows["AWQ 4 bit"]
    lines.append(
        f"[bold]size[/bold]: 4 bits take {packed.size_bytes / plain.size_bytes:.0%} of bf16 (embedding and head stay "
        "as they are, and in a model this small they count)."
    )
    ratio = packed.stepping_speed / plain.stepping_speed
    lines.append(
        f"[bold]speed[/bold]: stepping, int4 runs at {ratio:.2f} x the speed of fp32. This model fits in the processor's "
        "cache; int4 saves memory traffic, which is what bounds models of billions of weights."
    )
    return "\n".join(f"- {line}" for line in lines)


def printable(continuation: bytes) -> str:
    """Bytes of the model as terminal text: no control characters but newlines."""
    decoded = continuation.decode("utf-8", "replace")
    return "".join(c if c == "\n" or c.isprintable() else "·" for c in decoded)


def completions(result: DemoResult) -> Text:
    """The prompt, and what each variant writes next; yellow once it leaves the float model's words."""
    text = Text(printable(PROMPT), style="dim")
    reference_text = printable(result.rows[0].completion)
    for row in result.rows:
        written = printable(row.completion)
        same = next((i for i, (a, b) in enumerate(zip(written, reference_text, strict=False)) if a != b), len(written))
        text.append(f"\n{row.name}\n", style="not dim bold cyan")
        text.append(written[:same], style="not dim")
        text.append(written[same:] + "\n", style="not dim bold yellow")
    return text


def show(result: DemoResult, console: Console) -> None:
    """Print everything."""
    console.print(results_table(result))
    console.print(COLUMNS, style="dim")
    console.print("\n[bold]How to read it[/bold]")
    console.print(reading_guide(result))
    console.print("\n[bold]What each one writes[/bold] [dim](yellow once it leaves the float model's words)[/dim]")
    console.print(completions(result))
    yours = "The same for your model: awq_ext.quantize(model, calib_loader)"
    console.print(f"[dim]{result.seconds:.0f} s in all. {yours}[/dim]")


def run_and_show(tokens: int, group_size: int, console: Console) -> DemoResult:
    """The whole demo: say what happens, do it with a progress bar, print the result."""
    console.print(INTRODUCTION + "\n")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        result = run_demo(tokens, group_size, on_step)
    show(result, console)
    return result
