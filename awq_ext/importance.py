"""Importance: how much the model's output reacts to an error that a Linear makes on one row of its input (``objective="model"``).

An error d [N] of a row moves the model's logits by J d, and costs d^T J^T F J d / 2 of KL divergence to second order, F being the
Fisher information of the softmax. With the trace of J^T F J for its weight, each row's squared error adds up to what the model
loses, as far as one number a row can say it (arXiv 2505.07004 has one a row and group of outputs). A backward of each batch
estimates it: with random signs e and g = F^(1/2) e, the squared entries of J^T g sum to that trace on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from . import interrupt
from .batches import Call
from .blocks import CalibrationError, copy_inputs, run_call
from .calibrate import BlockSurvey
from .evaluate import logits_of, targets_of
from .weighting import RowWeights

# Rows count at least this share of the mean: one that the output does not react to still shows what inputs look like.
_LEAST = 1e-4
_HINT = ' objective="model" runs it with gradients: objective="layer" needs none.'


def find_row_weights(
    model: nn.Module, calls: Sequence[Call], surveys: Sequence[BlockSurvey], progress: bool = False
) -> RowWeights:
    """Weights for every input that quantizing looks at: one forward and one backward of the whole model a batch.

    A row's weight adds up over the Linears that read it. Raises CalibrationError for a model that cannot be differentiated.
    """
    parts = [[(name, s.linears[name]) for name in part] for s in surveys for g in s.groups for part in g.inputs]
    linears = [linear for part in parts for _, linear in part]
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, list[Tensor]]] = []
    bar = tqdm(calls, desc="weighing rows", unit="batch", leave=False, disable=not progress)
    with _without_gradients(model), bar:
        for index, call in enumerate(bar):
            squares = _squared_gradients(model, call, index, linears, generator)
            found.append({part[0][0]: _added([squares[linear] for _, linear in part]) for part in parts})
    for name in (part[0][0] for part in parts):
        _normalize([rows for mine in found for rows in mine[name]])
    return RowWeights(found, calls)


def _added(squares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sums over Linears that read the same rows, call by call."""
    return [torch.stack(rows).sum(0) for rows in zip(*squares, strict=False)]


def _normalize(rows: Sequence[Tensor]) -> None:
    """In place: mean 1 over the rows that count (those that do not are below 0), none below ``_LEAST``."""
    every = torch.cat([*rows, torch.zeros(0)])
    counted = every[every >= 0]
    mean = float(counted.mean()) if len(counted) else 0.0
    if not mean > 0:
        for one in rows:
            one.fill_(1.0)
        return
    raised = float((counted / mean).clamp_min(_LEAST).mean())
    for one in rows:
        one.div_(mean).clamp_min_(_LEAST).div_(raised)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for its gradient, so that autograd keeps no inputs for it."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _squared_gradients(
    model: nn.Module, call: Call, index: int, linears: Sequence[nn.Linear], generator: torch.Generator
) -> dict[nn.Linear, list[Tensor]]:
    """For each call of each Linear, a row's squared gradient summed over outputs: fp32 [rows], -1 where the row does not count."""
    outputs: dict[nn.Linear, list[Tensor]] = {linear: [] for linear in linears}
    running = True

    def see(module: nn.Linear, args: Any, output: Tensor) -> Tensor:
        leaf = not output.requires_grad
        output.requires_grad_()
        if running:
            outputs[module].append(output)
        # what comes next may work in place, which a leaf would refuse
        return output * 1 if leaf else output

    # hooked during the backward too: a checkpointed part of the model runs once more then, and must do the same
    with ExitStack() as stack, torch.enable_grad():
        for linear in linears:
            stack.callback(linear.register_forward_hook(see).remove)
        copied = Call(copy_inputs(call.args), copy_inputs(call.kwargs), call.hint + _HINT)
        targets, cotangents = _cotangents(run_call(model, copied, index), call, generator)
        running = False
        if not targets:
            raise CalibrationError(f"nothing that calibration batch {index} returned can be differentiated.{_HINT}")
        interrupt.check()
        flat = [output for mine in outputs.values() for output in mine]
        try:
            found = iter(torch.autograd.grad(targets, flat, cotangents, allow_unused=True))
        except RuntimeError as error:
            raise CalibrationError(f"no gradient of calibration batch {index}: {error}.{_HINT}") from error
    return {linear: [_squares(output, next(found), call) for output in mine] for linear, mine in outputs.items()}


def _squares(output: Tensor, gradient: Tensor | None, call: Call) -> Tensor:
    rows = output.shape[:-1]
    squares = torch.zeros(rows) if gradient is None else gradient.float().square().sum(-1).cpu()
    mask = call.row_mask(output)
    return squares.flatten() if mask is None else squares.masked_fill(~mask.cpu().view(rows), -1.0).flatten()


def _cotangents(result: Any, call: Call, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """What the model returned and F^(1/2) times random signs: F is the softmax's for logits, otherwise the identity."""
    logits = _logits(result, call)
    leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    given = [leaf for leaf in leaves if leaf.dim()] if logits is None else [logits]
    targets = [target for target in given if target.requires_grad]
    made = []
    for target in targets:
        # signs of rows times signs of columns are as good: the products of any two different ones are 0 on average
        rows, columns = (_signs(shape, generator, target) for shape in ((*target.shape[:-1], 1), target.shape[-1:]))
        values = rows * columns
        if logits is not None:
            # a = p^(1/2) e has the second moment diag(p), and a - p (1^T a) that of the softmax, diag(p) - p p^T
            chances = target.detach().float().softmax(-1)
            values = chances.sqrt().mul_(values)
            values -= chances.mul_(values.sum(-1, keepdim=True))
        mask = call.row_mask(target)
        made.append((values if mask is None else values * mask[..., None]).to(target.dtype))
    return targets, made


def _signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1).float().to(like.device)


def _logits(result: Any, call: Call) -> Tensor | None:
    """What the model returned if these are logits: by name, or a Tensor [B, T, V] with a place for every id [B, T] it was given."""
    found = logits_of(result)
    if found is None or not isinstance(result, (Tensor, tuple, list)):
        return found
    ids = targets_of(call)
    fits = ids is not None and ids.numel() and found.shape[:-1] == ids.shape and found.shape[-1] > int(ids.max())
    return found if fits else None
