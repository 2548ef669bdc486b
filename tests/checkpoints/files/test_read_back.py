"""verify: what was written is compared with the model before the directory is put in place, in every layout."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_directory
import models
import pytest
import torch
from checks import Snapshot
from counterparts.counterpart import byte_tokenizer
from quantized_dirs import make_directory, random_layer
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, float_model
from torch import Tensor, nn
from typer.testing import CliRunner

import awq_ext
from awq_ext.checkpoints import write
from awq_ext.checkpoints.files import read_back
from awq_ext.checkpoints.files.read_back import VerificationError, _layer_differences
from awq_ext.checkpoints.files.safetensors_file import SafetensorsFile
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.checkpoints.gguf import writing as gguf_file
from awq_ext.checkpoints.model_source import ModelSource
from awq_ext.cli import app

FORMATS = list(LAYOUTS)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
NOTHING = "CheckpointError that names file, tensor and layer; what was there stays, nothing half written lies about"


def quantized(**settings: Any) -> nn.Module:
    """A random Llama of which every layout holds every layer."""
    model = float_model("Llama", settings.pop("dtype", torch.float32), attention_bias=True)
    chosen = {"group_size": 32, "symmetric": True, "fold": "always", "method": "rtn", "progress": False}
    return awq_ext.quantize(model, [BATCH], **(chosen | settings))


def small(**settings: Any) -> nn.Module:
    case = models.make("mlp")
    return awq_ext.quantize(case.model, case.batches, **({"group_size": 16, "progress": False, "n_grid": 2} | settings))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def after_writing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any]) -> None:
    """Let ``change`` happen to every file of weights right after it is written, whoever writes it."""
    tensors, blocks = write.save_file, gguf_file.write_gguf

    def save(shard: dict[str, Tensor], path: Path, **more: Any) -> None:
        tensors(shard, path, **more)
        change(path)

    def save_gguf(folder: Path, *more: Any) -> None:
        blocks(folder, *more)
        change(folder / "model.gguf")

    monkeypatch.setattr(write, "save_file", save)
    monkeypatch.setattr(gguf_file, "write_gguf", save_gguf)


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each tensor in a file -> where its bytes begin and end."""
    if path.suffix != ".gguf":
        return {name: (entry.begin, entry.end) for name, entry in SafetensorsFile(path).tensors.items()}
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return {each.name: (each.data_offset, each.data_offset + each.n_bytes) for each in tensors}


def assert_refused(act: Callable[[], Any], folder: Path, said: str) -> str:
    """``act``, which writes ``folder``, says what is wrong and changes nothing, there and beside it."""
    before = files(folder.parent)
    with pytest.raises(VerificationError, match=said) as caught:
        act()
    text = str(caught.value)
    assert str(folder) in text and ".partial-" not in text and "as it was" in text
    assert files(folder.parent) == before
    assert not list(folder.parent.glob(".*"))
    return text


