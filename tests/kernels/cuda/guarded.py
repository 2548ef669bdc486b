"""Runs all CUDA kernels, emulated, on arguments that end right before a page that cannot be touched. Prints how many calls it made.

A read or write behind an argument kills the process. Run by test_bounds.py; and by test_wgmma.py, for the Linear by wgmma alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

import emulated_gpu
import torch
from torch import Tensor

from awq_ext.kernels import cuda, reference
from awq_ext.kernels.cuda import descent, library, linear, quantize, search, stats

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
calls = 0


def guarded_run(name: str, on: Tensor, *arguments: Tensor | int | None) -> None:
    """Call a kernel with copies of its tensors before guard pages, and copy back what it may have written."""
    global calls  # noqa: PLW0603
    calls += 1
    loaded = library.found()
    assert loaded is not None
    held, values = [], []
    for argument in arguments:
        if not isinstance(argument, Tensor):
            values.append(0 if argument is None else int(argument))
            continue
        # what a view's pointer may reach is its storage from there on
        size = argument.untyped_storage().nbytes() - argument.storage_offset() * argument.element_size()
        room = -(-max(size, 1) // PAGE) * PAGE
        start = libc.mmap(None, room + PAGE, 3, 0x22, -1, 0)
        assert libc.mprotect(start + room, PAGE, 0) == 0
        place = start + room - size
        ctypes.memmove(place, argument.data_ptr(), size)
        held.append((argument.data_ptr(), place, size, start, room + PAGE))
        values.append(place)
    loaded.call(name, 0, *values)
    for pointer, place, size, start, room in held:
        ctypes.memmove(pointer, place, size)
        libc.munmap(start, room)


def each(work: Callable[[], Any], expected: Callable[[], Any]) -> None:
    """Run and compare loosely: the other tests compare closely."""
    for a, b in zip(work(), expected(), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.1, atol=0.1)


def main() -> None:
    """Run every function on odd sizes; multiples of 16 bytes where a kernel needs them so."""
    os.environ["AWQ_EXT_CUDA_WGMMA"] = os.environ["AWQ_EXT_CUDA_FEW"] = "0"
    for n, k, group in ((5, 13, 7), (33, 72, 32), (130, 160, -1), (3, 40, 16)):
        weight, moment, order = torch.randn(n, k), torch.eye(k), torch.arange(k)
        each(lambda: cuda.quantize_weight(weight, group), lambda: reference.quantize_weight(weight, group))  # noqa: B023
        codes, scales, zeros = cuda.quantize_weight(weight, group)
        cuda.gptq_quantize(weight, moment, order, group)
        cuda.refine_quantized(weight, codes, scales, zeros, moment, group)
        cuda.search_clip(weight, moment, torch.ones(1), group)
        cuda.scale_losses(weight, torch.ones(2, k), moment, group)
        cuda.code_losses(weight, codes, scales, zeros, moment, group, damping=0.5)
        cuda.dequantize_weight(codes, scales, zeros, group)
        cuda.ActivationStats(k).update(weight.half(), torch.ones(n, dtype=torch.bool), torch.ones(n))
        for bits in (4, 8):
            rows = cuda.pack_int4(codes) if bits == 4 else codes
            tiles = cuda.tile_codes(rows, k, group, bits)
            assert torch.equal(cuda.untile_codes(tiles, n, k, group, bits), rows)
            parts = tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)
            cuda.quant_weight(*parts, k, n, group, bits)
            for x in (torch.randn(m, k).to(d) for m in (1, 9, 40) for d in (torch.float32, torch.half, torch.bfloat16)):
                args = (x, *parts, torch.randn(n), torch.ones(k), k, n, group, bits)
                each(lambda: [cuda.quant_linear(*args)], lambda: [reference.quant_linear(*args)])  # noqa: B023
                cuda.quant_linear(x, *parts, None, None, k, n, group, bits)
    few()
    print(calls)


def few() -> None:
    """Run the Linear for few rows on weights so long that its rings go round."""
    del os.environ["AWQ_EXT_CUDA_FEW"]
    for n, k, group in ((5, 8320, 128), (7, 5152, 32)):
        codes, scales, zeros = cuda.quantize_weight(torch.randn(n, k), group)
        for bits in (4, 8):
            tiles = cuda.tile_codes(cuda.pack_int4(codes) if bits == 4 else codes, k, group, bits)
            parts = tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)
            for rows in (1, 9, 17):
                args = (torch.randn(rows, k).half(), *parts, None, None, k, n, group, bits)
                each(lambda: [cuda.quant_linear(*args)], lambda: [reference.quant_linear(*args)])  # noqa: B023


def wgmma() -> None:
    """Run the Linear for many rows on sizes that fill no tile, stage or block."""
    for n, k, group in ((5, 13, -1), (33, 72, 32), (130, 200, 64), (300, 40, -1)):
        codes, scales, zeros = cuda.quantize_weight(torch.randn(n, k), group)
        for bits in (4, 8):
            tiles = cuda.tile_codes(cuda.pack_int4(codes) if bits == 4 else codes, k, group, bits)
            parts = tiles, reference.tile_scales(scales), reference.tile_zeros(zeros, bits)
            for x in (torch.randn(m, k).to(d) for m in (33, 65, 140) for d in (torch.half, torch.bfloat16)):
                args = (x, *parts, torch.randn(n), None, k, n, group, bits)
                each(lambda: [cuda.quant_linear(*args)], lambda: [reference.quant_linear(*args)])  # noqa: B023
    print(calls)


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    for module in (descent, linear, quantize, search, stats):
        module.run = guarded_run
    with emulated_gpu.kernels():
        wgmma() if sys.argv[1:] == ["wgmma"] else main()
