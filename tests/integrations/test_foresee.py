"""check_format: before quantizing it says what save_pretrained would say afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import hf_directory
import pytest
import torch
from checks import Snapshot
from tiny_transformers import BATCH, MOE, float_model
from typer.testing import CliRunner

import awq_ext
from awq_ext import CheckpointError, cli
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.checkpoints.model_source import ModelSource
from awq_ext.checkpoints.renaming import Renamed
from awq_ext.integrations.beside import summary_for

FAST: dict[str, Any] = {"n_grid": 2, "progress": False}
ODD = {"intermediate_size": 80}  # 16 divides it, 32 does not
NARROW = {"intermediate_size": 68}  # no multiple of 8


def said(error: CheckpointError | None) -> list[str] | None:
    return None if error is None else str(error).partition("\nas it is, ")[0].splitlines()[1:]


def foreseen(model: Any, format: str, settings: dict[str, Any]) -> list[str] | None:
    before = Snapshot(model)
    try:
        awq_ext.check_format(model, BATCH, format, **settings)
        found = None
    except CheckpointError as error:
        assert "nothing was quantized yet" in str(error)
        found = error
    before.assert_unchanged()
    return said(found)


def seen(model: Any, format: str, settings: dict[str, Any], folder: Path) -> list[str] | None:
    awq_ext.quantize(model, [BATCH], **settings, **FAST)
    try:
        awq_ext.save_pretrained(model, folder, format)
    except CheckpointError as error:
        return said(error)
    return None


@pytest.mark.filterwarnings("ignore:.*(neighbours are float|fewer than min_tokens)")
@pytest.mark.parametrize(
    ("family", "shape", "format", "settings", "holds"),
    [
        ("Llama", {}, "awq", {"fold": "always", "group_size": 32}, True),
        ("Llama", ODD, "awq", {"fold": "always", "group_size": 32}, False),
        ("Llama", ODD, "awq", {"fold": "always", "group_size": 32, "skip": ("*.down_proj",)}, True),
        ("Llama", ODD, "native", {"group_size": 32}, True),
        ("Llama", ODD, "compressed-tensors", {"fold": "always", "group_size": 32}, False),
        ("Llama", NARROW, "awq", {"method": "rtn", "group_size": -1}, False),
        ("Llama", {}, "awq", {"fold": "never", "group_size": 32}, False),
        ("Llama", {}, "awq", {"fold": "auto", "group_size": 32}, True),
        ("Olmo2", {}, "awq", {"fold": "auto", "group_size": 32}, False),  # no norm before q, k and v
        ("Llama", {}, "awq", {"fold": "never", "method": "rtn", "group_size": 32}, True),
        ("Llama", {}, "gemv", {"method": "rtn", "group_size": 16}, False),
        ("Llama", {}, "modelopt", {"method": "rtn", "group_size": 32}, False),  # zero points
        ("Llama", {}, "modelopt", {"method": "rtn", "group_size": 32, "symmetric": True}, True),
        (
            "Llama",
            {},
            "awq",
            {"fold": "always", "group_size": 32, "per_layer": {"*.up_proj": {"group_size": 16}}},
            False,
        ),
        ("Llama", {}, "native", {"bits": 8, "group_size": 32}, True),
        ("Llama", {}, "native", {"group_size": 32, "per_layer": {"*.up_proj": {"bits": 8}}}, True),
        *[
            ("Llama", {}, name, {"method": "rtn", "symmetric": True, "bits": 8, "group_size": 32}, False)
            for name in LAYOUTS
            if 8 not in LAYOUTS[name].widths
        ],
        ("Llama", {}, "awq", {"method": "rtn", "group_size": 32, "per_layer": {"*.up_proj": {"bits": 8}}}, False),
        ("Mixtral", {}, "awq", {"method": "rtn", "group_size": 32}, True),
        (
            "Qwen2Moe",
            {**MOE, "num_experts": 4},
            "awq",
            {"method": "rtn", "group_size": 32},
            False,
        ),  # gates of one output
    ],
)
def test_what_saving_says_is_said_before(
    family: str, shape: dict[str, Any], format: str, settings: dict[str, Any], holds: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = float_model(family, **shape)
    before = foreseen(model, format, settings)
    assert before == seen(model, format, settings, tmp_path / "out")
    assert (before is None) == holds
    if 8 in (settings.get("bits"), *(own.get("bits") for own in settings.get("per_layer", {}).values())) and not holds:
        assert any(
            'it has 8 bits, not 4: use format="compressed-tensors", "gptq", "mlx", "native" or' in line
            for line in before
        )


@pytest.mark.filterwarnings("ignore:.*neighbours are float")
@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "modelopt", "native"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen2-MoE", "gpt-oss", "T5", "Falcon, new decoder"])
def test_of_other_architectures_too(name: str, format: str) -> None:
    case = architectures.make(name)
    settings = {"group_size": 16, "method": "rtn", "symmetric": format == "modelopt"}
    before = after = None
    try:
        awq_ext.check_format(case.model, case.batches[0], format, **settings)
    except CheckpointError as error:
        before = said(error)
    model = awq_ext.quantize(case.model, case.batches, **settings, progress=False)
    try:
        summary_for(Renamed(ModelSource(model), model, to_files=True), model, LAYOUTS[format])
    except CheckpointError as error:
        after = said(error)
    assert before == after


def test_an_unknown_format_and_nothing_to_pack() -> None:
    model = float_model()
    with pytest.raises(ValueError, match="choose one of 'awq'"):
        awq_ext.check_format(model, BATCH, "exl3")
    with pytest.raises(CheckpointError, match="packed=False"):
        awq_ext.check_format(model, BATCH, bits=3, packed=False)


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_the_command_refuses_before_it_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = hf_directory.make(tmp_path / "model")  # intermediate_size 96
    (tmp_path / "c.txt").write_text("some text of this kind, again and again. " * 40)
    begun: list[object] = []
    monkeypatch.setattr(awq_ext, "quantize", lambda *arguments, **_: begun.append(arguments))
    options = ["--calib", tmp_path / "c.txt", "--samples", 2, "--seq-len", 64, "--group-size", 64, "--format", "awq"]
    shown = CliRunner().invoke(cli.app, list(map(str, ["quantize", model_dir, tmp_path / "out", *options])))
    assert shown.exit_code == 1 and not begun and not (tmp_path / "out").exists()
    assert "down_proj: in_features=96 is not a multiple of --group-size 64" in " ".join(shown.output.split())
    assert "quantize with --group-size 32, or leave" in " ".join(shown.output.split())
