"""awq_ext: activation-aware weight quantization (AWQ, W4A16) of any PyTorch model, on the machine you have."""

from importlib.metadata import version as _version

from . import _abi

_abi.check()

from .blocks import CalibrationError  # noqa: E402
from .checkpoint import CheckpointError, load, save  # noqa: E402
from .config import AwqConfig  # noqa: E402
from .convert import convert  # noqa: E402
from .plan import GroupPlan, Plan, plan  # noqa: E402
from .pretrained import from_pretrained, save_pretrained  # noqa: E402
from .qlinear import QuantLinear, set_compute_dtype  # noqa: E402
from .quantize import quantize  # noqa: E402
from .report import AwqReport, BlockReport, LayerReport  # noqa: E402

__version__ = _version("awq-ext")

__all__ = [
    "AwqConfig",
    "AwqReport",
    "BlockReport",
    "CalibrationError",
    "CheckpointError",
    "GroupPlan",
    "LayerReport",
    "Plan",
    "QuantLinear",
    "__version__",
    "convert",
    "from_pretrained",
    "load",
    "plan",
    "quantize",
    "save",
    "save_pretrained",
    "set_compute_dtype",
]

_AUTOAWQ_KERNELS = ("dequantize_weights_cuda", "gemm_forward_cuda", "gemmv2_forward_cuda", "gemv_forward_cuda")


def __getattr__(name: str) -> object:
    # AutoAWQ looks for its own CUDA extension under this very name and takes any `awq_ext` for it.
    if name in _AUTOAWQ_KERNELS:
        raise AttributeError(
            f"awq_ext.{name} belongs to AutoAWQ's CUDA kernels (autoawq-kernels), which install under the name awq_ext too; "
            "this is the awq_ext quantizer, it has no such function: use the two packages in separate environments"
        )
    raise AttributeError(f"module 'awq_ext' has no attribute {name!r}")
