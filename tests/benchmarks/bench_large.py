"""A model quantized in memory and block by block from its files: time, peak of memory, and the same files after kills.

    python tests/benchmarks/bench_large.py make DIR            # random bf16 weights in the shape of Llama-3.2-1B: 2.5 GB, 5 shards
    python tests/benchmarks/bench_large.py run DIR OUT         # both ways, one after the other
    python tests/benchmarks/bench_large.py kill DIR OUT        # ... and again with SIGKILL at random moments, resumed each time
    python tests/benchmarks/bench_large.py several DIR OUT     # ... and by two processes of torchrun, one of which is killed once

Anonymous memory is RssAnon of /proc/PID/status, which counts no mapped files, looked at every 10 ms from outside; time is that of
the whole process, with imports. Each run is a process of its own. The plan is compared with the peak that the report tells, which
counts what the plan counts: in memory also the pages of files that are mapped. ``--windows 32`` takes as much text as is usual;
``--layers`` makes a smaller model. ``--json FILE`` adds what was found to a file.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awq_ext.evaluation.processor import this_processor

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


def work(way: str, source: Path, out: Path, options: argparse.Namespace) -> None:
    """Quantize in this process: "memory" or "streamed"; as one of several where the launcher says so."""
    import transformers

    import awq_ext
    from awq_ext.distributed.launch import launched

    size = json.loads((source / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    calib = [torch.randint(0, size, (1, options.length), generator=generator) for _ in range(options.windows)]
    settings = {"method": options.method, "group_size": 128}
    if way == "streamed":
        with launched():
            awq_ext.quantize_checkpoint(source, out, calib, timeout=options.timeout, overwrite=True, **settings)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    awq_ext.quantize(model, calib, fold="always", **settings)
    awq_ext.save_pretrained(model, out, overwrite=True)


def command(way: str, options: argparse.Namespace, out: Path) -> list[str]:
    given = {name: str(getattr(options, name)) for name in ("windows", "length", "method", "timeout")}
    return [__file__, way, str(options.source), str(out), *(word for k, v in given.items() for word in (f"--{k}", v))]


def started(way: str, options: argparse.Namespace, out: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *command(way, options, out)], env={**os.environ, **variables})


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def watched(process: subprocess.Popen[str], ends: Callable[[], bool] = lambda: False) -> tuple[float, int]:
    """Wait for a process; its seconds, and its peak of RssAnon in bytes. It is killed once ``ends()``."""
    start, peak = time.perf_counter(), 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        if ends():
            process.kill()
        time.sleep(0.01)
    return time.perf_counter() - start, peak


def differing(a: Path, b: Path) -> list[str]:
    """Name the files that differ, the report compared without what is measured."""
    names = {file.name for file in (*a.iterdir(), *b.iterdir())} - {"awq_report.json"}
    odd = [n for n in names if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False))]
    reports = [json.loads((folder / "awq_report.json").read_text()) for folder in (a, b)]
    plain = [{name: value for name, value in one.items() if name not in MEASURED} for one in reports]
    return odd + (["awq_report.json"] if plain[0] != plain[1] else [])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways."""
    found: dict[str, Any] = {}
    for way in ("memory", "streamed"):
        before = os.times()
        seconds, peak = watched(started(way, options, options.out / way))
        after = os.times()
        used = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
        report = json.loads((options.out / way / "awq_report.json").read_text())
        planned, told = report["planned_memory_bytes"], report["peak_memory_bytes"]
        found[way] = {
            "seconds": round(seconds, 1),
            "processor_seconds": round(used, 1),
            "calibration_seconds": round(report["calibration_seconds"], 1),
            "search_seconds": round(report["search_seconds"], 1),
            "anonymous_peak": peak,
            "planned": planned,
            "told_peak": told,
        }
        print(
            f"{way}: {seconds:.0f} s ({used:.0f} s of processor time), peak of anonymous memory {peak / 1e9:.2f} GB; "
            f"planned {planned / 1e9:.2f} GB, told {told / 1e9:.2f} GB: {planned / told - 1:+.1%}, and "
            f"{(planned - told) / peak:+.1%} of the anonymous peak",
            flush=True,
        )
    found["differing"] = differing(options.out / "memory", options.out / "streamed")
    print(f"files that differ: {found['differing'] or 'none'}")
    return found


