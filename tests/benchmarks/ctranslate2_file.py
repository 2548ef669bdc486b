"""Reads models that CTranslate2 stores in float, without CTranslate2, and renames Whisper's tensors to those of Transformers.

The layout is that of CTranslate2's converter (python/ctranslate2/specs/model_spec.py, version 6 of the binary format).
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

VERSION = 6
# numbers of CTranslate2's DataType enum; others are rounded weights, or written by no converter
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
# the part of each tensor's name that differs, here and there
NORMS = {"gamma": "weight", "beta": "bias"}
CONVOLUTIONS = ("conv1", "conv2")


class _Reader:
    """Takes values off the front of bytes; all are little-endian."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{form}", self.content, self.place)
        self.place += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("H")
        return self.bytes(length)[:-1].decode()  # ends with a zero

    def bytes(self, length: int) -> bytes:
        self.place += length
        return self.content[self.place - length : self.place]


def read(content: bytes) -> dict[str, Tensor]:
    """Read all tensors of a model.bin by CTranslate2's names, aliases as the tensor that they stand for.

    ValueError for another version of the format.
    """
    reader = _Reader(content)
    (version,) = reader.numbers("I")
    if version != VERSION:
        raise ValueError(
            f"version {version} of CTranslate2's format: {VERSION} is read (convert the model with a newer one)"
        )
    reader.text(), reader.numbers("I")  # the kind of model, and its revision
    tensors = {}
    for _ in range(reader.numbers("I")[0]):
        name = reader.text()
        shape = reader.numbers("I" * reader.numbers("B")[0])
        kind, length = reader.numbers("BI")
        data = bytearray(reader.bytes(length))
        tensors[name] = torch.frombuffer(data, dtype=DTYPES[kind]).reshape(shape)
    for _ in range(reader.numbers("I")[0]):
        alias, name = reader.text(), reader.text()
        tensors[alias] = tensors[name]
    return tensors


def whisper_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and split the tensors of a Whisper: what WhisperForConditionalGeneration loads.

    ValueError for rounded weights, and where a key projection has a bias, which Whisper's has not.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        side, *rest = name.split("/")
        if tensor.dim() and not tensor.is_floating_point() and rest[-1] in ("weight", "bias"):
            raise ValueError(f"{name} is stored as {tensor.dtype}: its weights are rounded")
        if rest[0] == "embeddings":
            found[f"model.{side}.embed_tokens.weight"] = tensor
        elif rest[0] == "position_encodings":
            found[f"model.{side}.embed_positions.weight"] = tensor
        elif rest[0] in CONVOLUTIONS:
            found[f"model.{side}.{rest[0]}.{rest[1]}"] = tensor
        elif rest[0] == "layer_norm":
            found[f"model.{side}.layer_norm.{NORMS[rest[1]]}"] = tensor
        elif rest[0].startswith("layer_"):
            prefix = f"model.{side}.layers.{rest[0].removeprefix('layer_')}."
            found |= {prefix + key: value for key, value in _of_layer(rest[1:], tensor).items()}
    return found


def _of_layer(parts: list[str], tensor: Tensor) -> dict[str, Tensor]:
    """Rename one tensor of a layer, or split what is joined: q, k and v of self-attention, k and v of cross-attention."""
    block, *middle, kind = parts
    if block == "ffn":
        names = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
        return {f"{names[middle[0]]}.{NORMS.get(kind, kind)}": tensor}
    inside = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if middle == ["layer_norm"]:
        return {f"{inside}_layer_norm.{NORMS[kind]}": tensor}
    cross = block == "attention"
    joined = {
        ("linear_0", False): ("q_proj", "k_proj", "v_proj"),
        ("linear_1", False): ("out_proj",),
        ("linear_0", True): ("q_proj",),
        ("linear_1", True): ("k_proj", "v_proj"),
        ("linear_2", True): ("out_proj",),
    }[middle[0], cross]
    split = {f"{inside}.{name}.{kind}": part for name, part in zip(joined, tensor.chunk(len(joined)), strict=True)}
    bias = split.pop(f"{inside}.k_proj.bias", None)
    if bias is not None and bias.any():
        raise ValueError(f"{inside}.k_proj has a bias, which Whisper's has not: this is another model")
    return split
