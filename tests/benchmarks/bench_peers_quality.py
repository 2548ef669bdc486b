"""Perplexity, divergence and seconds beside llm-compressor (AWQModifier, GPTQModifier), AutoRound and AutoAWQ.

    python tests/benchmarks/bench_peers_quality.py MODEL_DIR --calib calib.txt --traffic code.txt de=de.txt
        [--llmcompressor PYTHON] [--autoround PYTHON] [--autoawq PYTHON] [--peers NAME] [--limit SECONDS] [--blocks N]
        [--group-size 64] [--json out.json]

All get the same calibration tokens, and are scored on the same windows by the same loop. PYTHON: the interpreter of an environment
with llmcompressor 0.14, with auto-round 0.16, or with autoawq 0.2.9 and transformers 4.51.3. A peer works in that environment, in a
process of its own that knows nothing of awq_ext: this very file, with --worker. Seconds are those of quantizing alone, model
loaded. --blocks: the model's first blocks alone, for peers that take long; times can then be compared, scores mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

PEERS = {
    "llmcompressor": ("llmcompressor awq", "llmcompressor gptq"),
    "autoround": ("auto-round light", "auto-round"),
    "autoawq": ("autoawq",),
}
# AutoRound's own recipes: steps a block
ROUNDS = {"auto-round light": 50, "auto-round": 200}
OURS = ("rtn", "awq", "gptq", "awq+gptq", "awq+gptq,propagate=quantized")


@torch.no_grad()
def score(model: Any, floats: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Perplexity, and mean KL divergence from the model ``floats``, over all tokens but each window's first.

    windows: int64 [count, length].
    """
    loss, divergence, count = 0.0, 0.0, 0
    for row in windows.split(1):
        found, wanted = (F.log_softmax(one(row, use_cache=False).logits[0, :-1].float(), -1) for one in (model, floats))
        loss += F.nll_loss(found, row[0, 1:], reduction="sum").item()
        divergence += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
        count += row[:, 1:].numel()
    return math.exp(loss / count), divergence / count


def scores(model: Any, floats: Any, texts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each text: windows int64 [count, length]."""
    found = {text: score(model, floats, torch.as_tensor(windows)) for text, windows in texts.items()}
    return {
        "perplexity": {text: one for text, (one, _) in found.items()},
        "divergence": {text: one for text, (_, one) in found.items()},
    }


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def work(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Quantize by one peer and score; runs in the peer's environment."""
    calib = torch.tensor(job["calib"])
    began = time.perf_counter()
    quantize = autoawq if name == "autoawq" else autoround if name in ROUNDS else llmcompressor
    model, seconds = quantize(name, job, calib)
    found = scores(model, load(job["model"]), job["traffic"])
    return found | {"seconds": seconds, "seconds_in_all": time.perf_counter() - began}


def llmcompressor(name: str, job: dict[str, Any], calib: torch.Tensor) -> tuple[Any, float]:
    """Its AWQModifier or GPTQModifier, 4 bits asymmetric, in groups."""
    # without an accelerator there is nothing to pin memory for, and torch refuses
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    from datasets import Dataset
    from llmcompressor import oneshot

    model = load(job["model"])
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": job["group_size"]}
    groups = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if name.endswith("gptq"):
        from llmcompressor.modifiers.gptq import GPTQModifier as Modifier
    else:
        from llmcompressor.modifiers.awq import AWQModifier as Modifier
    data = Dataset.from_dict({"input_ids": calib.tolist(), "attention_mask": torch.ones_like(calib).tolist()})
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=[Modifier(**groups)],
        num_calibration_samples=len(calib),
        max_seq_length=calib.shape[1],
    )
    return model, time.perf_counter() - began


