"""Cost: seconds by turns, of which the best counts."""

from __future__ import annotations

import time

import pytest
import torch

from awq_ext.evaluation.cost import LAYERS, LEAST_TURNS, layer_seconds, race, rotating_layers


def test_runners_take_turns_and_the_best_counts() -> None:
    calls = []

    def runner(name: str, durations: list[float]):
        def run() -> None:
            assert not torch.is_grad_enabled()
            calls.append(name)
            time.sleep(durations[(len(calls) - 1) // 2])

        return run

    took = race({"slow": runner("slow", [0.03, 0.02, 0.03]), "fast": runner("fast", [0.01] * 3)}, seconds=0.0)
    assert calls == ["slow", "fast"] * LEAST_TURNS
    assert 0.02 <= took["slow"] < 0.03 and 0.01 <= took["fast"] < 0.02


def test_it_goes_on_for_as_long_as_asked() -> None:
    began = time.perf_counter()
    race({"a": lambda: None, "b": lambda: None}, seconds=0.05)
    assert time.perf_counter() - began >= 0.1


def test_one_turn_may_be_enough() -> None:
    calls = []
    race({"a": lambda: calls.append("a")}, seconds=0.0, least_turns=1)
    assert calls == ["a"]


def test_layers_of_one_weight_in_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 stands for the float weight, int8 for int4 with rounded activations; each call takes the next of its copies."""
    monkeypatch.setattr("awq_ext.evaluation.cost._CACHES", 5 * 64 * 96 * 4)
    runners = rotating_layers(64, 96, 32, torch.float32)
    x = torch.randn(7, 64)
    results = {name: run(x) for name, run in runners.items()}
    assert tuple(results) == LAYERS

    def difference(one: str, other: str) -> float:
        return ((results[one] - results[other]).norm() / results[other].norm()).item()

    assert 0.01 < difference("int4", "float") < 0.2
    assert 0.001 < difference("int8", "int4") < 0.02
    layers = set()
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, _: layers.add(self))
    for _ in range(12):
        runners["float"](x)
    assert len(layers) == 5


def test_seconds_of_layers() -> None:
    took = layer_seconds((1, 3), 256, 32, seconds=0.0)
    assert list(took) == [1, 3]
    for pair in took.values():
        assert list(pair) == ["float", "int4"] and min(pair.values()) > 0
