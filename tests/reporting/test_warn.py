"""warn(): the warning names the line that called the package."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch

from awq_ext.reporting.warn import warn


def in_module(name: str, inner: Callable[..., None]) -> Callable[..., None]:
    """A function of the module called ``name`` that passes its arguments on."""
    space = {"__name__": name, "inner": inner}
    exec("def outer(*args):\n    inner(*args)\n", space)
    return space["outer"]


@pytest.mark.parametrize(
    "modules", [["checkpoints.fill"], ["undo.thread_state", "evaluation.compare"], ["pipeline.session"] * 3]
)
def test_the_line_of_the_caller_is_named(modules: list[str]) -> None:
    call = warn
    for name in modules:
        call = in_module(f"awq_ext.{name}", torch.no_grad()(call))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        call("mind this")
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert (str(warning.message), warning.category) == ("mind this", UserWarning)


def test_a_package_of_a_similar_name_is_a_caller() -> None:
    call = in_module("awq_ext_plugin.tool", in_module("awq_ext.evaluation.compare", warn))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call("mind this")
    assert caught[0].filename == "<string>"
