"""convert: from every layout to every other and back, the same bits, without a model."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import architectures
import models
import pytest
import torch
from checks import same_bits
from quantized_dirs import as_version_1, assert_holds, make_directory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.cli import app

# these know some architectures only: test_gguf.py, test_mlx.py
OTHERS = [name for name in LAYOUTS if name not in ("gguf", "mlx")]


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("source", OTHERS)
def test_every_layout_to_every_other(source: str, target: str, tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a", source)
    assert awq_ext.convert(tmp_path / "a", tmp_path / "b", format=target) == tmp_path / "b"
    assert_holds(tmp_path / "b", layers)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("none", 128)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokens"
    before, after = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    for name in ("embed.weight", "norm.weight", "lm_head.weight", "position_ids"):
        assert same_bits(before[name], after[name])
    if source == target:
        assert before.keys() == after.keys()
        assert all(same_bits(tensor, after[name]) for name, tensor in before.items())


def test_zero_points_and_their_problems(tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a", "awq", symmetric=False)
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="compressed-tensors")
    assert_holds(tmp_path / "b", layers)
    with pytest.raises(CheckpointError, match="which this format lacks"):
        awq_ext.convert(tmp_path / "a", tmp_path / "c", format="modelopt")
    assert not (tmp_path / "c").exists()


def test_float_modules_are_left_alone_by_readers(tmp_path: Path) -> None:
    make_directory(tmp_path / "a")
    for format, path in (
        ("awq", ("quantization_config", "modules_to_not_convert")),
        ("compressed-tensors", ("quantization_config", "ignore")),
    ):
        awq_ext.convert(tmp_path / "a", tmp_path / format, format=format)
        config = json.loads((tmp_path / format / "config.json").read_text())
        assert set(config[path[0]][path[1]]) == {"embed", "lm_head"}
    awq_ext.convert(tmp_path / "a", tmp_path / "m", format="modelopt")
    quantization = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["exclude_modules"] == ["embed", "lm_head"]
    assert quantization["quant_algo"] == "W4A16_AWQ"
    # and is gone when the directory becomes another layout
    awq_ext.convert(tmp_path / "a", tmp_path / "m", format="awq", overwrite=True)
    assert not (tmp_path / "m" / "hf_quant_config.json").exists()


def test_a_layer_spread_over_two_files(tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a", "awq")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weights = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / "a" / f"model-{i + 1:05}-of-00002.safetensors")
        weights |= dict.fromkeys(half, f"model-{i + 1:05}-of-00002.safetensors")
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert_holds(tmp_path / "a", layers)
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="gptq", max_shard_size=10_000)
    assert_holds(tmp_path / "b", layers)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2


def test_a_cache_of_the_hugging_face_hub(tmp_path: Path) -> None:
    """There the files of a snapshot are links into a store beside it."""
    repository = tmp_path / "models--x--y"
    layers = make_directory(repository / "blobs", "awq")
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert_holds(snapshot, layers)
    awq_ext.convert(snapshot, tmp_path / "b", format="gemv")
    assert_holds(tmp_path / "b", layers)
    assert not any(file.is_symlink() for file in (tmp_path / "b").iterdir())


@pytest.mark.parametrize("version", [1, 2])
def test_from_awq_ext_save(version: int, tmp_path: Path) -> None:
    case = models.make("llama")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=2, fold="never", progress=False)
    awq_ext.save(model, tmp_path / "a")
    if version == 1:
        as_version_1(tmp_path / "a")
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="native")
    loaded = awq_ext.load(models.make("llama").model, tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(models.logits(loaded(case.batches[0])), models.logits(model(case.batches[0])))
    with pytest.raises(CheckpointError, match="nothing was written") as caught:
        awq_ext.convert(tmp_path / "a", tmp_path / "c", format="awq")
    assert 'fold="always"' in str(caught.value)
    assert "is not a multiple of group_size" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_experts_of_awq_ext_save_need_their_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="for a mixture of experts")
    case = architectures.make("Mixtral")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    awq_ext.save(model, tmp_path / "a")
    if not json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["experts"]:
        pytest.skip("transformers before release 5 has experts as Linears")
    with pytest.raises(CheckpointError, match="which only that model can tell"):
        awq_ext.convert(tmp_path / "a", tmp_path / "b", format="awq")
    assert not (tmp_path / "b").exists()
    # the native layout keeps the names of the model
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="native")
    loaded = awq_ext.load(architectures.make("Mixtral", seed=1).model, tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(loaded(**case.batches[0]).logits, model(**case.batches[0]).logits)
    assert loaded.awq_report == model.awq_report


class OnlyIntegers(TorchDispatchMode):
    """Fails on a float tensor with as many elements as a weight."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            assert result.numel() < 64 * 128, f"{func} made a float weight"
        return result


