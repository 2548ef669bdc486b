"""The build backend: scikit-build-core's, which asks for a torch only where none is installed (torch_requirement.py).

``AWQ_EXT_KEEP_WHEEL=DIRECTORY`` leaves a copy of the wheel there that ``pip install .`` builds, installs and deletes, so that it
can be examined without another build.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch_requirement
from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  (the hooks that stay as they are)

Settings = dict[str, "list[str] | str"] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build.get_requires_for_build_wheel(config_settings), *torch_requirement.build_requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build.get_requires_for_build_editable(config_settings), *torch_requirement.build_requirements()]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    name = build.build_wheel(wheel_directory, config_settings, metadata_directory)
    if directory := os.environ.get("AWQ_EXT_KEEP_WHEEL"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(wheel_directory) / name, directory)
    return name
