"""evaluate(): against the formulas written out, on every way in which a model can be called."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from awq_ext import Bootstrap, CalibrationError, compare
from awq_ext.evaluation.evaluate import accuracy, embedding_cosine, evaluate, window_scores
from awq_ext.forwards.calls import Call
from awq_ext.forwards.outputs import targets_of

QUICK = Bootstrap(resamples=100)


def other(model: nn.Module, amount: float = 0.02) -> nn.Module:
    """A model near ``model``."""
    nearby = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nearby.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return nearby


def written_out(model: nn.Module, reference: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of every token but the first, KL(reference || model) and agreement at every place but the last: [B, T - 1]."""
    with torch.no_grad():
        p = models.logits(reference(ids))[:, :-1].double().softmax(-1)
        q = models.logits(model(ids))[:, :-1].double().softmax(-1)
    nll = -q.gather(-1, ids[:, 1:, None])[..., 0].log()
    return nll, (p * (p / q).log()).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()


@pytest.mark.parametrize("name", ["llama", "dict", "tied"])
def test_the_measures_are_those_of_the_formulas(name: str) -> None:
    case = models.make(name)
    model = other(case.model)
    found = evaluate(model, case.batches, reference=case.model, bootstrap=QUICK)
    parts = [written_out(model, case.model, ids) for ids in case.batches]
    nll, kl, top1 = (torch.cat([part[i].flatten() for part in parts]) for i in range(3))
    # fp32 against fp64: log-probabilities of about 4 are off by some 1e-6
    assert found["perplexity"].value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found["kl"].value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["top1"].value == float(top1.mean())
    assert (found.windows, found.tokens) == (8, 2 * (16 + 29 + 8 + 23))
    for measure in ("perplexity", "kl", "top1"):
        assert found[measure].low <= found[measure].value <= found[measure].high


def test_a_model_agrees_with_itself() -> None:
    case = models.make("llama")
    found = evaluate(case.model, case.batches, reference=case.model, bootstrap=QUICK)
    assert found["kl"].value == 0 and found["top1"].value == 1
    assert found.difference(found, "perplexity").value == 0
    with pytest.raises(KeyError, match="perplexity, kl, top1"):
        found["accuracy"]


def test_padding_does_not_count() -> None:
    case = models.make("llama")
    ids = case.batches[1]
    padded = F.pad(ids, (0, 5))
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0
    plain = evaluate(case.model, [ids], bootstrap=QUICK)
    masked = evaluate(case.model, [{"ids": padded, "attention_mask": mask}], bootstrap=QUICK)
    assert masked.tokens == plain.tokens
    assert masked["perplexity"].value == pytest.approx(plain["perplexity"].value, rel=1e-5)
    left = {"ids": padded.roll(5, 1), "attention_mask": mask.roll(5, 1)}
    assert evaluate(case.model, [left], bootstrap=QUICK).tokens == plain.tokens


