"""awq_ext: activation-aware weight quantization (AWQ, W4A16) of any PyTorch model, on the machine you have."""

from importlib.metadata import version as _version

from . import _abi

_abi.check()

from .blocks import CalibrationError  # noqa: E402
from .checkpoint import CheckpointError, load, save  # noqa: E402
from .config import AwqConfig  # noqa: E402
from .qlinear import QuantLinear  # noqa: E402
from .quantize import quantize  # noqa: E402
from .report import AwqReport, BlockReport, LayerReport  # noqa: E402

__version__ = _version("awq-ext")

__all__ = [
    "AwqConfig",
    "AwqReport",
    "BlockReport",
    "CalibrationError",
    "CheckpointError",
    "LayerReport",
    "QuantLinear",
    "__version__",
    "load",
    "quantize",
    "save",
]
