"""Metadata provider for scikit-build-core: the run-time requirements, with torch in the version of the build.

The extension links torch's C++ libraries, whose ABI changes with every release: only the torch of the build fits.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

__all__ = ["dynamic_metadata"]


def dynamic_metadata(field: str, settings: dict[str, Any]) -> list[str]:
    """``torch==<public version installed here>`` and the requirements listed under ``static``."""
    if field != "dependencies":
        raise ValueError(f"torch_requirement provides 'dependencies', not {field!r}")
    public = metadata.version("torch").partition("+")[0]  # 2.13.0+cpu, 2.13.0+cu130: the same source, either may run it
    return [f"torch=={public}", *settings.get("static", [])]
