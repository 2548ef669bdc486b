"""A real trained language model, where there is one: a folder with a Llama-type model ``lm``, ``outliers.py``, ``ppl.py``
and texts. AWQ_EXT_TESTBED names it; by default it is looked for beside the repository."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import awq_ext

FOLDER = Path(os.environ.get("AWQ_EXT_TESTBED") or Path(__file__).parents[3] / "shared" / "testbed")
WINDOW, SAMPLES, SCORED = 256, 8, 4096


def needed() -> Any:
    """transformers, if everything is there; else skip and say what is missing."""
    missing = [
        name for name in ("lm/config.json", "outliers.py", "ppl.py", "calib.txt") if not (FOLDER / name).exists()
    ]
    if missing:
        pytest.skip(
            f"NO TRAINED MODEL TESTED: {FOLDER} lacks {', '.join(missing)}; set AWQ_EXT_TESTBED to a folder with it"
        )
    try:
        import transformers
    except ImportError:
        pytest.skip("NO TRAINED MODEL TESTED: transformers is not installed (pip install awq-ext[hf])")
    return transformers


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"testbed_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_a_trained_model_with_salient_channels() -> None:
    transformers = needed()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER / "lm")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "lm", dtype=torch.float32).eval()
    perplexity = script("ppl").ppl_ids

    def ids(file: str, tokens: int) -> torch.Tensor:
        text = (FOLDER / file).read_text(encoding="utf-8")[: 8 * tokens]
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][:tokens]

    # the salient channels are chosen as the folder's README does: on the first 16 windows of the prose
    with torch.no_grad():
        plain = copy.deepcopy(model)
        script("outliers").add_outliers(
            model, pick="salient", calib=ids("text/prose.txt", 16 * WINDOW).view(-1, WINDOW)
        )
        window = ids("text/code.txt", WINDOW)[None]
        # the same function in float: factors and their inverses are fp32 roundings, logits of a few tens
        torch.testing.assert_close(model(window).logits, plain(window).logits, rtol=0, atol=1e-2)
    texts = {name: ids(f"text/{name}.txt", SCORED) for name in ("prose", "code")}
    score = {name: perplexity(model, text, WINDOW)[0] for name, text in texts.items()}
    calibration = [{"input_ids": window[None]} for window in ids("calib.txt", SAMPLES * WINDOW).split(WINDOW)]

    def quantized(method: str) -> dict[str, float]:
        copied = copy.deepcopy(model)
        awq_ext.quantize(copied, calibration, method=method, group_size=64, n_grid=10, progress=False)
        report = copied.awq_report
        print(report.summary(), report.blocks)
        done = [row for row in report.layers if row.status == "int4"]
        assert len(done) == 7 * 8
        assert all(row.loss <= row.loss_rtn for row in done)
        assert all(row.tokens == SAMPLES * WINDOW for row in done)
        assert report.warnings == []
        if method == "awq":
            ends = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
            assert all(row.applied == "norm" for row in done if row.name.endswith(ends) and row.scale != "identity")
            assert sum(row.loss for row in done) < 0.5 * sum(row.loss_rtn for row in done)
        return {name: perplexity(copied, text, WINDOW)[0] for name, text in texts.items()}

    rtn, awq = quantized("rtn"), quantized("awq")
    print("float", score, "rtn", rtn, "awq", awq)
    assert rtn["prose"] > score["prose"] * 1.01, "rounding to nearest must do harm here, else nothing is shown"
    closed = (rtn["prose"] - awq["prose"]) / (rtn["prose"] - score["prose"])
    assert closed >= 0.90, f"{closed:.0%} of the gap"
    assert awq["code"] <= rtn["code"]
