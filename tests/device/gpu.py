"""The device of the checks and of the benchmark: a GPU, or the emulated one, on which every line can be tried without a GPU.

Nothing here needs pytest: a machine with a GPU may have nothing but torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Gpu:
    """``device`` of the tensors; ``real``: whether it is a GPU, whose times mean something."""

    device: str
    real: bool

    def facts(self) -> dict[str, object]:
        """What there is: names, versions, the memory read at its best."""
        if not self.real:
            return {"device": "emulated", "torch": torch.__version__}
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    def seconds(self, work: list[Work], most: float = 0.2) -> float:
        """Median seconds of one call. ``work`` are calls of the same thing on other memory, so that no cache holds their weights.

        On a GPU all are captured in one graph, which shows that they can be, and leaves out what Python takes.
        """
        if not self.real:
            start = time.perf_counter()
            for call in work:
                call()
            return (time.perf_counter() - start) / len(work)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in work:  # libraries set themselves up at their first call, which a graph could not hold
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in work:
                call()
        return _median(graph.replay, most) / len(work)

    def eager(self, call: Work, most: float = 5.0) -> float:
        """Seconds of a call that may wait for the GPU: the best of up to three."""
        best, until = float("inf"), time.perf_counter() + most
        for _ in range(3):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() > until:
                break
        return best

    def wait(self) -> None:
        """Wait until all that was started has ended."""
        if self.real:
            torch.cuda.synchronize()


def _median(replay: Work, most: float) -> float:
    times: list[float] = []
    until = time.perf_counter() + most
    while len(times) < 5 or (time.perf_counter() < until and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


@contextlib.contextmanager
def asked(kernel: str, wish: str) -> Iterator[None]:
    """Inside the block AWQ_EXT_CUDA_<kernel> is ``wish``: "1" or "0"."""
    name = f"AWQ_EXT_CUDA_{kernel}"
    before = os.environ.get(name)
    os.environ[name] = wish
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def wgmma(wish: str) -> Iterator[bool]:
    """Ask for wgmma, "1" or "0", inside the block; the value says whether many rows are then multiplied by it."""
    from awq_ext.kernels.cuda import library

    with asked("WGMMA", wish):
        yield library.value("wgmma", 64) == 1


@contextlib.contextmanager
def chosen(emulated: bool) -> Iterator[Gpu]:
    """The GPU, or inside the block the emulated one. SystemExit that says what is missing where there is neither."""
    from awq_ext.kernels.cuda import library

    if emulated:
        import emulated_gpu

        with emulated_gpu.kernels():
            yield Gpu("cpu", real=False)
        return
    if library.found() is None:
        raise SystemExit(f"the CUDA kernels cannot run: {library.state()}. Try --check, which emulates them")
    yield Gpu("cuda", real=True)
