"""A directory is replaced as a whole: a kill at any operation on files leaves the old one or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from kills import POSIX, killed
from torch import nn

import awq_ext
from awq_ext.checkpoints import atomic_directory as replacement
from awq_ext.checkpoints.atomic_directory import out_of_the_way, replaced


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    with replaced(folder, lambda name: name.startswith("model")) as fresh:
        for name in ("model-1", "config"):
            (fresh / name).write_text(text)


def test_other_files_stay_and_old_parts_go(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / "sub" / "deep").mkdir(parents=True)
    for name in ("notes", "model-0", "config", "sub/model-9", "sub/deep/file"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("notes")
    (folder / "broken").symlink_to("nowhere")
    folder.chmod(0o750)
    fill(folder, "new")
    assert contents(folder) == {
        "config": "new",
        "link": "old",
        "model-1": "new",
        "notes": "old",
        "sub/deep/file": "old",
        "sub/model-9": "old",
    }
    assert (folder / "link").readlink() == Path("notes")
    assert (folder / "broken").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_error_inside_leaves_everything(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    fill(folder, "old")
    with pytest.raises(RuntimeError, match="stop"), replaced(folder, lambda name: True) as fresh:
        (fresh / "config").write_text("new")
        raise RuntimeError("stop")
    assert contents(folder) == {"config": "old", "model-1": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_through_a_link_and_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x"
    fill(folder, "old")
    (tmp_path / "alias").symlink_to(folder)
    fill(tmp_path / "alias", "newer")
    assert (tmp_path / "alias").is_symlink()
    assert contents(folder)["config"] == "newer"
    (folder / "below").mkdir()
    for inside in (folder, folder / "below"):
        monkeypatch.chdir(inside)
        fill(folder, "from inside")
        assert Path.cwd() == inside
        assert inside.samefile(".")
        assert contents(folder)["config"] == "from inside"


def can_exchange(folder: Path) -> bool:
    for name in ("a", "b"):
        (folder / name).mkdir()
    return replacement._exchange(folder / "a", folder / "b")


@POSIX
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("present", [True, False])
def test_a_kill_at_any_operation(
    present: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(replacement, "_exchange", lambda a, b: False)
    elif not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two directories")
    outcomes = []
    for step in range(1, 200):
        folder = tmp_path / str(step) / "x"
        old = {"config": "old", "model-1": "old", "notes": "mine"} if present else {}
        if present:
            fill(folder, "old")
            (folder / "notes").write_text("mine")
        new = old | {"config": "new", "model-1": "new"}
        dead = killed(step, lambda to=folder: fill(to, "new"))
        places = [folder] if exchange or not present or folder.exists() else list(folder.parent.glob(".x.old-*"))
        assert len(places) == 1
        found = contents(places[0]) if places[0].exists() else {}
        assert found in (old, new)
        outcomes.append(found == new)
        if not dead:
            break
        fill(folder, "again")
        assert not list(folder.parent.glob(".x.partial-*")), "what the dead process left is cleared away"
    assert not dead
    assert outcomes == sorted(outcomes), "once the new directory is in place, no later step goes back"
    assert outcomes.count(False) >= 8
    assert outcomes[-1]


@pytest.mark.fault(
    "Writing a checkpoint",
    "The process is killed at any step of `save_pretrained`",
    "The directory holds the old checkpoint or the new one, whole",
)
@POSIX
def test_a_kill_during_save_pretrained_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    def quantized(size: int) -> nn.Module:
        torch.manual_seed(size)
        case = models.make("mlp")
        return awq_ext.quantize(case.model, case.batches, group_size=size, method="rtn", progress=False)

    old, new = quantized(16), quantized(32)
    batch = models.make("mlp").batches[0]
    outcomes = []
    for step in range(1, 400, 3):
        folder = tmp_path / str(step)
        awq_ext.save_pretrained(old, folder, format="native", max_shard_size=3000)
        save = lambda to=folder: awq_ext.save_pretrained(new, to, "native", 5000, overwrite=True)  # noqa: E731
        dead = killed(step, save)
        loaded = awq_ext.load(models.make("mlp").model, folder)
        with torch.no_grad():
            result = loaded(batch)
            assert any(torch.equal(result, model(batch)) for model in (old, new))
            outcomes.append(torch.equal(result, new(batch)))
        if not dead:
            break
    assert not dead
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 8
    assert outcomes[-1]


@pytest.mark.fault(
    "Writing a checkpoint",
    "A process was killed and left a half-written folder beside the directory",
    "The next save removes it; those of living processes stay",
)
def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mine = replacement._owner().rpartition("-")[0]
        theirs = tmp_path / f".x.partial-{mine}-{other.pid}-abcd"
        elsewhere = tmp_path / ".x.partial-anotherhost-1-abcd"
        for folder in (theirs, elsewhere):
            folder.mkdir()
        fill(tmp_path / "x", "new")
        assert theirs.exists()
        assert elsewhere.exists()
        other.communicate(b"\n")
    fill(tmp_path / "x", "newer")
    assert not theirs.exists()
    assert elsewhere.exists()


def test_files_are_out_of_the_way_while_others_are_written_in_place(tmp_path: Path) -> None:
    def old(name: str) -> bool:
        return name.startswith("model")

    fill(tmp_path, "before")
    (tmp_path / "model-3").symlink_to("config")
    (tmp_path / "model-4").mkdir()
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk full"), out_of_the_way(tmp_path, old):
        assert [name for name in os.listdir(tmp_path) if old(name)] == ["model-4"]
        for name in ("model-1", "model-2"):
            (tmp_path / name).write_text("half")
        raise OSError("disk full")
    assert contents(tmp_path) == before
    with out_of_the_way(tmp_path, old):
        (tmp_path / "model-2").write_text("whole")
    kept = {name: text for name, text in before.items() if not old(name)}
    assert contents(tmp_path) == kept | {"model-2": "whole"}
    with out_of_the_way(tmp_path / "absent", old):
        pass
    assert not (tmp_path / "absent").exists()
