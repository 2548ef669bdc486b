"""Damage to the files of a checkpoint, drawn by hypothesis: their JSON, their headers, bytes, other things in their place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# What no writer writes: each is the wrong type or size for nearly every entry.
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 33, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 2**70, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "..", "../x", "\0", "\ud800", "re:(a|a)*b", "re:*", "F9", "F32"),
    *([], {}, [[]], [0], [0, 0], [-1, 4], [2**62, 4], {"a": {}}, [None], ["x"], "layers.0", "e" * 5000),
]  # fmt: skip
_SLOT = "?deep?"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside a JSON value, itself not among them."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in inner:
        yield (*path, key)
        yield from places(held, (*path, key))


def damaged_json(draw: Callable[[Any], Any], value: Any) -> str:
    """The text of a JSON value with one thing wrong in it."""
    path = draw(st.sampled_from(list(places(value))))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kinds = ["replace", "deep", "delete", "swap"] + (["rename", "add"] if isinstance(parent, dict) else [])
    kind = draw(st.sampled_from(kinds))
    text = None
    if kind == "replace":
        parent[path[-1]] = draw(st.sampled_from(HOSTILE))
    elif kind == "deep":
        depth, parent[path[-1]] = draw(st.sampled_from([50, 150, 900, 100_000])), _SLOT
        text = json.dumps(value).replace(f'"{_SLOT}"', "[" * depth + "]" * depth)
    elif kind == "delete":
        del parent[path[-1]]
    elif kind == "swap":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    else:
        held = parent[path[-1]] if kind == "add" else parent.pop(path[-1])
        parent[draw(st.sampled_from(["", "x", "..", "layers.9.up", "quantization_config", str(path[-1]) + " "]))] = held
    return json.dumps(value) if text is None else text


def damage_json(draw: Callable[[Any], Any], file: Path) -> None:
    """Spoil one entry of a JSON file."""
    file.write_text(damaged_json(draw, json.loads(file.read_text())))


def damage_header(draw: Callable[[Any], Any], file: Path) -> None:
    """Spoil one entry of the header of a safetensors file; the bytes of the tensors stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(draw, json.loads(content[8 : 8 + length])).encode("utf-8", "surrogatepass")
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def damage_bytes(draw: Callable[[Any], Any], file: Path) -> None:
    """Cut a file, lengthen it, give its header another length, or put odd bytes into its first ones."""
    content = bytearray(file.read_bytes())
    head = (
        min(len(content), 8 + int.from_bytes(content[:8], "little")) if file.suffix == ".safetensors" else len(content)
    )
    kind = draw(st.sampled_from(["cut", "cut in the head", "longer", "length", "odd bytes"]))
    if kind.startswith("cut"):
        del content[draw(st.integers(0, (head if "head" in kind else len(content)) - 1)) :]
    elif kind == "longer":
        content += draw(st.sampled_from([b"\0", b" ", b"{}", b"\xff" * 64]))
    elif kind == "length":
        content[:8] = draw(st.sampled_from([0, 1, 7, head, len(content), 2**31, 2**40, 2**63, 2**64 - 1])).to_bytes(
            8, "little"
        )
    else:
        at = draw(st.integers(0, head - 1))
        content[at : at + 1] = draw(st.sampled_from([b"\xff", b"\0", b'"', b"{", b"9", b"\xc3\x28", b"-", b"e", b""]))
    file.write_bytes(content)


def displace(draw: Callable[[Any], Any], file: Path) -> None:
    """Put something else in the place of a file: a folder, a named pipe, a device, a link to nowhere or to itself, nothing."""
    kind = draw(st.sampled_from(["folder", "pipe", "device", "to nowhere", "to itself", "empty", "gone", "another"]))
    others = sorted(other for other in file.parent.iterdir() if other != file and other.is_file())
    if kind == "another":
        shutil.copy(draw(st.sampled_from(others)), file)
        return
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "gone" and kind != "empty":
        file.symlink_to({"device": "/dev/zero", "to nowhere": "nothing", "to itself": file.name}[kind])
    elif kind == "empty":
        file.touch()
