"""save and load: every bit comes back, a kill loses nothing, a hostile file changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks import Snapshot, same_bits
from kills import POSIX, killed
from quantized_dirs import as_version_1
from safetensors.torch import load_file
from torch import Tensor, nn

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints import quantized_dir


def quantized(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    case = models.make(name, dtype)
    settings: dict[str, Any] = {"group_size": 16, "n_grid": 3, "progress": False} | options
    return awq_ext.quantize(case.model, case.batches, **settings)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same_model(a: nn.Module, b: nn.Module, name: str = "llama") -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert same_bits(tensor, second[key]), key
    assert [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]
    batch = models.make(name).batches[0].to(next(iter(first.values())).dtype if name == "mlp" else torch.long)
    with torch.no_grad():
        assert torch.equal(models.logits(a(batch)), models.logits(b(batch)))


@pytest.mark.parametrize("name", list(models.MODELS))
@pytest.mark.parametrize("meta", [False, True])
def test_reload_is_bit_for_bit(name: str, meta: bool, tmp_path: Path) -> None:
    model = quantized(name)
    assert awq_ext.save(model, tmp_path) == tmp_path
    torch.manual_seed(99)
    with torch.device("meta" if meta else "cpu"):
        empty = models.MODELS[name]().eval()
    loaded = awq_ext.load(empty, tmp_path)
    assert loaded is empty
    assert not any(tensor.is_meta for tensor in tensors_of(loaded).values())
    assert_same_model(model, loaded, name)
    assert loaded.awq_report == model.awq_report
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"scale_dtype": "bfloat16"}, {"symmetric": True, "fold": "never"}])
def test_other_dtypes(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(dtype=dtype, **options)
    awq_ext.save(model, tmp_path)
    loaded = awq_ext.load(lambda: models.Net().eval(), tmp_path)  # built in fp32: takes the dtype of the file
    assert_same_model(model, loaded)
    layer = loaded.layers[0].mlp.up_proj
    assert (layer.dtype, layer.weight.dtype) == (dtype, dtype)


MIXED = {"*.down_proj": {"bits": 8, "group_size": 32}, "layers.1.*": {"bits": 8, "symmetric": True}}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "fold": "never"}, {"per_layer": MIXED}])
def test_eight_bits(options: dict[str, Any], meta: bool, tmp_path: Path) -> None:
    model = quantized(**options)
    awq_ext.set_compute_dtype(model, "int8")
    awq_ext.save(model, tmp_path / "a")
    with torch.device("meta" if meta else "cpu"):
        empty = models.Net().eval()
    assert_same_model(model, awq_ext.load(empty, tmp_path / "a"))
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    widths = {name: (*sizes, said["bits"])[2] for name, sizes in said["layers"].items()}
    assert widths == {name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")}
    awq_ext.convert(tmp_path / "a", tmp_path / "b", "native")
    assert_same_model(model, awq_ext.load(models.Net().eval(), tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"(?s)'awq' cannot hold this model.*it has 8 bits, not 4"):
        awq_ext.convert(tmp_path / "a", tmp_path / "c", "awq")
    assert not (tmp_path / "c").exists()


def test_loading_onto_a_quantized_model_replaces_it(tmp_path: Path) -> None:
    model, other = quantized(), quantized(group_size=32, symmetric=True, fold="never")
    awq_ext.save(model, tmp_path)
    assert_same_model(model, awq_ext.load(other, tmp_path))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = quantized("tied")
    awq_ext.save(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    assert ("embed.weight" in stored) != ("lm_head.weight" in stored)
    with torch.device("meta"):
        empty = models.TiedNet()
    loaded = awq_ext.load(empty, tmp_path)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_buffers_outside_state_dict_are_stored(tmp_path: Path) -> None:
    class Rotary(models.Net):
        def __init__(self) -> None:
            super().__init__(models.MlpBlock)
            self.register_buffer("table", torch.randn(7), persistent=False)
            self.register_buffer("view", torch.randn(8)[::2], persistent=False)

    model = awq_ext.quantize(Rotary(), models.token_batches(), group_size=16, n_grid=2, progress=False)
    awq_ext.save(model, tmp_path)
    assert "table" not in model.state_dict()
    with torch.device("meta"):
        empty = Rotary()
    loaded = awq_ext.load(empty, tmp_path)
    assert torch.equal(loaded.table, model.table)
    assert torch.equal(loaded.view, model.view)
    assert "table" not in loaded.state_dict()


class Shared(nn.Module):
    """A bias of two Linears, a table of two modules, two views of one storage; ``tied`` False: all of it apart."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        storage = torch.randn(2, 8)
        self.register_buffer("whole", storage)
        self.register_buffer("flat", storage.view(-1) if tied else torch.randn(16))
        self.register_buffer("table", torch.randn(5), persistent=False)
        self.other = nn.Identity()
        self.other.register_buffer("table", self.table if tied else torch.randn(5), persistent=False)
        self.register_buffer("turns", torch.randn(3, dtype=torch.complex64))
        if tied:
            self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("skip", [(), ("a",), ("b",)])
