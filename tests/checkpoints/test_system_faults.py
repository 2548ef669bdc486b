"""What the system does while a checkpoint is read or written: full and read-only disks, other processes, memory refused."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import Snapshot, same_bits
from programs import ELSEWHERE
from torch import nn

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints import atomic_directory, quantized_dir
from awq_ext.checkpoints.files.safetensors_file import SafetensorsFile

FORK = multiprocessing.get_context("fork")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and mounts of Linux")


def quantized(group_size: int = 16) -> nn.Module:
    case = models.make("mlp")
    return awq_ext.quantize(case.model, case.batches, group_size=group_size, method="rtn", progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a fork, which its limits end with; it must not end by a signal."""
    child = FORK.Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode == 0


SAVERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save": lambda model, to: awq_ext.save(model, to, overwrite=True),
    "save_pretrained": lambda model, to: awq_ext.save_pretrained(model, to, format="native", overwrite=True),
}


@pytest.mark.fault(
    "Writing a checkpoint",
    "The disk is full after {bytes_} bytes of a file, in `{by}`",
    "OSError that names the directory; what was there stays, nothing half written lies about",
)
@linux
@pytest.mark.parametrize("by", list(SAVERS))
@pytest.mark.parametrize("bytes_", [0, 100, 3000])
def test_a_disk_that_is_full(by: str, bytes_: int, tmp_path: Path) -> None:
    """No file may grow beyond ``bytes_``: the system's answer is that of a full disk, at whichever file it happens."""
    folder, model = awq_ext.save(quantized(), tmp_path / "x"), quantized(32)
    before, state = files(tmp_path), Snapshot(model)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
        with pytest.raises(OSError, match=r"could not be written, and what was there is as it was.*/x'") as caught:
            SAVERS[by](model, folder)
        assert caught.value.errno == errno.EFBIG
        caught.value.__traceback__ = None
        state.assert_unchanged()

    in_a_child(work)
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing half written lies about"


ON_A_DISK_OF_ITS_OWN = """
import os, sys, torch, awq_ext
from torch import nn
torch.manual_seed(0)
model = awq_ext.quantize(nn.Sequential(nn.Linear(512, 512)), [torch.randn(64, 512)], method="rtn", progress=False)
try:
    awq_ext.save(model, sys.argv[1] + "/x")
except OSError as error:
    print(error.errno, error)
print(os.listdir(sys.argv[1]))
"""


def on_a_disk(mount: str, folder: Path) -> str:
    """What a save prints in a mount namespace of its own, where ``mount`` made a file system of ``folder``."""
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'{mount} && exec "$1" -W ignore -c "$2" "$3"',
        "sh",
        sys.executable,
        ON_A_DISK_OF_ITS_OWN,
    ]
    if shutil.which("unshare") is None or subprocess.run([*command[:2], "true"], check=False).returncode:
        pytest.skip("mounts are NOT tried here: unshare -m needs the rights of root")
    done = subprocess.run(
        [*command, str(folder)], cwd=ELSEWHERE, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.fault(
    "Writing a checkpoint",
    "The disk has less room than the checkpoint needs",
    "OSError that names the directory; what was there stays, nothing half written lies about",
)
@linux
def test_a_small_disk(tmp_path: Path) -> None:
    said = on_a_disk(f"mount -t tmpfs -o size=64k none {tmp_path}", tmp_path)
    assert said.startswith(f"{errno.ENOSPC} ")
    assert said.endswith("\n[]\n")


@pytest.mark.fault("Writing a checkpoint", "The disk is read-only", "PermissionError before the work begins")
@linux
def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    said = on_a_disk(f"mount -t tmpfs none {tmp_path} && mount -o remount,ro {tmp_path}", tmp_path)
    assert said.startswith(f"{errno.EACCES} ")
    assert "cannot be written to" in said
    assert said.endswith("\n[]\n")


@pytest.mark.fault(
    "Reading beside others",
    "A file is cut short while it is read",
    "CheckpointError; the process is not killed, because files are read and not mapped",
)
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """Of a file mapped into memory, the next access would kill the process."""
    folder = awq_ext.save(quantized(), tmp_path / "x")
    opened = SafetensorsFile(folder / "model.safetensors")
    name = max(opened.tensors, key=lambda name: opened.tensors[name].end)
    name = next(n for n, e in opened.tensors.items() if e.end == opened.tensors[name].end and e.end > e.begin)
    with open(opened.path, "r+b") as file:
        file.truncate(opened.tensors[name].begin + 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends too soon: it was cut short"):
        opened.read(name)


@pytest.mark.fault(
    "Reading beside others", "A file is written into while it is read", "CheckpointError; the model stays as it was"
)
def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = awq_ext.save(quantized(), tmp_path / "x"), quantized_dir.QuantDir.layer

    def written(self: Any, name: str, *args: Any) -> Any:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-8] + b"\\1" * 8)
        os.utime(folder / "model.safetensors", ns=(0, 0))
        return real(self, name, *args)

    monkeypatch.setattr(quantized_dir.QuantDir, "layer", written)
    model = models.make("mlp").model
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was read"):
        awq_ext.load(model, folder)
    before.assert_unchanged()


