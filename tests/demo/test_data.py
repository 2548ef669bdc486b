"""The demo's text: its splits, windows and batches."""

from __future__ import annotations

import pytest
import torch

from awq_ext.demo import data, run


def test_splits_are_disjoint_and_all_used() -> None:
    names = list(data.modules())
    splits = ("train", "calibration", "held-out")
    by_split = {split: {n for n in names if data.split_of(n) == split} for split in splits}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len(names)
    assert not by_split["train"] & by_split["held-out"] and not by_split["calibration"] & by_split["held-out"]


def test_split_depends_on_the_path_alone() -> None:
    """Frozen: another hash would put modules that the shipped weights were trained on into the held-out text."""
    expected = {
        "ast.py": "calibration",
        "inspect.py": "held-out",
        "wave.py": "calibration",
        "argparse.py": "train",
        "json/scanner.py": "calibration",
    }
    assert {name: data.split_of(name) for name in expected} == expected
    assert data.split_of("json\\scanner.py") == data.split_of("json/scanner.py")


def test_skips_tests_and_generated_files() -> None:
    assert not [n for n in data.modules() if n.startswith(("test/", "site-packages/", "encodings/", "pydoc_data/"))]
    assert "textwrap.py" in data.modules()


def test_no_source_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(data.NoSourceError, match="no Python source files under"):
        data.modules(str(tmp_path))


def test_windows() -> None:
    stream = torch.arange(100, dtype=torch.uint8)
    cut = data.windows(stream, 4, 10)
    assert cut.dtype == torch.int64 and cut.shape == (4, 10)
    assert cut[0, 0] == 0 and cut[-1, -1] == 99
    assert torch.equal(cut - cut[:, :1], torch.arange(10).expand(4, 10))
    with pytest.raises(data.NoSourceError, match="fewer than one window"):
        data.windows(stream, 1, 101)


def test_batches() -> None:
    calibration = data.calibration_batches(count=3, batch=2, length=32)
    assert [batch.shape for batch in calibration] == [(2, 32)] * 3
    assert data.held_out_tokens(1000, length=64).shape == (15, 64)


def test_held_out_windows_do_not_overlap() -> None:
    """Overlapping windows would count the same bytes twice and make the standard errors too small."""
    stream = torch.arange(data.tokens("held-out").numel())
    windows = data.windows(stream, run.TOKENS // 257, 257)
    assert (windows[1:, 0] > windows[:-1, -1]).all()
