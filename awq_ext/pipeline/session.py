"""What quantize(), plan() and salience() begin with: samples read, Linears selected, and every change ready to be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calibration.builtin import Mix, builtin_calls
from ..calibration.windows import at_most, count_tokens
from ..config import AwqConfig
from ..forwards.calls import Call, read_calls
from ..forwards.lockstep import Stop, Worker, lockstep, suspended
from ..forwards.memory import PeakAnonymous, PeakMemory
from ..forwards.mode import calibration_mode
from ..modules import heads_among
from ..standins.standins import StandIns
from ..survey.selection import Eligible, check_layers, select_linears
from ..survey.survey import BlockSurvey, survey_model
from ..undo import interrupt
from ..undo.journal import Journal


@dataclass(frozen=True, eq=False)
class Session:
    """The model, its calibration batches (``calls``, on the model's device), and the Linears that can be quantized.

    config: the settings, with what ``head`` means for the output layers among them. builtin: the built-in texts, where these take
    part. notes, warnings: for the report. limited: whether ``max_calib_tokens`` left tokens out.
    """

    model: nn.Module
    config: AwqConfig
    device: torch.device
    calls: list[Call]
    journal: Journal
    eligible: Eligible
    standins: StandIns
    memory: PeakMemory | PeakAnonymous
    builtin: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    limited: bool = False

    @contextmanager
    def surveyed(self, blocks: Sequence[str] | None) -> Iterator[list[BlockSurvey]]:
        """Survey the blocks (None: find them) with the first batch; the model is in calibration mode while the body runs."""
        with calibration_mode(self.model):
            yield survey_model(self.model, self.calls[0], self.eligible, blocks, self.config)

    @contextmanager
    def visits(
        self,
        surveys: Sequence[BlockSurvey],
        calls: Sequence[Call],
        waits: Callable[[Stop], None] = lambda stop: None,
    ) -> Iterator[Iterator[tuple[BlockSurvey, list[Stop]]]]:
        """Run all ``calls`` in lockstep: the body sees each block with the batches that wait at its entry.

        waits: called for each batch that begins to wait.
        """
        with lockstep(self.model, [one.block for one in surveys], calls, waits) as visits:
            yield ((one, stops) for one, (_, stops) in zip(surveys, visits, strict=True))

    def forwards(
        self, surveys: Sequence[BlockSurvey], calls: Sequence[tuple[int, Call]], waits: Callable[[Stop], None]
    ) -> AbstractContextManager[list[Worker]]:
        """Begin numbered ``calls`` that the body leads through the blocks itself (``lockstep.suspended``)."""
        return suspended(self.model, [one.block for one in surveys], calls, waits)


@contextmanager
def session(
    model: nn.Module,
    samples: Iterable[Any],
    config: AwqConfig,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    *,
    undo: bool = True,
    memory: PeakMemory | PeakAnonymous | None = None,
) -> Iterator[Session]:
    """Read the calibration samples, and find the Linears that can be quantized.

    memory: measures the peak; None makes what measures that of the device. What the body or the stand-ins change through the
    journal is undone after an exception, with ``undo`` always. Raises what ``check_layers``,
    ``read_calls`` and ``select_linears`` raise. A Ctrl-C waits for :func:`awq_ext.undo.interrupt.check`.
    """
    device = check_layers(model, config)
    calls, mix, cut = _chosen(read_calls(samples, device, tokenizer, inputs, config.seq_len, model), config, tokenizer)
    config = mix.config
    # tensors made in inference mode could not be used in training later
    with interrupt.held(), torch.inference_mode(False), Journal() as journal, torch.no_grad():
        memory = memory or PeakMemory(device)
        try:
            eligible, standins = select_linears(model, calls[0], config, journal)
            if config.head != "float":
                config = config.with_heads(heads_among(model, eligible.linears))
            found = (model, config, device, calls, journal, eligible, standins, memory)
            notes, warnings = [one for one in (cut, mix.note) if one], [mix.warning] if mix.warning else []
            yield Session(*found, mix.calls, notes, warnings, limited=bool(cut))
        finally:
            if undo:
                journal.rollback()


def _chosen(
    given: Sequence[Call], config: AwqConfig, tokenizer: Callable[..., Any] | None
) -> tuple[list[Call], Mix, str]:
    """Keep of the batches given what ``max_calib_tokens`` allows beside the built-in texts; also return these, and what to note."""
    mix, most = builtin_calls(config, given, tokenizer), config.max_calib_tokens
    added = count_tokens(mix.calls)
    calls = at_most(given, max(most - added, 1) if most else 0)
    before, after = count_tokens(given), count_tokens(calls)
    beside = f", and on {added:,} of the built-in texts" if added else ""
    cut = (
        f"calibrated on {after:,} of the {before:,} tokens given{beside} (max_calib_tokens={most}, where 0 is no limit)"
    )
    return calls, mix, cut if after < before else ""
