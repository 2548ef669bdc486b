"""Importance of calibration rows: how much the model's output reacts to a Linear's error on one (``objective="model"``).

An error d [N] of a row moves the model's logits by J d, and costs d^T J^T F J d / 2 of KL divergence to second order, where F is
the Fisher information of the softmax. With weights of the trace of J^T F J, the squared errors of rows add up to what the model
loses, as far as one number per row can express it (arXiv 2505.07004 has one per row and group of outputs). A backward of a batch
estimates the trace: with random signs e and g = F^(1/2) e, the squared entries of J^T g sum to it on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..forwards.calls import CalibrationError, Call, run_call
from ..forwards.hooks import Hooks
from ..forwards.memory import SLACK, FreeMemory, release_free_memory
from ..forwards.outputs import float_tensors, logits_of, targets_of
from ..modules import output_embeddings
from ..survey.survey import BlockSurvey
from ..undo import interrupt
from .gradients import checkpointed, without_gradients
from .row_weights import PositionWeights, RowWeights, Weights, stretches_of

# The least weight of a row, as a share of the mean: a row that the output does not react to still shows what inputs look like.
_LEAST = 1e-4
_ROWS_AT_ONCE = 16
_EXPONENT = 0x7F800000  # the bits of an fp32's exponent
# Tensors of its widest layer that a block keeps for its backward, and makes in it, such as gate, up, what becomes of them, and the
# gradients of these.
_BLOCK_BACKWARD = 10
_HINT = ' objective="model" runs it with gradients: objective="layer" needs none.'


def find_weights(
    model: nn.Module,
    calls: Sequence[Call],
    surveys: Sequence[BlockSurvey],
    batches: int = 0,
    progress: bool = False,
    of_tokens: bool = False,
) -> Weights:
    """Find weights of the rows of every input that is calibrated, by forwards and backwards of the whole model.

    batches: how many to run, evenly spaced, of token ids one window each; rows of all batches then get the mean weight of their
    position. With 0, or if this leaves nothing out, every row gets its own weight. The weight of a row is the sum over the Linears
    that read it. Blocks keep only their inputs, and run once more in the backward. Raises CalibrationError for a model that cannot
    be differentiated, and with ``of_tokens`` for one that does not return logits for every token id that it is given.
    """
    parts = [[(name, s.linears[name]) for name in part] for s in surveys for g in s.groups for part in g.inputs]
    linears = [linear for part in parts for _, linear in part]
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, list[Tensor]]] = []
    read, free = _weighed(calls, batches), FreeMemory()
    bar = tqdm(read, desc="importance weights", unit="batch", leave=False, disable=not progress)
    with without_gradients(model), checkpointed([s.block.module for s in surveys], model), bar:
        for index in bar:
            squares = _squared_gradients(model, read[index], index, linears, generator, of_tokens)
            found.append({part[0][0]: _added([squares[linear] for _, linear in part]) for part in parts})
            free.release_if_grown()
    names = [part[0][0] for part in parts]
    if not all(read.get(index) is call for index, call in enumerate(calls)):
        return PositionWeights(_by_position({name: [rows for mine in found for rows in mine[name]] for name in names}))
    for name in names:
        _normalize([rows for mine in found for rows in mine[name]])
    return RowWeights([{name: [x.flatten() for x in rows] for name, rows in mine.items()} for mine in found], calls)


def weighing_bytes(model: nn.Module, calls: Sequence[Call], surveys: Sequence[BlockSurvey], batches: int = 0) -> int:
    """Estimate what :func:`find_weights` takes at its peak beside the model: the backward of the largest batch that it runs."""
    read = _weighed(calls, batches).values()
    share = max(call.elements for call in read) / max(calls[0].elements, 1)
    inputs = sum(one.input_bytes for one in surveys)
    block = _BLOCK_BACKWARD * max(one.widest_bytes for one in surveys)
    head = output_embeddings(model)
    width = head.weight.shape[0] if isinstance(head, nn.Linear) else 0
    # the logits, and what their backward begins with
    logits = 2 * width * (head.weight.element_size() if width else 0) * max(call.tokens for call in read)
    return int(share * inputs + logits + max(share * block, 4 * 4 * _ROWS_AT_ONCE * width) + SLACK)


def _weighed(calls: Sequence[Call], batches: int) -> dict[int, Call]:
    """Choose what is run backwards, by the number of the batch: ``batches`` (0: all, whole)."""
    return {index: _longest_window(calls[index]) if batches else calls[index] for index in _spaced(len(calls), batches)}


def _spaced(count: int, wanted: int) -> list[int]:
    """Choose ``wanted`` (0: all) numbers below ``count``, middles of equal parts, so that each kind of batches has its share."""
    wanted = min(wanted or count, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _longest_window(call: Call) -> Call:
    """Reduce a batch of token ids and masks [B, T] to the window in which most positions count; return any other as it is."""
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    if any(t.dim() != 2 or t.is_floating_point() or len(t) != len(tensors[0]) for t in tensors):
        return call
    if not tensors or len(tensors[0]) == 1:
        return call
    longest = int((call.masks[0] != 0).sum(1).argmax()) if call.masks else 0
    cut = lambda value: value[longest : longest + 1] if isinstance(value, Tensor) else value  # noqa: E731
    return Call(tuple(map(cut, call.args)), {name: cut(value) for name, value in call.kwargs.items()}, call.hint)


def _added(squares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add up over Linears that read the same rows, call by call."""
    return [torch.stack(rows).sum(0) for rows in zip(*squares, strict=False)]


