"""Say what llama.cpp calls the tensors and settings of one model, by the tables of the ``gguf`` package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import CheckpointError
from .architectures import ENTRIES
from .entry import Config, Entry, Value
from .rope import Rope

_STACK = ".weight.*"  # of experts that transformers has in one tensor
_HALF = "#"  # in the name of a part of a module
# what routers add to the scores of experts to choose among them
CORRECTION = (".e_score_correction_bias", ".expert_bias")


class Place(NamedTuple):
    """Where a module's tensors are in the file: under which name, and which of the experts in it they are."""

    name: str
    expert: int | None = None


def gguf() -> Any:
    """Import the gguf package; ImportError with one clear sentence without it."""
    try:
        import gguf as package
    except ImportError as error:
        raise ImportError('GGUF files need the gguf package: pip install "awq-ext[gguf]"') from error
    return package


def parted(name: str) -> tuple[str, str]:
    """Part the name of a tensor into those of its module and its leaf; the biases of routers, which are in none, have their own."""
    if name.endswith(CORRECTION):
        return name.removesuffix("_bias"), "bias"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def whole(module: str, leaf: str) -> str:
    """Invert :func:`parted`."""
    return f"{module}_{leaf}" if f"{module}_{leaf}".endswith(CORRECTION) else f"{module}.{leaf}"


def module_of(part: str) -> str:
    """Give the module of which :meth:`Architecture.parts` made ``part``, or the tensor of one of its."""
    return re.sub(rf"{_HALF}\d", "", part)


def key_of(path: str, name: str) -> str:
    """Give the key of metadata that gguf.Keys has at ``path``, for the architecture called ``name``."""
    return reduce(getattr, path.split("."), gguf().Keys).format(arch=name)


def entry_of(config: Config) -> Entry:
    """Find the entry of a config.json; CheckpointError that lists those there are."""
    if not config:
        raise CheckpointError("a GGUF file is read by the config.json beside it, which is missing")
    name = (config.get("architectures") or [None])[0]
    found = next((entry for entry in ENTRIES if name in entry.classes), None)
    if found is None:
        known = ", ".join(name for entry in ENTRIES for name in entry.classes)
        raise CheckpointError(
            f"GGUF files of {name} are not written or read here; those of {known} are: use another format"
        )
    return found


