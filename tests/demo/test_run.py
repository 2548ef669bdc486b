"""What the demo measures, and how it is shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import typer
from demo.made_up import compared, layer
from programs import run_python

import awq_ext
from awq_ext import cli
from awq_ext.demo import data, display, run
from awq_ext.demo.model import load_demo_model
from awq_ext.demo.theory import example
from awq_ext.layers.quant_linear import QuantLinear
from awq_ext.layers.sizes import model_bytes
from awq_ext.reporting.tables import as_text


def test_float_size_is_two_bytes_a_parameter() -> None:
    trained = load_demo_model(torch.float32)
    assert model_bytes(trained, run.BYTES_PER_FLOAT) == 2 * sum(p.numel() for p in trained.parameters())


def test_removed_is_of_the_divergences() -> None:
    found = compared(rtn=[0.2, 0.4], awq=[0.1, 0.35], best=[0.3, 0.6])
    assert run.removed(found, "AWQ", 3).share == pytest.approx(0.25)
    assert run.removed(found, "AWQ", 3).difference.value == pytest.approx(0.075)
    worse = run.removed(found, "AWQ+GPTQ", 4)
    assert worse.share == pytest.approx(-0.5) and worse.difference.value == pytest.approx(-0.15)
    assert run.removed(compared(rtn=[0.0], awq=[0.1], best=[0.1]), "AWQ", 4).share == 0


@pytest.mark.parametrize("windows", [1, 3])
def test_json_of_a_result_is_finite(windows: int) -> None:
    found = compared(*([value] * windows for value in (0.2, 0.1, 0.05)))
    result = run.DemoResult(example(), found, layer((1e-3, 2e-4), (0.1, 0.2)), -1, 1.0)
    figures = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert figures["layer"]["seconds"]["1"] == {"float": 1e-3, "int4": 2e-4}
    assert figures["removed"]["AWQ+GPTQ_3_bit"]["share"] == pytest.approx(0.75)
    assert figures["example"]["rtn"]["costs"][figures["example"]["loud"]] > figures["example"]["awq"]["total"]


def test_tables_show_the_figures_within_80_columns() -> None:
    found = compared(rtn=[0.3] * 3, awq=[0.225] * 3, best=[0.075] * 3)
    cost = layer((3.457e-3, 4.69e-4), (0.216165, 0.232521))
    tables = [display.row_table(example()), display.model_table(found), display.layer_table(cost)]
    shown = as_text(*(table.to_rich() for table in tables), width=80)
    assert "4 bits " in shown and "3 bits*" in shown and "*: simulated" in display.MODEL_NOTE
    assert max(map(len, display.MODEL_NOTE.splitlines())) <= 80
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for figure in (
        "0.3000 ± 0.0000",
        "0.2250 ± 0.0000",
        "0.0750 ± 0.0000",
        "3,457",
        "469",
        "216,165",
        "232,521",
        "33.6",
        "8.7",
    ):
        assert figure in shown
    best = [row[0].text for row in tables[1].rows if row[1].best]
    assert best == ["AWQ+GPTQ"]


def test_a_method_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(rtn=[0.2], awq=[0.1], best=[0.1])
    failed = replace(found, rows=[*found.rows[:-1], replace(found.rows[-1], error="ValueError: no luck")])
    monkeypatch.setattr(run, "compare", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="AWQ\\+GPTQ 3 bit: ValueError: no luck"):
        run.compare_methods(tokens=256)


def test_a_layer_is_measured_as_it_is_stored() -> None:
    found = run.measure_layer(256, 64, seconds=0.0)
    linear = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    assert found.float_bytes == linear.weight.nbytes
    model = torch.nn.Sequential(linear)
    awq_ext.quantize(model, [torch.randn(8, 256).bfloat16()], method="rtn", group_size=run.LAYER_GROUP, progress=False)
    assert isinstance(model[0], QuantLinear) and found.int4_bytes == model[0].nbytes
    assert set(found.seconds) == {run.DECODE, run.PREFILL}
    assert all(took > 0 for pair in found.seconds.values() for took in pair.values())


def test_what_to_type_next_exists() -> None:
    """The command's options are those of the program, and the three lines of Python run on names of the package."""
    lines = [line.strip().removeprefix("[cyan]").removesuffix("[/cyan]") for line in display.NEXT.splitlines()]
    (command,) = (line for line in lines if line.startswith("awq-ext "))
    name, *arguments = command.split()[1:]
    known = {option for parameter in typer.main.get_command(cli.app).commands[name].params for option in parameter.opts}
    assert [a for a in arguments if a.startswith("-")] == ["--calib"] and {"--calib", "--method"} <= known
    python = lines[lines.index("import awq_ext") :]
    calls = {
        name: getattr(awq_ext, name) for name in ("quantize", "save") if any(f"awq_ext.{name}(" in x for x in python)
    }
    assert set(calls) == {"quantize", "save"} and all(map(callable, calls.values()))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The demo end to end, as a user starts it."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    # one thread: several are many times slower where other programs keep the cores busy
    done = run_python(
        *("-m", "awq_ext", "demo", "--tokens", "2048", "--threads", "1", "--json", str(path)), COLUMNS="80", timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= max(80, len(f"figures written to {path}"))
    return json.loads(path.read_text(encoding="utf-8")) | {"stdout": done.stdout}


def test_demo_figures_are_finite_and_shown(figures: dict) -> None:
    rows = figures["rows"]
    assert [r["label"] for r in rows] == ["float", *run.METHODS]
    for r in rows[1:]:
        found = r["evaluations"]["held-out"]["kl"]["value"]
        assert math.isfinite(found) and found > 0 and r["seconds"] > 0
        assert f"{found:.2f}" in figures["stdout"]
    sizes = {r["label"]: r["size_bytes"] for r in rows}
    assert sizes["float"] > sizes["AWQ 4 bit"] > sizes["AWQ 3 bit"] and figures["threads"] == 1
    for heading in ("1. Which rounding hurts", "2. A whole model", "3. A layer of an 8B model", "4. Your model"):
        assert heading in figures["stdout"]
    assert f"{figures['layer']['seconds']['1']['int4'] * 1e6:,.0f}" in figures["stdout"]


def test_awq_at_three_bits_is_not_worse_than_rtn(figures: dict) -> None:
    assert figures["removed"]["AWQ_3_bit"]["difference"]["high"] > 0


def test_size_formula_agrees_with_packed_layers() -> None:
    """What is printed for simulated widths is what QuantLinear takes where both exist: at 4 bits."""
    sizes = []
    for packed in (True, False):
        batches = data.calibration_batches(count=1, batch=2)
        model = load_demo_model(torch.float32)
        sizes.append(
            model_bytes(
                awq_ext.quantize(model, batches, progress=False, method="rtn", packed=packed), run.BYTES_PER_FLOAT
            )
        )
    assert sizes[0] == sizes[1]
