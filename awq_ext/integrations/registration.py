"""Run quantized directories through Transformers' own from_pretrained on our kernels, and LoRA adapters of PEFT beside them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from . import transformers_models as huggingface

# quant_method of config.json
METHODS = ("awq", "awq_ext", "modelopt", "compressed-tensors", "gptq")
DEFAULT_METHODS = ("awq", "awq_ext", "modelopt")


def register_with_transformers(methods: str | Iterable[str] = DEFAULT_METHODS) -> None:
    """Make ``AutoModel*.from_pretrained(directory)`` run quantized directories on :class:`QuantLinear`, in this process.

    methods: the ``quant_method`` values of config.json to take over: "awq" (AutoAWQ's layouts, which Transformers 5 otherwise
        hands to gptqmodel), "awq_ext" (format="native") and "modelopt", which it does not know; on demand "compressed-tensors"
        and "gptq", which it hands to other packages.
    The rest of Transformers stays as it is: ``generate``, ``device_map`` (the quantized layers on one device; none on disk),
    ``model.dequantize()``, and ``model.save_pretrained``, which writes the layout that was loaded (Transformers 5; older ones
    refuse: use :func:`awq_ext.save_pretrained`). May be called again, to add methods.
    Raises ImportError without transformers, ValueError for an unknown method. Loading then raises CheckpointError for
    what :func:`awq_ext.from_pretrained` refuses.
    """
    wanted = [methods] if isinstance(methods, str) else list(methods)
    if unknown := [method for method in wanted if method not in METHODS]:
        raise ValueError(f"methods: {unknown[0]!r} is not known, choose among {', '.join(map(repr, METHODS))}")
    huggingface.transformers()
    from transformers.quantizers import auto

    from .quantizer import AwqExtConfig, AwqExtQuantizer

    for method in wanted:
        auto.AUTO_QUANTIZER_MAPPING[method] = AwqExtQuantizer
        # that of "awq" is part of Transformers' interface; the one of Transformers 4 refuses without AutoAWQ or a GPU
        if method != "awq" or find_spec("transformers.core_model_loading") is None:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AwqExtConfig


def register_with_peft() -> None:
    """Let PEFT put LoRA adapters beside int4 layers, in this process: plain ``LoraConfig``s, ``target_modules="all-linear"`` too.

    ``get_peft_model``, ``PeftModel.from_pretrained``, ``model.add_adapter`` and what is built on them (TRL) then work as with float
    models; the adapters that are saved are ordinary ones. Merging raises RuntimeError, which names the ways out. Other methods
    than LoRA, and other layers, stay as PEFT has them. May be called again. Raises ImportError without peft.
    """
    if find_spec("peft") is None:
        raise ImportError("LoRA adapters need peft, which is not installed: pip install peft")
    from .adapters import register

    register()
