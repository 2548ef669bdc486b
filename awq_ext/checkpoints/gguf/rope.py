"""Rotary embeddings: what config.json says of them, and what a GGUF file does, either way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats import CheckpointError
from .entry import Config, Entry

# Llama 3.1's and 3.2's: their factor is the largest of the frequencies', the rest is the same in all of them
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# the kinds beside "default" that were run in an architecture of llama.cpp
_MORE = {
    "LLAMA": ("linear", "llama3"),
    "QWEN2": ("linear", "yarn"),
    "QWEN3": ("linear", "yarn"),
    "QWEN3MOE": ("yarn",),
    "GEMMA3": ("linear",),
    "PHI3": ("longrope",),
    "EXAONE4": ("llama3",),
    "HUNYUAN_DENSE": ("dynamic",),
    "HUNYUAN_MOE": ("dynamic",),
}


@dataclass(frozen=True)
class Rope:
    """Those of one model. theta: base of the frequencies; dims: channels of a head that are turned.

    local: theta of layers with a window, where they have one of their own.
    """

    theta: float
    dims: int
    kind: str
    settings: Mapping[str, Any]
    local: float | None = None

    @classmethod
    def of(cls, config: Config, entry: Entry, head: int) -> Rope:
        """Read config.json; CheckpointError for kinds that are not known here."""
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        local = None
        if entry.local_rope:
            local = config.get("rope_local_base_freq", 10000.0) if entry.local_rope == "own" else None
            if "sliding_attention" in given:
                sliding, given = given["sliding_attention"], given["full_attention"]
                _known_kind(sliding, ("default",))
                if entry.local_rope == "own":
                    local = sliding["rope_theta"]
                elif dict(sliding) != dict(given):
                    raise CheckpointError(
                        f"GGUF: llama.cpp turns the layers with a window as the others, not by {dict(sliding)}"
                    )
        kind = _known_kind(given, ("default", *_MORE.get(entry.key, ())))
        theta = given.get("rope_theta", config.get("rope_theta", 1e6 if local is not None else 10000.0))
        if kind == "dynamic":
            kind, theta = "default", _stretched(theta, given, head)
        share = 1.0
        if entry.rotary_factor is not None:
            share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", entry.rotary_factor))
        settings = {**given, "rope_theta": theta}
        if kind in ("longrope", "yarn"):
            settings |= _lengths(config, given)
        if kind == "yarn":
            _require_plain_yarn(settings)
        return cls(float(theta), int(head * share), kind, settings, local)

    def describe(self, writer: Any, package: Any) -> None:
        """Add the metadata to a gguf.GGUFWriter."""
        writer.add_rope_dimension_count(self.dims)
        writer.add_rope_freq_base(self.theta)
        if self.local is not None:
            writer.add_float32(package.Keys.Rope.FREQ_BASE_SWA.format(arch=writer.arch), float(self.local))
        if self.kind == "linear":
            writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.settings["factor"]))
        if self.kind == "yarn":
            writer.add_rope_scaling_type(package.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(self.settings["factor"]))
            writer.add_rope_scaling_orig_ctx_len(self.settings["original_max_position_embeddings"])
        if self.kind == "longrope":
            writer.add_rope_scaling_orig_ctx_len(self.settings["original_max_position_embeddings"])
            writer.add_rope_scaling_attn_factors(self.settings["attention_factor"])

    def tensors(self) -> dict[str, Tensor]:
        """Make those that no file of transformers has: factors of the frequencies, fp32 [dims / 2]."""
        if self.kind == "llama3":
            return {FREQS: llama3_factors(self.settings, self.dims)}
        if self.kind == "longrope":
            return {
                LONG: torch.tensor(self.settings["long_factor"]),
                SHORT: torch.tensor(self.settings["short_factor"]),
            }
        return {}


def _known_kind(given: Mapping[str, Any], known: tuple[str, ...]) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in known:
        raise CheckpointError(f"GGUF: rotary embeddings of rope_type={kind!r} are not known here")
    return kind


def _stretched(theta: float, given: Mapping[str, Any], head: int) -> float:
    """Make the theta of embeddings that are called dynamic, and are not where they have an alpha."""
    if not given.get("alpha"):
        raise CheckpointError("GGUF: rotary embeddings of rope_type='dynamic' without an alpha are not known here")
    return theta * given["alpha"] ** (head / (head - 2))


def _require_plain_yarn(given: Mapping[str, Any]) -> None:
    """Refuse settings for which there is no metadata."""
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
    usual |= {"factor": given.get("factor") or 0, "attention_factor": 0.1 * math.log(given.get("factor") or 1) + 1}
    for name, value in usual.items():
        if given.get(name) not in (None, value):
            raise CheckpointError(
                f"GGUF: rotary embeddings of rope_type='yarn' with {name}={given[name]!r} are not known here"
            )
    if not given.get("factor"):
        raise CheckpointError(f"config.json: factor={given.get('factor')!r}: a positive number is needed")


def _lengths(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Tell up to which length texts are turned as before, and what attention is scaled by."""
    key = "original_max_position_embeddings"  # that outside rope_parameters counts, as in transformers
    before = config.get(key) or given.get(key)
    if not before:
        raise CheckpointError(f"config.json: {key}={before!r}: a positive number is needed")
    longer = given.get("factor") or config["max_position_embeddings"] / before
    scale = given.get("attention_factor")
    if scale is None and longer <= 1:
        scale = 1.0
    elif scale is None and given.get("rope_type", given.get("type")) == "yarn":
        scale = 0.1 * math.log(longer) + 1
    elif scale is None:
        scale = math.sqrt(1 + math.log(longer) / math.log(before))
    return {key: before, "attention_factor": float(scale)}