def finished(out: Path) -> int:
    """Count the blocks that are finished in a work directory."""
    return len(list(Path(f"{out}.partial").glob("block-*")))


class At:
    """A moment of a run: so many blocks are finished, and a share of the time of one more is over."""

    def __init__(self, out: Path, blocks: float, seconds_of_block: float) -> None:
        self._out, self._blocks = out, int(blocks)
        self._wait = (blocks - int(blocks)) * seconds_of_block
        self._since = float("inf")

    def __call__(self) -> bool:
        """Whether it has come."""
        now = time.perf_counter()
        if self._since == float("inf") and finished(self._out) >= self._blocks:
            self._since = now
        return now - self._since > self._wait


def kill(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the streamed run at random moments until it comes to its end, and compare with the run that was not."""
    out, chance = options.out / "killed", random.Random(options.seed)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    report = json.loads((options.out / "streamed" / "awq_report.json").read_text())
    blocks = json.loads((options.source / "config.json").read_text())["num_hidden_layers"]
    moments = sorted(chance.uniform(0, blocks + 0.1) for _ in range(options.kills))
    runs = []
    for moment in [*moments, float("inf")]:
        ends = (
            At(out, moment, options.block_seconds or report["seconds"] / blocks)
            if moment < float("inf")
            else lambda: False
        )
        process = started("streamed", options, out)
        seconds, peak = watched(process, ends)
        runs.append({"seconds": round(seconds, 1), "exit": process.returncode, "blocks": finished(out), "peak": peak})
        print(f"run {len(runs)}, to be killed after {moment:.2f} blocks: {runs[-1]}", flush=True)
        if process.returncode == 0:
            break
    found = {"runs": runs, "differing": differing(options.out / "streamed", out)}
    print(f"files that differ: {found['differing'] or 'none'}")
    return found


def several(options: argparse.Namespace) -> dict[str, Any]:
    """Let one of several processes be killed; then let torchrun start them anew, and compare with the run of one process."""
    out, count = options.out / "several", options.processes
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port), "WORLD_SIZE": str(count)}
    started_at = time.perf_counter()
    ranks = [started("streamed", options, out, RANK=str(rank), **address) for rank in range(count)]
    while finished(out) < options.kill_after and all(one.poll() is None for one in ranks):
        time.sleep(0.05)
    ranks[-1].kill()
    killed_at = time.perf_counter()
    for one in ranks:
        one.wait()
    found: dict[str, Any] = {
        "killed_after": {"seconds": round(killed_at - started_at, 1), "blocks": finished(out)},
        "seconds_to_the_error": round(time.perf_counter() - killed_at, 1),
        "timeout": options.timeout,
        "exits": [one.returncode for one in ranks],
    }
    print(found, flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    start = time.perf_counter()
    # torchrun gives one thread, and with another number of threads a forward may round differently
    alike = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    resumed = subprocess.run([*launcher, *command("streamed", options, out)], check=False, env=alike)
    found["resumed"] = {"exit": resumed.returncode, "seconds": round(time.perf_counter() - start, 1)}
    found["differing"] = differing(options.out / "streamed", out)
    print(f"{found['resumed']}; files that differ from those of one process: {found['differing'] or 'none'}")
    return found


def keep(file: Path, name: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Add what was found to a file."""
    told = json.loads(file.read_text()) if file.exists() else {}
    given = {key: getattr(options, key) for key in ("windows", "length", "method")}
    on = {"processor": str(this_processor()), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    on["load"] = [round(one, 1) for one in os.getloadavg()]
    file.write_text(json.dumps(told | {name: {"on": on, "options": given, **found}}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "kill", "several", "memory", "streamed"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="awq")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--block-seconds", type=float, help="of a run that is killed; as in the streamed one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29731)
    parser.add_argument(
        "--timeout", type=float, default=20, help="of several processes: seconds without a sign of life"
    )
    parser.add_argument(
        "--kill-after", type=int, default=1, help="blocks after which one of several processes is killed"
    )
    parser.add_argument("--json", type=Path, help="file that what was found is added to")
    options = parser.parse_args()
    if options.what == "make":
        make(options.source, options.layers)
    elif options.what in ("memory", "streamed"):
        work(options.what, options.source, options.out, options)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"run": compare, "kill": kill, "several": several}[options.what](options)
        if options.json:
            keep(options.json, options.what, found, options)


if __name__ == "__main__":
    main()