class Reading(nn.Module):
    """A language model that names its embeddings, as Transformers' do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def get_input_embeddings(self) -> nn.Module:
        return self.net.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.net(input_ids, attention_mask)


ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]
ONES = [1] * 8


@pytest.mark.parametrize(
    "samples",
    [
        ROWS,
        [torch.tensor(row) for row in ROWS],
        [{"input_ids": row, "attention_mask": ONES} for row in ROWS],
        [{"input_ids": torch.tensor(row), "attention_mask": torch.tensor(ONES)} for row in ROWS],
        {"input_ids": ROWS, "attention_mask": [ONES, ONES]},  # as many columns as rows
        {"input_ids": torch.tensor(ROWS)},
    ],
)
def test_rows_of_tokens_are_read_as_by_quantize(samples: Any) -> None:
    model = Reading(models.make("llama").model)
    seen = []

    def mean(output: Tensor, expected: Tensor | None, sample: Any) -> Tensor:
        seen.append(sample["input_ids"] if isinstance(sample, dict) else sample)
        return output.mean((1, 2))

    for options in ({"reference": other(model)}, {"metric": mean}):
        found = evaluate(model, samples, bootstrap=QUICK, **options)
        batched = evaluate(model, [torch.tensor([row]) for row in ROWS], bootstrap=QUICK, **options)
        assert found.windows == 2 and found.tokens == batched.tokens
        for name in found.measures:
            assert found[name].value == pytest.approx(batched[name].value, rel=1e-5)
    assert [ids.tolist() for ids in seen] == [[row] for row in ROWS] * 2
    calib = [torch.tensor([row]) for row in ROWS]
    compared = compare(model, samples, {"same": samples}, ["rtn"], group_size=16, progress=False, speed_seconds=0)
    by_batch = compare(model, calib, {"same": calib}, ["rtn"], group_size=16, progress=False, speed_seconds=0)
    for row, expected in zip(compared.rows, by_batch.rows, strict=True):
        scored, wanted = row.evaluations["same"]["perplexity"], expected.evaluations["same"]["perplexity"]
        assert scored.value == pytest.approx(wanted.value, rel=1e-5)


def test_columns_that_the_model_does_not_take_are_left_out_and_labels_kept() -> None:
    case = models.make("llama")
    rows = [{"input_ids": row, "labels": [-100] * 4 + row[4:], "idx": 3} for row in ROWS]
    with pytest.warns(UserWarning, match="left out of the samples, as the model takes nothing of these names: idx"):
        found = evaluate(Labelled(case.model), rows, bootstrap=QUICK)
    assert found.tokens == 6  # as in test_labels_say_what_counts


class Labelled(nn.Module):
    """Takes labels, as Transformers' models do."""

    def __init__(self, net: nn.Module, encoder_decoder: bool = False) -> None:
        super().__init__()
        self.net = net
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(input_ids))


def test_labels_say_what_counts() -> None:
    case = models.make("llama")
    ids = case.batches[0]
    labels = ids.clone()
    labels[:, :10] = -100
    found = evaluate(Labelled(case.model), [{"input_ids": ids, "labels": labels}], bootstrap=QUICK)
    nll, _, _ = written_out(case.model, case.model, ids)
    assert found.tokens == 2 * 7 - 2  # the place before the first counted label is labelled -100 itself
    assert found["perplexity"].value == pytest.approx(math.exp(nll[:, 10:].mean()), rel=1e-5)


def test_an_encoder_decoders_logits_are_not_shifted() -> None:
    case = models.make("llama")
    ids = case.batches[0]
    labels = torch.randint(0, models.VOCAB, ids.shape)
    sample = {"input_ids": ids, "labels": labels}
    found = evaluate(Labelled(case.model, encoder_decoder=True), [sample], bootstrap=QUICK)
    expected = F.cross_entropy(case.model(ids).flatten(0, 1), labels.flatten())
    assert found.tokens == ids.numel()
    assert found["perplexity"].value == pytest.approx(expected.exp().item(), rel=1e-5)


def test_texts_are_cut_into_windows() -> None:
    case = models.make("llama")
    tokenizer = lambda text: [ord(c) % models.VOCAB for c in text]  # noqa: E731
    found = evaluate(case.model, ["x" * 25, "abc", ""], tokenizer=tokenizer, seq_len=10, bootstrap=QUICK)
    assert (found.windows, found.tokens) == (4, 9 + 9 + 4 + 2)


def test_scores_in_parts_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, expected = torch.randn(3, 11, 20), torch.randn(3, 11, 20)
    targets, counted = torch.randint(0, 20, (3, 11)), torch.rand(3, 11) < 0.7
    whole = window_scores(logits, expected, targets, counted)
    monkeypatch.setattr(sys.modules["awq_ext.evaluation.evaluate"], "_ELEMENTS_AT_ONCE", 60)
    torch.testing.assert_close(window_scores(logits, expected, targets, counted), whole, rtol=1e-12, atol=0)


