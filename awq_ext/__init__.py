"""awq_ext: activation-aware weight quantization (AWQ, W4A16) of any PyTorch model, on the machine you have."""

from importlib.metadata import version as _version

from . import _abi

_abi.check()

from .blocks import CalibrationError  # noqa: E402
from .bootstrap import Bootstrap, Estimate  # noqa: E402
from .checkpoint import CheckpointError, load, save  # noqa: E402
from .compare import compare  # noqa: E402
from .comparison import Comparison  # noqa: E402
from .config import AwqConfig  # noqa: E402
from .convert import convert  # noqa: E402
from .evaluate import Evaluation, evaluate  # noqa: E402
from .plan import GroupPlan, Plan, plan  # noqa: E402
from .pretrained import from_pretrained, save_pretrained  # noqa: E402
from .qlinear import QuantLinear, set_compute_dtype  # noqa: E402
from .quantize import quantize  # noqa: E402
from .registration import register_with_transformers  # noqa: E402
from .report import AwqReport, BlockReport, LayerReport  # noqa: E402
from .salience import Salience, salience  # noqa: E402
from .sensitivity import Sensitivity, sensitivity  # noqa: E402

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
    "Salience",
    "Sensitivity",
    "__version__",
    "compare",
    "convert",
    "evaluate",
    "from_pretrained",
    "load",
    "plan",
    "quantize",
    "register_with_transformers",
    "salience",
    "save",
    "save_pretrained",
    "sensitivity",
    "set_compute_dtype",
]


def __getattr__(name: str) -> object:
    # AutoAWQ looks for its own CUDA extension under this very name and takes any `awq_ext` for it.
    from .autoawq import FUSED_FUNCTIONS, LAYER_FUNCTIONS, function

    if name in LAYER_FUNCTIONS or name in FUSED_FUNCTIONS:
        return function(name)
    raise AttributeError(f"module 'awq_ext' has no attribute {name!r}")
