"""compare(): what it measures, what it says of the noise, and that the model stays as it is."""

from __future__ import annotations

import copy
import json
import math
import sys
from io import StringIO

import architectures
import models
import pytest
import torch
from checks import Snapshot
from rich.console import Console
from torch import nn

import awq_ext
from awq_ext import AwqConfig, Bootstrap, Comparison
from awq_ext.evaluation.bootstrap import Estimate, Measure
from awq_ext.evaluation.compare import compare, read_methods
from awq_ext.evaluation.comparison import FLOAT, Variant, plus_minus
from awq_ext.evaluation.evaluate import Evaluation, accuracy, embedding_cosine, evaluate

QUICK = {"bootstrap": Bootstrap(resamples=200), "speed_seconds": 0, "progress": False, "group_size": 16, "n_grid": 4}


def traffic(count: int = 3) -> dict[str, list[torch.Tensor]]:
    return {name: models.token_batches((20,) * count) for name in ("code", "json")}


def scored(losses: list[float], counts: float = 10) -> Evaluation:
    values = torch.tensor(losses, dtype=torch.float64)
    measure = Measure(values * counts, torch.full_like(values, counts), torch.exp)
    return Evaluation({"perplexity": measure}, Bootstrap(resamples=500), len(values), int(len(values) * counts), 0.1)


def made(**losses: list[float]) -> Comparison:
    """A comparison of given mean losses of windows."""
    settings = AwqConfig().to_dict()
    rows = [Variant(n, None if n == FLOAT else settings, 100, evaluations={"x": scored(v)}) for n, v in losses.items()]
    return Comparison(rows, ["x"], 1, Bootstrap(resamples=500))


def test_each_method_is_quantized_and_scored_as_by_hand() -> None:
    case, texts = models.make("llama"), traffic()
    found = compare(case.model, case.batches, texts, ["rtn", {"label": "mine", "clip": False}], **QUICK)
    assert [row.label for row in found.rows] == ["float", "rtn", "mine"]
    by_hand = copy.deepcopy(case.model)
    awq_ext.quantize(by_hand, case.batches, group_size=16, n_grid=4, clip=False, progress=False)
    for name, batches in texts.items():
        expected = evaluate(by_hand, batches, reference=case.model)
        for measure in ("perplexity", "kl", "top1"):
            assert found["mine"].evaluations[name][measure].value == expected[measure].value
        plain = evaluate(case.model, batches)
        assert found[FLOAT].evaluations[name]["perplexity"].value == plain["perplexity"].value
    assert found["mine"].config["clip"] is False and found["mine"].report.summary()
    assert found["mine"].size_bytes < found[FLOAT].size_bytes
    assert found["mine"].seconds > 0