def _normalize(rows: Sequence[Tensor]) -> None:
    """Make weights, in place, powers of 2 of about 1 on average over the rows that count (others are below 0).

    None is much below ``_LEAST``.
    """
    every = torch.cat([*(one.flatten() for one in rows), torch.zeros(0)])
    counted = every[every >= 0]
    mean = float(counted.mean()) if len(counted) else 0.0
    if not mean > 0:
        for one in rows:
            one.fill_(1.0)
        return
    raised = float((counted / mean).clamp_min(_LEAST).mean())
    for one in rows:
        one.div_(mean).clamp_min_(_LEAST).div_(raised)
        _round_to_powers(one)


def _round_to_powers(weights: Tensor) -> None:
    """Round weights > 0 to the nearest powers of 2, in place.

    A power of 2 times a number in bf16 is in bf16 too, so weighted rows of a bf16 model take one product in bf16, as rows without
    weights do. What is lost, a factor of 2^(1/2) at most, is less than one backward leaves uncertain.
    """
    # an fp32 without its mantissa is the power at or below it
    weights.mul_(2**0.5).view(torch.int32).bitwise_and_(_EXPONENT)


def _by_position(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Average the weights of each input over the stretches of a window (``stretches_of``), as :func:`_normalize` says."""
    tables = {}
    for name, seen in found.items():
        rows = [one for one in seen if one.dim() > 1]
        kept = [one >= 0 for one in rows]
        if not sum(int(one.sum()) for one in kept):
            continue
        weights = torch.cat([one[k] for one, k in zip(rows, kept, strict=True)])
        stretches = torch.cat([stretches_of(k)[k] for k in kept])
        # no stretch is skipped: windows begin at position 0
        means = torch.bincount(stretches, weights.double()) / torch.bincount(stretches)
        spread = means[stretches].float()
        _normalize([spread])
        tables[name] = torch.zeros(len(means)).index_copy_(0, stretches, spread)
    return tables


def _squared_gradients(
    model: nn.Module,
    call: Call,
    index: int,
    linears: Sequence[nn.Linear],
    generator: torch.Generator,
    of_tokens: bool,
) -> dict[nn.Linear, list[Tensor]]:
    """Return each row's squared gradient, summed over outputs, by Linear and call: fp32 [..., T], -1 where it does not count."""
    squares: dict[nn.Linear, list[Tensor]] = {linear: [] for linear in linears}
    running = True

    def see(linear: nn.Linear, output: Tensor) -> Tensor:
        leaf = not output.requires_grad
        output.requires_grad_()
        if running:
            rows = torch.zeros(output.shape[:-1])
            if (mask := call.row_mask(output)) is not None:
                rows.masked_fill_(~mask.cpu(), -1.0)
            squares[linear].append(rows)
            output.register_hook(lambda gradient: _add_squares(rows, gradient))
        # what comes next may work in place, which a leaf would refuse
        return output * 1 if leaf else output

    # hooks stay on in the backward: a checkpointed part of the model runs once more then, and must do the same
    with Hooks() as on, torch.enable_grad():
        for linear in linears:
            on.output(linear, partial(see, linear))
        result = run_call(model, call.on_copies(_HINT), index)
        running = False
        release_free_memory()  # what comes now is the peak
        if of_tokens and not _are_of_tokens(logits_of(result), call):
            raise CalibrationError(
                f"rows can be weighed in language models alone, and calibration batch {index} got no logits for every token id"
            )
        targets, cotangents = _cotangents(result, call, generator)
        if not targets:
            raise CalibrationError(f"nothing that calibration batch {index} returned can be differentiated.{_HINT}")
        interrupt.check()
        release_free_memory()
        try:
            torch.autograd.backward(targets, cotangents)
        except RuntimeError as error:
            raise CalibrationError(f"no gradient of calibration batch {index}: {error}.{_HINT}") from error
    return squares


def _add_squares(rows: Tensor, gradient: Tensor) -> None:
    """Add the squares of a gradient [..., T, N], summed over outputs, to the ``rows`` [..., T] that count."""
    # one reduction: a square in fp32 would be a copy of the gradient at twice its size
    found = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).square().cpu()
    rows.add_(found.masked_fill_(rows < 0, 0.0))


