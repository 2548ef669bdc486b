"""Which torch the extension is built against, and what follows for the requirements. Imports no torch.

The extension links torch's C++ libraries, whose ABI changes with every release: only the torch of the build fits. So it is built
against the torch that is installed already, wherever there is one, and requires that very version: pip then replaces nothing.

pip builds in an environment of its own, which hides the packages of the one it installs into. The interpreter is still that
one's, so the directories it installs packages to are known and are looked through after ``sys.path``. Tools that make a whole
virtual environment for the build (``python -m build``, uv, cibuildwheel) leave nothing to find: torch comes from ``PINNED`` then.

``python torch_requirement.py`` prints ``DIRECTORY;VERSION``, for CMake.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import machinery, metadata
from pathlib import Path
from typing import Any

__all__ = ["dynamic_metadata", "dynamic_wheel"]

OLDEST = (2, 10)
# Where no torch is installed. Pinned, because the newest one would be a CUDA build of gigabytes that no test has seen.
PINNED = "2.13.0"


def package_directories() -> list[str]:
    """Return the directories that this interpreter installs packages to, those that a build environment hides included."""
    paths = sysconfig.get_paths()
    user = [site.getusersitepackages()] if sys.prefix == sys.base_prefix else []  # virtual environments do not see it
    return list(dict.fromkeys([paths["purelib"], paths["platlib"], *site.getsitepackages(), *user]))


def found_torch(directories: Sequence[str] | None = None) -> tuple[Path, str] | None:
    """Return torch's directory and public version: that on ``sys.path``, else that in ``directories``; None where there is none.

    directories: by default ``package_directories()``. Raises RuntimeError where torch is older than ``OLDEST``: pip would
    replace it.
    """
    hidden = package_directories() if directories is None else list(directories)
    places = [(importlib.util.find_spec("torch"), sys.path), (machinery.PathFinder.find_spec("torch", hidden), hidden)]
    for spec, path in places:
        known = next(iter(metadata.distributions(name="torch", path=list(path))), None)
        if spec is None or spec.origin is None or known is None:
            continue
        public = known.version.partition("+")[0]  # 2.13.0+cpu, 2.13.0+cu130: the same source, either may run it
        if tuple(map(int, re.findall(r"\d+", public)[:2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise RuntimeError(
                f"torch {known.version} is installed in {Path(spec.origin).parent}, and awq_ext needs torch >= {oldest}: "
                f'run `pip install "torch>={oldest}"` first. It is not replaced unasked.'
            )
        return Path(spec.origin).parent, public
    return None


def build_requirements() -> list[str]:
    """Return what the build needs beside its tools: no torch where one is installed, else the pinned one."""
    return [] if found_torch() else [f"torch=={PINNED}"]


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the run-time requirements: ``torch==<public version of the build>`` and ``others``.

    Without torch, which only a source distribution is made without: the oldest that fits. The interface is scikit-build-core's.
    """
    found = found_torch()
    torch = f"torch=={found[1]}" if found else f"torch>={'.'.join(map(str, OLDEST))}"
    return {"dependencies": [torch, *settings["others"]]}


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Return which fields a wheel may have other than its source distribution, which is marked there."""
    return {"dependencies": True}


if __name__ == "__main__":
    found = found_torch()
    if found is None:
        sys.exit(f"torch is not installed: pip install torch=={PINNED}")
    print(*found, sep=";")
