"""What must hold on a GPU, tried on one: python tests/device/checks.py [--emulated] [--json FILE]; exit code 1 if anything fails.

The kernels themselves are compared with the reference in tests/kernels/cuda, on the emulated GPU; here are the sizes of real
layers, and what no emulation has: streams, graphs, autograd, autocast, torch.compile, and layers that move.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import gpu as device
import torch
from torch import Tensor

from awq_ext import _C, QuantLinear
from awq_ext.kernels import cuda, kernels_for, reference
from awq_ext.layers.quantized_weight import QuantizedWeight

Check = Callable[[device.Gpu], None]
ROWS = (1, 3, 8, 16, 33, 200)


def layer(n: int, k: int, group_size: int, bits: int, dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    """A quantized layer with a bias, on the CPU."""
    linear = torch.nn.Linear(k, n, dtype=dtype)
    codes, scales, zeros = reference.quantize_weight(linear.weight.detach(), group_size, bits)
    return QuantLinear.from_packed(linear, QuantizedWeight.of_codes(codes, scales, zeros, group_size, bits))


def close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """A result's relative error: sums of a few thousand fp32 terms, and the rounding of the result."""
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < max(1e-5, torch.finfo(dtype).eps), f"off by {error:.2g}"


def the_linear(gpu: device.Gpu) -> None:
    """All rows, both widths, all dtypes, usual and odd groups, against the reference on the same device."""
    sizes = (
        ((1024, 2048, 128), (300, 1100, 64), (65, 100, 7), (128, 513, -1)) if gpu.real else ((65, 72, 32), (9, 50, 7))
    )
    for n, k, group_size in sizes:
        for bits in (4, 8):
            made = layer(n, k, group_size, bits).to(gpu.device)
            parts = made.tiles, made.tile_scales, made.tile_zeros
            weight = cuda.quant_weight(*parts, k, n, group_size, bits)
            assert torch.equal(weight, reference.quant_weight(*parts, k, n, group_size, bits))
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for rows in ROWS:
                    x = torch.randn(rows, k, device=gpu.device, dtype=dtype)
                    args = (x, *parts, made.bias, None, k, n, group_size, bits)
                    close(cuda.quant_linear(*args), reference.quant_linear(*args), dtype)


def few_rows(gpu: device.Gpu) -> None:
    """The kernel for few rows of regular weights: every code and zero exactly, and against the reference."""
    sizes = ((1024, 2048, 128), (300, 1120, 32), (4096, 4096, 128), (65, 416, -1)) if gpu.real else ((9, 64, 32),)
    with device.wgmma("0"):
        for n, k, group_size in sizes:
            for bits in (4, 8):
                made = layer(n, k, group_size, bits).to(gpu.device)
                parts = made.tiles, made.tile_scales, made.tile_zeros
                ones = parts[0], torch.ones_like(made.tile_scales), parts[2]
                for dtype in (torch.float16, torch.bfloat16):
                    for rows in (1, 3, 8, 9, 16, 24, 32):
                        x = torch.randn(rows, k, device=gpu.device, dtype=dtype)
                        args = (*parts, made.bias, None, k, n, group_size, bits)
                        close(cuda.quant_linear(x, *args), reference.quant_linear(x, *args), dtype)
                        one = torch.nn.functional.one_hot(torch.arange(rows, device=gpu.device) * 7 % k, k).to(dtype)
                        exact = (*ones, None, None, k, n, group_size, bits)
                        assert torch.equal(cuda.quant_linear(one, *exact), reference.quant_linear(one, *exact))


def the_linear_by_wgmma(gpu: device.Gpu) -> None:
    """On Hopper: many rows by wgmma and by mma.sync, against the reference and each other; with integers, exactly."""
    hopper = not gpu.real or torch.cuda.get_device_capability()[0] == 9
    with device.wgmma("1") as taken:
        assert taken == hopper, f"wgmma is {'not ' * hopper}used on this device"
    if not hopper:
        return
    sizes = (
        ((1024, 2048, 128), (4096, 4096, 128), (300, 1100, 64), (65, 416, 32), (128, 513, -1))
        if gpu.real
        else ((65, 72, 32), (9, 50, -1))
    )
    for n, k, group_size in sizes:
        for bits in (4, 8):
            made = layer(n, k, group_size, bits).to(gpu.device)
            scales = torch.exp2(torch.randint(-2, 3, made.tile_scales.shape, device=gpu.device)).half()
            for dtype in (torch.float16, torch.bfloat16):
                for rows in (17, 64, 65, 128, 700, 2048) if gpu.real else (33, 70):
                    both_kernels(made, scales, torch.randn(rows, k, device=gpu.device, dtype=dtype), group_size, bits)


