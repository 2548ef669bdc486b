"""Score a model on samples, alone and against a reference model, with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..forwards.calls import Call, read_calls, run_call
from ..forwards.forked import finishing_after_fork
from ..forwards.mode import calibration_mode
from ..forwards.outputs import IGNORED_LABEL, logits_of, targets_of
from ..forwards.samples import is_ids
from ..modules import unwrapped
from ..reporting.progress import Progress
from ..undo.thread_state import restoring
from .bootstrap import Bootstrap, Estimate, Measure
from .tokens.distance import ROWS, Distance

# fp32 log-probabilities made at a time, in elements: a vocabulary of 128 k times 512 tokens would be 256 MiB at once
_ELEMENTS_AT_ONCE = 1 << 23
# metric(output, output of the reference or None, sample) -> a number, or one for each row of the sample
Metric = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, repr=False)  # its __str__ is what is to be seen
class Evaluation:
    """What a model scored on some samples. ``print`` shows it; ``evaluation["perplexity"]`` is an Estimate.

    For language models the measures are "perplexity" and, against a reference, "kl" (mean Kullback-Leibler divergence of the
    reference's next-token distribution from the model's, in nats a token) and "top1" (share of tokens for which both hold the
    same next one most likely). windows: rows of samples, the unit that is resampled; tokens: predictions scored. distance: against
    a reference, of language models, more on single tokens: median, tail and largest divergence, and what llama.cpp tells.
    """

    measures: Mapping[str, Measure]
    bootstrap: Bootstrap
    windows: int
    tokens: int
    seconds: float
    distance: Distance | None = None

    def __getitem__(self, name: str) -> Estimate:
        """The measure called ``name``, with its interval; KeyError names those there are."""
        return self.bootstrap.estimate(self._measure(name))

    def _measure(self, name: str) -> Measure:
        if name not in self.measures:
            raise KeyError(f"no measure {name!r}: there are {', '.join(self.measures)}")
        return self.measures[name]

    @property
    def reference_perplexity(self) -> Estimate | None:
        """The reference's own perplexity on the same tokens; None without a reference, and for other models."""
        return (
            None if self.distance is None else self.bootstrap.estimate(self.distance.measures["reference_perplexity"])
        )

    def difference(self, other: Evaluation, name: str) -> Estimate:
        """Subtract ``other`` in the measure ``name``, paired window by window. ValueError unless both saw the same samples."""
        return self.bootstrap.difference(self._measure(name), other._measure(name))

    def ratio(self, other: Evaluation, name: str) -> Estimate:
        """Divide by ``other`` in the measure ``name``, paired like :meth:`difference`."""
        return self.bootstrap.ratio(self._measure(name), other._measure(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {name: self[name].to_dict() for name in self.measures}
        more = {} if self.distance is None else {"distance": self.distance.to_dict(self.bootstrap)}
        return {**values, **more, "windows": self.windows, "tokens": self.tokens, "seconds": self.seconds}

    def __str__(self) -> str:
        beside = {} if (other := self.reference_perplexity) is None else {"perplexity": f", the reference's {other}"}
        lines = [f"{name:12} {self[name]}{beside.get(name, '')}" for name in self.measures]
        share = f"{self.bootstrap.confidence:.0%}"
        return "\n".join([*lines, f"{self.tokens} scored in {self.windows} windows; {share} intervals over windows"])

    __repr__ = __str__


@finishing_after_fork
@restoring
@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    metric: Metric | Mapping[str, Metric] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    seq_len: int = 512,
    bootstrap: Bootstrap | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score ``model`` on samples: perplexity, or any ``metric``; with ``reference`` also the distance from that model.

    loader: samples as :func:`awq_ext.quantize` reads them; texts need ``tokenizer`` and are cut into windows of ``seq_len``
        tokens. In each window every token but the first is predicted; positions whose ``attention_mask`` is 0 do not count, nor
        ``labels`` of -100 (where there are labels, they are what is predicted).
    reference: the float model, say. Both run on every sample, one after the other, so no logits are kept.
    metric: for models without next-token logits: a function (output, reference's output or None, sample) that returns a number
        or one for each row, higher being better; or a dict of such functions by name. :func:`accuracy` and :func:`embedding_cosine`
        are two.
    bootstrap: how intervals are made; None is ``Bootstrap()``: 95 %, 2000 resamples of windows.

    The models run in evaluation mode without gradients and are left as they were. Raises TypeError and ValueError for
    unusable arguments, CalibrationError when a model rejects a sample.
    """
    model = unwrapped(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    samples = (
        list(loader) if isinstance(loader, Iterable) and not isinstance(loader, (str, Mapping, Tensor)) else loader
    )
    calls = read_calls(samples, device, tokenizer, inputs, seq_len, model, scoring=True)
    if len(calls) != len(samples) or isinstance(samples, Mapping):  # texts, cut into windows; columns, taken apart
        samples = [call.args[0] if call.args else call.kwargs for call in calls]
    elif inputs == "all":
        samples = [_as_called(sample, call) for sample, call in zip(samples, calls, strict=True)]
    started = time.perf_counter()
    scorer = _TokenScorer(model, reference is not None) if metric is None else _MetricScorer(metric)
    beside = calibration_mode(reference if reference is not None else nn.Module())
    with calibration_mode(model), beside, Progress(len(calls), "scoring", "window", progress, part=True) as bar:
        for index, (sample, call) in enumerate(zip(samples, calls, strict=True)):
            output = run_call(model, call, index)
            expected = None if reference is None else run_call(reference, call, index)
            scorer.add(output, expected, sample, call)
            bar.update()
    measures = scorer.measures()
    counts = next(iter(measures.values())).counts
    taken, tokens = time.perf_counter() - started, int(counts.sum())
    return Evaluation(measures, bootstrap or Bootstrap(), len(counts), tokens, taken, scorer.distance)


def _as_called(sample: Any, call: Call) -> Any:
    """Give metrics rows of token ids with the batch dimension that the model got; all other samples as they are."""
    if isinstance(sample, Mapping):
        return {**sample, **call.kwargs}
    return call.args[0] if (isinstance(sample, Tensor) and sample.dim() == 1) or is_ids(sample) else sample


class _MetricScorer:
    """Collects the values of a user's metrics, one for each row."""

    def __init__(self, metric: Metric | Mapping[str, Metric]) -> None:
        self.metrics = dict(metric) if isinstance(metric, Mapping) else {getattr(metric, "__name__", "metric"): metric}
        self.values: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        self.distance: Distance | None = None

    def add(self, output: Any, expected: Any, sample: Any, call: Call) -> None:
        for name, metric in self.metrics.items():
            value = metric(output, expected, sample)
            self.values[name].append(torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(-1))

    def measures(self) -> dict[str, Measure]:
        joined = {name: torch.cat(values) for name, values in self.values.items()}
        return {name: Measure(v, torch.ones_like(v), better="higher") for name, v in joined.items()}


class _TokenScorer:
    """Sums next-token scores over each window."""

    def __init__(self, model: nn.Module, against: bool) -> None:
        # the logits of a decoder that reads shifted labels stand at the position they predict
        self.shifted = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.names = ("nll", "kl", "top1", *ROWS) if against else ("nll",)
        self.rows: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.distance: Distance | None = None

    def add(self, output: Any, expected: Any, sample: Any, call: Call) -> None:
        logits, targets = logits_of(output), targets_of(call)
        if logits is None or targets is None or logits.shape[:-1] != targets.shape:
            raise ValueError(
                "the model's output has no next-token logits [batch, tokens, vocabulary] for the tokens of its input: "
                "pass metric=, a function of (output, the reference's output, sample)"
            )
        counted = targets != IGNORED_LABEL
        mask = call.row_mask(logits)
        counted = counted if mask is None else counted & mask
        if self.shifted:
            counted = counted[:, 1:] & (counted[:, :-1] if mask is None else mask[:, :-1])
            targets, logits = targets[:, 1:], logits[:, :-1]
        other = None if expected is None else _logits_like(expected, logits)
        self.rows.append(window_scores(logits, other, targets, counted, self.kl).cpu())

    def measures(self) -> dict[str, Measure]:
        rows = torch.cat(self.rows, 1)
        rows = rows[:, rows[0] > 0]  # a window of one token predicts nothing
        if rows.shape[1] == 0:
            raise ValueError("no token is left to score: every window is one token long, masked or labelled -100")
        counts, *totals = rows
        found = dict(zip(self.names, totals, strict=True))
        measures = {"perplexity": Measure(found["nll"], counts, torch.exp)}
        if "kl" in found:
            measures["kl"] = Measure(found["kl"], counts)
            measures["top1"] = Measure(found["top1"], counts, better="higher")
            self.distance = Distance.of(self.kl, found, counts)
        return measures


def window_scores(
    logits: Tensor, expected: Tensor | None, targets: Tensor, counted: Tensor, kept: list[Tensor] | None = None
) -> Tensor:
    """Sum next-token scores over the counted tokens of each window: fp64 [2 or 7, B].

    Its rows: tokens, -log p and, against ``expected``, KL divergence, agreement of the likeliest token, -log p there, and how the
    probability of the target changed, itself and squared.
    logits, expected [B, T, V]; targets int64 and counted bool [B, T]. kept: takes the divergence of each counted token, fp32.
    """
    positions = counted.nonzero()
    sums = torch.zeros(2 if expected is None else 7, len(logits), dtype=torch.float64, device=logits.device)
    for part in positions.split(max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])):
        window, place = part.unbind(1)
        model = F.log_softmax(logits[window, place].float(), -1)
        scores = [torch.ones(len(part), device=logits.device)]
        scores.append(-model.gather(1, targets[window, place, None])[:, 0])
        if expected is not None:
            wanted = F.log_softmax(expected[window, place].float(), -1)
            agree = wanted.argmax(-1) == model.argmax(-1)
            # 0 log 0 = 0: tokens that the reference rules out (-inf) contribute nothing. Below zero is rounding.
            terms = torch.where(wanted == -torch.inf, 0.0, wanted.exp() * (wanted - model))
            kl, there = terms.sum(-1).clamp_min(0), -wanted.gather(1, targets[window, place, None])[:, 0]
            change = (-scores[1]).double().exp() - (-there).double().exp()
            scores += [kl, agree, there, change, change.square()]
            if kept is not None:
                kept.append(kl.cpu())
        sums.index_add_(1, window, torch.stack([score.double() for score in scores]))
    return sums


def _logits_like(expected: Any, logits: Tensor) -> Tensor:
    """Take the reference's logits at the positions of ``logits`` [B, T, V]. ValueError for another vocabulary or batch."""
    other = logits_of(expected)
    if other is None or other.shape[0] != logits.shape[0] or other.shape[2:] != logits.shape[2:]:
        what = "no next-token logits" if other is None else f"logits of {other.shape[-1]} tokens"
        raise ValueError(
            f"the reference has {what}, the model of {logits.shape[-1]}: only models of one vocabulary can be compared "
            "(pass metric= for others)"
        )
    return other[:, : logits.shape[1]]


def accuracy(output: Any, expected: Any, sample: Sequence[Any]) -> Tensor:
    """Metric for classifiers: 1 where the largest logit is at the label. sample: (input, label); loader with ``inputs="first"``."""
    scores = logits_of(output)
    if scores is None or not isinstance(sample, (tuple, list)) or len(sample) < 2:
        raise TypeError("accuracy needs class logits as output and samples (input, label)")
    labels = torch.as_tensor(sample[1], device=scores.device)
    return (scores.argmax(-1) == labels).double().reshape(-1)


def embedding_cosine(output: Any, expected: Any, sample: Any) -> Tensor:
    """Metric for encoders: cosine between the model's and the reference's embeddings, one a row.

    An embedding is the mean of ``last_hidden_state`` [B, T, D] over the tokens that ``attention_mask`` counts (sentence
    encoders pool so); outputs [B, D] are embeddings already.
    """
    if expected is None:
        raise TypeError("embedding_cosine compares with a reference: pass reference=the float model")
    one, other = _embedding(output, sample), _embedding(expected, sample)
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


def _embedding(output: Any, sample: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", output)
    if isinstance(hidden, (tuple, list)):
        hidden = hidden[0]
    if hidden.dim() == 2:
        return hidden.float()
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
    weights = weights.to(hidden.device)[..., None]
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
