"""The demo: its model, its text, its shipped weights, and what it prints."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from programs import run_python
from torch import nn

import awq_ext
from awq_ext.demo import data, display, run
from awq_ext.demo import model as demo_model
from awq_ext.demo.model import ByteLlama, ByteLlamaConfig, load_demo_model
from awq_ext.evaluation.bootstrap import Bootstrap, Measure
from awq_ext.evaluation.comparison import FLOAT, Comparison, Variant
from awq_ext.evaluation.cost import model_bytes
from awq_ext.evaluation.evaluate import Evaluation, evaluate


@pytest.fixture(scope="module")
def trained() -> ByteLlama:
    return load_demo_model(torch.float32)


def unigram_entropy(windows: torch.Tensor) -> float:
    """Entropy in nats of the bytes of the text itself: what a model without any context could reach at best."""
    counts = torch.bincount(windows.flatten(), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum().item()


def bigram_entropy(windows: torch.Tensor) -> float:
    """Entropy in nats of a byte given the one before it, from the text's own pair counts: the best of all bigrams."""
    pairs = torch.bincount((windows[:, :-1] * 256 + windows[:, 1:]).flatten(), minlength=65536).double().view(256, 256)
    joint = pairs / pairs.sum()
    given = (joint / joint.sum(1, keepdim=True))[joint > 0]
    return -(joint[joint > 0] * given.log()).sum().item()


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 17), (3, 256)])
def test_forward_shape(batch: int, length: int) -> None:
    assert ByteLlama()(torch.zeros(batch, length, dtype=torch.long)).shape == (batch, length, 256)


def test_future_bytes_do_not_change_past_logits(trained: ByteLlama) -> None:
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 256
    with torch.no_grad():
        before, after = trained(ids), trained(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30], atol=1e-4, rtol=1e-4)
    assert (before[:, 30:] - after[:, 30:]).abs().max() > 0.1


def test_position_matters(trained: ByteLlama) -> None:
    """Without rotary embeddings, the last logits could not tell two orders of the earlier bytes of one block apart."""
    with torch.no_grad():
        one, other = (trained(torch.tensor([list(text)]))[0, -1] for text in (b"abcdefg", b"fedcbag"))
    assert (one - other).abs().max() > 0.1


