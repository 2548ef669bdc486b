"""Running the package in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
# With -c or -m Python looks in the current directory first. In a clone it would find the source tree, without a compiled extension,
# instead of the package that is installed.
ELSEWHERE = tempfile.gettempdir()


def seeing_tests() -> dict[str, str]:
    """Return an environment in which the modules of the tests can be imported, and the package from where it is found here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_python(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with this interpreter and additions to the environment, in another directory."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ELSEWHERE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
