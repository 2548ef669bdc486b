"""int4 Linears of others, each on as many copies of a random weight as ours: torch's, and vLLM's Marlin where it is installed."""

from __future__ import annotations

from collections.abc import Callable

import gpu as device
import torch
from torch import Tensor

Rival = list[Callable[[Tensor], object]]  # one call for each copy of the weight


def make(gpu: device.Gpu, n: int, k: int, group: int, copies: int) -> dict[str, Rival | str]:
    """Make all rivals; in place of one that cannot be made, why."""
    found: dict[str, Rival | str] = {}
    for name, maker in (("int4pack_mm_us", _int4pack), ("marlin_us", _marlin)):
        try:
            found[name] = maker(gpu, n, k, group, copies)
        except Exception as error:  # whatever another tool raises is its answer
            found[name] = f"{type(error).__name__}: {error}"
    return found


def timed(gpu: device.Gpu, rival: Rival, x: Tensor) -> float | str:
    """Microseconds of a call, or what it raised."""
    try:
        return gpu.seconds([lambda call=call: call(x) for call in rival]) * 1e6
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _int4pack(gpu: device.Gpu, n: int, k: int, group: int, copies: int) -> Rival:
    """torch's: weights packed by 8 tiles along K, scales and zeros bf16 [K / g, N, 2]."""
    pairs = torch.full((k // group, n, 2), 0.01, dtype=torch.bfloat16, device=gpu.device)
    calls: Rival = []
    for _ in range(copies):
        if gpu.real:
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=gpu.device)
            weight = torch._convert_weight_to_int4pack(codes, 8)
            calls.append(lambda x, w=weight: torch._weight_int4pack_mm(x, w, group, pairs))
        else:
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
            calls.append(lambda x, w=weight: torch._weight_int4pack_mm_for_cpu(x, w, group, pairs))
    return calls


def _marlin(gpu: device.Gpu, n: int, k: int, group: int, copies: int) -> Rival:
    """vLLM's, by its own helpers; they move between releases, so a failure is reported and no more."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    if not gpu.real:
        raise RuntimeError("Marlin needs a GPU")
    kind, calls = scalar_types.uint4b8, []
    workspace = marlin_utils.marlin_make_workspace_new(torch.device(gpu.device))
    none = torch.empty(0, dtype=torch.int32, device=gpu.device)
    for _ in range(copies):
        weight = torch.randn(k, n, dtype=torch.bfloat16, device=gpu.device)
        _, packed, scales, order, sorting, *_ = marlin_utils_test.marlin_quantize(weight, kind, group, act_order=False)

        def call(x: Tensor, w: tuple[Tensor, ...] = (packed, scales, order, sorting)) -> object:
            return marlin_utils.apply_gptq_marlin_linear(
                input=x,
                weight=w[0],
                weight_scale=w[1],
                weight_zp=none,
                g_idx=w[2],
                g_idx_sort_indices=w[3],
                workspace=workspace,
                wtype=kind,
                output_size_per_partition=n,
                input_size_per_partition=k,
                is_k_full=True,
            )

        calls.append(call)
    return calls
