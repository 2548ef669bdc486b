"""GPTQModel: "awq" and "gptq" directories run through its CPU kernel in Transformers, and are read by it; what it wrote is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import (
    assert_same_weights,
    byte_tokenizer,
    clear_prompt,
    needed,
    quantized_llama,
    quantized_qwen2,
    read_by,
    run,
    weights_of,
)
from quantized_dirs import edit_json
from safetensors import safe_open
from safetensors.torch import load_file
from ways import layers_of, write_all

import awq_ext


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "Qwen2"])
@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_same_tokens_through_both_kernels(layout: str, kind: str, tmp_path: Path) -> None:
    """Of "gptq" with zero points too, which GPTQModel by itself refuses."""
    needed("gptqmodel")
    made = quantized_qwen2() if kind == "Qwen2" else quantized_llama(symmetric=kind == "symmetric")
    folder = awq_ext.save_pretrained(made, tmp_path / "model", format=layout)
    model = awq_ext.from_pretrained(folder)
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("gptqmodel", "gptqmodel_generate.py", folder, prompt, out)
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    # its kernel keeps scales and zeros in bfloat16 (2^-9 of each weight)
    assert (ours - theirs["logits"]).norm() < 0.02 * ours.norm()
    with safe_open(out, "pt") as file:
        assert "gptqmodel" in file.metadata()["kernel"], "Transformers did not run it through gptqmodel"


MIXED = {"per_layer": {"*.down_proj": {"bits": 8}}}


@pytest.mark.parametrize("settings", [MIXED, {"bits": 8}], ids=["mixed", "eight"])
def test_gptqmodel_reads_layers_of_eight_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    """A "gptq" directory, ``dynamic`` included, in layers that GPTQModel builds for it; with zero points it refuses them."""
    needed("gptqmodel")
    model = quantized_llama(symmetric=True, **settings)
    out, tokenizer = tmp_path / "out.safetensors", byte_tokenizer()  # without which GPTQModel loads nothing
    tokenizer.pad_token = "!"
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="gptq", tokenizer=tokenizer)
    run("gptqmodel", "gptqmodel_read.py", folder, out)
    theirs = load_file(out)
    ours, again = weights_of(model, torch.float32), weights_of(awq_ext.from_pretrained(folder), torch.float32)
    assert_same_weights(ours, again)
    assert ours.keys() == theirs.keys()
    with safe_open(out, "pt") as file:
        widths = file.metadata()
    for name, weight in ours.items():
        assert int(widths[name]) == model.get_submodule(name).bits
        # it dequantizes in float16
        assert (weight - theirs[name]).abs().max() <= 2**-10 * weight.abs().max(), name


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_gptqmodel_reads_every_way_to_quantize(layout: str, tmp_path: Path) -> None:
    """All that docs/formats.md says the layout holds."""
    needed("gptqmodel")
    models, tokenizer = write_all(tmp_path, layout, torch.float16), byte_tokenizer()
    tokenizer.pad_token = "!"
    for folder in models:
        tokenizer.save_pretrained(folder)
        if layout == "gptq":  # it takes zero points from nobody but itself
            edit_json(folder / "config.json", by_itself)
    for folder, theirs in read_by("gptqmodel", "gptqmodel_read.py", models).items():
        ours = weights_of(models[folder], torch.float32)
        assert_same_weights(ours, weights_of(awq_ext.from_pretrained(folder), torch.float32))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():  # it dequantizes in float16
            assert (weight - theirs[name]).abs().max() <= 2**-11 * weight.abs().max(), (folder.name, name)


def by_itself(config: dict[str, Any]) -> None:
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.6.0"]}


EIGHT = {"bits": 8, "format": "gptq", "desc_act": False, "sym": True}
ROWS = EIGHT | {"group_size": -1, "act_group_aware": False}
WRITTEN = {
    "groups of 128": EIGHT | {"group_size": 128},
    "rows": ROWS,
    "rows, reordered": ROWS | {"desc_act": True},
    "zero points": EIGHT | {"group_size": 64, "sym": False},
    "zero points of 4 bits": EIGHT | {"bits": 4, "group_size": 32, "sym": False},
    "zero points of version 2": EIGHT | {"group_size": 64, "sym": False, "format": "gptq_v2"},
    "groups of 128, reordered": EIGHT | {"group_size": 128, "desc_act": True},
}


def test_what_gptqmodel_wrote_is_read(tmp_path: Path) -> None:
    """Zeros of 0 included, which borrow from their neighbours in its version 1. Reordered channels are in one group, or refused."""
    needed("gptqmodel")
    run("gptqmodel", "gptqmodel_write.py", tmp_path, *map(json.dumps, WRITTEN.values()))
    for index, (kind, settings) in enumerate(WRITTEN.items()):
        theirs = load_file(tmp_path / f"{index}.safetensors")
        if kind == "groups of 128, reordered":
            with pytest.raises(awq_ext.CheckpointError, match="g_idx reorders the channels"):
                awq_ext.from_pretrained(tmp_path / str(index))
            continue
        model = awq_ext.from_pretrained(tmp_path / str(index), dtype=torch.float32)
        layers, tokens, logits = layers_of(model), theirs.pop("tokens"), theirs.pop("logits")
        zeros = {name: theirs.pop(f"{name}.zeros") for name in layers}
        assert any(bool((each == 0).any()) for each in zeros.values()) != settings["sym"]
        for name, weight in weights_of(model, torch.float32).items():
            assert layers[name].bits == settings["bits"]
            assert torch.equal(layers[name].zeros.int(), zeros[name].view_as(layers[name].zeros)), (kind, name)
            # it dequantizes in float16
            assert (weight - theirs.pop(name)).abs().max() <= 2**-11 * weight.abs().max(), (kind, name)
        assert not theirs
        with torch.no_grad():  # it computes in float16 throughout
            assert (model(tokens).logits - logits).norm() < 0.005 * logits.norm(), kind
