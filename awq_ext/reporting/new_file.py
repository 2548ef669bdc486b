"""Write a file that is not there yet."""

from __future__ import annotations

import os
from pathlib import Path


def write_new(path: str | os.PathLike[str], text: str, overwrite: bool = False) -> Path:
    """Write a text and return its path; FileExistsError for a file that is there, unless ``overwrite``."""
    target = Path(path)
    if target.is_file() and not overwrite:
        raise FileExistsError(f"{target} exists: give another name, or overwrite=True")
    target.write_text(text, encoding="utf-8")
    return target
