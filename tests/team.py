"""Processes that run one function together, as torchrun would start them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from programs import seeing_tests


@dataclass
class Started:
    """One process. number: its rank."""

    number: int
    process: subprocess.Popen[str]

    def ends(self, seconds: float) -> tuple[int, str]:
        """Wait for its end; return its exit code and all that it printed."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment() -> dict[str, str]:
    """Variables for a process that sees the tests' own modules, with one thread."""
    return seeing_tests() | {"OMP_NUM_THREADS": "1"}


def start(size: int, arguments: list[str]) -> list[Started]:
    """Start ``size`` processes of ``python ARGUMENTS``, with the variables that torchrun sets."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = environment() | common
    return [
        Started(
            rank,
            subprocess.Popen(
                [sys.executable, *arguments],
                env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ),
        )
        for rank in range(size)
    ]


def run(size: int, arguments: list[str], seconds: float = 240) -> list[str]:
    """Run them to their end; return what each printed. AssertionError for one that fails."""
    started, until = start(size, arguments), time.monotonic() + seconds
    try:
        outputs = [one.ends(max(1.0, until - time.monotonic())) for one in started]
    finally:
        for one in started:
            one.process.kill()
    assert not any(code for code, _ in outputs), "\n".join(text for _, text in outputs)
    return [text for _, text in outputs]
