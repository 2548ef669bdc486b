"""What a test compares a model against: everything that a failed call must leave as it was, and what its layers read."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from awq_ext.undo.thread_state import ThreadState

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
)


# The instruction sets whose products of bf16 are used to rank candidates and to fit scales.
RANKS_IN_BF16 = {"avx512_bf16", "amx_plain", "amx_emulated", "amx"}


def moment(k: int) -> Tensor:
    """Second moment of correlated channels of different size, one of them dead."""
    x = torch.randn(2 * k + 3, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5) * torch.rand(k).add(0.1)
    if k > 5:
        x[:, 4] = 0
    return x.T @ x


def bits(tensor: Tensor) -> bytes:
    """The tensor's bytes (NaNs compare too)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def hook_count(model: nn.Module) -> int:
    """Hooks on all modules of ``model``."""
    books = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, book)) for module in model.modules() for book in books)


def inputs_of(model: nn.Module, batches: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """All rows that enter the modules ``names`` when the batches run through the model: fp64 [T, K]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        seen[name].append(x.detach().reshape(-1, x.shape[-1]).double())

    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, a, k, n=n: note(n, a, k), with_kwargs=True)
        for n in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


# All that ran in this thread and still exist. To look for them among all objects takes a third of a second each time.
_STARTED: weakref.WeakSet[greenlet.greenlet] = weakref.WeakSet()


def _note_switch(event: str, switch: Any) -> None:
    if event in ("switch", "throw"):
        _STARTED.update(switch)  # from which one and to which


greenlet.settrace(_note_switch)


def suspended_greenlets() -> list[Any]:
    """Greenlets that started and neither ended nor are running, and that somebody can still reach."""
    if _suspended():
        gc.collect()
    return _suspended()


def _suspended() -> list[Any]:
    current = greenlet.getcurrent()
    mine = {current}
    while current.parent is not None:
        current = current.parent
        mine.add(current)
    return [g for g in _STARTED if g and not g.dead and g not in mine]


class Snapshot:
    """A model as it was at construction: modules, parameters and buffers by identity and bits, flags, hooks, thread modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = self._read()
        self.tensors = {n: (t, bits(t)) for n, t in self._tensors()}
        self.thread = (ThreadState.capture(), torch.is_inference_mode_enabled())

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return [(name, tensor) for name, tensor in found if not tensor.is_meta]

    def _read(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        state: dict[str, Any] = {
            name: (id(m), m.training, tuple(m._modules), tuple(m._buffers), tuple(m._parameters))
            for name, m in modules.items()
        }
        state |= {f"hooks of {n}": [list(getattr(m, book)) for book in _HOOKS] for n, m in modules.items()}
        state |= {f"gradient of {n}": (id(p), p.requires_grad) for n, p in self.model.named_parameters()}
        state["attributes"] = sorted(vars(self.model))
        state["use_cache"] = getattr(getattr(self.model, "config", None), "use_cache", None)
        return state

    def assert_unchanged(self) -> None:
        now = self._read()
        assert list(now) == list(self.state)
        for name, value in self.state.items():
            assert now[name] == value, f"{name} changed"
        for name, tensor in self._tensors():
            before, content = self.tensors[name]
            assert tensor is before, f"{name} is another object"
            assert bits(tensor) == content, f"{name} has other values"
        assert (ThreadState.capture(), torch.is_inference_mode_enabled()) == self.thread
        assert suspended_greenlets() == []