@pytest.mark.fault(
    "Reading beside others", "The files of a loaded model are overwritten or emptied", "The model keeps its weights"
)
def test_a_model_does_not_follow_its_files(tmp_path: Path) -> None:
    folder = awq_ext.save(quantized(), tmp_path / "x")
    model = awq_ext.load(models.make("mlp").model, folder)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"\xff" * size)
    os.truncate(folder / "model.safetensors", 0)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, expected[name])


@pytest.mark.fault(
    "Writing a checkpoint",
    "Two processes save into one directory at once",
    "Without overwrite one is told that the directory exists; with it the later one stays, whole",
)
def test_two_processes_save_into_one_directory(tmp_path: Path) -> None:
    """Without ``overwrite`` one of them does, however close they are; with it both, one after the other, and nothing is mixed."""
    models_ = [quantized(16), quantized(32)]
    outcomes = FORK.SimpleQueue()
    for overwrite in (False, True):
        start = FORK.Barrier(2)

        def work(number: int, start: Any = start, overwrite: bool = overwrite) -> None:
            for turn in range(10):
                start.wait(60)
                try:
                    awq_ext.save(models_[number], tmp_path / f"{overwrite}{turn}", overwrite=overwrite)
                    outcomes.put((turn, "saved"))
                except FileExistsError:
                    outcomes.put((turn, "refused"))

        both = [FORK.Process(target=work, args=(number,)) for number in (0, 1)]
        for each in both:
            each.start()
        found = sorted(outcomes.get() for _ in range(20))
        for each in both:
            each.join(60)
            assert each.exitcode == 0
        once = ["saved", "saved"] if overwrite else ["refused", "saved"]
        assert found == [(turn, word) for turn in range(10) for word in once]
    assert not list(tmp_path.glob(".*"))
    for folder in tmp_path.iterdir():
        loaded = awq_ext.load(models.make("mlp").model, folder).state_dict()
        assert any(
            loaded.keys() == model.state_dict().keys()
            and all(same_bits(loaded[name], tensor) for name, tensor in model.state_dict().items())
            for model in models_
        )


@pytest.mark.fault(
    "Writing a checkpoint",
    "Another process is stopped just while it puts its directory in place",
    "Ours waits a minute, then goes on",
)
def test_a_process_that_keeps_the_lock_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_directory, "_LONGEST_WAIT", 0.2)
    with atomic_directory._alone_in(tmp_path):
        awq_ext.save(quantized(), tmp_path / "x")
    awq_ext.load(models.make("mlp").model, tmp_path / "x")


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))


@pytest.mark.fault(
    "Memory",
    "The system refuses memory to `{what}`",
    "MemoryError, or torch's RuntimeError with the size; the model stays as it was",
)
@linux
@pytest.mark.parametrize("what", ["quantize", "forward"])
@pytest.mark.parametrize("megabytes", [1, 24])
def test_memory_is_refused(what: str, megabytes: int) -> None:
    """The address space may grow by less than the call needs: an error that says so, and the model as it was."""
    x = torch.randn(64, 1024)
    ready = awq_ext.quantize(wide(), [x], group_size=128, method="rtn", progress=False)
    model = wide()

    def work() -> None:
        subject = ready if what == "forward" else model
        before = Snapshot(subject)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))
        try:
            if what == "quantize":
                awq_ext.quantize(model, [x], group_size=128, n_grid=2, progress=False)
            else:
                ready(x[:1].expand(2**14, 1024))
        except (MemoryError, RuntimeError) as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert isinstance(error, MemoryError) or "allocate memory" in str(error)
            error.__traceback__ = None
            before.assert_unchanged()
        else:
            raise AssertionError("there was memory enough")

    in_a_child(work)


@pytest.mark.fault(
    "Memory",
    "A tensor of the files is larger than the memory",
    "MemoryError that names the file, the tensor and its size",
)
@linux
def test_memory_for_a_tensor_is_refused(tmp_path: Path) -> None:
    """A gigabyte of nothing: the file has holes, and takes no room on the disk."""
    header = json.dumps({"embed.weight": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + 2**30)

    def work() -> None:
        opened = SafetensorsFile(file)
        resource.setrlimit(resource.RLIMIT_AS, (2**29, resource.RLIM_INFINITY))
        with pytest.raises(
            MemoryError, match=r"model\.safetensors: no memory for the 1073741824 bytes of embed\.weight"
        ):
            opened.read("embed.weight")

    in_a_child(work)


@pytest.mark.fault("Memory", "Memory runs out in the midst of `load`", "MemoryError; the model stays as it was")
@pytest.mark.parametrize("call", [1, 4, 9])
def test_memory_is_refused_in_the_midst_of_loading(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, real = awq_ext.save(quantized(), tmp_path / "x"), models.make("mlp").model, SafetensorsFile.read
    calls = iter(range(1, 1000))

    def read(self: SafetensorsFile, name: str) -> torch.Tensor:
        if next(calls) == call:
            raise MemoryError("on purpose")
        return real(self, name)

    before = Snapshot(model)
    monkeypatch.setattr(SafetensorsFile, "read", read)
    with pytest.raises(MemoryError, match="on purpose") as caught:
        awq_ext.load(model, folder)
    caught.value.__traceback__ = None
    before.assert_unchanged()
