"""race(): every runner has its turns, the best counts."""

from __future__ import annotations

import time

import torch

from awq_ext.evaluation import cost as speed


def test_runners_take_turns_and_the_best_counts() -> None:
    calls = []

    def runner(name: str, durations: list[float]):
        def run() -> None:
            assert not torch.is_grad_enabled()
            calls.append(name)
            time.sleep(durations[(len(calls) - 1) // 2])

        return run

    took = speed.race({"slow": runner("slow", [0.03, 0.02, 0.03]), "fast": runner("fast", [0.01] * 3)}, seconds=0.0)
    assert calls == ["slow", "fast"] * speed.LEAST_TURNS
    assert 0.02 <= took["slow"] < 0.03 and 0.01 <= took["fast"] < 0.02


def test_it_goes_on_for_as_long_as_asked() -> None:
    began = time.perf_counter()
    speed.race({"a": lambda: None, "b": lambda: None}, seconds=0.05)
    assert time.perf_counter() - began >= 0.1
