"""Running the package in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile


def run_python(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with this interpreter and additions to the environment.

    It runs in another directory: with -c or -m Python looks there first, and in a clone it would find the source tree, which has no
    compiled extension, instead of the package that is installed.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tempfile.gettempdir(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
