"""Where a model comes from: calls and commands as they can be typed, and versions."""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta, timezone

import torch

import awq_ext
from awq_ext.reporting import origin


def test_versions_are_those_that_run() -> None:
    found = origin.versions()
    assert list(found)[:2] == ["awq_ext", "torch"]
    assert found["awq_ext"] == awq_ext.__version__ and torch.__version__.startswith(found["torch"].partition("+")[0])


def test_now_is_in_utc() -> None:
    found = datetime.fromisoformat(origin.now())
    assert found.utcoffset() == timedelta(0) and abs(datetime.now(timezone.utc) - found) < timedelta(seconds=60)


def test_a_call_names_what_is_unlike_the_usual() -> None:
    config = {"method": "gptq", "bits": 4, "skip": ["*.a", "b"]}
    usual = {"method": "awq", "bits": 4, "skip": []}
    assert origin.call_text(config, usual) == "awq_ext.quantize(model, calibration, method='gptq', skip=('*.a', 'b'))"


def test_a_command_tells_no_folders() -> None:
    words = [
        "awq-ext",
        "quantize",
        "/home/me/models/a b",
        "out/int4",
        "--traffic",
        "code=/data/x.txt",
        "--set",
        "n_grid=4",
    ]
    said = origin.command_text(words)
    assert shlex.split(said) == [
        "awq-ext",
        "quantize",
        "a b",
        "out/int4",
        "--traffic",
        "code=x.txt",
        "--set",
        "n_grid=4",
    ]