def test_grouped_query_heads_share_keys_and_values() -> None:
    """With k and v computed by hand for every query head, attention gives the same."""
    torch.manual_seed(0)
    attention = demo_model.Attention(ByteLlamaConfig(hidden=64, query_heads=4, kv_heads=2))
    x = torch.randn(1, 5, 64)
    cos, sin = demo_model.rotary_tables(5, 16, 10_000.0, x.device)
    query, key, value = (f(x).view(5, -1, 16) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for head in range(4):
        q = demo_model.rotate(query[:, head], cos, sin)
        k = demo_model.rotate(key[:, head // 2], cos, sin)
        weights = (q @ k.T / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
        heads.append(weights @ value[:, head // 2])
    torch.testing.assert_close(attention(x, cos, sin)[0], attention.o_proj(torch.cat(heads, -1)))


def test_llama_names(trained: ByteLlama) -> None:
    linears = {name.rpartition(".")[2] for name, m in trained.named_modules() if isinstance(m, nn.Linear)}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert all(m.in_features % 64 == 0 for m in trained.modules() if isinstance(m, nn.Linear))


def test_generate(trained: ByteLlama) -> None:
    assert trained.generate(b"import o", 12) == trained.generate(b"import o", 12)
    sampled = [trained.generate(b"def ", 24, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(trained.generate(b"x" * 300, 3)) == 3  # longer than the context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_dtype(dtype: torch.dtype) -> None:
    model = load_demo_model(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training


def test_weights_are_small() -> None:
    assert demo_model.WEIGHTS.stat().st_size <= 3_000_000


def test_trained_model_beats_counting(trained: ByteLlama) -> None:
    """Far better than byte frequencies, and better than pair frequencies taken from the scored text itself."""
    windows = data.held_out_tokens(16_384)
    loss = math.log(evaluate(trained, windows.split(16))["perplexity"].value)
    assert loss < 0.5 * unigram_entropy(windows)
    assert loss < bigram_entropy(windows)


# --- text -------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_all_used() -> None:
    names = list(data.modules())
    splits = ("train", "calibration", "held-out")
    by_split = {split: {n for n in names if data.split_of(n) == split} for split in splits}
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len(names)
    assert not by_split["train"] & by_split["held-out"] and not by_split["calibration"] & by_split["held-out"]


def test_split_depends_on_the_path_alone() -> None:
    """Frozen: another hash would put modules that the shipped weights were trained on into the held-out text."""
    expected = {
        "ast.py": "calibration",
        "inspect.py": "held-out",
        "wave.py": "calibration",
        "argparse.py": "train",
        "json/scanner.py": "calibration",
    }
    assert {name: data.split_of(name) for name in expected} == expected
    assert data.split_of("json\\scanner.py") == data.split_of("json/scanner.py")


def test_skips_tests_and_generated_files() -> None:
    assert not [n for n in data.modules() if n.startswith(("test/", "site-packages/", "encodings/", "pydoc_data/"))]
    assert "textwrap.py" in data.modules()


def test_no_source_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(data.NoSourceError, match="no Python source files under"):
        data.modules(str(tmp_path))


def test_windows() -> None:
    stream = torch.arange(100, dtype=torch.uint8)
    cut = data.windows(stream, 4, 10)
    assert cut.dtype == torch.int64 and cut.shape == (4, 10)
    assert cut[0, 0] == 0 and cut[-1, -1] == 99
    assert torch.equal(cut - cut[:, :1], torch.arange(10).expand(4, 10))
    with pytest.raises(data.NoSourceError, match="fewer than one window"):
        data.windows(stream, 1, 101)


def test_batches() -> None:
    calibration = data.calibration_batches(count=3, batch=2, length=32)
    assert [batch.shape for batch in calibration] == [(2, 32)] * 3
    assert data.held_out_tokens(1000, length=64).shape == (15, 64)


def test_held_out_windows_do_not_overlap() -> None:
    """Overlapping windows would count the same bytes twice and make the standard errors too small."""
    stream = torch.arange(data.tokens("held-out").numel())
    windows = data.windows(stream, run.TOKENS // 257, 257)
    assert (windows[1:, 0] > windows[:-1, -1]).all()


# --- measuring and showing --------------------------------------------------------------------------------------------


def scored(label: str, losses: list[float]) -> Variant:
    """A row of the comparison, from the mean loss of each window in nats a byte."""
    totals = torch.tensor(losses, dtype=torch.float64)
    measure = Measure(totals, torch.ones_like(totals), torch.exp)
    evaluation = Evaluation({"perplexity": measure}, Bootstrap(resamples=500), len(losses), len(losses), 0.1)
    return Variant(label, None if label == FLOAT else run.METHODS[label], evaluations={run.TEXT: evaluation})


def compared(**losses: list[float]) -> Comparison:
    """RTN and AWQ of 4 bits (and the same as 3 bits) beside the float model."""
    rows = [scored(FLOAT, losses["float"])]
    rows += [scored(f"{m.upper()} {bits} bit", losses[m]) for bits in run.BITS for m in ("rtn", "awq")]
    return Comparison(rows, [run.TEXT], 1, Bootstrap(resamples=500))


def test_float_size_is_two_bytes_a_parameter(trained: ByteLlama) -> None:
    assert model_bytes(trained, run.BYTES_PER_FLOAT) == 2 * sum(p.numel() for p in trained.parameters())


OF_FLOAT = [1.0, 1.2, 1.4]


@pytest.mark.parametrize(
    "rtn, awq, says",
    [
        ([1.2, 1.41, 1.6], [1.1, 1.3, 1.5], "AWQ closes"),
        ([1.1, 1.3, 1.5], [1.2, 1.41, 1.6], "AWQ is worse than RTN here"),
        ([1.1, 1.3, 1.5], [1.0, 1.4, 1.5], "less than the noise"),
        ([0.9, 1.3, 1.4], [0.8, 1.4, 1.4], "AWQ does not differ from it measurably either"),
        ([0.9, 1.3, 1.4], [1.0, 1.41, 1.5], "AWQ is worse by"),
        ([0.9, 1.3, 1.4], [0.8, 1.19, 1.3], "AWQ is better by"),
        ([1.2], [1.1], "RTN costs nothing that this many bytes can show"),
    ],
)
def test_verdict_says_what_the_figures_say(rtn: list[float], awq: list[float], says: str) -> None:
    found = compared(float=OF_FLOAT[: len(rtn)], rtn=rtn, awq=awq)
    assert says in display.verdict(found, 4)
    result = run.DemoResult(found, {row.label: b"abc" for row in found.rows}, -1, 1.0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_gap_closed_is_of_the_printed_perplexities() -> None:
    found = compared(**{name: [math.log(p)] * 2 for name, p in {"float": 1.0, "rtn": 3.0, "awq": 2.0}.items()})
    result = run.DemoResult(found, {row.label: b"" for row in found.rows}, -1, 1.0)
    assert result.to_dict()["gap_closed"] == pytest.approx({"4 bit": 0.5, "3 bit": 0.5})
    assert "closes [green]50%[/green]" in display.verdict(found, 3) and "(3.0000 against 2.0000)" in display.verdict(
        found, 3
    )


def test_a_method_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(float=OF_FLOAT, rtn=OF_FLOAT, awq=OF_FLOAT)
    failed = replace(found, rows=[*found.rows[:-1], replace(found.rows[-1], error="ValueError: no luck")])
    monkeypatch.setattr(run, "compare", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="AWQ 3 bit: ValueError: no luck"):
        run.run_demo(tokens=256)


def test_completion_bytes_cannot_control_the_terminal() -> None:
    assert display.printable(b"a\x1b[31m\n\xff\0") == "a·[31m\n\N{REPLACEMENT CHARACTER}·"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The demo end to end, as a user starts it."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    # one thread: several are many times slower where other programs keep the cores busy
    done = run_python("-m", "awq_ext", "demo", "--tokens", "2048", "--threads", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "How to read it" in done.stdout and "perplexity" in done.stdout
    return json.loads(path.read_text(encoding="utf-8")) | {"stdout": done.stdout}


def test_demo_figures_are_finite(figures: dict) -> None:
    rows = figures["rows"]
    assert [r["label"] for r in rows] == ["float", "RTN 4 bit", "AWQ 4 bit", "RTN 3 bit", "AWQ 3 bit"]
    for r in rows:
        perplexity = r["evaluations"]["held-out"]["perplexity"]["value"]
        assert math.isfinite(perplexity) and perplexity > 1
        assert f"{perplexity:.3f}" in figures["stdout"]
        assert r["seconds"] is None or r["seconds"] > 0
        assert r["completion"]
    for r in rows[:3]:
        assert all(r["speeds"][kind]["tokens_per_second"] > 0 for kind in ("windows", "steps"))
    assert not rows[3]["speeds"] and not rows[4]["speeds"] and figures["threads"] == 1
    assert rows[0]["size_bytes"] > rows[2]["size_bytes"] > rows[4]["size_bytes"]
    # each verdict prints the perplexities it compares to one digit more
    for r in rows[1:]:
        assert f"{r['evaluations']['held-out']['perplexity']['value']:.4f}" in figures["stdout"]


def test_awq_at_three_bits_is_not_worse_than_rtn(figures: dict) -> None:
    assert figures["rtn_minus_awq"]["3 bit"]["high"] > 0


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
