"""Show progress: a bar in terminals and notebooks, a plain line a minute where the output is a file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS = 60.0


class Progress:
    """Counts steps of a known number; a context manager that ends the bar.

    part: whether this is a part of other work; its bar is wiped out at the end, and no line says that it is done.
    """

    def __init__(self, total: int, what: str, unit: str, show: bool, part: bool = False) -> None:
        bar = show and draws_bars()
        self._bar = tqdm(total=total, desc=what, unit=unit, disable=not bar, leave=not part)
        self.lines = show and not bar  # whether it prints lines
        self._total, self._what, self._unit, self._part = total, what, unit, part
        self.done = 0
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def note(self, text: str) -> None:
        """Show a text beside the bar."""
        self._bar.set_postfix_str(text)

    def update(self, count: int = 1) -> None:
        """Count steps, and print a line if the last one is a minute old, or all is done."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self.lines and (now - self._told >= _SECONDS or (self.done == self._total and not self._part)):
            self._told, took = now, now - self._started
            left = took / max(self.done, 1) * (self._total - self.done)
            say(f"{self._what}: {self._unit} {self.done}/{self._total}, {_minutes(took)}, about {_minutes(left)} left")


def draws_bars() -> bool:
    """Tell whether bars can be drawn over on standard error: in a terminal or a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


def say(text: str) -> None:
    """Print a line on standard error, above a bar if there is one."""
    tqdm.write(f"awq_ext: {text}", file=sys.stderr)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
