"""Journal: every change made to a user's model, so that all of it can be taken back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import interrupt


class Journal:
    """Records how to undo a change *before* making it; as a context manager it undoes all changes on any exception.

    Undoing twice does no harm, so an interrupt between the record and the change does none either. Restored tensors keep their
    identity and bits. Within the context a Ctrl-C comes before a change, or at the end when all is done or undone.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._held = ExitStack()

    def set_module(self, root: nn.Module, name: str, module: nn.Module) -> None:
        """Put ``module`` at the dotted ``name`` below ``root``."""
        interrupt.check()
        parent_name, _, leaf = name.rpartition(".")
        parent = root.get_submodule(parent_name)
        old = parent._modules[leaf]
        self._undo.append(lambda: parent._modules.__setitem__(leaf, old))
        parent._modules[leaf] = module

    @torch.no_grad()
    def write_tensor(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite a parameter or buffer in place."""
        interrupt.check()
        saved = tensor.detach().clone()
        self._undo.append(lambda: _overwrite(tensor, saved))
        _overwrite(tensor, values)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of any object; one that its class gave it is the class's again after an undo."""
        old = getattr(owner, name)
        static = inspect.getattr_static(type(owner), name, None)
        inherited = name not in vars(owner) and static is not None and not hasattr(static, "__set__")
        self._undo.append((lambda: delattr(owner, name)) if inherited else (lambda: setattr(owner, name, old)))
        setattr(owner, name, value)

    def replace_parameter(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Put ``module`` where ``owner`` holds the parameter ``name``."""
        self._keep_names(owner)
        del owner._parameters[name]
        owner._modules[name] = module

    def put_parameter(self, owner: nn.Module, name: str, parameter: nn.Parameter, order: Sequence[str]) -> None:
        """Put ``parameter`` where ``owner`` holds the module ``name``; ``order``: the names of the owner's parameters, in order."""
        self._keep_names(owner)
        held = owner._parameters | {name: parameter}
        del owner._modules[name]
        owner._parameters.clear()
        owner._parameters.update((key, held[key]) for key in sorted(held, key=order.index))

    def _keep_names(self, owner: nn.Module) -> None:
        parameters, modules = dict(owner._parameters), dict(owner._modules)

        def restore() -> None:  # whole dictionaries: the order of names is part of the model
            for held, before in ((owner._parameters, parameters), (owner._modules, modules)):
                held.clear()
                held.update(before)

        self._undo.append(restore)

    def __len__(self) -> int:
        """Count the changes recorded so far: a mark to roll back to."""
        return len(self._undo)

    def rollback(self, mark: int = 0) -> None:
        """Take back every change, the last one first; with ``mark`` only those since the journal had that length."""
        while len(self._undo) > mark:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Journal:
        self._held.enter_context(interrupt.held())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if kind is not None:
                self.rollback()


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    # a model that was made in inference mode can be written in that mode alone
    with torch.no_grad(), torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(values)
