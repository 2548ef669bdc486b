"""What a work directory belongs to: the model, the calibration batches, the settings and the versions of a call.

Of each weight a sample is hashed: up to 16 stretches of 256 values, evenly spaced, the first and the last among them. Training
changes all values and is noticed; a few values changed by hand may not be. Times and places of files do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..config import AwqConfig
from ..forwards.calls import Call
from ..reporting.origin import versions

_STRETCHES, _LENGTH = 16, 256

Fingerprint = Mapping[str, Any]


def fingerprint(
    model: nn.Module, calls: Sequence[Call], config: AwqConfig, blocks: Sequence[str] | None
) -> Fingerprint:
    """Collect what must be the same for a call to go on with the work of another; plain values, ready for JSON."""
    settings = config.to_dict() | {"blocks": None if blocks is None else list(blocks)}
    return json.loads(
        json.dumps(
            {
                "versions": versions(),
                "settings": settings,
                "calibration batches": _hash_of_calls(calls),
                "model": type(model).__name__,
                "names, shapes or dtypes of the weights": _hash(_outline(model)),
                "weights": _hash(_samples(model)),
            },
            default=str,
        )
    )


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Say in words what differs between two fingerprints; "" if nothing does."""
    for name, value in now.items():
        other = before.get(name)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            keys = [key for key in {**value, **other} if value.get(key) != other.get(key)]
            return ", ".join(f"{key} was {other.get(key)!r}, now it is {value.get(key)!r}" for key in keys)
        if name == "model":
            return f"the model was a {other}, now it is a {value}"
        return f"the {name} are others now"
    return ""


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _outline(model: nn.Module) -> Iterable[bytes]:
    for name, tensor in _tensors(model):
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode()


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _samples(model: nn.Module) -> Iterable[bytes]:
    for _, tensor in _tensors(model):
        yield from map(_bytes, _stretches(tensor.detach()))


def _stretches(tensor: Tensor) -> list[Tensor]:
    # a transposed view is sampled by its memory too: what counts is that any order is always the same
    flat = tensor.reshape(-1) if tensor.is_contiguous() or tensor.numel() <= 1 << 16 else tensor.T.reshape(-1)
    if len(flat) <= _STRETCHES * _LENGTH:
        return [flat]
    last = len(flat) - _LENGTH
    return [flat[start : start + _LENGTH] for i in range(_STRETCHES) for start in [i * last // (_STRETCHES - 1)]]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _hash_of_calls(calls: Sequence[Call]) -> str:
    def parts() -> Iterable[bytes]:
        for call in calls:
            leaves, structure = tree_flatten((call.args, call.kwargs))
            yield str(structure).encode()
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    yield f"{tuple(leaf.shape)} {leaf.dtype}".encode()
                    yield _bytes(leaf.detach().reshape(-1))
                elif isinstance(leaf, (str, int, float, bool, bytes, type(None))):
                    yield repr(leaf).encode()
                else:  # an object of the model's own, whose text may tell its address
                    yield type(leaf).__qualname__.encode()

    return _hash(parts())
