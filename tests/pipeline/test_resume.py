"""quantize(resume=DIR): killed anywhere, the same call goes on after the last finished block, to the same bits."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import architectures
import hf_directory
import models
import pytest
import torch
from checks import Snapshot, bits
from kills import POSIX, killed, killed_after
from torch import nn

import awq_ext
from awq_ext import QuantLinear, ResumeError
from awq_ext.pipeline.run import Run
from awq_ext.workdir.directory import opened

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}
MEASURED = {"date", "seconds", "calibration_seconds", "search_seconds", "tuning_seconds"}
MEASURED |= {"planned_memory_bytes", "peak_memory_bytes"}


def outcome(model: nn.Module) -> tuple[dict[str, bytes], dict[str, Any], list[str]]:
    """All bits of a quantized model, its report without what is measured, and its layers as they print."""
    tensors = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    report = {name: value for name, value in model.awq_report.to_dict().items() if name not in MEASURED}
    return tensors, report, [str(module) for module in model.modules() if isinstance(module, (QuantLinear, nn.Linear))]


def interrupted_after(blocks: int, monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Run ``act``, which ends by KeyboardInterrupt once so many blocks are finished."""
    real, done = Run.finished, [0]

    def finished(self: Run, *args: Any) -> None:
        real(self, *args)
        done[0] += 1
        if done[0] == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finished", finished)
        with pytest.raises(KeyboardInterrupt):
            act()


def language_model() -> tuple[nn.Module, list[torch.Tensor]]:
    """One that can write text and be differentiated, and windows for it."""
    transformers = pytest.importorskip("transformers", reason="pip install 'awq-ext[test]'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval(), models.token_batches((12, 12, 12, 9))


CASES = [
    ("llama", {}),
    ("llama", {"propagate": "quantized", "method": "awq+gptq"}),
    ("offset", {"packed": False}),
    ("layernorm", {"per_layer": {"*up*": {"bits": 8}}}),
    ("tied", {"fold": "never"}),
    ("inplace", {"method": "gptq"}),
    ("mlp", {"blocks": []}),
]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{next(iter(more), '')}" for name, more in CASES])
def test_the_result_is_that_of_an_uninterrupted_run(
    name: str, settings: dict[str, Any], after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = models.make(name)
    whole = outcome(awq_ext.quantize(copy.deepcopy(case.model), case.batches, **FAST, **settings))
    again, snapshot = copy.deepcopy(case.model), Snapshot(case.model)
    run = lambda model: awq_ext.quantize(model, case.batches, resume=tmp_path / "work", **FAST, **settings)  # noqa: E731
    interrupted_after(min(after, len(whole[1]["blocks"])), monkeypatch, lambda: run(case.model))
    snapshot.assert_unchanged()
    collected = []
    monkeypatch.setattr(Run, "collect", lambda self, block, real=Run.collect: collected.append(1) or real(self, block))
    assert outcome(run(again)) == whole
    assert len(collected) == max(0, len(whole[1]["blocks"]) - after)


def test_nothing_runs_again_where_all_blocks_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    first, second = copy.deepcopy(case.model), copy.deepcopy(case.model)
    whole = awq_ext.quantize(first, case.batches, resume=tmp_path, **FAST)
    calls = []
    second.layers[0].register_forward_hook(lambda *_: calls.append(1))
    again = awq_ext.quantize(second, case.batches, resume=tmp_path, **FAST)
    assert outcome(again) == outcome(whole)
    assert len(calls) == 1  # of the survey
    assert again.awq_report.search_seconds == whole.awq_report.search_seconds
    assert again.awq_report.seconds > whole.awq_report.search_seconds


def test_a_run_that_goes_on_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = models.make("llama")
    run = lambda: awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST | {"progress": True})  # noqa: E731
    interrupted_after(1, monkeypatch, run)
    assert "going on" not in capsys.readouterr().err
    blocks = len(run().awq_report.blocks)
    assert f"going on after 1 of {blocks} blocks" in capsys.readouterr().err


@pytest.mark.parametrize("weighed_batches", [0, 2])
def test_written_text_and_weights_of_rows_are_found_once(
    weighed_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = language_model()
    settings = FAST | {"method": "awq+gptq", "weighed_batches": weighed_batches}
    whole = outcome(awq_ext.quantize(copy.deepcopy(model), batches, **settings))
    run = lambda: awq_ext.quantize(model, batches, resume=tmp_path, **settings)  # noqa: E731
    interrupted_after(1, monkeypatch, run)
    assert {"start-text.safetensors", "start-weights.safetensors"} < {file.name for file in tmp_path.iterdir()}
    for place in ("calibration.extra_batches.generated_tokens", "pipeline.preparation.find_weights"):
        monkeypatch.setattr(f"awq_ext.{place}", lambda *_, **__: 1 / 0)
    assert outcome(run()) == whole


def test_experts_are_resumed_with_what_is_told_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(architectures.ExpertList(4) for _ in range(3)))
    batches = [torch.randn(3, architectures.HIDDEN) for _ in range(2)]  # too few rows for some experts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = outcome(awq_ext.quantize(copy.deepcopy(model), batches, **FAST))
        run = lambda: awq_ext.quantize(model, batches, resume=tmp_path, **FAST)  # noqa: E731
        interrupted_after(2, monkeypatch, run)
        assert outcome(run()) == whole
    assert whole[1]["warnings"]


@POSIX
@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(3, 20))]
)
def test_killed_at_random_moments(seed: int, tmp_path: Path) -> None:
    """Again and again, before any operation on files, until a run comes to its end."""
    case, chance = models.make("llama"), random.Random(seed)
    whole = outcome(awq_ext.quantize(copy.deepcopy(case.model), case.batches, **FAST))
    run = lambda model: awq_ext.quantize(model, case.batches, resume=tmp_path / "work", **FAST)  # noqa: E731
    deaths = sum(killed(chance.randint(5, 40), lambda: run(case.model)) for _ in range(4))
    assert deaths
    assert outcome(run(case.model)) == whole