def test_the_model_stays_as_it_is(case: models.Case) -> None:
    snapshot = Snapshot(case.model)
    metric = None if case.batches[0].dtype == torch.int64 else embedding_cosine
    compare(case.model, case.batches, {"same": case.batches}, ["rtn", "awq"], metric=metric, **QUICK)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_model_as_it_is(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    snapshot = Snapshot(case.model)
    real, calls = evaluate, []

    def interrupted(*args: object, **kwargs: object) -> Evaluation:
        calls.append(args)
        if len(calls) == 4:  # float twice, then the second text of the first method
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(sys.modules["awq_ext.evaluation.compare"], "evaluate", interrupted)
    with pytest.raises(error):
        compare(case.model, case.batches, traffic(), ["awq", "rtn"], **QUICK)
    snapshot.assert_unchanged()


def test_a_method_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    snapshot = Snapshot(case.model)
    real = awq_ext.quantize

    def quantize(model: nn.Module, calib: object, config: AwqConfig, **settings: object) -> nn.Module:
        if config.method == "rtn":
            raise ValueError("no luck")
        return real(model, calib, config, **settings)

    monkeypatch.setattr(sys.modules["awq_ext.evaluation.compare"], "quantize", quantize)
    with pytest.warns(UserWarning, match="rtn failed: ValueError: no luck") as caught:
        found = compare(case.model, case.batches, traffic(), ["rtn", "awq"], **QUICK)
    assert caught[0].filename == __file__
    assert found["rtn"].error and found.best("code") == ["awq"]
    assert "rtn failed: ValueError: no luck" in str(found) and "failed" in found.to_markdown()
    json.loads(found.to_json())
    with pytest.raises(RuntimeError, match="every method failed: rtn: ValueError: no luck"):
        compare(case.model, case.batches, traffic(), ["rtn"], **QUICK)
    snapshot.assert_unchanged()


def test_speeds_are_measured_beside_the_float_model() -> None:
    case = models.make("llama")
    settings = QUICK | {"speed_seconds": 0.01}
    found = compare(case.model, case.batches, traffic(), ["rtn", {"bits": 3, "packed": False}], **settings)
    assert set(found["rtn"].speeds) == {"windows", "steps"}
    assert all(value > 0 for pair in found["rtn"].speeds.values() for value in pair)
    simulated = found.rows[2]
    assert simulated.simulated and simulated.speeds == {}
    assert found[FLOAT].speeds["steps"] == (found["rtn"].speeds["steps"][1],) * 2
    text = str(found)
    assert "× float" in text and "simulated" in text and "awq bits=3 packed=False" in text


def test_speeds_are_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.make("llama")
    seconds = lambda runners, _: dict(zip(runners, (2.0, 4.0), strict=True))  # noqa: E731  (the method's, float's)
    monkeypatch.setattr(sys.modules["awq_ext.evaluation.compare"], "race", seconds)
    texts = traffic()
    found = compare(case.model, case.batches, texts, ["rtn"], **QUICK | {"speed_seconds": 1})
    count = texts["code"][0].numel()
    assert found["rtn"].speeds == {"windows": (count / 2, count / 4), "steps": (1 / 2, 1 / 4)}


def test_a_log_counts_the_blocks_of_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    """One method may take an hour, in which a file would otherwise get no line."""
    case = models.make("llama")
    compare(case.model, case.batches, traffic(1), ["rtn", "awq"], **QUICK | {"progress": True})
    written = capsys.readouterr().err
    assert written.startswith("awq_ext: comparing 2 methods on 2 texts: scores the float model, then quantizes")
    for label in ("rtn", "awq"):
        assert -1 < written.find(f"awq_ext: {label}: quantizing") < written.index(f"awq_ext: {label}: scoring")
    assert written.count("quantizing: block") == 2


def test_each_model_is_shown_while_it_is_there() -> None:
    case, shown = models.make("llama"), {}
    snapshot = Snapshot(case.model)

    def look(label: str, model: nn.Module) -> None:
        with torch.no_grad():
            shown[label] = (type(model), models.logits(model(case.batches[0].clone())))
        if label == "awq":
            raise ValueError("not this one")

    with pytest.warns(UserWarning, match="awq failed: ValueError: not this one"):
        found = compare(case.model, case.batches, traffic(), ["rtn", "awq"], on_model=look, **QUICK)
    snapshot.assert_unchanged()
    assert list(shown) == ["float", "rtn", "awq"] and found["awq"].error and not found["rtn"].error
    with torch.no_grad():
        assert torch.equal(shown["float"][1], models.logits(case.model(case.batches[0].clone())))
    assert not torch.equal(shown["rtn"][1], shown["float"][1])


def test_a_classifier_is_compared_by_its_accuracy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    pairs = [(torch.randn(16, 32), torch.randint(0, 4, (16,))) for _ in range(4)]
    settings = QUICK | {"speed_seconds": 0.01}
    found = compare(model, pairs, {"test": pairs}, ["rtn", "awq"], inputs="first", metric=accuracy, **settings)
    assert found.measures == ["accuracy"]
    assert found[FLOAT].evaluations["test"]["accuracy"].value == evaluate(
        model, pairs, inputs="first", metric=accuracy
    )["accuracy"].value  # fmt: skip
    text = str(found)
    assert "rows/s" in text and "64 values in 64 windows" in text and "perplexity" not in text
    assert set(found["awq"].speeds) == {"windows"}


def test_differences_within_the_noise_are_marked() -> None:
    """b is a plus noise around nothing; c is surely worse than both, though less so than the windows differ."""
    windows = torch.linspace(1, 3, 20)
    noise = 0.01 * torch.randn(20)
    noise -= noise.mean()
    found = made(
        float=(windows - 0.1).tolist(),
        a=windows.tolist(),
        b=(windows + noise + 1e-4).tolist(),
        c=(windows + 0.05).tolist(),
    )
    assert found.best("x") == ["a", "b"]
    assert found.difference("a", "b", "x").within_noise
    assert not found.difference("c", "a", "x").within_noise
    table = found.tables()[1]
    assert {row[0].text: (row[1].best, row[1].text.endswith("≈")) for row in table.rows} == {
        "float": (False, False),
        "a": (True, False),
        "b": (False, True),
        "c": (False, False),
    }
    assert "x, by perplexity: a, b are not significantly different" in found.notes()


def test_the_gap_that_is_closed() -> None:
    values = {"float": 1.0, "rtn": 1.4, "awq": 1.1}
    found = made(**{name: [v, v + 0.1, v + 0.2] for name, v in values.items()})
    perplexities = {name: math.exp(v + 0.1) for name, v in values.items()}
    gap = perplexities["rtn"] - perplexities["float"]
    assert found.gap_closed("awq", "x") == pytest.approx((perplexities["rtn"] - perplexities["awq"]) / gap)
    assert f"{found.gap_closed('awq', 'x'):.0%}" in str(found)
    level = made(float=[1.0, 2.0, 3.0], rtn=[1.1, 1.9, 3.0], awq=[1.0, 2.0, 3.0])
    assert level.gap_closed("awq", "x") is None


def test_every_form_of_the_table() -> None:
    case = models.make("llama")
    found = compare(case.model, case.batches, traffic(), ["rtn", "awq"], **QUICK)
    values = json.loads(found.to_json())
    assert values["rows"][1]["evaluations"]["code"]["kl"]["low"] > 0
    assert set(values["over_float"]["awq"]["json"]) == {"perplexity"} and values["best"]["code"]["kl"]
    for text in (str(found), found.to_markdown(), found._repr_html_()):
        for word in ("Cost (1 thread)", "code: 114 tokens in 6 windows", "perplexity", "top1", "gap closed"):
            assert word in text
    rows = [line for line in found.to_markdown().splitlines() if line.startswith("| awq |")]
    assert len(rows) == 3 and all(line.count("|") in (5, 7) for line in rows)
    assert found._repr_html_().count("<table>") == 3
    assert "the best\n" in str(found) and "the best (bold)\n" in found.to_markdown()  # which plain text cannot show
    terminal = Console(file=StringIO(), force_terminal=True, color_system="standard", width=120, highlight=False)
    terminal.print(found)
    assert "the best (bold)" in terminal.file.getvalue()


def test_it_is_written_to_a_file(tmp_path) -> None:
    found = made(float=[1.0, 2.0], rtn=[1.5, 2.5])
    assert found.to_json(tmp_path / "c.json") == (tmp_path / "c.json").read_text()


def test_methods_in_every_form() -> None:
    found = read_methods(["rtn", {"method": "awq", "bits": 3, "packed": False}, AwqConfig(clip=False)], {"n_grid": 5})
    assert list(found) == ["rtn", "awq bits=3 packed=False", "awq clip=False"]
    assert [config.n_grid for config in found.values()] == [5, 5, 5]
    assert read_methods({"one": "rtn", "two": {"clip": True}})["two"] == AwqConfig(clip=True)
    assert read_methods(["fast", {"effort": "best", "label": "b"}])["b"] == AwqConfig(effort="best")
    assert read_methods(["balanced"], {"group_size": 64})["balanced"] == AwqConfig(
        method="awq+gptq", group_size=64, builtin_text=True, max_calib_tokens=16384
    )
    # what a method says itself counts more than what holds for all
    assert read_methods([{"label": "a", "group_size": 32}], {"group_size": 64})["a"].group_size == 32


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ("awq", TypeError, "a sequence is needed"),
        ([], TypeError, "a sequence is needed"),
        (["nonsense"], ValueError, "method='nonsense'"),
        (["awq", "awq"], ValueError, "the label 'awq' is taken"),
        ([{"label": "float"}], ValueError, "'float' is taken"),
        ([3], TypeError, "3 is a int"),
        ([{"grop_size": 3}], ValueError, "grop_size"),
    ],
)
def test_unusable_methods_are_refused_before_any_work(methods: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(models.make("llama").model, iter(()), traffic(), methods, progress=False)


def test_traffic_needs_names() -> None:
    with pytest.raises(TypeError, match="by name"):
        compare(models.make("llama").model, [], models.token_batches(), ["rtn"])
    with pytest.raises(KeyError, match="there are float, rtn"):
        made(float=[1.0], rtn=[1.0])["awq"]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(17.583, 17.1, 18.0), "17.58 ± 0.45"),
        (Estimate(0.02131, 0.02118, 0.02142), "0.02131 ± 0.00012"),
        (Estimate(1.5, math.nan, math.nan), "1.5000"),
        (Estimate(0.0, 0.0, 0.0), "0.0000 ± 0.0000"),
        (Estimate(1234.5, 1100.0, 1400.0), "1234.5 ± 150.0"),
    ],
)
def test_figures_have_the_digits_that_mean_something(estimate: Estimate, text: str) -> None:
    assert plus_minus(estimate) == text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "experts in a list"])
def test_a_mixture_of_experts_stays_as_it_is(name: str) -> None:
    made = architectures.make_or_skip(name)
    metric = (
        None if name in architectures.TRANSFORMERS else lambda output, expected, _: -float((output - expected).norm())
    )
    snapshot = Snapshot(made.model)
    methods = ["rtn", "awq", {"bits": 3, "packed": False}]
    found = compare(
        made.model, made.batches, {"same": made.batches}, methods, metric=metric, **QUICK | {"min_tokens": 1}
    )
    snapshot.assert_unchanged()
    assert not any(row.error for row in found.rows)
    assert found.rows[0].size_bytes > found["rtn"].size_bytes
    by_hand = awq_ext.quantize(made.model, made.batches, group_size=16, n_grid=4, min_tokens=1, progress=False)
    model = architectures.make(name).model
    measure = found.measures[-1]
    again = evaluate(by_hand, made.batches, reference=model, metric=metric)
    assert found["awq"].evaluations["same"][measure].value == again[measure].value
