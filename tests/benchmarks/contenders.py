"""One int4 Linear, made for each tool that can compute it on a CPU: what bench_rivals.py lets race.

A maker takes a Case and returns a function from rows of activations to a call. It raises what the tool raises where that is
absent or cannot run. Each contender gets activations in the dtype that it takes and returns its output in its own: bf16, or
fp32 for ARK and OpenVINO. What converting costs is not counted, which favours those two.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference
from awq_ext.layers import ops

Call = Callable[[], Any]
Maker = Callable[["Case"], Callable[[Tensor], Call]]
CACHE_BYTES = 256 << 20  # of copies of one weight, at least; twice the last cache where that is more
MOST_COPIES = 96
# The channels of a word of eight codes: in turn, or as AutoAWQ orders them
IN_TURN, AUTOAWQ = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def last_cache() -> int:
    """Bytes of all last-level caches together, each core's share counted once; 0 where Linux does not tell."""
    found = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        size = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
        if size:
            found[(index / "shared_cpu_list").read_text()] = int(size[1]) << {"K": 10, "M": 20}[size[2]]
    return sum(found.values())


@dataclass(frozen=True, eq=False)
class Case:
    """A weight [out, in] in 4 bits, asymmetric: W[n, k] = (codes[n, k] - zeros[n, k // g]) * scales[n, k // g]."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # bf16 [N, G]
    zeros: Tensor  # uint8 [N, G]
    group: int

    @classmethod
    def random(cls, k: int, n: int, group: int) -> Case:
        weight = torch.randn(n, k) / k**0.5
        codes, scales, zeros = _C.quantize_weight(weight, group, scale_dtype=torch.bfloat16)
        return cls(codes, scales, zeros, group)

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @cached_property
    def weight(self) -> Tensor:
        """The weight as floats: fp32 [N, K]."""
        return reference.dequantize_weight(self.codes, self.scales.float(), self.zeros, self.group)

    def copies(self, nbytes: int) -> int:
        """Of a weight of so many bytes: as many as no cache holds."""
        return min(MOST_COPIES, max(2, -(-max(CACHE_BYTES, 2 * last_cache()) // nbytes)))


def words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes [R, C] in words of eight along C, in that order: int32 [R, C / 8]."""
    parts = codes.to(torch.int32).view(codes.shape[0], -1, 8)[..., order]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return torch.bitwise_left_shift(parts, shifts).sum(-1, dtype=torch.int32)  # disjoint bits: a sum is an "or"


def in_turn(function: Callable[..., Any], weights: list[Any]) -> Callable[[Tensor], Call]:
    """A call of ``function(x, weight)`` on one weight after the other, for ever."""
    endless: Iterator[Any] = itertools.cycle(weights)
    return lambda x: lambda: function(x, next(endless))


