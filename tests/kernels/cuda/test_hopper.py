"""What stands for Hopper's barriers, copies and products: right programs get right results, and wrong ones are found out."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import emulated_gpu
import pytest
import torch
from programs import run_python, seeing_tests
from torch import Tensor

CASES = Path(__file__).with_name("hopper_cases.cu")
FAULTS = re.search(r"enum Fault \{([^}]*)\}", CASES.read_text())[1].replace(",", " ").split()
SAID = {
    "box_not_aligned": "a swizzled box at an address that is not a multiple of 1024",
    "no_fence_of_barriers": "a barrier is used without fence_barriers()",
    "no_fence_of_products": "a product without fence_products() since registers could change",
    "fragment_after_fence": "a fragment was changed after fence_products()",
    "read_too_soon": "a product reads what is still being copied",
    "overwritten_too_soon": "a copy over what a product still reads",
    "product_not_waited_for": "products that nobody waited for",
    "copy_not_waited_for": "copies to a barrier that nobody waited for",
    "too_many_arrivals": "more arrivals at a barrier than it was made for",
    "too_few_arrivals": "some threads wait at a barrier that others do not reach",
    "too_many_bytes": "a barrier gets more bytes than it was told to expect",
    "barrier_overwritten": "a barrier that was not made, or was overwritten",
    "different_products": "threads of a warpgroup multiplied different matrices",
    "half_a_warpgroup": "threads of a warpgroup multiplied different matrices",
    "outside": "a product reads outside the block's shared memory",
}


def call(name: str, *arguments: Tensor | int) -> None:
    """Run one of the cases."""
    function = getattr(ctypes.CDLL(str(emulated_gpu.compiled(CASES))), name)
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    function.argtypes, function.restype = [ctypes.c_uint64] * len(values), None
    function(*values)


def product(a: Tensor, x: Tensor, columns: int, column: int, row: int, wrong: int = 0) -> Tensor:
    """a times the box of x from there on, on the emulated GPU; ``columns`` of x are said to be there."""
    out = torch.full((64, 64), float("nan"))
    call("hopper_product", a, x, x.shape[0], columns, x.shape[1], column, row, wrong, out)
    return out


def alone(*lines: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a process of their own, which a fault ends."""
    emulated_gpu.compiled(CASES)
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})", "import torch, test_hopper"
    return run_python("-c", "\n".join([*start, *lines]), **seeing_tests())


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape).half()


@pytest.mark.parametrize("copies", ["late", "early"])
def test_a_product_of_a_box(order: str, copies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fragments, the swizzle and its descriptor; and zeros for what lies outside the matrix."""
    monkeypatch.setenv("AWQ_EMULATED_COPIES", copies)
    a, x = integers(64, 64), integers(90, 136)
    padded = torch.nn.functional.pad(x[:, :130], (0, 200, 0, 100))
    for column, row in ((0, 0), (64, 8), (128, 60), (0, 89)):
        box = padded[row : row + 64, column : column + 64].float()
        assert torch.equal(product(a, x, 130, column, row), a.float() @ box.T)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(1 << 62, id="no swizzle"),
        pytest.param(3 << 62, id="64 bytes"),
        pytest.param(1 << 63, id="32 bytes"),
        pytest.param((1024 ^ 512) // 16 << 32, id="eight columns after 512 bytes"),
        pytest.param(1, id="address"),
    ],
)
def test_a_wrong_descriptor_gives_wrong_results(wrong: int) -> None:
    a, x = integers(64, 64), integers(64, 64)
    right = a.float() @ x.float().T
    assert torch.equal(product(a, x, 64, 0, 0), right)
    off = product(a, x, 64, 0, 0, wrong) != right
    assert off.float().mean() > 0.5


def test_a_buffer_given_back_too_soon_shows(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randint(0, 2**31 - 1, (6, 4), dtype=torch.int32)
    for copies in ("late", "early"):
        monkeypatch.setenv("AWQ_EMULATED_COPIES", copies)
        got = [torch.zeros_like(given), torch.zeros_like(given)]
        for too_soon in (0, 1):
            call("hopper_pass_on", given, got[too_soon], len(given), too_soon)
        assert torch.equal(got[0], given)
        if copies == "early" and order != "lowest":  # then the warp that reads is always the first to run
            assert not torch.equal(got[1], given)


def test_a_product_is_done_when_it_is_waited_for() -> None:
    out = torch.zeros(3)
    call("hopper_early", torch.ones(64, 64).half(), out)
    assert out[0] == 0
    assert out[1] == 16
    assert out[2] == 8  # all lanes have changed the register of eight of its channels


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(fault: str) -> None:
    done = alone(f"test_hopper.call('hopper_fault', {FAULTS.index(fault)}, torch.zeros(64, 64).half())")
    assert done.returncode < 0
    assert SAID[fault] in done.stderr


@pytest.mark.parametrize(
    ("place", "columns", "pitch", "message"),
    [
        (4, 60, 64, "a tensor map of an address that is not a multiple of 16"),
        (0, 60, 60, "a tensor map whose rows are not multiples of 16 bytes"),
        (0, 80, 64, "a tensor map of no such matrix"),
    ],
)
def test_matrices_that_cannot_be_copied(place: int, columns: int, pitch: int, message: str) -> None:
    done = alone(
        "x = torch.zeros(64, 64).half()",
        f"test_hopper.call('hopper_product', x, x.data_ptr() + 2 * {place}, 60, {columns}, {pitch}, 0, 0, 0, x)",
    )
    assert done.returncode < 0
    assert message in done.stderr
