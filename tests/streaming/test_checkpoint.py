"""quantize_checkpoint(): the files that the model in memory gives, with its weights never in memory, and resumed after kills."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hf_directory
import models
import pytest
import torch
from kills import POSIX, killed
from safetensors.torch import save_file
from typer.testing import CliRunner

import awq_ext
from awq_ext import AwqConfig, CheckpointError, ResumeError
from awq_ext.cli import app
from awq_ext.forwards.spill import can_spill, mapped_copy
from awq_ext.pipeline.run import Run
from awq_ext.streaming.checkpoint import quantize_streamed, streamed, work_folder
from awq_ext.streaming.limits import memory_limit

transformers = pytest.importorskip("transformers", reason="NOTHING STREAMED: pip install 'awq-ext[test]'")
FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}
MEASURED = {"date", "seconds", "calibration_seconds", "search_seconds", "tuning_seconds"}
MEASURED |= {"planned_memory_bytes", "peak_memory_bytes"}
WINDOWS = models.token_batches((20, 33, 20))


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a directory, the report without what is measured."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = json.loads(found["awq_report.json"])
    for one in report["evaluations"].values():
        one.pop("seconds", None)
    found["awq_report.json"] = {name: value for name, value in report.items() if name not in MEASURED}
    return found


def assert_same(a: Path, b: Path) -> None:
    first, second = contents(a), contents(b)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def in_memory(source: Path, out: Path, format: str = "awq", **settings: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    fold = "auto" if format == "native" else "always"
    awq_ext.quantize(model, WINDOWS, **{"fold": fold, **FAST, **settings})
    return awq_ext.save_pretrained(model, out, format)


def sharded(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of transformers in several files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "tied": lambda: transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "bias": lambda: transformers.Qwen2Config(**SIZES, **HEADS),
    "transposed": lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "experts": lambda: transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2),
}
CASES = [
    ("tied", {}, "awq"),
    ("tied", {"head": "int8", "propagate": "quantized"}, "native"),
    ("bias", {"method": "awq+gptq"}, "compressed-tensors"),
    ("transposed", {"fold": "auto"}, "native"),
    ("experts", {"min_tokens": 1}, "native"),
]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("kind", "settings", "format"), CASES)
def test_the_files_are_those_of_the_model_in_memory(
    kind: str, settings: dict[str, Any], format: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = sharded(tmp_path / "float", CONFIGS[kind](), dtype)
    expected = in_memory(source, tmp_path / "memory", format, **{"group_size": 32, **settings})
    options = FAST | {"group_size": 32} | settings
    made = awq_ext.quantize_checkpoint(source, tmp_path / "streamed", WINDOWS, format=format, **options)
    assert made == tmp_path / "streamed"
    assert_same(expected, made)
    assert not work_folder(made).exists()


@pytest.mark.skipif(not can_spill(), reason="NOTHING SPILLED: POSIX alone removes mapped files")
def test_hidden_states_go_to_the_disk_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory.make(tmp_path / "float")
    expected = in_memory(source, tmp_path / "memory")
    spilled = []
    monkeypatch.setattr("awq_ext.pipeline.keeping.planned_bytes", lambda *_, spilled=False: 0 if spilled else 1 << 50)
    monkeypatch.setattr("awq_ext.forwards.spill._LEAST", 64)
    monkeypatch.setattr("awq_ext.forwards.spill.mapped_copy", lambda *a: spilled.append(1) or mapped_copy(*a))
    made = awq_ext.quantize_checkpoint(source, tmp_path / "streamed", WINDOWS, max_memory="1TB", **FAST)
    assert len(spilled) >= 2 * len(WINDOWS)
    assert_same(expected, made)


def test_the_weights_and_the_results_take_no_memory(tmp_path: Path) -> None:
    """All of them are views of files that are mapped."""
    source = hf_directory.make(tmp_path / "float")
    with streamed(source, tmp_path / "out", progress=False) as (model, work):
        floats = {name: p.data_ptr() for name, p in model.named_parameters()}
        assert all(in_a_file(address) for address in floats.values())
        quantize_streamed(model, WINDOWS, AwqConfig(group_size=16, n_grid=2), work, None, progress=False)
        layers = [module for module in model.modules() if isinstance(module, awq_ext.QuantLinear)]
        assert layers and all(in_a_file(layer.tiles.data_ptr()) for layer in layers)


def in_a_file(address: int) -> bool:
    """Whether /proc/self/maps names a file for an address."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("NOT SEEN: Linux alone tells what is mapped")
    for line in maps.read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return ".safetensors" in line
    return False


@POSIX
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 12))])
def test_killed_at_random_moments(seed: int, tmp_path: Path) -> None:
    """While blocks are solved, or while the directory is written; the same call makes the same files."""
    source, chance = hf_directory.make(tmp_path / "float"), random.Random(seed)
    expected = in_memory(source, tmp_path / "memory")
    out = tmp_path / "out"
    run = lambda: awq_ext.quantize_checkpoint(source, out, WINDOWS, overwrite=True, **FAST)  # noqa: E731
    deaths = sum(killed(chance.randint(10, 200), run) for _ in range(4))
    assert deaths
    run()
    assert_same(expected, out)
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]


