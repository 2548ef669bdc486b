"""The check that the compiled extension exists and fits the running torch, made before ``awq_ext._C`` is imported.

torch's C++ interface changes with every release, so ``_C`` works only with the torch it was compiled against. With another one it
fails with an undefined symbol or, worse, does not fail.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

REBUILD = "pip install --force-reinstall --no-deps ."  # which builds against the installed torch


def public_version(version: str) -> str:
    """Cut ``2.13.0+cpu`` to ``2.13.0``: builds of one release for different devices share the interface."""
    return version.partition("+")[0]


def running_version() -> str:
    """Return torch's version: its own where it is loaded, else what pip knows of it, which takes no seconds."""
    if "torch" not in sys.modules:
        try:
            return version("torch")
        except PackageNotFoundError:
            pass  # built in place, or missing: importing it says which
    import torch

    return torch.__version__


def built_version() -> str | None:
    """Return the torch version that the extension was compiled against; None where nothing was built (a bare source tree)."""
    try:
        from ._build import TORCH_VERSION  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        return None
    return TORCH_VERSION


def check(built: str | None = None, running: str | None = None, *, installed: bool | None = None) -> None:
    """Raise ImportError, saying what to do, unless the extension exists and was built against the running torch.

    built, running: torch versions, by default those found. installed: whether the compiled module exists, by default
    looked up.
    """
    built = built_version() if built is None else built
    if installed is None:
        installed = built is not None and importlib.util.find_spec("awq_ext._C") is not None
    if built is None or not installed:
        raise ImportError(
            "awq_ext was imported from a source tree in which the C++ extension has not been built: "
            "run `pip install -e .` there, or, if awq_ext is installed, leave that directory or use the `awq-ext` command."
        )
    running = running_version() if running is None else running
    if public_version(built) != public_version(running):
        raise ImportError(
            f"awq_ext was built against torch {public_version(built)} but torch {running} is installed: "
            f"run `pip install torch=={public_version(built)}`, or rebuild from the source with `{REBUILD}`."
        )
