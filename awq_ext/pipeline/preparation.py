"""What is made before the first block: more batches than those given, and how much each row counts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..calibration.extra_batches import generated_calls, random_calls
from ..calibration.importance import find_weights
from ..calibration.row_weights import Weights
from ..config import AwqConfig
from ..forwards.calls import CalibrationError, Call
from ..forwards.outputs import targets_of
from ..reporting.progress import draws_bars, say
from ..reporting.report import AwqReport
from ..survey.survey import BlockSurvey
from ..workdir.directory import ResumeError
from .keeping import Keeping
from .session import Session


def extra_calls(opened: Session, report: AwqReport, progress: bool, keeping: Keeping) -> list[Call]:
    """Make batches in addition to those given: the built-in texts, random tokens, and text that the model generates if it can."""
    model, calls, config = opened.model, opened.calls, opened.config
    if keeping.streamed and progress and config.generated_share > 0:
        say(
            "the model writes text to calibrate on: each token reads all files once; generated_tokens=0 leaves that out"
        )
    drawn = random_calls(model, calls, config.random_share)
    try:
        written = generated_calls(
            model, calls, config.generated_share, progress and draws_bars(), keeping.remember_text
        )
    except (ResumeError, OSError):  # of the work directory
        raise
    except Exception as error:  # the calls that were given will show whether the model works
        written = []
        report.notes.append(f"the model could not write text to calibrate on: {type(error).__name__}: {error}")
    kinds = {"of the built-in texts": opened.builtin, "of random tokens": drawn, "that the model wrote": written}
    added = " and ".join(f"{len(made)} windows {kind}" for kind, made in kinds.items() if made)
    if added:
        report.notes.append(f"calibrated on {len(calls)} batches, and on {added}")
    return opened.builtin + drawn + written


def row_weights(
    model: nn.Module,
    calls: Sequence[Call],
    surveys: Sequence[BlockSurvey],
    config: AwqConfig,
    report: AwqReport,
    progress: bool,
    keeping: Keeping,
) -> Weights | None:
    """Weigh the calibration rows by how strongly the model's output reacts to errors in them; None if all count alike."""
    if not config.weighs_rows:
        return None
    asked = config.objective is not None
    if not asked and all(targets_of(call) is None for call in calls):
        return None  # no language model: there is nothing to tell
    if keeping.streamed and progress:
        count = config.weighed_batches or len(calls)
        say(
            f"importance weights need {count} backward passes; each reads all files three times, and holds the logits of a batch"
        )
    shown = progress and draws_bars()
    try:
        return keeping.remember_weights(
            calls, lambda: find_weights(model, calls, surveys, config.weighed_batches, shown, of_tokens=not asked)
        )
    except (ResumeError, OSError):
        raise
    except Exception as error:  # a model need not have gradients to be quantized
        if asked:
            raise
        reason = str(error) if isinstance(error, CalibrationError) else f"{type(error).__name__}: {error}"
        report.notes.append(f"all calibration rows count alike: {reason}")
        return None