def test_blocks_that_are_finished_are_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = hf_directory.make(tmp_path / "float"), tmp_path / "out"
    expected = in_memory(source, tmp_path / "memory")
    with monkeypatch.context() as patch:
        patch.setattr("awq_ext.streaming.checkpoint.write_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            awq_ext.quantize_checkpoint(source, out, WINDOWS, **FAST)
    assert len(list(work_folder(out).glob("block-*.safetensors"))) == 2 and not out.exists()
    monkeypatch.setattr(Run, "collect", lambda *_: 1 / 0)
    with pytest.raises(ResumeError, match="group_size was 16, now it is 32"):
        awq_ext.quantize_checkpoint(source, out, WINDOWS, **(FAST | {"group_size": 32}))
    awq_ext.quantize_checkpoint(source, out, WINDOWS, **FAST)
    assert_same(expected, out)
    with pytest.raises(ZeroDivisionError):
        awq_ext.quantize_checkpoint(source, out, WINDOWS, overwrite=True, fresh=True, **FAST)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    case = models.make("llama")
    source = tmp_path / "float"
    source.mkdir()
    state = case.model.state_dict()
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    for number, half in enumerate(halves):
        save_file(half, source / f"part-{number}.safetensors")
    made = awq_ext.quantize_checkpoint(
        source,
        tmp_path / "out",
        case.batches,
        factory=lambda: models.make("llama", seed=5).model,
        format="native",
        **FAST,
    )
    awq_ext.quantize(case.model, case.batches, **FAST)
    loaded = awq_ext.load(models.make("llama", seed=7).model, made)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), case.model.state_dict().values(), strict=True)
    )


def test_a_factory_that_does_not_fit(tmp_path: Path) -> None:
    case, source = models.make("llama"), tmp_path / "float"
    source.mkdir()
    save_file(
        {name: t for name, t in case.model.state_dict().items() if "layers.2" not in name}, source / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lacks layers\.2\."):
        awq_ext.quantize_checkpoint(
            source, tmp_path / "out", case.batches, factory=lambda: models.make("llama").model, format="native", **FAST
        )
    with pytest.raises(TypeError, match="factory returned a str"):
        awq_ext.quantize_checkpoint(source, tmp_path / "out", case.batches, factory=lambda: "model", **FAST)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = lambda source: awq_ext.quantize_checkpoint(source, tmp_path / "out", WINDOWS, **FAST)  # noqa: E731
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="a pickle, which can run any code"):
        run(pickled)
    source = hf_directory.make(tmp_path / "float")
    quantized = awq_ext.quantize_checkpoint(source, tmp_path / "int4", WINDOWS, **FAST)
    with pytest.raises(CheckpointError, match="is quantized already"):
        run(quantized)
    with pytest.raises(CheckpointError, match="holds the float model"):
        awq_ext.quantize_checkpoint(source, source, WINDOWS, overwrite=True, **FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "int4", "pickled"]


def test_code_beside_the_weights_runs_only_if_trusted(tmp_path: Path) -> None:
    source = hf_directory.make(tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    mapped = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": mapped}))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        awq_ext.quantize_checkpoint(source, tmp_path / "out", WINDOWS, **FAST)


def test_too_little_memory_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory.make(tmp_path / "float")
    monkeypatch.setattr(Run, "collect", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"takes about .* the limit is 10\.0 MiB: give shorter or smaller"):
        awq_ext.quantize_checkpoint(source, tmp_path / "out", WINDOWS, max_memory="10MiB", **FAST)
    assert not (tmp_path / "out.partial").exists()  # shorter batches, as the message advises, are another call
    with pytest.raises(ValueError, match="max_memory='much': give bytes"):
        awq_ext.quantize_checkpoint(source, tmp_path / "out", WINDOWS, max_memory="much", **FAST)


def test_the_limit_by_default_is_most_of_what_is_free() -> None:
    assert memory_limit("2GB") == 2 * 10**9 and memory_limit(5) == 5
    found = memory_limit(None)
    assert found is None or found > 1 << 20


def test_the_command_streams_what_does_not_fit_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_directory.make(tmp_path / "float")
    (tmp_path / "calib.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    options = ["--calib", str(tmp_path / "calib.txt"), "--samples", "3", "--seq-len", "32", "--group-size", "32"]

    def run(out: str, *more: str) -> Any:
        return CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / out), *options, *more])

    monkeypatch.setattr("awq_ext.cli.quantize._next", lambda *_: "")
    assert run("memory/int4").exit_code == 0
    monkeypatch.setattr("awq_ext.streaming.working.float_bytes", lambda _: 1 << 60)
    real = Run.finished

    def interrupted(self: Run, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finished", interrupted)
        shown = run("streamed/int4")
    assert shown.exit_code == 130 and "1 finished blocks are in" in shown.stderr, shown.output
    shown = run("streamed/int4")
    assert shown.exit_code == 0 and "of float weights are read from" in shown.stderr, shown.output
    assert_same(tmp_path / "memory" / "int4", tmp_path / "streamed" / "int4")
    assert not work_folder(tmp_path / "streamed" / "int4").exists()


@pytest.mark.skipif(not can_spill(), reason="NOTHING SPILLED: POSIX alone removes mapped files")
def test_a_full_disk_leaves_hidden_states_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    source = hf_directory.make(tmp_path / "float")
    expected = in_memory(source, tmp_path / "memory")
    monkeypatch.setattr("awq_ext.pipeline.keeping.planned_bytes", lambda *_, spilled=False: 0 if spilled else 1 << 50)
    monkeypatch.setattr("awq_ext.pipeline.keeping.spill", full)
    with pytest.warns(UserWarning, match="hidden states stay in memory from here on"):
        made = awq_ext.quantize_checkpoint(source, tmp_path / "streamed", WINDOWS, max_memory="1TB", **FAST)
    assert_same(expected, made)