class Architecture:
    """That of a config.json. CheckpointError, naming it, for one without an entry, and for settings not known here."""

    def __init__(self, config: Config) -> None:
        self.entry = entry_of(config)
        self.config = config = self.entry.usual(config)
        package = gguf()
        self.kind = package.MODEL_ARCH[self.entry.key]
        self.name = package.MODEL_ARCH_NAMES[self.kind]
        self.blocks, self.heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self._table = package.get_tensor_name_map(self.kind, self.blocks)
        self._refuse_what_is_not_known()
        self.rope = Rope.of(config, self.entry, self.head)

    def _refuse_what_is_not_known(self) -> None:
        """Raise CheckpointError for what llama.cpp would compute differently without a word."""
        config = self.config
        _number(config, "hidden_size")
        for value in self.entry.values:
            _given(value, config)
        for need in self.entry.needs:
            if not need.met(config):
                raise CheckpointError(
                    f"GGUF: {need.name}={config.get(need.name, need.absent)!r} is not known here: llama.cpp's {self.name} computes "
                    f"with {str(need.of(config))[:120]}"
                )
        window = config.get("sliding_window")
        if self.entry.window == "off" and window and window < config["max_position_embeddings"]:
            # where it holds every text it changes nothing
            raise CheckpointError(
                f"GGUF: sliding_window={window}: llama.cpp's {self.name} attends to all tokens. Use another format, or, if no text "
                f"is longer than the window, set max_position_embeddings={window} in the float model's config.json"
            )
        if isinstance(self.entry.window, int):
            self._require_layers()

    def _require_layers(self) -> None:
        """Require a window, and the usual order of the layers that have it."""
        _number(self.config, "sliding_window")
        wanted, found = windows(self.config, self.entry.window), self.config.get("layer_types")
        every = self.config.get("sliding_window_pattern", self.entry.window)
        if found not in (None, wanted) or every != self.entry.window:
            raise CheckpointError(
                f"GGUF: layer_types={found}: in llama.cpp's {self.name} each {self.entry.window}. layer attends to all tokens, the "
                "others to those of a window"
            )

    @property
    def head(self) -> int:
        """Channels of an attention head."""
        return self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    @property
    def experts(self) -> int:
        """How many experts a block has; 0 where there are none."""
        for value in self.entry.values:
            if value.key == "LLM.EXPERT_COUNT":
                return int(_given(value, self.config))
        return 0

    def places(self) -> dict[str, Place]:
        """Map the names of the model's modules to their places in the file."""
        outside = (*self.entry.outside, *((self.entry.output,) if self.entry.head is not False else ()))
        leaves = [f"{self.entry.blocks}.{i}.{leaf}" for i in range(self.blocks) for leaf in self.entry.modules]
        found: dict[str, Place] = {}
        for name in (*outside, *leaves):
            for part, plain in self._named(name):
                # some are there only without the name of the model in the class
                there = self._table.get_name(plain) or self._table.get_name(plain.partition(".")[2])
                if there is None:
                    raise CheckpointError(
                        f"the gguf package has no name for {name} of llama.cpp's {self.name}: it is too old"
                    )
                if "*" in name:
                    found |= {part.replace("*", str(e)): Place(there, e) for e in range(self.experts)}
                    if _STACK in name:  # where they stay float, they are one tensor here too
                        found[part.replace(_STACK, "")] = Place(there)
                else:
                    found[part] = Place(there)
        return found

    def _named(self, name: str) -> list[tuple[str, str]]:
        """Give the parts of a module, and what they are called in the table."""
        for leaf, halves in self.entry.halves.items():
            if name.endswith(leaf):
                return [(f"{name}{_HALF}{i}", name.removesuffix(leaf) + half) for i, half in enumerate(halves)]
        for leaf, other in self.entry.called.items():
            if name.endswith(leaf):
                return [(name, name.removesuffix(leaf) + other)]
        return [(name, name.replace(".*", "").removesuffix(".weight"))]

    def parts(self, module: str) -> list[str]:
        """Name what is in one tensor each of the file: the module, or its first and second half of rows."""
        plain = re.sub(r"\.weight\.\d+$", "", module)
        if any(plain.endswith(leaf.removesuffix(_STACK)) for leaf in self.entry.halves):
            return [f"{module}{_HALF}{i}" for i in range(2)]
        return [module]

    def rows(self, name: str, count: int, back: bool = False) -> Tensor | None:
        """Give the order of a module's rows there (``back``: of theirs here); None where it is the same.

        Where llama.cpp turns the channels 2i and 2i + 1 of a head by one angle, and transformers i and i + d/2, the rows of q and k
        are put side by side. Where a layer has q, k and v of one head after the other, those of all heads are put together.
        A half has half of its module's.
        """
        if _HALF in name:
            half = torch.arange(count // 2)
            return None if back else half + (count // 2) * int(name[-1])
        if self.entry.joined and name.endswith(self.entry.joined):
            if count % (3 * self.heads):
                raise CheckpointError(f"{name} has {count} rows, which {self.heads} heads do not divide")
            order = torch.arange(count).view(self.heads, 3, -1).transpose(0, 1).flatten()
            return order.argsort() if back else order
        found = re.search(r"\.([qk])_proj$", name)
        if not self.entry.pairs or found is None:
            return None
        heads = self.heads if found[1] == "q" else self.kv_heads
        if count % (2 * heads):
            raise CheckpointError(f"{name} has {count} rows, which {heads} heads do not divide")
        order = torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()
        return order.argsort() if back else order

    def there(self, name: str, tensor: Tensor) -> Tensor:
        """Make of a float tensor what the file has of it: rows in their order, weights of norms with what is added to them."""
        if self.squeezed(name):
            return tensor.squeeze(1)
        tensor = tensor.T if self.transposed(name) else tensor
        of = max(tensor.dim() - 2, 0)  # rows of each expert, where there are experts
        rows = self.rows(parted(name)[0], tensor.shape[of])
        tensor = tensor if rows is None else tensor.index_select(of, rows)
        return tensor.float() + self.shift(name) if self.shift(name) else tensor

    def here(self, name: str, tensor: Tensor) -> Tensor:
        """Invert :meth:`there`; of a norm exactly but for what 1 + w lost in float32, so that 1 + w is the same again."""
        if self.squeezed(name):
            return tensor.unsqueeze(1)
        tensor = tensor.T if self.transposed(name) else tensor
        rows = self.rows(parted(name)[0], tensor.shape[0], back=True)
        tensor = tensor if rows is None else tensor[rows]
        return tensor - self.shift(name) if self.shift(name) else tensor

    def squeezed(self, name: str) -> bool:
        """Tell whether a tensor is [N, 1, K] here, and [N, K] there."""
        return bool(self.entry.squeezed) and name.endswith(f"{self.entry.squeezed}.weight")

    def transposed(self, name: str) -> bool:
        """Tell whether a tensor is the other way round there."""
        return any(name.endswith(f"{leaf}.weight") for leaf in self.entry.transposed)

    def shift(self, name: str) -> float:
        """Tell what is added to a tensor."""
        return self.entry.shift if name.endswith("norm.weight") else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Make those that no file of transformers has."""
        return self.rope.tensors()

    def describe(self, writer: Any) -> None:
        """Add the metadata without which llama.cpp cannot run the model."""
        config = self.config
        writer.add_block_count(self.blocks)
        writer.add_context_length(_number(config, "max_position_embeddings"))
        writer.add_embedding_length(_number(config, "hidden_size"))
        writer.add_feed_forward_length(_number(config, "intermediate_size"))
        writer.add_head_count(self.heads)
        kinds = config["layer_types"] if self.entry.some_attention else []
        by_layer = [self.kv_heads if kind == "full_attention" else 0 for kind in kinds]
        writer.add_head_count_kv(by_layer or self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_vocab_size(_number(config, "vocab_size"))
        self.rope.describe(writer, gguf())
        if isinstance(self.entry.window, int):
            writer.add_sliding_window(_number(config, "sliding_window"))
        for value in self.entry.values:
            if (given := _given(value, config)) is not None:
                self._add(writer, value.key, value.kind(given))
        for key, value in self.entry.always.items():
            self._add(writer, key, value(config) if callable(value) else value)

    def _add(self, writer: Any, key: str, value: float) -> None:
        add = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}[type(value)]
        add(key_of(key, self.name), value)


def _given(value: Value, config: Config) -> float | None:
    """Read a setting of config.json; None only for one that may be left out."""
    said = [config[name] for name in value.names if name in config]  # None is something else than nothing
    found = next((one for one in said if one is not None), None if said else value.absent)
    missing = found is None and not value.optional
    if missing or (value.kind is int and found is not None and (not isinstance(found, int) or found < 1)):
        raise CheckpointError(f"config.json: {value.names[0]}={found!r}: a positive number is needed")
    return found


def windows(config: Config, every: int) -> list[str]:
    """Make layer_types where each ``every``-th layer attends to all tokens, the others to those of a window."""
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(config["num_hidden_layers"])]


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name}={value!r}: a positive number is needed")
    return value
