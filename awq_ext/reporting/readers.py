"""Know who loads directories of each layout, and with which command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# what every command and function writes unless told otherwise: loaded by vLLM and by Transformers
DEFAULT_FORMAT = "awq"

# what quantization_config says in the layouts whose name it is not
_METHODS = {
    "native": "awq_ext",
    **dict.fromkeys(("gemv", "gemv_fast", "llm-awq"), "awq"),
    "compressed-tensors-w8a8": "compressed-tensors",
}


@dataclass(frozen=True)
class Reader:
    """A program that loads a directory, the command for it (``{}`` is the directory), and what it needs installed."""

    name: str
    command: str
    language: str = "bash"
    needs: str = ""


_VLLM = Reader("vLLM", "vllm serve {}")
_AUTO = 'transformers.AutoModelForCausalLM.from_pretrained("{}")'
_OURS = Reader("awq_ext", 'awq_ext.from_pretrained("{}")', "python")
_REGISTERED = Reader("Transformers on awq_ext", f"awq_ext.register_with_transformers(); {_AUTO}", "python")
_AUTOAWQ = Reader("AutoAWQ, on a GPU", 'awq.AutoAWQForCausalLM.from_quantized("{}")', "python")
_FLOAT = (_VLLM, Reader("Transformers", _AUTO, "python"))
_OTHERS = {
    "awq": (_VLLM, Reader("Transformers", _AUTO, "python", "pip install gptqmodel")),
    "compressed-tensors": (_VLLM, Reader("Transformers", _AUTO, "python", "pip install compressed-tensors")),
    "compressed-tensors-w8a8": (_VLLM, Reader("Transformers", _AUTO, "python", "pip install compressed-tensors")),
    "gptq": (_VLLM, Reader("Transformers", _AUTO, "python", "pip install gptqmodel optimum")),
    "gemv": (_AUTOAWQ,),
    "gemv_fast": (_AUTOAWQ,),
    "llm-awq": (Reader("TinyChat", "python -m tinychat.demo --load_quant {}"),),
    "gguf": (Reader("llama.cpp", "llama-cli -m {}/model.gguf"),),
    "mlx": (Reader("mlx-lm", "mlx_lm.generate --model {} --prompt Hello", "bash", "pip install mlx-lm"),),
    "modelopt": (Reader("TensorRT-LLM, on a GPU", "trtllm-serve {}"),),
}
# who loads symmetric layers of a layout, and refuses zero points
_SYMMETRIC_ONLY = {"gptq": (_VLLM,)}


def rounded(format: str) -> tuple[int, ...]:
    """Tell the bits of layers whose activations every program that loads a layout rounds to 8 bits."""
    return (8,) if format == "compressed-tensors-w8a8" else ()


def quant_method(format: str) -> str:
    """Tell what config.json calls a layout."""
    return _METHODS.get(format, format)


def readers(format: str, zero_points: bool = False) -> tuple[Reader, ...]:
    """List the programs that load directories of a layout, other tools first; "float": of a model that is not quantized.

    zero_points: whether any layers have them.
    """
    if format == "float":
        return _FLOAT
    # methods that register_with_transformers takes over unless told otherwise
    ours = (_OURS, _REGISTERED) if quant_method(format) in ("awq", "awq_ext", "modelopt") else (_OURS,)
    refuse = _SYMMETRIC_ONLY.get(format, ()) if zero_points else ()
    return (*(reader for reader in _OTHERS.get(format, ()) if reader not in refuse), *ours)


def zero_points_told(settings: Mapping[str, object]) -> bool:
    """Tell whether a quantization_config says that layers have zero points; those of few layouts do."""
    return settings.get("sym") is False


def loaders(format: str, directory: str, zero_points: bool = False) -> list[dict[str, str]]:
    """List who loads ``directory``, by which command, and what that needs, as plain values."""
    return [
        {"program": reader.name, "command": reader.command.format(directory), "needs": reader.needs}
        for reader in readers(format, zero_points)
    ]


def lines(format: str, directory: str, zero_points: bool = False) -> list[str]:
    """Say who loads ``directory`` and with which command, a program a line; for one that only awq_ext loads, that too."""
    found = [
        f"{reader.name}: {reader.command.format(directory)}" + (f"  ({reader.needs})" if reader.needs else "")
        for reader in readers(format, zero_points)
    ]
    return (
        found if format in _OTHERS else [*found, "no other tool knows the native layout; awq-ext convert makes others"]
    )
