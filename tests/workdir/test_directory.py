"""A work directory belongs to one call and one process, and never takes what is not its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import ELSEWHERE

from awq_ext.workdir.directory import ResumeError, opened


def test_what_is_stored_is_found_by_the_next(tmp_path: Path) -> None:
    with opened(tmp_path / "work") as work:
        work.begin({"settings": {"bits": 4}})
        assert work.load("block-0000") is None and not work.has("block-0000")
        work.store("block-0000", {"a": torch.arange(3)}, [1, None])
    made = []
    with opened(tmp_path / "work") as work:
        work.begin({"settings": {"bits": 4}})
        tensors, values = work.load("block-0000")
        assert tensors["a"].tolist() == [0, 1, 2] and values == [1, None]
        for _ in range(2):
            found = work.remember("text", lambda: (made.append(1) or {"t": torch.ones(2)}, "told"))
            assert found[0]["t"].tolist() == [1, 1] and found[1] == "told"
    assert made == [1]


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ({"settings": {"bits": 4, "clip": True}}, {"settings": {"bits": 8, "clip": True}}, "bits was 4, now it is 8"),
        ({"model": "A"}, {"model": "B"}, "the model was a A, now it is a B"),
        ({"weights": "1f"}, {"weights": "2f"}, "the weights are others now"),
        ({}, {"weights": "2f"}, "the weights are others now"),
    ],
)
def test_the_work_of_another_call_is_refused(before: dict, now: dict, reason: str, tmp_path: Path) -> None:
    with opened(tmp_path) as work:
        work.begin(before)
        work.store("block-0000", {}, {})
        with pytest.raises(ResumeError, match=reason):
            work.begin(now)
        work.begin(before)


def test_a_fresh_one_is_empty(tmp_path: Path) -> None:
    with opened(tmp_path) as work:
        work.begin({"model": "A"})
        work.store("block-0000", {}, {})
    with opened(tmp_path, fresh=True) as work:
        assert not work.has("block-0000")
        work.begin({"model": "B"})


def test_an_empty_one_is_not_left_behind(tmp_path: Path) -> None:
    with opened(tmp_path / "work"):
        assert (tmp_path / "work").is_dir()
    assert not (tmp_path / "work").exists()


def test_one_without_finished_work_is_not_left_behind_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too little memory"), opened(tmp_path / "work") as work:
        work.begin({"model": "A"})
        raise ValueError("too little memory")
    assert not (tmp_path / "work").exists()


def test_one_without_finished_work_is_free_for_another_call(tmp_path: Path) -> None:
    with opened(tmp_path) as work:
        work.begin({"model": "A"})  # a kill here leaves the note of whose work it would have been
        work.begin({"model": "B"})
        work.store("start-text", {}, {})
        with pytest.raises(ResumeError, match="the model was a B, now it is a A"):
            work.begin({"model": "A"})


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_not_ours_stays(fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ResumeError, match=r"it holds letter\.txt"), opened(tmp_path, fresh):
        pass
    with pytest.raises(ResumeError, match="is a file"), opened(tmp_path / "letter.txt", fresh):
        pass
    assert (tmp_path / "letter.txt").read_text() == "dear" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="NO LOCK TESTED: there is none on Windows")
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    hold = "import sys; from awq_ext.workdir.directory import opened\nwith opened(sys.argv[1]) as w:\n"
    hold += " w.begin({}); print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", hold, str(tmp_path / "work")]
    holder = subprocess.Popen(words, cwd=ELSEWHERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ResumeError, match=rf"another process \(process {holder.pid}\)"), opened(tmp_path / "work"):
            pass
        holder.kill()
    with opened(tmp_path / "work") as work:
        work.begin({})


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as work:
        work.begin({})
        work.store("block-0000", {}, {})
    (tmp_path / "state.json").write_text("{")
    with opened(tmp_path) as work, pytest.raises(ResumeError, match=r"damaged.*start over"):
        work.begin({})
