"""awq_ext: activation-aware weight quantization (AWQ, W4A16) of any PyTorch model, on the machine you have.

The public names are loaded at their first use, and torch with them; at once where torch is there already. So ``awq-ext --help``
does not wait for torch. The operators come with the names: who only loads a program that torch.export wrote imports torch first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from . import _abi

_abi.check()

from .layers.announcement import listen as _listen  # noqa: E402

if TYPE_CHECKING:
    from torch import nn

    from .checkpoints.convert import convert
    from .checkpoints.formats.packed import CheckpointError
    from .checkpoints.saved import load, save
    from .config import AwqConfig
    from .distributed.team import TeamError
    from .evaluation.bootstrap import Bootstrap, Estimate
    from .evaluation.compare import compare
    from .evaluation.comparison import Comparison
    from .evaluation.evaluate import Evaluation, accuracy, embedding_cosine, evaluate
    from .evaluation.salience import Salience, salience
    from .evaluation.sensitivity import Sensitivity, sensitivity
    from .forwards.calls import CalibrationError
    from .integrations.foresee import check_format
    from .integrations.pretrained import from_pretrained, save_pretrained
    from .integrations.registration import register_with_peft, register_with_transformers
    from .layers.quant_linear import QuantLinear, set_compute_dtype
    from .pipeline.plan import GroupPlan, Plan, plan
    from .pipeline.quantize import quantize
    from .reporting.report import AwqReport, BlockReport, LayerReport
    from .streaming.checkpoint import quantize_checkpoint
    from .workdir.directory import ResumeError

# the same for the running program: module -> its public names
_PLACES = {
    "checkpoints.convert": ("convert",),
    "checkpoints.formats.packed": ("CheckpointError",),
    "checkpoints.saved": ("load", "save"),
    "config": ("AwqConfig",),
    "distributed.team": ("TeamError",),
    "evaluation.bootstrap": ("Bootstrap", "Estimate"),
    "evaluation.compare": ("compare",),
    "evaluation.comparison": ("Comparison",),
    "evaluation.evaluate": ("Evaluation", "accuracy", "embedding_cosine", "evaluate"),
    "evaluation.salience": ("Salience", "salience"),
    "evaluation.sensitivity": ("Sensitivity", "sensitivity"),
    "forwards.calls": ("CalibrationError",),
    "integrations.foresee": ("check_format",),
    "integrations.pretrained": ("from_pretrained", "save_pretrained"),
    "integrations.registration": ("register_with_peft", "register_with_transformers"),
    "layers.quant_linear": ("QuantLinear", "set_compute_dtype"),
    "pipeline.plan": ("GroupPlan", "Plan", "plan"),
    "pipeline.quantize": ("quantize",),
    "reporting.report": ("AwqReport", "BlockReport", "LayerReport"),
    "streaming.checkpoint": ("quantize_checkpoint",),
    "workdir.directory": ("ResumeError",),
}
__version__ = _version("awq-ext")
__all__ = [
    "AwqConfig",
    "AwqReport",
    "BlockReport",
    "Bootstrap",
    "CalibrationError",
    "CheckpointError",
    "Comparison",
    "Estimate",
    "Evaluation",
    "GroupPlan",
    "LayerReport",
    "Plan",
    "QuantLinear",
    "ResumeError",
    "Salience",
    "Sensitivity",
    "TeamError",
    "__version__",
    "accuracy",
    "check_format",
    "compare",
    "convert",
    "embedding_cosine",
    "evaluate",
    "from_pretrained",
    "load",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "register_with_peft",
    "register_with_transformers",
    "salience",
    "save",
    "save_pretrained",
    "sensitivity",
    "set_compute_dtype",
]


def _attach(model: nn.Module, format: str | None = None) -> None:
    from .integrations.attached import attach

    attach(model, format)


# whatever is quantized or loaded, by which function ever, can be saved by Transformers' own save_pretrained
_listen(_attach)


def _load_names() -> None:
    """Load torch and all public names, and with them the operators that exported programs call."""
    import torch  # noqa: F401

    _abi.check()  # before, only what pip knows of torch was read
    for place, names in _PLACES.items():
        module = import_module(f".{place}", __name__)
        globals().update({name: getattr(module, name) for name in names})


def __getattr__(name: str) -> object:
    if name in __all__:
        _load_names()
        return globals()[name]
    if name == "_C":
        import torch  # noqa: F401  (whose libraries it needs)

        return import_module("._C", __name__)
    # AutoAWQ looks for its own CUDA extension under this very name and takes any `awq_ext` for it.
    from .integrations.autoawq import FUNCTIONS, function

    if name in FUNCTIONS:
        return function(name)
    raise AttributeError(f"module 'awq_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    _load_names()
