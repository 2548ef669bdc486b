"""Make figures ready for JSON: numbers that it has, and keys without spaces."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any


def key(title: str) -> str:
    """Turn what people read to a key: ``memory read at`` -> ``memory_read_at``."""
    return re.sub(r"\W+", "_", title).strip("_").lower()


def as_json(figures: Mapping[str, Any]) -> str:
    """Write figures as JSON text; None takes the place of NaN and infinity, which JSON lacks."""
    return json.dumps(_finite(figures), indent=1, default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(held) for name, held in value.items()}
    return [_finite(held) for held in value] if isinstance(value, (list, tuple)) else value
