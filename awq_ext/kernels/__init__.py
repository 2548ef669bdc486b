"""Which implementation of the kernels runs for a tensor: the compiled ``awq_ext._C`` or the plain torch ``reference``.

Both are modules with the same functions and the same ``ActivationStats``. The compiled one works on CPU tensors; for
every other device the reference runs there, on the device's own torch kernels. ``AWQ_EXT_BACKEND=reference`` in the
environment selects the reference everywhere (to test that path without such a device, or to rule the C++ out);
``compiled``, empty or unset is the normal choice. The variable is read at every call.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from .. import _C
from . import reference

BACKENDS = ("compiled", "reference")


def kernels_for(device: torch.device | str) -> ModuleType:
    """The module whose functions take tensors on ``device``. ValueError for an unknown AWQ_EXT_BACKEND."""
    choice = os.environ.get("AWQ_EXT_BACKEND") or "compiled"
    if choice not in BACKENDS:
        raise ValueError(f"environment variable AWQ_EXT_BACKEND: expected one of {', '.join(BACKENDS)}, got {choice!r}")
    return _C if choice == "compiled" and torch.device(device).type == "cpu" else reference
