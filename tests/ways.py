"""Ways to quantize, which formats hold them by the table of docs/formats.md, and a small Llama quantized in each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_transformers import float_model
from torch import nn

import awq_ext

# 384 channels are three groups of 128, so that words of zeros are not full; 128 rows of k and v are two heads of 64
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 64}
BATCH = torch.arange(2, 34)[None]


class Way(NamedTuple):
    bits: int
    symmetric: bool
    group_size: int

    @property
    def settings(self) -> dict[str, Any]:
        return {**self._asdict(), "method": "rtn", "fold": "always"}

    def __str__(self) -> str:
        size = "rows" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'zero points'}, {size}"


WAYS = [Way(*each) for each in itertools.product((4, 8), (True, False), (32, 64, 128, -1))]


def documented() -> dict[str, list[Way]]:
    """The table of docs/formats.md."""
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text("utf-8")
    head, _, *rows = page.partition("<!-- paths -->")[2].strip().partition("\n\n")[0].splitlines()
    columns = list(itertools.product((4, 8), (True, False)))
    titles = [f"{bits} bits, {'symmetric' if symmetric else 'zero points'}" for bits, symmetric in columns]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == titles
    found: dict[str, list[Way]] = {}
    for row in rows:
        name, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        found[name.strip("`")] = [
            Way(bits, symmetric, -1 if size == "rows" else int(size))
            for (bits, symmetric), cell in zip(columns, cells, strict=True)
            for size in cell.split(", ")
            if size
        ]
    return found


def quantized(way: Way, **options: Any) -> nn.Module:
    """All but the output layer."""
    return awq_ext.quantize(float_model(**SIZES | options), [BATCH], **way.settings, progress=False)


def layers_of(model: nn.Module) -> dict[str, awq_ext.QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, awq_ext.QuantLinear)}


def write_all(folder: Path, format: str, dtype: torch.dtype) -> dict[Path, nn.Module]:
    """A directory in each way that ``format`` holds -> the model in it."""
    models = {
        folder / str(way).replace(", ", "-").replace(" ", "_"): quantized(way, dtype=dtype)
        for way in documented()[format]
    }
    for path, model in models.items():
        awq_ext.save_pretrained(model, path, format=format)
    return models
