"""The repeated blocks of a model, which are calibrated and quantized one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..forwards.calls import Call, run_call
from ..forwards.lockstep import Block
from ..modules import norm_candidates
from .expert_groups import MixtureWatch
from .mixtures import Mixture


def find_blocks(model: nn.Module) -> list[Block]:
    """The outermost repeated blocks, in module order: children of ModuleLists, or of Sequentials of one class.

    A list counts when it has at least two children, all of them more than a Linear and each with a Linear inside.
    Nothing found: the whole model is one block, named "".
    """
    found: list[Block] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(block.name + ".") or name == block.name for block in found)
        if inside or not _repeats(module):
            continue
        prefix = f"{name}." if name else ""
        found.extend(Block(prefix + leaf, child) for leaf, child in module.named_children())
    return found or [Block("", model)]


def _repeats(module: nn.Module) -> bool:
    children = list(module.children())
    if len(children) < 2 or not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    if isinstance(module, nn.Sequential) and len({type(child) for child in children}) > 1:
        return False
    return all(
        not isinstance(child, nn.Linear) and any(isinstance(m, nn.Linear) for m in child.modules())
        for child in children
    )


def blocks_around(model: nn.Module, blocks: Sequence[Block], owners: Iterable[str]) -> list[Block]:
    """``blocks`` with those inside the modules called ``owners`` replaced by the largest module around that holds no other."""

    def holds(outer: str, name: str) -> bool:
        return not outer or f"{name}.".startswith(f"{outer}.")

    owners = list(owners)
    kept = [block for block in blocks if not any(holds(owner, block.name) for owner in owners)]
    names = []
    for owner in owners:
        parts = owner.split(".") if owner else []
        for depth in range(len(parts) + 1):
            name = ".".join(parts[:depth])
            never_called = isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict))
            if not never_called and not any(holds(name, block.name) for block in kept):
                break
        names.append(name)
    return [*kept, *(Block(name, model.get_submodule(name)) for name in dict.fromkeys(names))]


def blocks_found(model: nn.Module, call: Call, mixtures: Sequence[Mixture]) -> list[Block]:
    """The repeated blocks; where these are the experts of a model's only layer, what is around them."""
    blocks = find_blocks(model)
    spread = [m for m in mixtures if m.routers and sum(bool(linears_of(block, m.linears)) for block in blocks) > 1]
    if not spread:
        return blocks
    watch = MixtureWatch(spread)
    with watch.on(norm_candidates(model)), torch.no_grad():
        run_call(model, call.on_copies(), 0)
    return blocks_around(model, blocks, [mixture.owner for mixture in watch.shown()])


def blocks_named(model: nn.Module, names: Sequence[str]) -> list[Block]:
    if isinstance(names, str):
        raise TypeError(f"blocks={names!r}: a sequence of module names is needed")
    modules = dict(model.named_modules(remove_duplicate=False))
    for position, name in enumerate(names):
        if name not in modules:
            raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}")
        for other in names[:position]:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(f"blocks: {other!r} and {name!r} overlap")
    return [Block(name, modules[name]) for name in names] or [Block("", model)]


T = TypeVar("T")


def linears_of(block: Block, linears: Mapping[str, T]) -> dict[str, T]:
    """Those of ``linears`` that are the block or lie below it."""
    prefix = f"{block.name}." if block.name else ""
    return {name: module for name, module in linears.items() if name == block.name or name.startswith(prefix)}