def test_all_ties_come_back_in_a_model_built_without_them(skip: tuple[str, ...], version: int, tmp_path: Path) -> None:
    model, batches = Shared(), [torch.randn(8, 32)]
    awq_ext.quantize(model, batches, group_size=16, skip=skip, bias_correction=False, progress=False)
    assert model.a.bias is model.b.bias
    awq_ext.save(model, tmp_path)
    with torch.device("meta"):
        empty = Shared(tied=False)
    loaded = awq_ext.load(empty, as_version_1(tmp_path) if version == 1 else tmp_path)
    assert loaded.a.bias is loaded.b.bias
    assert loaded.table is loaded.other.table
    first, second = tensors_of(model), tensors_of(loaded)
    assert first.keys() == second.keys()
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())


def test_what_is_apart_in_the_file_is_apart_in_a_model_built_with_ties(tmp_path: Path) -> None:
    model = Shared(tied=False)
    awq_ext.quantize(model, [torch.randn(8, 32)], group_size=16, skip=("a", "b"), progress=False)
    awq_ext.save(model, tmp_path)
    loaded = awq_ext.load(Shared(), tmp_path)
    assert same_bits(loaded.a.bias, model.a.bias)
    assert same_bits(loaded.b.bias, model.b.bias)
    assert same_bits(loaded.other.table, model.other.table)


def test_a_layer_with_two_names(tmp_path: Path) -> None:
    model = Shared(tied=False)
    awq_ext.quantize(model, [torch.randn(8, 32)], group_size=16, progress=False)
    model.d = model.a
    awq_ext.save(model, tmp_path)
    assert not any(name.startswith("d.") for name in load_file(tmp_path / "model.safetensors"))
    empty = Shared(tied=False)
    empty.d = nn.Linear(32, 32)
    loaded = awq_ext.load(empty, tmp_path)
    first, second = dict(model.d.named_buffers()) | {"bias": model.d.bias}, dict(loaded.d.named_buffers())
    assert all(same_bits(tensor, (second | {"bias": loaded.d.bias})[name]) for name, tensor in first.items())
    assert (loaded.d.tiles is loaded.a.tiles, loaded.d.bias is loaded.a.bias) == (True, True)


def test_dtypes_of_layers_and_what_they_compute_in_come_back(tmp_path: Path) -> None:
    model = quantized("mlp")
    layers = [module for module in model.modules() if isinstance(module, awq_ext.QuantLinear)]
    layers[0].compute = "int8"
    layers[1].to(torch.bfloat16)
    awq_ext.save(model, tmp_path)
    loaded = awq_ext.load(models.make("mlp").model, tmp_path)
    found = [module for module in loaded.modules() if isinstance(module, awq_ext.QuantLinear)]
    assert [(m.dtype, m.compute) for m in found] == [(m.dtype, m.compute) for m in layers]


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no QuantLinear"):
        awq_ext.save(models.Net(), tmp_path)
    model = quantized().to("meta")
    with pytest.raises(CheckpointError, match="is on the meta device"):
        awq_ext.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- atomicity ----------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.fault(
    "Writing a checkpoint",
    "The process is killed at any step of `save`",
    "The directory holds the old checkpoint or the new one, whole",
)
@POSIX
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """After a kill at each of the file operations in turn the directory loads as the old model or as the new one."""
    old, new = quantized("mlp"), quantized("mlp", group_size=32, symmetric=True)
    outcomes = []
    for step in range(1, 200):
        folder = tmp_path / str(step) / "x"
        awq_ext.save(old, folder)
        dead = killed(step, lambda to=folder: awq_ext.save(new, to, overwrite=True))
        loaded = awq_ext.load(lambda: models.MODELS["mlp"]().eval(), folder)
        sizes = {module.group_size for module in loaded.modules() if isinstance(module, awq_ext.QuantLinear)}
        expected = old if sizes == {16} else new
        assert_same_model(loaded, expected, "mlp")
        assert loaded.awq_report == expected.awq_report
        outcomes.append(expected is new)
        if not dead:
            break
        awq_ext.save(new, folder, overwrite=True)
        assert names(folder.parent) == ["x"], "what the dead process left is cleared away"
        assert names(folder) == ["awq_report.json", "config.json", "model.safetensors"]
    assert not dead
    assert outcomes == sorted(outcomes), "once the new checkpoint is in place, no later step goes back"
    assert outcomes[0] is False
    assert outcomes.count(False) >= 8
    assert outcomes[-1] is True


