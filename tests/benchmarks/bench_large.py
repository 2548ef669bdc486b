"""A model quantized in memory and block by block from its files: time, peak of anonymous memory, and the same files after kills.

    python tests/benchmarks/bench_large.py make DIR            # random bf16 weights in the shape of Llama-3.2-1B: 2.5 GB, 5 shards
    python tests/benchmarks/bench_large.py run DIR OUT         # both ways, one after the other
    python tests/benchmarks/bench_large.py kill DIR OUT        # ... and again with SIGKILL at random moments, resumed each time

Memory is RssAnon of /proc/PID/status, which counts no mapped files, looked at every 10 ms; time is that of the whole process, with
imports. Each run is a process of its own. ``--windows 32`` takes as much text as is usual; ``--layers`` makes a smaller model.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

MEASURED = {"date", "seconds", "calibration_seconds", "search_seconds", "tuning_seconds"}
MEASURED |= {"planned_memory_bytes", "peak_memory_bytes"}


def make(folder: Path, layers: int) -> None:
    """Write a model of Llama-3.2-1B's shape, a layer at a time: this takes no memory either."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    generator, home, shards = torch.Generator().manual_seed(0), {}, {}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        shards.setdefault(1 + layer // 4, {})[name] = parameter.shape
    for number, names in shards.items():
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_weight(name, shape, generator) for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Gains that differ between channels, as in trained models; all else normal, of the usual size."""
    values = torch.randn(shape, generator=generator)
    return (values.mul(0.5).exp() if len(shape) == 1 else values.mul(0.02)).to(torch.bfloat16)


def work(way: str, source: Path, out: Path, windows: int, length: int) -> None:
    """Quantize in this process: "memory" or "streamed"."""
    import transformers

    import awq_ext

    size = json.loads((source / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    calib = [torch.randint(0, size, (1, length), generator=generator) for _ in range(windows)]
    if way == "streamed":
        awq_ext.quantize_checkpoint(source, out, calib, method="awq", group_size=128, overwrite=True)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    awq_ext.quantize(model, calib, method="awq", group_size=128, fold="always")
    awq_ext.save_pretrained(model, out, overwrite=True)


def started(way: str, options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, way, str(options.source), str(out)]
    return subprocess.Popen([*command, "--windows", str(options.windows), "--length", str(options.length)])


def watched(process: subprocess.Popen[bytes], limit: float = float("inf")) -> tuple[float, int]:
    """Wait for a process; its seconds, and its peak of RssAnon in bytes. After ``limit`` seconds it is killed."""
    start, peak, status = time.perf_counter(), 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        if time.perf_counter() - start > limit:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return time.perf_counter() - start, peak


def differing(a: Path, b: Path) -> list[str]:
    """Name the files that differ, the report compared without what is measured."""
    names = {file.name for file in (*a.iterdir(), *b.iterdir())} - {"awq_report.json"}
    odd = [n for n in names if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False))]
    reports = [json.loads((folder / "awq_report.json").read_text()) for folder in (a, b)]
    plain = [{name: value for name, value in one.items() if name not in MEASURED} for one in reports]
    return odd + (["awq_report.json"] if plain[0] != plain[1] else [])


def compare(options: argparse.Namespace) -> None:
    """Run both ways."""
    for way in ("memory", "streamed"):
        before = os.times()
        seconds, peak = watched(started(way, options, options.out / way))
        after = os.times()
        used = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
        told = json.loads((options.out / way / "awq_report.json").read_text())
        print(
            f"{way}: {seconds:.0f} s ({used:.0f} s of processor time), peak of anonymous memory {peak / 1e9:.2f} GB; "
            f"planned {told['planned_memory_bytes'] / 1e9:.2f} GB, told {told['peak_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    print(f"files that differ: {differing(options.out / 'memory', options.out / 'streamed') or 'none'}")


def kill(options: argparse.Namespace) -> None:
    """Kill the streamed run at random moments until one comes to its end, and compare with the run that was not."""
    out, chance = options.out / "killed", random.Random(options.seed)
    shutil.rmtree(out, ignore_errors=True)
    for attempt in range(100):
        limit = chance.uniform(0.2, 1.0) * options.every if attempt < options.kills else float("inf")
        process = started("streamed", options, out)
        seconds, peak = watched(process, limit)
        done = sorted(file.name for file in Path(f"{out}.partial").glob("block-*"))
        print(
            f"run {attempt + 1}: {seconds:.0f} s, exit {process.returncode}, peak {peak / 1e9:.2f} GB, {len(done)} blocks"
        )
        if process.returncode == 0:
            break
    print(f"files that differ: {differing(options.out / 'streamed', out) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "kill", "memory", "streamed"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=float, default=120, help="seconds after which a run is killed at the latest")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "make":
        make(options.source, options.layers)
    elif options.what in ("memory", "streamed"):
        work(options.what, options.source, options.out, options.windows, options.length)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        {"run": compare, "kill": kill}[options.what](options)


if __name__ == "__main__":
    main()
