"""One process of several that quantize a small model: ``python team_cases.py CASE FOLDER [OPTIONS]``.

Writes FOLDER/RANK.pt: all bits of the model, and its report without what is measured. After an exception it prints it, and
whether the model is what it was. OPTIONS, in JSON: settings of quantize(), and "fault": [KIND, RANK, BLOCK], what happens to that
process when it begins to solve its block: "kill" (SIGKILL), "stop" (SIGSTOP) or "raise".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import architectures
import models
import torch
from torch import distributed as dist
from torch import nn

import awq_ext
from awq_ext.pipeline.shared_run import SharedRun

FAST: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}
MEASURED = (
    "date",
    "seconds",
    "tuning_seconds",
    "calibration_seconds",
    "search_seconds",
    "planned_memory_bytes",
    "peak_memory_bytes",
)


def llama(**more: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Five batches of different lengths: none of 2 or 4 divides them."""
    case = models.make("llama")
    return case.model, [*case.batches, *models.token_batches((7, 11, 5))][:5], more


def padded(**more: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    model = transformers_model("Llama")
    batches = []
    for ids in models.token_batches((12, 12, 9, 12, 5)):
        mask = torch.ones_like(ids)
        mask[:, :2] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return model, batches, more


def mixture(**more: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Few rows: some experts get none in some batches, and some none at all."""
    torch.manual_seed(1)
    model = nn.Sequential(*(architectures.ExpertList(4) for _ in range(4)))
    return model, [torch.randn(3, architectures.HIDDEN) for _ in range(5)], more


def mixtral(**more: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    model = transformers_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    batches = []
    for ids in models.token_batches((12, 12, 9)):
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return model, batches, more


def transformers_model(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


CASES = {
    "llama": llama,
    "llama-quantized": lambda: llama(propagate="quantized", method="awq+gptq"),
    "llama-gptq": lambda: llama(method="gptq", fold="never"),
    "llama-whole": lambda: llama(blocks=[]),
    "llama-tuned": lambda: llama(method="awq+gptq", tune_scales=1),
    "llama-fake": lambda: llama(packed=False),
    "padded": lambda: padded(method="awq+gptq", weighed_batches=0),
    "padded-position": lambda: padded(method="awq+gptq", weighed_batches=2),
    "mixture": mixture,
    "mixture-quantized": lambda: mixture(propagate="quantized"),
    "mixtral": mixtral,
}


def outcome(model: nn.Module) -> dict[str, Any]:
    """All tensors of a quantized model, and its report without what is measured."""
    report = {name: value for name, value in model.awq_report.to_dict().items() if name not in MEASURED}
    return {"tensors": model.state_dict(), "report": report}


def quantized(case: str, **more: Any) -> nn.Module:
    model, batches, settings = CASES[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return awq_ext.quantize(model, batches, **FAST, **settings, **more)


def arrange(kind: str, rank: int, block: int) -> None:
    """Let something happen to process ``rank`` when it begins to solve a block."""
    solve = SharedRun.solve

    def faulty(run: SharedRun, one: Any, collected: Any) -> Any:
        if dist.get_rank() == rank and one.index == block:
            if kind == "raise":
                raise ArithmeticError(f"no scales for block {block}")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
        return solve(run, one, collected)

    SharedRun.solve = faulty


def main(case: str, folder: str, options: str = "{}") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = {"timeout": 60.0} | json.loads(options)
    if fault := settings.pop("fault", None):
        arrange(*fault)
    model, batches, more = CASES[case]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            awq_ext.quantize(model, batches, **FAST, **more, **settings)
    except Exception as error:
        after = model.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(after[name], one) for name, one in before.items())
        print(f"{type(error).__name__}: {error} | model {'as it was' if same else 'CHANGED'}", flush=True)
        os._exit(3)  # torch's own group would wait for the process that is gone
    torch.save(outcome(model), Path(folder) / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