@POSIX
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 10))])
def test_killed_by_the_clock(seed: int, tmp_path: Path) -> None:
    case, chance = models.make("llama"), random.Random(seed)
    whole = outcome(awq_ext.quantize(copy.deepcopy(case.model), case.batches, **FAST))
    run = lambda: awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)  # noqa: E731
    for _ in range(3):
        killed_after(chance.uniform(0.02, 0.3), run)
    assert outcome(run()) == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda call: call["settings"].update(group_size=32), "group_size was 16, now it is 32"),
        (lambda call: call["settings"].update(blocks=[]), "blocks was None, now it is"),
        (lambda call: call.update(batches=call["batches"][:2]), "the calibration batches are others"),
        (lambda call: call["model"].layers[2].mlp.up_proj.weight.data.add_(0.01), "the weights are others"),
        (lambda call: call["model"].register_buffer("more", torch.ones(1)), "names, shapes or dtypes"),
    ],
)
def test_the_work_of_another_call_is_refused(
    change: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = models.make("llama")
    call: dict[str, Any] = {"model": case.model, "batches": case.batches, "settings": dict(FAST)}
    run = lambda **more: awq_ext.quantize(  # noqa: E731
        call["model"], call["batches"], resume=tmp_path, **call["settings"], **more
    )
    interrupted_after(1, monkeypatch, run)
    change(call)
    snapshot = Snapshot(case.model)
    with pytest.raises(ResumeError, match=reason) as raised:
        run()
    assert "fresh=True" in str(raised.value)
    snapshot.assert_unchanged()
    assert isinstance(run(fresh=True).layers[2].mlp.up_proj, QuantLinear)


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    interrupted_after(1, monkeypatch, lambda: awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST))
    state = json.loads((tmp_path / "state.json").read_text())
    state["fingerprint"]["versions"]["torch"] = "1.0"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ResumeError, match=r"torch was '1\.0'"):
        awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)


def test_a_damaged_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    interrupted_after(1, monkeypatch, lambda: awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST))
    block = tmp_path / "block-0000.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(ResumeError, match=r"block-0000\.safetensors is damaged.*fresh=True"):
        awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)


def test_a_full_disk_leaves_the_model_and_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    whole, snapshot = outcome(awq_ext.quantize(copy.deepcopy(case.model), case.batches, **FAST)), Snapshot(case.model)
    place, done = "awq_ext.workdir.tensor_file.os.fsync", [0]

    def full(handle: int) -> None:
        done[0] += 1
        if done[0] == 4:  # directories are flushed too
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="the disk is full: what is finished stays"):
            awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)
    snapshot.assert_unchanged()
    assert not list(tmp_path.glob("*.new"))
    assert outcome(awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)) == whole


def test_a_small_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    monkeypatch.setattr("awq_ext.workdir.directory.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    monkeypatch.setattr(Run, "collect", lambda *_: 1 / 0)
    with pytest.raises(OSError, match=r"what will be finished needs about .* which has 1000 B left"):
        awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    case = models.make("llama")
    with opened(tmp_path), pytest.raises(ResumeError, match=r"another process \(process \d+\) works in"):
        awq_ext.quantize(case.model, case.batches, resume=tmp_path, **FAST)


def test_fresh_alone_is_refused() -> None:
    case = models.make("llama")
    with pytest.raises(ValueError, match="name it with resume="):
        awq_ext.quantize(case.model, case.batches, fresh=True, **FAST)


def test_a_transformers_model_resumes_from_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are mapped from files at any address, where torch rounds otherwise: both runs see the same."""
    transformers = pytest.importorskip("transformers", reason="pip install 'awq-ext[test]'")
    folder = hf_directory.make(tmp_path / "float")
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    batches = models.token_batches((20, 20))
    whole = outcome(awq_ext.quantize(load(), batches, **FAST))
    run = lambda: awq_ext.quantize(load(), batches, resume=tmp_path / "work", **FAST)  # noqa: E731
    interrupted_after(1, monkeypatch, run)
    assert outcome(run()) == whole
