"""Checkpoints with something wrong in them, whatever it is: read right, or refused with the reason; never anything else."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import mutations
import pytest
import torch
from checks import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_dirs import as_version_1, make_directory
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.checkpoints.quantized_dir import QuantDir

INDEX = "model.safetensors.index.json"
KINDS = [*LAYOUTS, "awq_ext.save", "version 1"]
SECONDS = 30  # after which something hangs: one try takes hundredths
# Files have 100 KB, of which a reader may hold a few times as much; the rest is what allocators keep.
MOST_MEMORY = 300 * 2**20
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(EXAMPLES, max_examples=1500)
Content = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind: of other tools in two files with an index, our own in one."""
    torch.set_num_threads(1)
    made = {}
    for name in LAYOUTS:
        make_directory(made.setdefault(name, tmp_path_factory.mktemp(name) / "x"), name)
        split(made[name])
    case = models.make("llama")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    made["awq_ext.save"] = awq_ext.save(model, tmp_path_factory.mktemp("saved") / "x")
    made["version 1"] = as_version_1(awq_ext.save(model, tmp_path_factory.mktemp("old") / "x"))
    return made


def split(folder: Path) -> None:
    """Give a directory a second file and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    home = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(home.values()):
        save_file({name: tensor for name, tensor in tensors.items() if home[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))


@contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"it did not end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> Content:
    """All that a directory holds, by name; every layer as rows."""
    found = QuantDir(folder)
    held = {name: found.float_tensor(name) for name in found.floats}
    for name in found.layers:
        layer = found.layer(name)
        for part in ("qweight", "scales", "zeros", "bias", "pre_quant_scale"):
            if (tensor := getattr(layer, part)) is not None:
                held[f"{name}:{part}"] = tensor
        held[f"{name}:sizes"] = torch.tensor([layer.in_features, layer.groups, layer.bits])
    return held


def read_or_refused(folder: Path, out: Path) -> Content | None:
    """What the directory holds, or None where it is refused, by an error that names it; nothing is half written."""
    try:
        found = content(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
        assert len(str(error)) > len(str(folder)) + 10, "it says no reason"
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of neighbours with other settings
        try:
            awq_ext.convert(folder, out, format="native")
        except CheckpointError:
            assert not out.exists()
    return found


def same(a: Content, b: Content) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def attack(draw: Callable[[Any], Any], good: Path, to: Path) -> None:
    """One damage: whatever is still read must be what was there, or what the safetensors library finds in the same files."""
    folder, out = to / "x", to / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(good, folder)
    file = folder / draw(st.sampled_from(sorted(each.name for each in good.iterdir() if each.name != "tokenizer.json")))
    tensors = file.suffix == ".safetensors"
    own = mutations.damage_header if tensors else mutations.damage_json
    damage = draw(st.sampled_from([own, own, own, mutations.damage_bytes, mutations.displace]))
    with in_time():
        damage(draw, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a report that cannot be read
            found = read_or_refused(folder, out)
    if found is None or same(found, content(good)):
        return
    assert tensors, f"{file.name} was damaged ({damage.__name__}), and another model is read without a word"
    theirs = {name: tensor for each in folder.glob("*.safetensors") for name, tensor in load_file(each).items()}
    for name, tensor in found.items():
        assert ":" in name or same_bits(tensor, theirs[name])


@pytest.mark.fault(
    "Files of a checkpoint",
    "In any format, any entry of a file changed, added or gone; bytes cut or changed; a folder, pipe or link in its place",
    "Read right, or CheckpointError that names the directory; no crash, no hang, no other model",
)
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(data=st.data())
def test_whatever_is_wrong_is_refused_with_its_reason(
    kind: str, good: dict[str, Path], tmp_path: Path, data: Any
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack(data.draw, good[kind], tmp_path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(data=st.data())
def test_many_more_of_them(kind: str, good: dict[str, Path], tmp_path: Path, data: Any) -> None:
    attack(data.draw, good[kind], tmp_path)


@pytest.mark.fault(
    "Files of a checkpoint", "In any format, scales hold NaN or Inf", "CheckpointError that names the layer"
)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_no_numbers(kind: str, good: dict[str, Path], tmp_path: Path) -> None:
    """A layer with one such scale answers with NaN for ever after."""
    for value in (float("nan"), float("inf")):
        folder = shutil.copytree(good[kind], tmp_path / str(value))
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if "scale" in name:
                    tensor.view(-1)[1] = value
                elif name.endswith(".blocks"):  # of GGUF, which begin with their scale
                    tensor.view(-1)[:2] = torch.tensor([value]).half().view(torch.uint8)
            save_file(tensors, file)
        assert read_or_refused(folder, tmp_path / "out") is None