def llama3_factors(rope: Mapping[str, Any], dims: int) -> Tensor:
    """Divide rotary frequencies as Llama 3.1 does, fp32 [dims / 2]: long waves by ``factor``, short ones by 1, others by less."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    share = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def rope_in(facts: Any, entry: Entry, head: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Make rope_parameters of what a file says (``metadata.Facts``) and of its tensors of factors, by name (gguf.ReaderTensor).

    CheckpointError for kinds that are not known here.
    """
    theta, more = facts.real("Rope.FREQ_BASE", 10000.0), _MORE.get(entry.key, ())
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling = facts.get("Rope.SCALING_TYPE", "none")
    if scaling == "linear" and "linear" in more:
        rope |= {"rope_type": "linear", "factor": facts.real("Rope.SCALING_FACTOR")}
    elif scaling == "yarn" and "yarn" in more:
        rope |= {"rope_type": "yarn", "factor": facts.real("Rope.SCALING_FACTOR")}
        rope["original_max_position_embeddings"] = facts.number("Rope.SCALING_ORIG_CTX_LEN")
    elif scaling != "none":
        raise facts.unknown("Rope.SCALING_TYPE", scaling)
    dims = facts.number("Rope.DIMENSION_COUNT", head)
    if entry.rotary_factor is None:
        facts.require("Rope.DIMENSION_COUNT", head)
    else:
        rope["partial_rotary_factor"] = dims / head
    if FREQS in tensors and "llama3" in more:
        factors = _values(tensors[FREQS])
        rope |= {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **_LLAMA3}
        known = llama3_factors(rope, dims)
        if scaling != "none" or factors.shape != known.shape or not torch.allclose(factors, known, rtol=1e-4):
            raise CheckpointError(f"{facts.file}: {FREQS} has other factors than Llama 3.1 and 3.2 have")
    if LONG in tensors and SHORT in tensors and "longrope" in more:
        rope |= {
            "rope_type": "longrope",
            "long_factor": _values(tensors[LONG]).tolist(),
            "short_factor": _values(tensors[SHORT]).tolist(),
            "original_max_position_embeddings": facts.number("Rope.SCALING_ORIG_CTX_LEN"),
            "attention_factor": facts.real("Rope.SCALING_ATTN_FACTOR", 1.0),
        }
    if not entry.local_rope:
        return rope
    local = {"rope_type": "default", "rope_theta": theta}
    if entry.local_rope == "own":
        local["rope_theta"] = facts.real("Rope.FREQ_BASE_SWA", 10000.0)
    return {"full_attention": rope, "sliding_attention": local}


def _values(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(tensor.data)).float().flatten()
