"""Codes that gradients move, at every instruction set that this processor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awq_ext import _C
from awq_ext.kernels import reference
from awq_ext.kernels.reference import group_count, in_groups
from awq_ext.kernels.reference.learned import REACH

EPS = 2.0**-24  # relative error of one fp32 operation
# out_features, in_features, group_size, bits: whole groups and a short last one, one channel, one group a row, odd widths
SHAPES = [(3, 64, 32, 4), (5, 77, 32, 3), (2, 1, 64, 8), (37, 13, -1, 2), (300, 192, 64, 4)]

# every test here, on every instruction set
pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.parametrize("shape", SHAPES, ids=str)]


def codes_of(shape: tuple[int, int, int, int], scaled: bool) -> dict[str, Any]:
    """Arguments of both kernels, with ties between two codes, positions past both ends, and scales of either sign."""
    n, k, group_size, bits = shape
    groups = group_count(k, group_size)
    start, moved = torch.rand(n, k) * (2**bits + 1) - 1, torch.rand(n, k) * 2 * REACH - REACH
    start[0], moved[0] = torch.arange(k) % 2**bits, 0.5
    return {
        "start": start,
        "moved": moved,
        "scales": torch.randn(n, groups),
        "zeros": torch.randint(0, 2**bits, (n, groups)).float(),
        "group_size": group_size,
        "bits": bits,
        "channel_scale": torch.rand(k) + 0.5 if scaled else None,
        "divisor": torch.rand(n) + 0.5 if scaled else None,
    }


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, scaled: bool) -> None:
    arguments = codes_of(shape, scaled) | {"dtype": dtype}
    made = _C.learned_weight(**arguments)
    assert made.dtype == dtype
    assert torch.equal(made, reference.learned_weight(**arguments))


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_are_those_of_the_reference(shape: tuple[int, int, int, int], scaled: bool) -> None:
    arguments = codes_of(shape, scaled)
    gradient = torch.randn(shape[:2]).bfloat16()
    gradient[0, 0] = 0
    moved, thetas = {}, {}
    for kernels in (_C, reference):
        moved[kernels], thetas[kernels] = arguments["moved"].clone(), torch.full_like(arguments["scales"], 0.25)
        mine = arguments | {"moved": moved[kernels], "thetas": thetas[kernels]}
        assert kernels.move_learned(**mine, gradient=gradient, rate=0.125, theta_rate=2.0**-10) is None
    assert torch.equal(moved[_C], moved[reference])
    assert moved[_C][0, 0] == 0.5
    assert not torch.equal(moved[_C], arguments["moved"])
    # a sum decides by its sign, unless fp32 leaves that open: a product and at most one sum for each channel
    products = (gradient.double() * reference.learned_weight(**arguments, dtype=torch.float32).double()).float()
    sums, sizes = (in_groups(one, shape[2]).double().sum(-1) for one in (products, products.abs()))
    certain = sums.abs() > sizes * (EPS * (shape[1] + 1))
    assert certain.any()
    assert torch.equal(thetas[_C][certain], (0.25 - 2.0**-10 * sums.sign()).float()[certain])


def test_any_number_of_threads_gives_the_same(shape: tuple[int, int, int, int]) -> None:
    arguments, gradient, found = codes_of(shape, True), torch.randn(shape[:2]), []
    for count in (1, 3):
        torch.set_num_threads(count)
        mine = arguments | {"moved": arguments["moved"].clone(), "thetas": torch.zeros_like(arguments["scales"])}
        _C.move_learned(**mine, gradient=gradient, rate=0.01, theta_rate=0.01)
        found.append((mine["moved"], mine["thetas"]))
    torch.set_num_threads(1)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_wrong_arguments_change_nothing(shape: tuple[int, int, int, int]) -> None:
    arguments = codes_of(shape, False) | {"thetas": torch.zeros(shape[0], group_count(shape[1], shape[2]))}
    before, step = arguments["moved"].clone(), {"rate": 0.1, "theta_rate": 0.1}
    gradient = torch.ones(shape[:2])
    with pytest.raises(ValueError, match="'gradient'"):
        _C.move_learned(**arguments, gradient=gradient[:, :0], **step)
    with pytest.raises(TypeError, match=r"'gradient'.*float32"):
        _C.move_learned(**arguments, gradient=gradient.double(), **step)
    with pytest.raises(ValueError, match=r"'moved'.*contiguous"):
        _C.move_learned(**arguments | {"moved": torch.zeros(shape[0], 2 * shape[1])[:, ::2]}, gradient=gradient, **step)
    with pytest.raises(ValueError, match="'bits'"):
        _C.move_learned(**arguments | {"bits": 9}, gradient=gradient, **step)
    with pytest.raises(ValueError, match="'scales'"):
        _C.move_learned(**arguments | {"scales": torch.ones(shape[0] + 1, 1)}, gradient=gradient, **step)
    assert torch.equal(arguments["moved"], before)
    assert not arguments["thetas"].any()
