"""Calibration samples in the forms that tokenizers, data sets and chats have: rows of token ids, and the texts in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

# Fields of rows of texts, in the order in which they are looked for.
TEXT_FIELDS = ("text", "messages", "conversations", "prompt")
# ShareGPT's names of who speaks -> those of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of messages, {role, content} or ShareGPT's {from, value}."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(one, Mapping) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
            for one in value
        )
    )


def has_text(row: Mapping[str, Any], field: str | None = None) -> bool:
    """Tell whether a row holds a text or a chat under ``field``, or one of the usual names."""
    names = TEXT_FIELDS if field is None else (field,)
    return any(isinstance(row.get(name), str) or is_chat(row.get(name)) for name in names)


def unread_file(sample: Any) -> str:
    """Say how to read a file whose name is given in place of its text; "" for what names no file that is there."""
    # no path is longer (PATH_MAX of linux/limits.h), and texts may have gigabytes
    named = isinstance(sample, os.PathLike) or (isinstance(sample, str) and len(sample) <= 4096)
    if not named or not os.path.isfile(sample):
        return ""
    return f"is the name of a file, not its text: read it first, [pathlib.Path({os.fspath(sample)!r}).read_text()]"


def text_of(row: Any, tokenizer: Any, place: str, field: str | None = None) -> tuple[str, bool]:
    """Return the text of a row, and whether the chat template made it, which then has put the special tokens there.

    A row is a str, a chat, or a mapping that holds one under ``field`` (None: "text", "messages", "conversations", or "prompt" with
    its "completion"). ValueError, naming ``place`` and what the row has, for any other.
    """
    if isinstance(row, str):
        return row, False
    if is_chat(row):
        return _chat(row, tokenizer, place), True
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is a {type(row).__name__}: a text, a chat or an object that holds one is needed")
    if field is not None and field not in row:
        raise ValueError(f"{place} has no field {field!r}: it has {sorted(map(str, row))}")
    name = field or next((one for one in TEXT_FIELDS if row.get(one) is not None), None)
    if name is None:
        wanted = ", ".join(map(repr, TEXT_FIELDS[:-1]))
        raise ValueError(
            f"{place} has neither of {wanted} or 'prompt': it has {sorted(map(str, row))}; name the field of its text "
            "(--field NAME; in Python rename it to text)"
        )
    value, completion = row[name], row.get("completion") if name == "prompt" else None
    if completion is not None and is_chat(value) and is_chat(completion):
        value = [*value, *completion]
    elif isinstance(value, str) and isinstance(completion, str):
        value += completion
    if isinstance(value, str) or is_chat(value):
        return text_of(value, tokenizer, place)
    raise ValueError(f"{place}: {name!r} is a {type(value).__name__}, neither a string nor a list of messages")


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, place: str) -> str:
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"{place} is a chat: a tokenizer with a chat template is needed (tokenizer=)")
    if not getattr(tokenizer, "chat_template", True):
        raise ValueError(
            f"{place} is a chat, and this model's tokenizer has no chat template: give rows with a field 'text', or a "
            "tokenizer that has one (in Python, tokenizer.chat_template)"
        )
    read = [
        one if "role" in one else {"role": _ROLES.get(one["from"], one["from"]), "content": one["value"]}
        for one in messages
    ]
    try:
        return tokenizer.apply_chat_template(read, tokenize=False)
    except Exception as error:  # a template is a program of the model's
        raise ValueError(f"{place}: the tokenizer's chat template refuses its messages: {error}") from error


def is_ids(value: Any) -> bool:
    """Tell whether a value is a list of token ids, or of such lists."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, int) and not isinstance(one, bool) for one in value) or all(map(is_ids, value))


def rows_of_ids(value: list[Any]) -> list[Tensor]:
    """Make batches int64 [1, T] of a list of token ids, or one [B, T] of lists of one length; of others one for each."""
    if not isinstance(value[0], list):
        return [torch.tensor([value])]
    if len({len(row) for row in value}) == 1:
        return [torch.tensor(value)]
    return [torch.tensor([row]) for row in value]


def rows_of_mapping(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give lists and one-dimensional tensors of a tokenizer's row a batch dimension; lists of different length, a batch each."""
    ids = {name: value for name, value in row.items() if name.endswith("input_ids")}
    if not any(is_ids(value) or (isinstance(value, Tensor) and value.dim() == 1) for value in ids.values()):
        yield dict(row)
        return
    first = next(iter(ids.values()))
    count = len(first)
    ragged = isinstance(first, list) and isinstance(first[0], list) and len({len(one) for one in first}) > 1
    if not ragged:
        yield {name: _batched(value) for name, value in row.items()}
        return
    for index in range(count):
        mates = {n: v for n, v in row.items() if isinstance(v, (list, Tensor)) and len(v) == count}
        yield {name: _batched(value[index]) for name, value in mates.items()}


def _batched(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[None] if value.dim() == 1 else value
    if not isinstance(value, list) or not value:
        return value
    inner = value[0]
    if isinstance(inner, Number):
        return torch.tensor([value])
    if isinstance(inner, list) and inner and isinstance(inner[0], Number) and len({len(one) for one in value}) == 1:
        return torch.tensor(value)
    return value


def rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Take a mapping of columns, as a tokenizer returns it for several texts, apart into rows; None for any other mapping."""
    known = [name for name in columns if name.endswith("input_ids") or name in TEXT_FIELDS]
    if not known:
        return None
    lead = columns[known[0]]
    whole = isinstance(lead, Tensor) and lead.dim() == 2
    nested = (
        isinstance(lead, (list, tuple))
        and len(lead) > 0
        and (isinstance(lead[0], str) or is_ids(lead[0]) or is_chat(lead[0]))
    )
    if not (whole or nested):
        return None
    names = [name for name, value in columns.items() if hasattr(value, "__len__") and len(value) == len(lead)]
    return [{name: columns[name][index] for name in names} for index in range(len(lead))]


Tokenizer = Callable[..., Any]


def token_ids(tokenizer: Tokenizer, text: str, **options: Any) -> Tensor:
    """Return the token ids [T] in whatever a tokenizer returns: a mapping with input_ids, a Tensor, a list.

    Tokenizers of transformers warn of more tokens than the model takes at once. Here texts are cut into windows, so they do not.
    """
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    ids = tokenizer(text, **quiet, **options)
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    return torch.as_tensor(ids, dtype=torch.long).reshape(-1)
