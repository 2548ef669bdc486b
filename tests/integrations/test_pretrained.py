"""save_pretrained and from_pretrained: the logits of the model in memory, bit for bit, from every layout."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import models
import pytest
import torch
from checks import Snapshot, same_bits
from quantized_dirs import as_version_1
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, SIZES, float_model, logits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.checkpoints.write import parse_size

transformers = pytest.importorskip("transformers", reason="from_pretrained builds models with it (extra hf)")

FORMATS = list(LAYOUTS)
STRUCTURE = ("tie_word_embeddings", "attention_bias", "num_key_value_heads")


def quantized(family: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    settings = {name: options.pop(name) for name in (*options,) if name in STRUCTURE}
    chosen = {"group_size": 32, "symmetric": True, "fold": "always", "method": "rtn", "progress": False} | options
    return awq_ext.quantize(float_model(family, dtype, **settings), [BATCH], **chosen)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = quantized()
    return model, awq_ext.save_pretrained(model, tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_every_layout_computes_what_the_model_in_memory_does(
    format: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    # MLX warns of scales of another dtype than a bfloat16 model's
    scales = "bfloat16" if format == "mlx" and dtype == torch.bfloat16 else "float16"
    model = quantized(dtype=dtype, scale_dtype=scales, **options)
    expected = logits(model)
    folder = awq_ext.save_pretrained(model, tmp_path / "x", format=format)
    loaded = awq_ext.from_pretrained(folder)
    assert not loaded.training
    assert torch.equal(logits(loaded), expected)
    assert {n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)} == {
        n for n, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    ours, theirs = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == bool(options)
    assert torch.equal(logits(awq_ext.load(float_model(dtype=dtype, **options), folder)), expected)


@pytest.mark.parametrize("options", [{"bits": 8}, {"per_layer": {"*.down_proj": {"bits": 8}}}])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_eight_bits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    if family == "Mixtral" and "per_layer" in options:
        options = {"per_layer": {"*.experts.*": {"bits": 8}}}
    model = quantized(family, symmetric=False, fold="auto", method="awq", n_grid=2, min_tokens=0, **options)
    assert 8 in {module.bits for module in model.modules() if isinstance(module, QuantLinear)}
    awq_ext.save_pretrained(model, tmp_path / "a", format="native")
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="native")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(logits(awq_ext.from_pretrained(folder)), logits(model))
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("in 8 bits" if "bits" in options else "in 4 and 8 bits") in card and "- int8" in card


@pytest.mark.parametrize("format", ["awq", "gemv", "gemv_fast", "llm-awq", "compressed-tensors", "native"])
def test_zero_points(format: str, tmp_path: Path) -> None:
    model = quantized("Qwen2", symmetric=False)
    awq_ext.save_pretrained(model, tmp_path, format=format)
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3",
        "Gemma2",
        "Phi",
        "GPT-NeoX",
        "Falcon, new decoder",
        "OPT",
        "BLOOM",
        "MPT",
        "BERT",
        "T5",
        "ViT",
        "Whisper",
    ],
)
def test_architectures(name: str, tmp_path: Path) -> None:
    case = architectures.make(name)
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    awq_ext.save_pretrained(model, tmp_path)
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), case.batches[0]), logits(model, case.batches[0]))


EXPERTS = {
    "Mixtral": "model.layers.0.block_sparse_moe.experts.3.w2",
    "Qwen2-MoE": "model.layers.1.mlp.experts.0.gate_proj",
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "native"])
@pytest.mark.parametrize("name", list(EXPERTS))
def test_experts_that_transformers_joins_have_their_own_tensors_in_files(
    name: str, format: str, kept: bool, tmp_path: Path
) -> None:
    case = architectures.make(name)
    skip = ("*lm_head", "*gate", "*experts.*") if kept else ("*lm_head", "*gate")
    options = {"group_size": 16, "method": "rtn", "fold": "always", "skip": skip, "progress": False}
    model = awq_ext.quantize(case.model, case.batches, **options)
    awq_ext.save_pretrained(model, tmp_path, format=format, max_shard_size=20_000)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first = "weight" if kept else LAYOUTS[format].suffixes[0]
    assert f"{EXPERTS[name]}.{first}" in names
    expected = logits(model, case.batches[0])
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), case.batches[0]), expected)
    other = architectures.make(name, seed=1).model
    assert torch.equal(logits(awq_ext.load(other, tmp_path), case.batches[0]), expected)


def test_experts_that_no_file_divides_are_for_the_native_layout(tmp_path: Path) -> None:
    if not hasattr(transformers, "GptOssForCausalLM"):
        pytest.skip("this release of transformers has no gpt-oss")
    case = architectures.make("gpt-oss")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    with pytest.raises(
        CheckpointError, match=r'mlp\.experts\.(gate_up|down)_proj and alike hold experts.*format="native"'
    ):
        awq_ext.save_pretrained(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    awq_ext.save_pretrained(model, tmp_path / "x", format="native")
    expected = logits(model, case.batches[0])
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / "x"), case.batches[0]), expected)
    other = architectures.make("gpt-oss", seed=1).model
    assert torch.equal(logits(awq_ext.load(other, tmp_path / "x"), case.batches[0]), expected)
    awq_ext.convert(tmp_path / "x", tmp_path / "y", format="native")
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / "y"), case.batches[0]), expected)


def test_layers_with_a_transposed_weight(tmp_path: Path) -> None:
    case = architectures.make("GPT-2")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    assert isinstance(model.transformer.h[0].mlp.c_fc, QuantLinear)
    awq_ext.save_pretrained(model, tmp_path)
    expected = logits(model, case.batches[0])
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), case.batches[0]), expected)
    assert torch.equal(
        logits(awq_ext.load(architectures.make("GPT-2", seed=1).model, tmp_path), case.batches[0]), expected
    )


def test_a_damaged_expert_leaves_the_model_whole(tmp_path: Path) -> None:
    case = architectures.make("Mixtral")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    awq_ext.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.qzeros"
    for spoil in (lambda: tensors.pop(name), lambda: tensors.update({name: torch.zeros(1, 1, dtype=torch.int32)})):
        spoil()
        save_file(tensors, tmp_path / "model.safetensors")
        other = architectures.make("Mixtral", seed=1).model
        before = Snapshot(other)
        with pytest.raises(CheckpointError):
            awq_ext.load(other, tmp_path)
        before.assert_unchanged()


def test_run_time_scales_live_in_the_native_layout(tmp_path: Path) -> None:
    model = quantized(fold="never", method="awq", n_grid=2)
    assert any(m.pre_quant_scale is not None for m in model.modules() if isinstance(m, QuantLinear))
    awq_ext.save_pretrained(model, tmp_path, format="native")
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path)), logits(model))


def test_all_that_a_format_cannot_hold_is_listed_at_once(tmp_path: Path) -> None:
    model = quantized(fold="never", method="awq", n_grid=2, symmetric=False)
    before = Snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        awq_ext.save_pretrained(model, tmp_path / "x", format="modelopt")
    text = str(caught.value)
    assert 'fold="always"' in text
    assert "symmetric=True" in text
    assert "more layers" in text
    assert list(tmp_path.iterdir()) == []
    before.assert_unchanged()


def test_half_of_what_servers_join_is_a_warning(tmp_path: Path) -> None:
    model = quantized(skip=("*lm_head", "*.1.self_attn.k_proj"))
    with pytest.warns(
        UserWarning, match=r"layers\.1\.self_attn\.q_proj, model\.layers\.1\.self_attn\.v_proj: neighbours"
    ):
        awq_ext.save_pretrained(model, tmp_path)
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path)), logits(model))
    model = quantized(per_layer={"*.up_proj": {"group_size": 16}})
    with pytest.warns(UserWarning, match="gate_proj"):
        awq_ext.save_pretrained(model, tmp_path, format="compressed-tensors", overwrite=True)
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(CheckpointError, match=r"different group sizes \(16, 32\)"):
        awq_ext.save_pretrained(model, tmp_path, format="awq", overwrite=True)


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    model = quantized()
    for options, error in (
        ({"format": "marlin"}, "choose one of 'awq'"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples'"),
        ({"max_shard_size": 0}, "at least one byte"),
    ):
        with pytest.raises(ValueError, match=error):
            awq_ext.save_pretrained(model, tmp_path / "x", **options)
    with pytest.raises(CheckpointError, match="holds no QuantLinear"):
        awq_ext.save_pretrained(float_model(), tmp_path / "x")
    with pytest.raises(CheckpointError, match="meta device"):
        awq_ext.save_pretrained(quantized().to("meta"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("300MiB", 300 * 2**20), (" 1.5 kb", 1500), (7, 7), ("12", 12), ("9B", 9)],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


def test_shards_have_an_index_and_the_asked_size(tmp_path: Path) -> None:
    model = quantized()
    limit = 20_000
    folder = awq_ext.save_pretrained(model, tmp_path / "x", max_shard_size=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    seen: dict[str, str] = {}
    total = 0
    for file in files:
        with safe_open(folder / file, framework="pt") as content:
            sizes = {name: content.get_tensor(name).nbytes for name in content.keys()}  # noqa: SIM118
        seen |= dict.fromkeys(sizes, file)
        total += sum(sizes.values())
        parts = {name.rpartition(".")[0] for name in sizes}
        assert sum(sizes.values()) <= limit or len(parts) == 1
    assert seen == index["weight_map"]
    assert total == index["metadata"]["total_size"]
    assert torch.equal(logits(awq_ext.from_pretrained(folder)), logits(model))
    # a smaller checkpoint in its place leaves no old shard, and no index that would hide it
    awq_ext.save_pretrained(model, folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "awq_report.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_config_is_what_readers_expect_and_the_model_s_own_stays(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 50_000.0, "transformers 4 knows it by this name only"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert model.config.quantization_config.to_dict() == {"quant_method": "awq", "bits": 4}, "as quantize left it"
    assert (folder.stat().st_mode | 0o111) & 0o777 == (folder / "model.safetensors").stat().st_mode & 0o777 | 0o111


def test_generation_settings_travel(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config.max_new_tokens = 5
    model.generation_config.eos_token_id = 95
    loaded = awq_ext.from_pretrained(awq_ext.save_pretrained(model, tmp_path))
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.generation_config.eos_token_id == 95
    tokens = loaded.generate(BATCH[:1], do_sample=False)
    assert torch.equal(tokens, model.generate(BATCH[:1], do_sample=False))
    assert tokens.shape[1] <= BATCH.shape[1] + 5


def test_files_beside_the_weights_are_carried_over(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    float_model().save_pretrained(origin)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "preprocessor_config.json",
    ):
        (origin / name).write_text(f"{{}} {name}")
    (origin / "notes.txt").write_text("not a tokenizer's")
    (origin / "training_args.bin").write_bytes(b"a pickle")
    model = transformers.AutoModelForCausalLM.from_pretrained(origin)
    awq_ext.quantize(model, [BATCH], group_size=32, method="rtn", fold="always", progress=False)
    folder = awq_ext.save_pretrained(model, tmp_path / "x")
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "README.md",
        "awq_report.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "preprocessor_config.json",
        "notes.txt",
    }
    # into the directory the model came from: never over its float weights; once these are gone, its other files stay
    for overwrite in (False, True, origin):
        with pytest.raises(CheckpointError, match=r"holds (the float model|float weights)"):
            awq_ext.save_pretrained(model, origin, overwrite=overwrite)
    (origin / "model.safetensors").unlink()
    awq_ext.save_pretrained(model, origin)
    assert (origin / "notes.txt").read_text() == "not a tokenizer's"
    assert (origin / "merges.txt").read_text() == "{} merges.txt"
    assert torch.equal(logits(awq_ext.from_pretrained(origin)), logits(model))


def test_tokenizer_files_come_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--some-model"
    for folder in ("blobs", "snapshots/1234", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("1234")
    for name in ("config.json", "tokenizer.json"):
        (repository / "blobs" / name).write_text(name)
        (repository / "snapshots" / "1234" / name).symlink_to(Path("../../blobs") / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = quantized()
    for origin, found in (("someone/some-model", True), ("someone/other", False), ("/gone/for/good/ever", False)):
        model.config._name_or_path = origin
        folder = awq_ext.save_pretrained(model, tmp_path / "x")
        assert (folder / "tokenizer.json").exists() == found
        shutil.rmtree(folder)


def test_a_tokenizer_of_one_s_own(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("mine")

    awq_ext.save_pretrained(quantized(), tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "mine"

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise RuntimeError("no tokenizer")

    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="no tokenizer"):
        awq_ext.save_pretrained(quantized(group_size=64), tmp_path, tokenizer=Broken(), overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_dtype_casts_what_is_not_quantized(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    loaded = awq_ext.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    layer, original = loaded.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert layer.dtype == torch.bfloat16
    assert same_bits(layer.scales, original.scales)
    error = (logits(loaded).float() - logits(model)).norm() / logits(model).norm()
    assert error < 0.05  # bf16 has 8 bits: 2^-8 a rounding, of which a token sees some dozens


def test_options_reach_the_config(saved: tuple[nn.Module, Path]) -> None:
    loaded = awq_ext.from_pretrained(saved[1], attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert torch.allclose(logits(loaded), logits(saved[0]), atol=1e-4)  # another order of some dozen fp32 sums


class NoFloatWeights(TorchDispatchMode):
    """Fails when any operation makes a float matrix of one of these shapes that is not on the meta device."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                assert tuple(tensor.shape) not in self.shapes, f"{func} made a float weight"
                assert tuple(tensor.shape[::-1]) not in self.shapes, f"{func} made a float weight"
        return result