@pytest.mark.fault(
    "Writing a checkpoint",
    "The process is killed at any step of a first `save`",
    "The directory is not there, or whole",
)
@POSIX
def test_the_first_save_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    model = quantized("mlp")
    outcomes = []
    for step in range(1, 200):
        folder = tmp_path / str(step) / "x"
        dead = killed(step, lambda to=folder: awq_ext.save(model, to))
        outcomes.append(folder.exists())
        if outcomes[-1]:
            assert_same_model(awq_ext.load(lambda: models.MODELS["mlp"]().eval(), folder), model, "mlp")
        else:
            with pytest.raises(CheckpointError, match="is not a directory"):
                awq_ext.load(models.MODELS["mlp"](), folder)
        if not dead:
            break
    assert not dead
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 8


@pytest.mark.fault(
    "Reading beside others", "The directory is replaced while it is read", "CheckpointError; the model stays as it was"
)
def test_a_directory_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the config of one checkpoint could meet the tensors of another."""
    old, new = quantized("mlp"), quantized("mlp", group_size=32)
    folder, real = awq_ext.save(old, tmp_path / "x"), quantized_dir.Shards

    def replaced_before(*args: Any) -> Any:
        awq_ext.save(new, folder, overwrite=True)
        return real(*args)

    monkeypatch.setattr(quantized_dir, "Shards", replaced_before)
    model = models.make("mlp").model
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        awq_ext.load(model, folder)
    before.assert_unchanged()


# --- what else is in the directory --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    mine = ("tokenizer.json", "notes.txt", "model.py", "adapter.safetensors", "sub/model.safetensors")
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "config.json").write_text('{"my_key": 1}')
    for overwrite in (False, True):
        awq_ext.save(quantized("mlp"), tmp_path, overwrite=overwrite)
        assert all((tmp_path / name).read_text() == "mine" for name in mine)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["my_key"] == 1
        assert config["quantization_config"]["quant_method"] == "awq_ext"
    assert len(contents(tmp_path)) == len(mine) + 3


FOREIGN = {
    "model.safetensors": "mine",
    "model-00001-of-00002.safetensors": "mine",
    "model.safetensors.index.json": "mine",
    "quantize_config.json": "{}",
    "config.json": "mine",
}


@pytest.mark.fault("Writing a checkpoint", "The directory holds other weights: {name}", "FileExistsError; they stay")
@pytest.mark.parametrize("name", list(FOREIGN))
def test_weights_of_others_are_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        awq_ext.save(quantized("mlp"), tmp_path)
    assert contents(tmp_path) == before


def test_a_checkpoint_in_another_layout_is_not_replaced(tmp_path: Path) -> None:
    model = quantized("mlp", fold="always", symmetric=True, group_size=-1)
    awq_ext.save_pretrained(model, tmp_path / "other", format="compressed-tensors")
    before = contents(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"holds a quantized checkpoint \(model\.safetensors\)"):
        awq_ext.save(model, tmp_path / "other")
    assert contents(tmp_path / "other") == before
    awq_ext.save_pretrained(model, tmp_path / "native", format="native")
    awq_ext.save(model, tmp_path / "native", overwrite=True)
    assert_same_model(awq_ext.load(models.MODELS["mlp"]().eval(), tmp_path / "native"), model, "mlp")


def test_the_report_of_an_earlier_model_does_not_stay(tmp_path: Path) -> None:
    model = quantized("mlp")
    awq_ext.save(model, tmp_path)
    del model.awq_report
    awq_ext.save(model, tmp_path, overwrite=True)
    assert not hasattr(awq_ext.load(models.make("mlp").model, tmp_path), "awq_report")


def test_a_model_of_other_shapes_is_called_another_model(tmp_path: Path) -> None:
    def build(width: int, norm: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(norm))

    model = build(32, 16)
    awq_ext.quantize(model, [torch.randn(64, 32)], group_size=16, n_grid=3, progress=False)
    awq_ext.save(model, tmp_path / "saved")
    for width, norm, what in (
        (64, 16, "32 -> 32 features in the files"),
        (32, 8, r"shape \(16,\) in the file, \(8,\)"),
    ):
        other = build(width, norm)
        with pytest.raises(CheckpointError, match=f"{what}.*: the model given is another than the one that was saved$"):
            awq_ext.load(other, tmp_path / "saved")
        with pytest.raises(CheckpointError, match=f"{what}.*: the function builds another model than the one that was"):
            awq_ext.load(lambda other=other: other, tmp_path / "saved")
