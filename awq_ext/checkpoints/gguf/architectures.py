"""The architectures of llama.cpp that are known here, each a short entry.

To add one: read src/models/NAME.cpp of llama.cpp for what it takes for granted (``needs``) and what it reads (``values``), add an
entry to ``dense`` or ``mixtures``, and a model to tests/counterparts/gguf_models.py, which llama.cpp then runs. Names of tensors
come from the gguf package.
"""

from __future__ import annotations

from .dense import DENSE
from .entry import Entry
from .mixtures import MIXTURES

ENTRIES: tuple[Entry, ...] = (*DENSE, *MIXTURES)