def both_kernels(made: QuantLinear, scales: Tensor, x: Tensor, group_size: int, bits: int) -> None:
    """``scales`` are powers of two, with which products of -1, 0 and 1 are integers."""
    n, k = made.out_features, made.in_features
    whole = x.sign() * (x.abs() > 1)
    results = []
    for wish in ("1", "0"):
        with device.wgmma(wish):
            parts = made.tiles, made.tile_scales, made.tile_zeros
            real = cuda.quant_linear(x, *parts, made.bias, None, k, n, group_size, bits)
            close(real, reference.quant_linear(x, *parts, made.bias, None, k, n, group_size, bits), x.dtype)
            exact = cuda.quant_linear(whole, made.tiles, scales, made.tile_zeros, None, None, k, n, group_size, bits)
            results.append((real, exact))
    close(results[0][0], results[1][0], x.dtype)
    assert torch.equal(results[0][1], results[1][1]), f"{x.shape[0]} rows of {x.dtype}, {n} x {k}, {bits} bits"


def calls_from_cpp(gpu: device.Gpu) -> None:
    """The call without Python is used, and gives what Python gives: on any stream, in a graph, with another device current."""
    n, k = (1024, 2048) if gpu.real else (64, 256)
    for bits in (4, 8):
        made = layer(n, k, 128, bits).to(gpu.device)
        for rows in (1, 20, 512) if gpu.real else (1, 20):
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=gpu.device)
            args = (x, made.tiles, made.tile_scales, made.tile_zeros, made.bias, None, k, n, 128, bits)
            expected = cuda.quant_linear(*args)

            def same(args: tuple[object, ...] = args, expected: Tensor = expected) -> None:
                ours = _C.usual_cuda_linear(*args, "auto")
                assert ours is not None, "C++ leaves it to Python"
                assert torch.equal(ours, expected)

            same()
            if gpu.real:
                on_other_streams(made, x, expected)
                for other in range(1, torch.cuda.device_count()):
                    with torch.cuda.device(other):
                        same()