@pytest.mark.parametrize("format", FORMATS)
def test_scales_of_both_signs_come_back_bit_by_bit(format: str, tmp_path: Path) -> None:
    """A symmetric group has a negative scale where its largest weight is positive."""
    if format == "gguf":
        pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    model = quantized()
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=format)
    again = awq_ext.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, awq_ext.QuantLinear)}
    assert layers
    for name, layer in layers.items():
        other = again.get_submodule(name)
        assert bool((layer.scales < 0).any()) and bool((layer.scales > 0).any()), name
        assert torch.equal(layer.qweight, other.qweight) and torch.equal(layer.zeros, other.zeros), name
        assert layer.scales.dtype == other.scales.dtype, name
        assert torch.equal(layer.scales.view(torch.int16), other.scales.view(torch.int16)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_layout_is_verified_and_stays_the_same(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if format == "gguf":
        pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    # scales of the model's dtype, which MLX wants
    model = quantized(dtype=dtype, scale_dtype="bfloat16" if dtype == torch.bfloat16 else "float16")
    plain = awq_ext.save_pretrained(model, tmp_path / "plain", format=format, max_shard_size="60KB")
    sure = awq_ext.save_pretrained(model, tmp_path / "sure", format=format, max_shard_size="60KB", verify=True)
    assert files(plain) == files(sure)


@pytest.mark.parametrize(
    "settings",
    [
        {"fold": "never", "method": "awq"},
        {"bits": 8},
        {"group_size": -1},
        {"per_layer": {"re:.*(down|down_proj|[.]2)$": {"bits": 8}}},
    ],
    ids=["run-time scales", "8 bits", "rows", "mixed bits"],
)
@pytest.mark.parametrize("name", ["mlp", "llama", "twice", "tied"])
def test_models_as_they_are_in_memory(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Ties, layers called twice, short groups, buffers outside ``state_dict``."""
    case = models.make(name)
    chosen = {"group_size": 16, "n_grid": 2, "progress": False} | settings
    model = awq_ext.quantize(case.model, case.batches, **chosen)
    assert files(awq_ext.save(model, tmp_path / "a")) == files(awq_ext.save(model, tmp_path / "b", verify=True))


@pytest.mark.fault(
    "Writing a checkpoint", "A byte of the codes is not what was written, in `format={format!r}`", NOTHING
)
@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_byte_in_every_layout(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if format == "gguf":
        pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    model = quantized()
    folder = awq_ext.save_pretrained(quantized(group_size=-1), tmp_path / "x", format="native")
    codes = "blk.0.ffn_up.weight" if format == "gguf" else f"{UP}.{LAYOUTS[format].suffixes[0]}"

    def change(path: Path) -> None:
        begin, end = places(path)[codes]
        flip(path, (begin + end) // 2, 5)

    after_writing(monkeypatch, change)
    state = Snapshot(model)
    leaf = "blocks" if format == "gguf" else LAYOUTS[format].suffixes[0]
    file = "model.gguf" if format == "gguf" else "model.safetensors"
    said = rf"x/{file}: {UP}\.{leaf} of layer {UP} differs in 1 of"
    assert_refused(
        lambda: awq_ext.save_pretrained(model, folder, format=format, overwrite=True, verify=True), folder, said
    )
    state.assert_unchanged()


@pytest.mark.fault("Writing a checkpoint", "A bit of any one tensor is not what was written", NOTHING)
def test_a_flipped_bit_in_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, scales, zeros, biases, scales of inputs and float parameters, wherever in them it is."""
    case = models.make("llama")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, n_grid=2, fold="never", progress=False)
    found = {n: p for n, p in places(awq_ext.save(model, tmp_path / "x") / "model.safetensors").items() if p[0] < p[1]}
    assert {name.rpartition(".")[2] for name in found} >= {"qweight", "scales", "zeros", "pre_quant_scale", "weight"}
    at = [0]
    after_writing(monkeypatch, lambda path: flip(path, *at))
    for index, (name, (begin, end)) in enumerate(found.items()):
        at[:] = [(begin, end - 1)[index % 2], index % 8]
        said = f"x/model.safetensors: {name}( of layer {name.rpartition('.')[0]})? differs in 1 of"
        assert_refused(lambda: awq_ext.save(model, tmp_path / "x", True, verify=True), tmp_path / "x", said)


def test_a_flipped_bit_in_every_tensor_of_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The low bits of vectors too, which GGUF has in float32 and the model in bfloat16, and the factors of Llama 3."""
    pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    model = quantized(dtype=torch.bfloat16)
    # beside the dictionary of its class: transformers checks what is set
    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 10000.0, **factors}
    found = places(awq_ext.save_pretrained(model, tmp_path / "x", format="gguf") / "model.gguf")
    assert "rope_freqs.weight" in found
    at = [0]
    after_writing(monkeypatch, lambda path: flip(path, *at))
    for begin, _ in found.values():
        at[:] = [begin]
        said = r"x/model\.gguf: (model\.\S+|lm_head\S*|rope_freqs\.weight) .*differs in 1 of"
        again = lambda: awq_ext.save_pretrained(model, tmp_path / "x", "gguf", overwrite=True, verify=True)  # noqa: E731
        assert_refused(again, tmp_path / "x", said)


def test_metadata_of_gguf_with_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real numbers, one of them rounded to float32, and a whole one."""
    gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    model = quantized(dtype=torch.bfloat16)
    model.config.rms_norm_eps = 1e-5 / 3
    save = lambda: awq_ext.save_pretrained(model, tmp_path / "x", "gguf", overwrite=True, verify=True)  # noqa: E731
    fields = gguf.GGUFReader(save() / "model.gguf").fields
    for name in ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.block_count"):
        field = fields[name]
        place = field.offset + sum(part.nbytes for part in field.parts[: field.data[0]])
        with monkeypatch.context() as patch:
            after_writing(patch, lambda path, place=place: flip(path, place))
            assert_refused(save, tmp_path / "x", rf"model\.gguf: {re.escape(name)} is .*, not ")


def test_a_tokenizer_in_gguf_with_another_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter of the last token, and its type."""
    gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    from tokenizers import pre_tokenizers

    model, tokenizer = quantized(), byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.config.vocab_size = 300
    save = lambda: awq_ext.save_pretrained(  # noqa: E731
        model, tmp_path / "x", "gguf", overwrite=True, verify=True, tokenizer=tokenizer
    )
    fields = gguf.GGUFReader(save() / "model.gguf").fields
    for name, said in {
        "tokens": r"tokens\[299\] is '.*', not '\[PAD299\]'",
        "token_type": r"token_type\[299\] is '4', not '5'",
    }.items():
        field = fields[f"tokenizer.ggml.{name}"]
        place = field.offset + sum(part.nbytes for part in field.parts[: field.data[-1]])
        with monkeypatch.context() as patch:
            after_writing(patch, lambda path, place=place: flip(path, place))
            assert_refused(save, tmp_path / "x", rf"model\.gguf: tokenizer\.ggml\.{said}")


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Write a file once more with other tensors."""

    def act(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return act


def swap(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{UP}.")]:
        other = name.replace(UP, DOWN)
        tensors[name], tensors[other] = tensors[other], tensors[name]


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Two layers of one shape are exchanged": (edited(swap), rf"{UP}\.qweight of layer {UP} differs in"),
    "A file is cut short": (
        cut(0.6),
        r"damaged: its tensors end at byte \d+, the file at \d+, in (model\.|lm_head)\S+",
    ),
    "A file is cut off in its header": (cut(0.001), "damaged: "),
    "A tensor is missing": (edited(lambda t: t.pop(f"{UP}.zeros")), rf"{UP}\.zeros of layer {UP} is in no file"),
    "A float tensor is missing": (edited(lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight is in no file"),
    "There is a tensor more": (
        edited(lambda t: t.update(extra=torch.ones(2))),
        "extra is in the file, but was not to be",
    ),
    "Scales have another dtype": (
        edited(lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].bfloat16()})),
        rf"{UP}\.scales of layer {UP} has dtype torch.bfloat16 in the file, not torch.float16",
    ),
    "A float tensor has another shape": (
        edited(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][1:].clone()})),
        r"model\.norm\.weight has shape",
    ),
    "The header lacks its metadata": (
        lambda path: save_file(load_file(path), path),
        r"has the metadata None, not \{'format': 'pt'\}",
    ),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.fault("Writing a checkpoint", what, NOTHING)) for what in FAULTS]
)
def test_a_file_with_other_tensors(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = FAULTS[what]
    model, folder = quantized(), awq_ext.save(small(), tmp_path / "x")
    after_writing(monkeypatch, change)
    act = lambda: awq_ext.save_pretrained(model, folder, "native", overwrite=True, verify=True)  # noqa: E731
    assert "x/model.safetensors" in assert_refused(act, folder, said) or "missing" in what
    awq_ext.save_pretrained(model, folder, "native", overwrite=True)  # without verify nobody looks


@pytest.mark.fault("Writing a checkpoint", "Of several files one is cut short", NOTHING)
def test_one_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    after_writing(monkeypatch, lambda path: cut(0.9)(path) if path.name == "2.part" else None)
    act = lambda: awq_ext.save_pretrained(model, tmp_path / "x", max_shard_size="20KB", verify=True)  # noqa: E731
    assert_refused(
        act, tmp_path / "x", r"model-00003-of-\d+\.safetensors is damaged: .*the file at \d+, in (model|lm_head)\."
    )


def test_a_config_with_another_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = quantized(), Path.write_text

    def spoilt(self: Path, text: str, **more: Any) -> int:
        return real(self, text.replace('"vocab_size": ', '"vocab_size": 1'), **more)

    monkeypatch.setattr(Path, "write_text", spoilt)
    act = lambda: awq_ext.save_pretrained(model, tmp_path / "x", verify=True)  # noqa: E731
    assert_refused(act, tmp_path / "x", "x/config.json has another content than was written")


@pytest.mark.fault("Writing a checkpoint", "The config tells readers something else than the tensors", NOTHING)
def test_a_config_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is as it should be, but who reads them by config.json gets other layers."""
    native = LAYOUTS["native"]
    real = native.quantization_config

    def odd(summary: Any) -> dict[str, Any]:
        config = real(summary)
        k, size = config["layers"][UP]
        config["layers"][UP] = [k - 2, size]  # as many groups and as many bytes of codes, but for one
        return config

    monkeypatch.setattr(native, "quantization_config", odd, raising=False)
    act = lambda: awq_ext.save_pretrained(quantized(), tmp_path / "x", "native", verify=True)  # noqa: E731
    assert_refused(act, tmp_path / "x", f"layer {UP}: ")


def test_layers_that_are_read_differently() -> None:
    """Each part of a layer by itself, as a reader may get it wrong though the tensors are right."""
    made = random_layer(16, 128, 32, bias=True, scaled=True)
    assert not any(difference for _, difference in _layer_differences(made, made))
    finer = replace(
        made, group_size=16, scales=made.scales.repeat_interleave(2, 1), zeros=made.zeros.repeat_interleave(2, 1)
    )
    assert not any(difference for _, difference in _layer_differences(finer, made)), "as blocks of GGUF repeat them"
    odd = {
        "bits": replace(made, bits=8),
        "rescaled": replace(made, rescaled=2.0),
        "codes": replace(made, qweight=made.qweight ^ 1),
        "scales": replace(made, scales=made.scales * 2),
        "zeros": replace(made, zeros=made.zeros ^ 1),
        "bias": replace(made, bias=None),
        "pre_quant_scale": replace(made, pre_quant_scale=made.pre_quant_scale + 1),
    }
    for what, there in odd.items():
        assert next(name for name, difference in _layer_differences(there, made) if difference) == what
    other = replace(made, group_size=48, scales=made.scales[:, :3], zeros=made.zeros[:, :3])
    assert dict([next(pair for pair in _layer_differences(other, made) if pair[1])]) == {
        "scales": "read as 3 groups of 48, not 4 of 32"
    }


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, most = quantized(), weakref.WeakSet(), []
    real = ModelSource.layer

    def layer(self: ModelSource, name: str) -> Any:
        most.append(len(alive))
        made = real(self, name)
        alive.add(made)
        return made

    awq_ext.save(small(), tmp_path / "warm", verify=True)  # what is imported late
    monkeypatch.setattr(ModelSource, "layer", layer)
    awq_ext.save(model, tmp_path / "x", verify=True)
    layers = sum(isinstance(module, awq_ext.QuantLinear) for module in model.modules())
    assert len(most) == 2 * layers
    assert max(most[layers:]) <= 1, "the one before may be left until the next one is there"


def test_floats_are_mapped_and_differences_found_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding may be larger than the memory that is left."""
    model, read = quantized(), []
    real = SafetensorsFile.read

    def noted(self: SafetensorsFile, name: str) -> Tensor:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", noted)
    awq_ext.save_pretrained(model, tmp_path / "x", verify=True)
    assert read and all("_proj." in name for name in read)
    a = torch.arange(100, dtype=torch.float16)
    b = a.clone()
    b[[37, 60, 99]] += 1
    monkeypatch.setattr(read_back, "_BYTES_AT_ONCE", 16)
    said = "differs in 3 of 100 values, first at [3, 7]: 37.0 in the file, 38.0 in memory"
    assert read_back._difference(a.view(10, 10), b.view(10, 10)) == said


# GGUF and MLX have a name for no layer of these: they are the next test
@pytest.mark.parametrize("target", [name for name in FORMATS if name not in ("gguf", "mlx")])
def test_convert_is_verified(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path / "a", "awq")
    awq_ext.convert(tmp_path / "a", tmp_path / "b", target)
    awq_ext.convert(tmp_path / "a", tmp_path / "c", target, verify=True)
    assert files(tmp_path / "b") == files(tmp_path / "c")
    after_writing(monkeypatch, lambda path: flip(path, path.stat().st_size - 1))
    again = lambda: awq_ext.convert(tmp_path / "a", tmp_path / "b", target, overwrite=True, verify=True)  # noqa: E731
    assert_refused(again, tmp_path / "b", r"b/model\.safetensors: .* differs in 1 of")


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_convert_from_a_model(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "gguf":
        pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    awq_ext.save_pretrained(quantized(), tmp_path / "a")
    awq_ext.convert(tmp_path / "a", tmp_path / "b", target, verify=True)
    after_writing(monkeypatch, lambda path: flip(path, path.stat().st_size - 40))
    again = lambda: awq_ext.convert(tmp_path / "a", tmp_path / "b", target, overwrite=True, verify=True)  # noqa: E731
    assert_refused(again, tmp_path / "b", r"b/model\.(gguf|safetensors): .* differs in 1 of")


@pytest.mark.fault(
    "Writing a checkpoint",
    "A byte is not what `awq-ext quantize` or `awq-ext convert` wrote",
    "One line that names file, tensor and layer, exit status 1; nothing is left, unless --no-verify is given",
)
@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_the_commands_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calib = hf_directory.make(tmp_path / "float"), tmp_path / "calib.txt"
    calib.write_text("some text of this kind, again and again. " * 40)
    base = ["--samples", "2", "--seq-len", "64", "--method", "rtn", "--group-size", "32", "--format", "awq"]
    quantize = ["quantize", source, tmp_path / "q", "--calib", calib, *base]
    convert = ["convert", tmp_path / "q", tmp_path / "c", "--format", "compressed-tensors"]
    run = lambda *parts: CliRunner().invoke(app, list(map(str, parts)), env={"COLUMNS": "1000"})  # noqa: E731
    after_writing(monkeypatch, lambda path: flip(path, path.stat().st_size - 1))
    for command, out in ((quantize, tmp_path / "q"), (convert, tmp_path / "c")):
        done = run(*command)
        assert done.exit_code == 1 and not out.exists(), done.output
        assert f"{out}/model.safetensors: " in done.output and " of layer " in done.output and "differs" in done.output
        assert run(*command, "--no-verify").exit_code == 0 and out.exists()


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_a_streamed_checkpoint_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished stays, so that the same call writes it once more."""
    source, out = hf_directory.make(tmp_path / "float"), tmp_path / "out"
    batches = models.token_batches((20, 33))
    call = lambda: awq_ext.quantize_checkpoint(  # noqa: E731
        source, out, batches, method="rtn", group_size=32, verify=True, progress=False
    )
    with monkeypatch.context() as patched:
        after_writing(patched, lambda path: flip(path, path.stat().st_size - 1))
        with pytest.raises(VerificationError, match=rf"{out}/model\.safetensors: .* differs in 1 of"):
            call()
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    call()
    assert out.is_dir() and not (tmp_path / "out.partial").exists()
