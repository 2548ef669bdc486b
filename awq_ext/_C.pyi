"""Types of the compiled extension. The functions mirror ``awq_ext.kernels.reference`` for tensors on the CPU; see there."""

import torch
from torch import Tensor

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def default_isa() -> tuple[str, str]: ...
def default_isa_on(
    vendor: str,
    *,
    avx2: bool = False,
    avx512: bool = False,
    avx512_vnni: bool = False,
    avx512_bf16: bool = False,
    amx: bool = False,
    tiles_agree: bool = False,
) -> tuple[str, str]: ...
def processor() -> tuple[str, int, int]: ...
def choices() -> list[tuple[str, str, str]]: ...
def emulated_tiles_agree() -> bool: ...
def probe_tiles(milliseconds: int) -> tuple[int, int, int]: ...
def use_cuda_library(device: str, linear: int, linear_parts: int, error: int, current_stream: int) -> None: ...
def usual_cuda_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    compute_dtype: str,
) -> Tensor | None: ...
def quantize_weight(
    weight: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = ...,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor: ...
def pack_int4(codes: Tensor) -> Tensor: ...
def unpack_int4(packed: Tensor, in_features: int) -> Tensor: ...
def tile_codes(rows: Tensor, in_features: int, group_size: int, bits: int) -> Tensor: ...
def untile_codes(tiles: Tensor, out_features: int, in_features: int, group_size: int, bits: int) -> Tensor: ...
def quadratic_loss(error: Tensor, second_moment: Tensor) -> Tensor: ...
def code_losses(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
    damping: float = 0.0,
    ranking: bool = False,
) -> tuple[Tensor, Tensor]: ...
def scale_losses(
    weight: Tensor,
    candidates: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = ...,
    max_rows: int = 0,
) -> Tensor: ...
def search_clip(
    weight: Tensor,
    second_moment: Tensor,
    ratios: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = ...,
    channel_scale: Tensor | None = None,
) -> Tensor: ...
def gptq_factor(second_moment: Tensor, order: Tensor, damping: float = 1.0) -> Tensor: ...
def gptq_quantize(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = ...,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def learned_weight(
    start: Tensor,
    moved: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor: ...
def move_learned(
    start: Tensor,
    moved: Tensor,
    thetas: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gradient: Tensor,
    rate: float,
    theta_rate: float,
    group_size: int,
    bits: int,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> None: ...
def refine_quantized(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    damping: float = 1.0,
    rounds: int = 1,
    channel_scale: Tensor | None = None,
    scales_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...

class ActivationStats:
    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None: ...
    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None: ...
    def sum(self) -> Tensor: ...
    def abs_sum(self) -> Tensor: ...
    def second_moment(self) -> Tensor: ...
    @property
    def rows(self) -> int: ...
    @property
    def in_features(self) -> int: ...