def on_other_streams(made: QuantLinear, x: Tensor, expected: Tensor) -> None:
    """While the default stream is busy, and in a graph: a launch on the wrong stream would come too early, or be lost."""
    side, given = torch.cuda.Stream(), torch.zeros_like(x)
    with torch.no_grad(), torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        given.copy_(x)
        ours = made(given)
    side.synchronize()
    assert torch.equal(ours, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        ours = made(given)
    ours.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(ours, expected)


def the_quantizer(gpu: device.Gpu) -> None:
    """Codes, scales and zeros are the reference's on the CPU, bit for bit; layouts there and back too."""
    n, k = (768, 2048) if gpu.real else (20, 100)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(n, k).to(dtype)
        for bits, group_size in ((4, 128), (8, 64), (3, -1)):
            ours = cuda.quantize_weight(weight.to(gpu.device), group_size, bits)
            for a, b in zip(ours, reference.quantize_weight(weight, group_size, bits), strict=True):
                assert torch.equal(a.cpu(), b)
        tiles = cuda.tile_codes(cuda.pack_int4(ours[0] & 15), k, 128, 4)
        assert torch.equal(cuda.unpack_int4(cuda.untile_codes(tiles, n, k, 128, 4), k), ours[0] & 15)


def the_searches(gpu: device.Gpu) -> None:
    """Losses and statistics are the reference's up to fp32 sums; error feedback and descent lose no more than it does."""
    n, k = (512, 1024) if gpu.real else (9, 64)
    x = torch.randn(2 * k, k, device=gpu.device) * torch.rand(k, device=gpu.device).add(0.1)
    weight, mask = torch.randn(n, k, device=gpu.device), torch.rand(2 * k, device=gpu.device) < 0.8
    ours, expected = cuda.ActivationStats(k, device=gpu.device), reference.ActivationStats(k, device=gpu.device)
    for stats in (ours, expected):
        stats.update(x, mask, torch.ones_like(mask, dtype=torch.float32))
    close(ours.abs_sum(), expected.abs_sum(), torch.float32)
    moment = expected.second_moment().contiguous()
    close(ours.second_moment(), moment, torch.float32)
    candidates = torch.rand(3, k, device=gpu.device) + 0.5
    close(*(f.scale_losses(weight, candidates, moment, 32) for f in (cuda, reference)), torch.float16)
    factor, order = (
        reference.gptq_factor(moment, torch.arange(k, device=gpu.device)),
        torch.arange(k, device=gpu.device),
    )
    losses = []
    for f in (cuda, reference):
        clip = f.search_clip(weight, moment, torch.tensor([1.0, 0.9, 0.8], device=gpu.device), 32)
        parts = f.gptq_quantize(weight, factor, order, 32, clip=clip)
        parts = f.refine_quantized(weight, *parts, moment, 32)
        losses.append(f.code_losses(weight, *parts, moment, 32)[0].sum().item())
    assert abs(losses[0] / losses[1] - 1) < 0.01, losses


def dispatch(gpu: device.Gpu) -> None:
    """A layer that moves keeps its bytes, runs our kernel on the current stream, and comes back bit for bit."""
    made = layer(96, 192, 64, 4)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    moved = made.to(gpu.device)
    assert kernels_for(moved.tiles.device) is cuda or not gpu.real
    x = torch.randn(5, 192, dtype=torch.bfloat16, device=gpu.device)
    close(moved(x), torch.nn.functional.linear(x, moved.weight, moved.bias), torch.bfloat16)
    back = moved.to("cpu").state_dict()
    assert all(torch.equal(back[name], value) for name, value in before.items())


def gradients(gpu: device.Gpu) -> None:
    """Gradients reach the input and the bias, as through a Linear with this weight."""
    made = layer(96, 192, 64, 4, torch.float32).to(gpu.device)
    x = torch.randn(3, 192, device=gpu.device, requires_grad=True)
    made(x).square().sum().backward()
    ours = x.grad.clone(), made.bias.grad.clone()
    x.grad = made.bias.grad = None
    torch.nn.functional.linear(x, made.weight, made.bias).square().sum().backward()
    close(ours[0], x.grad, torch.float16)
    close(ours[1], made.bias.grad, torch.float16)


def autocast(gpu: device.Gpu) -> None:
    """Under autocast the input is cast as a Linear's is."""
    made = layer(96, 192, 64, 4, torch.float32).to(gpu.device)
    x = torch.randn(3, 192, device=gpu.device)
    with torch.autocast(torch.device(gpu.device).type, dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    assert made(x).dtype == torch.float32


def streams_and_graphs(gpu: device.Gpu) -> None:
    """A captured graph, replayed with other inputs, computes what the layer does."""
    if not gpu.real:
        return
    made = layer(256, 512, 128, 4).to(gpu.device)
    x = torch.randn(4, 512, dtype=torch.bfloat16, device=gpu.device)
    with torch.no_grad():
        made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, made(x))


def compiled(gpu: device.Gpu) -> None:
    """torch.compile takes the layer whole, without a break of the graph."""
    made = layer(64, 128, 64, 4).to(gpu.device)
    x = torch.randn(3, 128, dtype=torch.bfloat16, device=gpu.device)
    with torch.no_grad():
        run = torch.compile(made, fullgraph=True, backend="eager")
        assert torch.equal(run(x), made(x))


CHECKS: tuple[Check, ...] = (
    *(
        the_linear,
        few_rows,
        the_linear_by_wgmma,
        calls_from_cpp,
        the_quantizer,
        the_searches,
        dispatch,
        gradients,
        autocast,
        streams_and_graphs,
        compiled,
    ),
)


def run_all(gpu: device.Gpu) -> dict[str, str]:
    """Run all checks: name -> "passed", or what went wrong."""
    found = {}
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check(gpu)
            gpu.wait()
            found[check.__name__] = "passed"
        except Exception as error:
            traceback.print_exc()
            found[check.__name__] = f"{type(error).__name__}: {error}"
        print(f"{check.__name__}: {found[check.__name__]}", flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", action="store_true", help="on the emulated GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with device.chosen(options.emulated) as gpu:
        found = run_all(gpu)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(result != "passed" for result in found.values()))


if __name__ == "__main__":
    main()
