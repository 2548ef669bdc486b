"""The figures of llama.cpp's --kl-divergence, against the same written out over all logits at once."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_directory
import models
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import awq_ext
from awq_ext import Bootstrap, cli, evaluate
from awq_ext.evaluation.evaluate import window_scores
from awq_ext.evaluation.tokens.distance import Distance

QUICK = Bootstrap(resamples=100)


def other(model: nn.Module, amount: float = 0.3) -> nn.Module:
    nearby = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearby.parameters():
            parameter.add_(amount * torch.randn_like(parameter) * parameter.std())
    return nearby


def written_out(model: nn.Module, reference: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """Every figure in fp64, with all probabilities of all tokens in memory."""
    logs, targets = {}, torch.cat([ids[:, 1:].flatten() for ids in batches])
    with torch.no_grad():
        for name, one in (("q", model), ("p", reference)):
            rows = [models.logits(one(ids))[:, :-1].flatten(0, 1) for ids in batches]
            logs[name] = torch.cat(rows).double().log_softmax(-1)
    p, q = logs["p"], logs["q"]
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    right = {name: log.gather(1, targets[:, None])[:, 0] for name, log in logs.items()}
    change = (right["q"].exp() - right["p"].exp()).numpy()
    return {
        "Mean PPL(Q)": math.exp(-right["q"].mean()),
        "Mean PPL(base)": math.exp(-right["p"].mean()),
        "Mean PPL(Q)/PPL(base)": math.exp((right["p"] - right["q"]).mean()),
        "Mean KLD": kl.mean(),
        "Maximum KLD": kl.max(),
        "99.9% KLD": np.quantile(kl, 0.999),
        "99.0% KLD": np.quantile(kl, 0.99),
        "Median KLD": np.median(kl),
        "Mean Δp": 100 * change.mean(),
        "RMS Δp": 100 * math.sqrt((change**2).mean()),
        "Same top p": 100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_all_figures_are_those_of_the_formulas(name: str) -> None:
    case = models.make(name)
    model = other(case.model)
    found = evaluate(model, case.batches, reference=case.model, bootstrap=QUICK)
    assert found.distance is not None and len(found.distance.kl) == found.tokens
    wanted = written_out(model, case.model, list(case.batches))
    shown = dict(found.distance.lines())
    assert shown.keys() == wanted.keys() and wanted["Mean KLD"] > 0.001 and wanted["RMS Δp"] > 0.1
    for figure, value in wanted.items():
        # fp32 against fp64, and six digits after the point, or three of percent
        assert float(shown[figure].removesuffix(" %")) == pytest.approx(value, rel=1e-3, abs=1.1e-3), figure
    values = found.to_dict()["distance"]
    assert values["kl_median"] == pytest.approx(wanted["Median KLD"], rel=1e-3)
    assert values["kl_99"] == pytest.approx(wanted["99.0% KLD"], rel=1e-3)
    assert values["kl_99_9"] == pytest.approx(wanted["99.9% KLD"], rel=1e-3)
    assert values["kl_max"] == pytest.approx(wanted["Maximum KLD"], rel=1e-3)
    assert values["rms_dp"]["value"] == pytest.approx(wanted["RMS Δp"] / 100, rel=1e-3)
    assert values["mean_dp"]["value"] == pytest.approx(wanted["Mean Δp"] / 100, rel=1e-3)
    assert values["reference_perplexity"]["value"] == pytest.approx(wanted["Mean PPL(base)"], rel=1e-5)
    ratio = values["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(wanted["Mean PPL(Q)/PPL(base)"], rel=1e-5)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    assert found["kl"].value == pytest.approx(float(found.distance.kl.double().mean()), rel=1e-6)
    assert str(found.distance).splitlines()[0].split() == ["Mean", "PPL(Q)", shown["Mean PPL(Q)"]]


def test_a_model_and_itself() -> None:
    case = models.make("llama")
    found = evaluate(case.model, case.batches, reference=case.model, bootstrap=QUICK).to_dict()["distance"]
    assert {found[name] for name in ("kl_median", "kl_99", "kl_99_9", "kl_max")} == {0.0}
    assert found["rms_dp"]["value"] == found["mean_dp"]["value"] == 0 and found["perplexity_ratio"]["value"] == 1


def test_without_a_reference_there_is_none() -> None:
    case = models.make("llama")
    found = evaluate(case.model, case.batches, bootstrap=QUICK)
    assert found.distance is None and "distance" not in found.to_dict()


def test_padding_does_not_count() -> None:
    case = models.make("llama")
    ids, model = case.batches[1], other(case.model)
    padded = torch.nn.functional.pad(ids, (0, 5))
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0
    plain = evaluate(model, [ids], reference=case.model, bootstrap=QUICK).distance
    masked = evaluate(model, [{"ids": padded, "attention_mask": mask}], reference=case.model, bootstrap=QUICK).distance
    torch.testing.assert_close(masked.kl, plain.kl, rtol=1e-3, atol=1e-6)


def test_a_quantile_that_is_not_finite() -> None:
    kl = torch.tensor([0.0, 1.0, torch.inf])
    found = Distance(kl, {})
    assert math.isnan(found.quantile(0.5))
    assert Distance(kl[:2], {}).quantile(0.5) == 0.5 and Distance(kl[:1], {}).quantile(0.99) == 0


def test_logits_are_not_kept() -> None:
    """A token leaves four bytes behind, whatever the vocabulary."""
    logits, expected = torch.randn(2, 2, 8, 50)
    kept: list[Tensor] = []
    counted = torch.ones(2, 8, dtype=torch.bool)
    window_scores(logits, expected, torch.zeros(2, 8, dtype=torch.long), counted, kept)
    assert sum(part.numel() for part in kept) == 16
    assert sum(part.untyped_storage().nbytes() for part in kept) == 64


FORMATS = ("awq", "gemv", "gptq", "compressed-tensors", "modelopt", "native")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A float directory, and a quantized one in every layout, as another tool leaves it: without report and card."""
    folder = tmp_path_factory.mktemp("made")
    hf_directory.make(folder / "float")
    (folder / "code.txt").write_text(" ".join(f"code {i}" for i in range(300)))
    model = awq_ext.quantize(hf_model(folder / "float"), [torch.arange(64)[None]], **SETTINGS)
    for format in FORMATS:
        awq_ext.save_pretrained(model, folder / format, format)
        for name in ("awq_report.json", "README.md"):
            (folder / format / name).unlink(missing_ok=True)
    yield folder


SETTINGS: dict[str, Any] = {"method": "rtn", "group_size": 32, "symmetric": True, "fold": "always", "progress": False}


def hf_model(folder: Path) -> nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_the_command_on_a_directory_of_any_layout(made: Path) -> None:
    shown: dict[str, tuple[list[str], Any]] = {}
    for format in FORMATS:
        arguments = ["eval", made / format, made / "code.txt", "--reference", made / "float", "--seq-len", 64]
        arguments += ["--tokens", 256, "--json", made / f"{format}.json"]
        done = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        figures = json.loads((made / f"{format}.json").read_text())["code"]
        figures.pop("seconds")
        table = [line for line in done.output.splitlines() if re.search("PPL|KLD|Δp|top p", line)]
        shown[format] = (table, figures)
    table, figures = shown["awq"]
    distance = figures["distance"]
    assert 0 < distance["kl_median"] < distance["kl_99"] <= distance["kl_99_9"] <= distance["kl_max"]
    assert len(table) == 11 and f"{distance['kl_99']:.6f}" in next(line for line in table if "99.0% KLD" in line)
    for format in FORMATS[1:]:
        assert shown[format] == shown["awq"], f"{format} holds the same codes and scales"