def awq_ext(case: Case, compute: str = "auto") -> Callable[[Tensor], Call]:
    packed = _C.pack_int4(case.codes)

    def layer() -> tuple[Tensor, ...]:  # as a QuantLinear makes its buffers
        tiles = _C.tile_codes(packed, case.k, case.group, 4)
        return tiles, reference.tile_scales(case.scales), reference.tile_zeros(case.zeros, 4)

    def linear(x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        return ops.quant_linear(x, *own, None, None, case.k, case.n, case.group, 4, compute)

    return in_turn(linear, [layer() for _ in range(case.copies(sum(t.nbytes for t in layer())))])


def torch_bf16(case: Case) -> Callable[[Tensor], Call]:
    weight = case.weight.bfloat16()
    return in_turn(torch.nn.functional.linear, [weight.clone() for _ in range(case.copies(weight.nbytes))])


def torch_int4(case: Case) -> Callable[[Tensor], Call]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(case.codes.int(), 1)
    scales = case.scales.float()
    # it computes (code - 8) * scale + offset
    pairs = torch.stack([scales, (8 - case.zeros.float()) * scales], -1).transpose(0, 1).contiguous().bfloat16()

    def linear(x: Tensor, own: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, case.group, pairs)

    return in_turn(linear, [packed.clone() for _ in range(case.copies(packed.nbytes))])


def load_vllm() -> None:
    """vLLM's operators alone, in the build that vLLM itself would import here; vLLM is far more than one layer."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ImportError("vllm is not installed")
    has = torch.cpu.get_capabilities()
    name = "_C_AVX512" if has.get("avx512_f") else "_C_AVX2"
    if has.get("avx512_bf16") or has.get("architecture") != "x86_64":
        name = "_C"
    torch.ops.load_library(str(Path(next(iter(spec.submodule_search_locations))) / f"{name}.abi3.so"))


def vllm_w4a16(case: Case) -> Callable[[Tensor], Call]:
    load_vllm()
    # blocks of 16 outputs, two words, one after the other
    packed = words(case.codes.T.contiguous(), IN_TURN).view(case.k, -1, 2).transpose(0, 1).reshape(-1, 2 * case.k)
    scales, zeros = case.scales.T.contiguous(), words(case.zeros.T.contiguous(), IN_TURN)
    hint = "amx" if torch.cpu.get_capabilities().get("amx_bf16") else "vec"

    def linear(x: Tensor, own: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], case.n, dtype=x.dtype)
        torch.ops._C.cpu_gemm_wna16(x, own, out, scales, zeros, None, 8, hint)
        return out

    return in_turn(linear, [packed.clone() for _ in range(case.copies(packed.nbytes))])


def vllm_w4a8(case: Case) -> Callable[[Tensor], Call]:
    """The operator; vLLM's own layer calls it only where there is AMX."""
    load_vllm()
    codes, zeros = (words(t.T.contiguous(), AUTOAWQ) for t in (case.codes, case.zeros))
    parts = torch.ops._C.convert_weight_packed_scale_zp(codes, zeros, case.scales.T.contiguous(), 0)

    def linear(x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
        return torch.ops._C.int4_scaled_mm_cpu(x, *own, None)

    # weight, zeros, scales
    return in_turn(linear, [tuple(t.clone() for t in parts) for _ in range(case.copies(parts[0].nbytes))])


def ark(case: Case, compute: str) -> Callable[[Tensor], Call]:
    import auto_round_kernel

    codes, zeros = ((t.T.to(torch.int16) - 8).to(torch.int8).contiguous() for t in (case.codes, case.zeros))
    kind = (case.group, compute, "int4", "fp32", True)
    packed = auto_round_kernel.repack_quantized_weight(codes, case.scales.T.float().contiguous(), zeros, *kind)
    nothing = torch.empty(0)

    def linear(x: Tensor, own: Tensor) -> Tensor:
        return auto_round_kernel.woqgemm(x, own, nothing, case.n, case.k, *kind)

    calls = in_turn(linear, [packed.clone() for _ in range(case.copies(packed.nbytes))])
    return lambda x: calls(x.float())


def openvino(case: Case, rounded: int) -> Callable[[Tensor], Call]:
    """``rounded``: the channels of activations that share a scale of eight bits; 0 for activations that are not rounded."""
    import openvino as ov
    from openvino import opset13 as op

    n, k, groups = case.n, case.k, case.k // case.group
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(rounded),
    }
    core = ov.Core()

    def request() -> Any:
        x = op.parameter([-1, k], ov.Type.f32)
        codes, zeros = (
            op.convert(op.constant(t.reshape(n, groups, -1).numpy(), dtype=ov.Type.u4), ov.Type.f16)
            for t in (case.codes, case.zeros)
        )
        scales = op.constant(case.scales.reshape(n, groups, 1).half().numpy())
        rows = op.reshape(op.multiply(op.subtract(codes, zeros), scales), [n, k], False)
        product = op.matmul(x, op.convert(rows, ov.Type.f32), False, True)
        return core.compile_model(ov.Model([product], [x]), "CPU", settings).create_infer_request()

    requests = [request() for _ in range(case.copies(n * k // 2))]

    def linear(x: Any, own: Any) -> Any:
        return own.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    calls = in_turn(linear, requests)
    return lambda x: calls(x.float().numpy())


# Activations as they are, or rounded to eight bits: two classes, each compared with ours of that class.
W4A16: dict[str, Maker] = {
    "awq_ext": awq_ext,
    "vllm": vllm_w4a16,
    "ark": lambda case: ark(case, "bf16"),
    "openvino": lambda case: openvino(case, 0),
    "torch_int4": torch_int4,
    "bf16": torch_bf16,
}
W4A8: dict[str, Maker] = {
    "awq_ext_int8": lambda case: awq_ext(case, "int8"),
    "vllm_int8": vllm_w4a8,
    "ark_int8": lambda case: ark(case, "int8"),
    "openvino_int8": lambda case: openvino(case, case.group),
}
