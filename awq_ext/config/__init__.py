"""AwqConfig: what to do with a model, validated when it is made."""

from .checks import FORMER_SKIP, GROUP_SIZES, HEADS, METHODS, SCALE_DTYPES
from .effort import EFFORTS, by_effort
from .names import did_you_mean, nearest_choice
from .patterns import fits, suggested
from .settings import LAYER_FIELDS, AwqConfig, Selector, configured, understood

__all__ = [
    "EFFORTS",
    "FORMER_SKIP",
    "GROUP_SIZES",
    "HEADS",
    "LAYER_FIELDS",
    "METHODS",
    "SCALE_DTYPES",
    "AwqConfig",
    "Selector",
    "by_effort",
    "configured",
    "did_you_mean",
    "fits",
    "nearest_choice",
    "suggested",
    "understood",
]