@pytest.mark.parametrize("format", FORMATS)
def test_no_float_copy_of_a_quantized_weight_ever_exists(format: str, tmp_path: Path) -> None:
    # with two heads for keys a weight would have the shape of padded scales
    model = quantized(num_key_value_heads=4)
    awq_ext.save_pretrained(model, tmp_path, format=format)
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, QuantLinear)}
    with NoFloatWeights(shapes):
        loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(AssertionError, match="made a float weight"), NoFloatWeights(shapes):
        loaded.model.layers[0].mlp.up_proj.weight  # noqa: B018


def test_a_directory_of_awq_ext_save(tmp_path: Path) -> None:
    model = quantized(symmetric=False)
    awq_ext.set_compute_dtype(model, "int8")
    awq_ext.save(model, tmp_path)
    loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.awq_report == model.awq_report
    assert {m.compute for m in loaded.modules() if isinstance(m, QuantLinear)} == {"int8"}
    cast = awq_ext.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in cast.modules() if isinstance(m, QuantLinear)} == {torch.bfloat16}


def test_a_directory_of_version_1_with_a_config(tmp_path: Path) -> None:
    model = quantized(symmetric=False)
    awq_ext.save(model, tmp_path)
    as_version_1(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        awq_ext.from_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.awq_report == model.awq_report
    awq_ext.save(model, tmp_path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["awq_report.json", "config.json", "model.safetensors"]
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path)), logits(model))


