"""What is said of an architecture of llama.cpp: its classes, modules and settings, and what it takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
ABSENT = object()


@dataclass(frozen=True)
class Value:
    """A setting that both sides have: ``key`` of gguf.Keys, and its names in config.json, of which the first is written.

    absent: what transformers takes it for where config.json has none; None: an error. optional: None is a value, and not written.
    """

    key: str
    names: tuple[str, ...]
    kind: type = float
    absent: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class Need:
    """What llama.cpp takes for granted of config.json: another value is refused.

    wanted: the value, or a function that makes it of the config. absent: what transformers takes it for where config.json has none,
    if that is another.
    """

    name: str
    wanted: Any
    absent: Any = ABSENT

    def of(self, config: Config) -> Any:
        """Tell the value that is needed of this config."""
        return self.wanted(config) if isinstance(self.wanted, Callable) else self.wanted

    def met(self, config: Config) -> bool:
        """Tell whether the config has it, or says nothing else; None, False and an empty list are the same."""
        found, wanted = config.get(self.name, self.absent), self.of(config)
        return found is ABSENT or found is None or found == wanted or not (found or wanted)


@dataclass(frozen=True, eq=False)
class Entry:
    """One architecture.

    key: of gguf.MODEL_ARCH. classes: of transformers, in config.json's architectures; a file by itself is read as the first.
    modules: of a block, "*" for the number of an expert. biases: setting of config.json -> module that has a bias by it, or a
    tensor that is there by it. shift: what is added to the weight of each norm. pairs: llama.cpp turns the channels 2i and
    2i + 1 of a head by one angle, transformers i and i + d/2. window: None where there is no sliding window; "off" where
    config.json has one that counts and llama.cpp none; n where all layers but each n-th have one. head: whether there is an
    output layer beside the embedding: None for either way.
    """

    key: str
    classes: tuple[str, ...]
    model_type: str
    modules: tuple[str, ...]
    values: tuple[Value, ...] = (Value("Attention.LAYERNORM_RMS_EPS", ("rms_norm_eps",), absent=1e-6),)
    needs: tuple[Need, ...] = (Need("hidden_act", "silu"),)
    biases: Mapping[str, str] = field(default_factory=dict)
    shift: float = 0.0
    pairs: bool = False
    window: int | str | None = None
    head: bool | None = None
    # layers with a window have rotary embeddings of their own ("own"), or in config.json only, and the "same" in llama.cpp
    local_rope: str | None = None
    # partial_rotary_factor where config.json has none; None: whole heads are turned, whatever it says
    rotary_factor: float | None = None
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm")
    blocks: str = "model.layers"
    output: str = "lm_head"
    # sizes that config.json has by another name, or that follow from others of its settings
    names: Mapping[str, str | Callable[[Config], Any]] = field(default_factory=dict)
    # what is written besides, by its key, and must be so where a file is read: a value, or a function that makes it of the config
    always: Mapping[str, Any] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()  # layers whose float weights transformers has as [K, N]
    called: Mapping[str, str] = field(default_factory=dict)  # modules -> what the gguf package knows them as
    # modules that are two tensors there -> the names of these, as if each was a module
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    squeezed: str = ""  # convolution of which transformers has the weight as [N, 1, K], llama.cpp as [N, K] in float32
    # whether there is attention in some layers only: those that layer_types calls so; the others have no keys
    some_attention: bool = False
    joined: str = ""  # layer that has the rows of q, k and v of each head together, where llama.cpp has all of q first

    def usual(self, config: Config) -> dict[str, Any]:
        """Add the sizes that config.json has by other names."""
        found = dict(config)
        for name, how in self.names.items():
            if callable(how):
                # of sizes that are missing, which is said of them
                with suppress(KeyError, TypeError, ZeroDivisionError):
                    found[name] = how(found)
            elif config.get(how) is not None:
                found[name] = config[how]
        return found