def _cotangents(result: Any, call: Call, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Return what can be differentiated in an output, and F^(1/2) times random signs for it; F is the identity but for logits."""
    logits = _logits(result, call)
    given = [leaf for leaf in float_tensors(result) if leaf.dim()] if logits is None else [logits]
    targets = [target for target in given if target.requires_grad]
    return targets, [_signed_root(target, call, generator, softmax=logits is not None) for target in targets]


def _signed_root(target: Tensor, call: Call, generator: torch.Generator, softmax: bool) -> Tensor:
    """Multiply F^(1/2) by random signs, for a tensor [..., V] that the model returned; 0 where a row does not count."""
    # signs of rows times signs of columns are as good: the products of any two different ones are 0 on average
    rows, columns = (_signs(shape, generator, target) for shape in ((*target.shape[:-1], 1), target.shape[-1:]))
    if (mask := call.row_mask(target)) is not None:
        rows *= mask[..., None]
    given, rows = target.detach().reshape(-1, len(columns)), rows.reshape(-1, 1)
    made = torch.empty_like(given)
    # some rows at a time: logits in fp32 would be the largest tensors of all
    for part, signs, into in zip(*(x.split(_ROWS_AT_ONCE) for x in (given, rows, made)), strict=True):
        values = columns.expand_as(part)
        if softmax:
            # a = p^(1/2) e has the second moment diag(p), and a - p (1^T a) that of the softmax, diag(p) - p p^T
            chances = part.float().softmax(-1)
            values = chances.sqrt().mul_(columns)
            values -= chances.mul_(values.sum(-1, keepdim=True))
        into.copy_(values * signs)
    return made.view(target.shape)


def _signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1).float().to(like.device)


def _logits(result: Any, call: Call) -> Tensor | None:
    """Return an output's logits: what it calls so, or a Tensor [B, T, V] with a place for every id [B, T] that went in; or None."""
    found = logits_of(result)
    named = not isinstance(result, (Tensor, tuple, list))
    return found if named or _are_of_tokens(found, call) else None


def _are_of_tokens(logits: Tensor | None, call: Call) -> bool:
    ids = targets_of(call)
    if logits is None or ids is None or not ids.numel():
        return False
    return logits.shape[:-1] == ids.shape and logits.shape[-1] > int(ids.max())