def autoround(name: str, job: dict[str, Any], calib: torch.Tensor) -> tuple[Any, float]:
    """4 bits asymmetric, in groups; both recipes with 8 windows a step."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    model = load(job["model"])
    settings = {"bits": 4, "group_size": job["group_size"], "sym": False, "iters": ROUNDS[name], "batch_size": 8}
    if name == "auto-round light":
        settings["lr"] = 5e-3
    data = {"dataset": DataLoader(list(calib), batch_size=1), "seqlen": calib.shape[1], "nsamples": len(calib)}
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    began = time.perf_counter()
    quantized, _ = AutoRound(model, tokenizer=tokenizer, device_map="cpu", **settings, **data).quantize()
    return quantized, time.perf_counter() - began


def autoawq(name: str, job: dict[str, Any], calib: torch.Tensor) -> tuple[Any, float]:
    """Its quantize(), zero points on."""
    from awq import AutoAWQForCausalLM
    from transformers import PreTrainedTokenizerFast

    # the directory may name a tokenizer class of a newer transformers
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job["model"]) / "tokenizer.json"))
    model = AutoAWQForCausalLM.from_pretrained(job["model"], device_map="cpu", torch_dtype=torch.bfloat16)
    settings = {"zero_point": True, "q_group_size": job["group_size"], "w_bit": 4, "version": "GEMM"}
    began = time.perf_counter()
    model.quantize(
        tokenizer,
        quant_config=settings,
        calib_data=calib.tolist(),
        max_calib_samples=len(calib),
        max_calib_seq_len=calib.shape[1],
    )
    seconds = time.perf_counter() - began
    unpack(model.model)
    return model.model, seconds


def unpack(model: Any) -> None:
    """Its layers as torch Linears with the same values: its own forward needs an accelerator."""
    from awq.modules.linear import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, WQLinear_GEMM):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size)
            linear.weight.data = weight.T.contiguous()
            if layer.bias is not None:
                linear.bias.data = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear.to(next(model.parameters()).dtype))


def ours(job: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """The same by awq_ext."""
    import copy

    import awq_ext
    from awq_ext.cli import hf
    from awq_ext.cli.options.settings import parse_method

    model, tokenizer = load(job["model"]), hf.load_tokenizer(Path(job["model"]))
    found = {"float": scores(model, model, job["traffic"]) | {"seconds": 0.0}}
    for method in methods:
        fields = parse_method(method)
        label = fields.pop("label")
        quantized = copy.deepcopy(model)
        began = time.perf_counter()
        calib = torch.tensor(job["calib"]).split(1)
        awq_ext.quantize(quantized, calib, tokenizer=tokenizer, group_size=job["group_size"], progress=False, **fields)
        seconds = time.perf_counter() - began
        found[f"awq_ext {label}"] = scores(quantized, model, job["traffic"]) | {"seconds": seconds}
        print(f"awq_ext {label}: {found[f'awq_ext {label}']}", flush=True)
    return found


def in_its_environment(python: str, name: str, job: dict[str, Any], limit: float | None) -> dict[str, Any]:
    """What a worker process returns, or its error; it is given up after ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job_path, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(json.dumps(job))
        command = [python, __file__, "--worker", name, str(job_path), str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit:.0f} s"}
        if done.returncode or not result.exists():
            return {"error": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        return json.loads(result.read_text())


def markdown(found: dict[str, Any], texts: list[str]) -> str:
    """A line each: perplexities, mean divergence and seconds."""
    lines = ["| method | " + " | ".join(texts) + " | mean KL | seconds |", "|:--|" + "--:|" * (len(texts) + 2)]
    for name, row in found.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} |")
            continue
        cells = [f"{row['perplexity'][text]:.3f}" for text in texts]
        cells.append(f"{sum(row['divergence'].values()) / len(texts):.4f}")
        lines.append("| " + " | ".join([name, *cells, f"{row['seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def cut(model: Path, blocks: int, folder: Path) -> Path:
    """The first ``blocks`` blocks of a model, with its tokenizer, as a directory in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    del whole.model.layers[blocks:]
    whole.config.num_hidden_layers = blocks
    whole.config.layer_types = None  # one for each of the blocks that were there
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, job, result = sys.argv[2:5]
        Path(result).write_text(json.dumps(work(name, json.loads(Path(job).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, nargs="+", required=True)
    parser.add_argument("--traffic", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--method", nargs="+", default=list(OURS))
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--autoround", metavar="PYTHON")
    parser.add_argument("--autoawq", metavar="PYTHON")
    parser.add_argument("--peers", nargs="+", help="these of the peers alone, such as 'auto-round light'")
    parser.add_argument("--limit", type=float, help="give a peer up after so many seconds")
    parser.add_argument("--blocks", type=int, help="quantize the model's first blocks alone")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        race(args, cut(args.model, args.blocks, Path(folder)) if args.blocks else args.model)


def race(args: argparse.Namespace, model: Path) -> None:
    """Ours, then the peers, on the model in the directory ``model``."""
    from bench_linear import machine

    from awq_ext.cli import hf
    from awq_ext.cli.texts import windows

    tokenizer, count = hf.load_tokenizer(args.model), -(-args.tokens // args.seq)
    texts = hf.named_texts(args.traffic)
    job = {
        "model": str(model.absolute()),
        "group_size": args.group_size,
        "calib": torch.cat(windows(args.calib, tokenizer, args.samples, args.seq)).tolist(),
        "traffic": {
            name: torch.cat(windows([path], tokenizer, count, args.seq)).tolist() for name, path in texts.items()
        },
    }
    found = ours(job, args.method)
    for peer, names in PEERS.items():
        for name in names if getattr(args, peer) else ():
            if args.peers and name not in args.peers:
                continue
            found[name] = in_its_environment(getattr(args, peer), name, job, args.limit)
            print(f"{name}: {found[name]}", flush=True)
    print(markdown(found, list(texts)))
    if args.json:
        names = ("samples", "seq", "tokens", "group_size", "blocks")
        settings = {"model": args.model.absolute().name} | {name: getattr(args, name) for name in names}
        data = {"machine": machine(), "settings": settings, "results": found}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