def test_tokens_that_the_reference_rules_out() -> None:
    """p = 0 contributes nothing to the divergence, though log p is -inf."""
    logits = torch.zeros(1, 1, 4)
    expected = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]).view(1, 1, 4)
    scores = window_scores(logits, expected, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    assert scores[2].item() == pytest.approx(math.log(2))


def test_a_classifier() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    pairs = [(torch.randn(4, 8), torch.randint(0, 5, (4,))) for _ in range(10)]
    found = evaluate(model, pairs, inputs="first", metric=accuracy, bootstrap=QUICK)
    hits = torch.cat([model(x).argmax(-1) == y for x, y in pairs]).double()
    assert found["accuracy"].value == float(hits.mean()) and found.windows == 40


def test_embeddings() -> None:
    encoder = models.make("mlp").model
    nearby = other(encoder)
    batches = models.make("mlp").batches
    found = evaluate(nearby, batches, reference=encoder, metric=embedding_cosine, bootstrap=QUICK)
    cosines = [F.cosine_similarity(nearby(x).mean(1).double(), encoder(x).mean(1).double()) for x in batches]
    assert found["embedding_cosine"].value == pytest.approx(torch.cat(cosines).mean().item(), rel=1e-6)
    with pytest.raises(TypeError, match="reference"):
        evaluate(nearby, batches, metric=embedding_cosine)


def test_embeddings_pool_over_what_counts() -> None:
    hidden = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    output = SimpleNamespace(last_hidden_state=hidden)
    one = embedding_cosine(output, hidden[:, :2].mean(1), {"attention_mask": mask})
    assert one[0] == pytest.approx(1) and one[1] < 0.999


def test_several_metrics_of_a_users_own() -> None:
    case = models.make("mlp")
    metrics = {"mean": lambda out, ref, x: out.mean(), "rows": lambda out, ref, x: (out - x).flatten(1).norm(dim=1)}
    found = evaluate(case.model, case.batches, metric=metrics, bootstrap=QUICK)
    assert found["mean"].value == pytest.approx(sum(case.model(x).mean().item() for x in case.batches) / 4, rel=1e-5)
    assert len(found.measures["rows"].totals) == 8
    assert set(found.to_dict()) == {"mean", "rows", "windows", "tokens", "seconds"}


def test_the_models_are_left_as_they_were() -> None:
    case = models.make("cache")
    case.model.train()
    case.model.layers[1].eval()
    case.model.calibrating = True  # running with the cache on would be an error
    snapshot = Snapshot(case.model)
    evaluate(case.model, case.batches, reference=case.model, bootstrap=QUICK)
    snapshot.assert_unchanged()
    with pytest.raises(CalibrationError, match="batch 1"):
        evaluate(case.model, [case.batches[0], torch.zeros(1, 3, 40)], bootstrap=QUICK)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.randn(2, 3, 24)], ValueError, "pass metric="),
        (torch.zeros(2, 3), TypeError, "iterable"),
        (["text"], TypeError, "tokenizer"),
    ],
)
def test_unusable_samples(samples: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(models.make("mlp").model, samples)


def test_nothing_left_to_score() -> None:
    with pytest.raises(ValueError, match="no token is left"):
        evaluate(models.make("llama").model, [torch.zeros(2, 1, dtype=torch.long)])


def test_what_is_predicted() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int32)
    call = Call(args=(torch.randn(1, 3), ids))
    assert targets_of(call).dtype == torch.int64
    assert targets_of(Call(args=(torch.randn(1, 3),))) is None


def test_it_can_be_printed() -> None:
    case = models.make("llama")
    text = str(evaluate(case.model, case.batches, bootstrap=QUICK))
    assert text.startswith("perplexity") and "152 scored in 8 windows; 95% intervals" in text
    assert "reference" not in text
    other = models.make("llama").model
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight.mul_(1.1)
    both = evaluate(other, case.batches, reference=case.model, bootstrap=QUICK)
    alone = evaluate(case.model, case.batches, bootstrap=QUICK)["perplexity"]
    assert both.reference_perplexity == alone != both["perplexity"]
    assert str(both).splitlines()[0] == f"perplexity   {both['perplexity']}, the reference's {alone}"


class Bigram(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, tokens)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    ids = torch.randint(0, 5, (1, 8))
    with pytest.raises(ValueError, match=r"logits of 7 tokens, the model of 5: only models of one vocabulary"):
        evaluate(Bigram(5), [ids], reference=Bigram(7))
    with pytest.raises(ValueError, match="the reference has no next-token logits"):
        evaluate(Bigram(5), [ids], reference=nn.Identity())
