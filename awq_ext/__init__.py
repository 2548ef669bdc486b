"""awq_ext: activation-aware weight quantization (AWQ, W4A16) of any PyTorch model, on the machine you have."""

from importlib.metadata import version as _version

from . import _abi

_abi.check()

from .checkpoints.convert import convert  # noqa: E402
from .checkpoints.formats.packed import CheckpointError  # noqa: E402
from .checkpoints.saved import load, save  # noqa: E402
from .config import AwqConfig  # noqa: E402
from .evaluation.bootstrap import Bootstrap, Estimate  # noqa: E402
from .evaluation.compare import compare  # noqa: E402
from .evaluation.comparison import Comparison  # noqa: E402
from .evaluation.evaluate import Evaluation, accuracy, embedding_cosine, evaluate  # noqa: E402
from .evaluation.salience import Salience, salience  # noqa: E402
from .evaluation.sensitivity import Sensitivity, sensitivity  # noqa: E402
from .forwards.calls import CalibrationError  # noqa: E402
from .integrations.attached import attach as _attach  # noqa: E402
from .integrations.foresee import check_format  # noqa: E402
from .integrations.pretrained import from_pretrained, save_pretrained  # noqa: E402
from .integrations.registration import register_with_peft, register_with_transformers  # noqa: E402
from .layers.announcement import listen as _listen  # noqa: E402
from .layers.quant_linear import QuantLinear, set_compute_dtype  # noqa: E402
from .pipeline.plan import GroupPlan, Plan, plan  # noqa: E402
from .pipeline.quantize import quantize  # noqa: E402
from .reporting.report import AwqReport, BlockReport, LayerReport  # noqa: E402

# whatever is quantized or loaded, by which function ever, can be saved by Transformers' own save_pretrained
_listen(_attach)

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
    "register_with_peft",
    "register_with_transformers",
    "salience",
    "save",
    "save_pretrained",
    "sensitivity",
    "set_compute_dtype",
]


def __getattr__(name: str) -> object:
    # AutoAWQ looks for its own CUDA extension under this very name and takes any `awq_ext` for it.
    from .integrations.autoawq import FUNCTIONS, function

    if name in FUNCTIONS:
        return function(name)
    raise AttributeError(f"module 'awq_ext' has no attribute {name!r}")