def test_a_plain_model(tmp_path: Path) -> None:
    case = models.make("mlp")
    model = awq_ext.quantize(case.model, case.batches, group_size=8 * 2, progress=False, fold="always", n_grid=2)
    for format in ("native",):
        folder = awq_ext.save_pretrained(model, tmp_path / format, format=format, max_shard_size=2000)
        loaded = awq_ext.load(models.make("mlp").model, folder)
        batch = case.batches[0]
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_buffers_outside_the_files_cannot_be_on_meta(saved: tuple[nn.Module, Path]) -> None:
    _, folder = saved
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(CheckpointError, match=r"inv_freq is on the meta device"):
        awq_ext.load(empty, folder)


def test_without_transformers_there_is_one_clear_sentence(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "awq-ext\[hf\]"'):
        awq_ext.from_pretrained(saved[1])


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown model type": lambda c: c.update(model_type="nothing"),
    "no model type": lambda c: c.pop("model_type"),
    "other sizes": lambda c: c.update(hidden_size=128),
    "more layers": lambda c: c.update(num_hidden_layers=3),
    "a bias": lambda c: c.update(attention_bias=True),
    "other group size": lambda c: c["quantization_config"].update(group_size=64),
    "negative group size": lambda c: c["quantization_config"].update(group_size=-2),
    "other version": lambda c: c["quantization_config"].update(version="gemv"),
    "marlin": lambda c: c["quantization_config"].update(version="marlin"),
    "other bits": lambda c: c["quantization_config"].update(bits=8),
    "other method": lambda c: c["quantization_config"].update(quant_method="bitsandbytes"),
    "a list": lambda c: c.update(quantization_config=[]),
    "float": lambda c: c.pop("quantization_config"),
}


@pytest.mark.parametrize("what", list(CONFIGS))
def test_configs_that_do_not_fit_are_refused(what: str, saved: tuple[nn.Module, Path]) -> None:
    path = saved[1] / "config.json"
    config = json.loads(path.read_text())
    CONFIGS[what](config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        awq_ext.from_pretrained(saved[1])
    assert len(str(caught.value)) > 20
