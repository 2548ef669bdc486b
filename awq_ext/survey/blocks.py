"""The repeated blocks of a model, which are calibrated and quantized one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..forwards.calls import Call, run_call
from ..forwards.lockstep import Block
from ..modules import norm_candidates
from .expert_groups import MixtureWatch
from .mixtures import Mixture


def find_blocks(model: nn.Module) -> list[Block]:
    """Find the outermost repeated blocks, in module order: children of a ModuleList, or of a Sequential if all are of one class.

    There must be at least two, each of them more than a Linear and with a Linear inside. Of lists in a list (stages of layers) the
    inner children count. If nothing is found the whole model is one block, named "".
    """
    found: list[Block] = []
    taken: list[str] = []  # how the names begin of what lies in a module whose children are blocks
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in taken) or not _repeats(module):
            continue
        prefix = f"{name}." if name else ""
        taken.append(prefix)
        found.extend(Block(prefix + leaf, child) for leaf, child in _children(module))
    return found or [Block("", model)]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the children of a module, in place of lists and dictionaries, which nobody calls, their own."""
    for leaf, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{leaf}.{name}", inner) for name, inner in _children(child))
        else:
            yield leaf, child


def _repeats(module: nn.Module) -> bool:
    children = [child for _, child in _children(module)]
    if len(children) < 2 or not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    if isinstance(module, nn.Sequential) and len({type(child) for child in children}) > 1:
        return False
    return all(
        not isinstance(child, nn.Linear) and any(isinstance(m, nn.Linear) for m in child.modules())
        for child in children
    )


def blocks_around(model: nn.Module, blocks: Sequence[Block], owners: Iterable[str]) -> list[Block]:
    """Replace the blocks inside each module of ``owners`` (by name) by one: the largest module around that holds no other block."""

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
    """Find the repeated blocks, but where these are the experts of a model's only layer, the module around them."""
    blocks = find_blocks(model)
    spread = [m for m in mixtures if m.routers and sum(bool(linears_of(block, m.linears)) for block in blocks) > 1]
    if not spread:
        return blocks
    watch = MixtureWatch(spread)
    with watch.on(norm_candidates(model)), torch.no_grad():
        run_call(model, call.on_copies(), 0)
    return blocks_around(model, blocks, [mixture.owner for mixture in watch.routed()])


def blocks_named(model: nn.Module, names: Sequence[str]) -> list[Block]:
    """Return the modules called ``names`` as blocks, which must not overlap; for no names the whole model is one."""
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
    """Select those of ``linears``, by name, that are the block or lie below it."""
    prefix = f"{block.name}." if block.name else ""
    return {name: module for name, module in linears.items() if name == block.name or name.startswith(prefix)}