def test_nothing_is_dequantized_and_no_module_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a module was built")

    layers = make_directory(tmp_path / "a", "awq")
    monkeypatch.setattr(nn.Module, "__init__", refuse)
    with OnlyIntegers():
        awq_ext.convert(tmp_path / "a", tmp_path / "b", format="gemv_fast")
    monkeypatch.undo()
    assert_holds(tmp_path / "b", layers)


@pytest.mark.fault(
    "Writing a checkpoint", "`convert` into the directory that it reads", "CheckpointError; the source stays"
)
def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a")
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    for target in (tmp_path / "a", tmp_path / "alias", tmp_path / "b" / ".." / "a"):
        with pytest.raises(CheckpointError, match="is the source"):
            awq_ext.convert(tmp_path / "a", target)
    assert_holds(tmp_path / "a", layers)


def test_command(tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a", symmetric=False)
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "gemv"])
    assert result.exit_code == 0, result.output
    assert_holds(tmp_path / "b", layers)
    for arguments, code, text in (
        (["--format", "marlin"], 2, "is not one of awq"),
        (["--format", "modelopt"], 1, "--set symmetric=true"),
        (["--max-shard-size", "much"], 2, "is no size: give bytes"),
    ):
        result = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "c"), *arguments])
        assert result.exit_code == code, result.output
        assert text in " ".join(result.output.split())
        assert not (tmp_path / "c").exists()
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "nowhere"), str(tmp_path / "c")])
    assert result.exit_code == 1
    assert "is not a directory" in " ".join(result.output.split())


CARRIED = (
    "modeling_mine.py",
    "code/parts.py",
    "1_Pooling/config.json",
    "LICENSE",
    "notes.txt",
    "merges.txt",
    "words.model",
)
LEFT = (
    "pytorch_model.bin",
    "training_args.bin",
    "model.gguf",
    "tf_model.h5",
    "model.ONNX",
    "old.safetensors.index.json",
    "original/consolidated.pth",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "code/weights.npz",
    "code/__pycache__/parts.pyc",
    ".git/config",
    ".hidden",
)


def test_what_lies_beside_the_weights_is_carried_along_but_never_weights_or_pickles(tmp_path: Path) -> None:
    source = tmp_path / "a"
    make_directory(source)
    for name in (*CARRIED, *LEFT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "optimizer").write_bytes(pickle.dumps({}, protocol=4))
    torch.save({}, source / "state")
    (tmp_path / "secret.txt").write_text("secret")
    (source / "link.txt").symlink_to(tmp_path / "secret.txt")
    (source / "own.txt").symlink_to("notes.txt")
    awq_ext.convert(source, tmp_path / "b", format="awq")
    found = {str(file.relative_to(tmp_path / "b")) for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert found == {*CARRIED, "own.txt", "config.json", "model.safetensors", "tokenizer.json"}
    assert all((tmp_path / "b" / name).read_text() == name for name in CARRIED)


def test_a_checkpoint_inside_the_source_is_not_copied_into_itself(tmp_path: Path) -> None:
    make_directory(tmp_path)
    for _ in range(2):
        awq_ext.convert(tmp_path, tmp_path / "awq", format="awq", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "awq").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
