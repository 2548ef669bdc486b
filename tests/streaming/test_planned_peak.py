"""The peak that is planned before the work is the one that is measured, in memory and from files.

Each measurement runs in a process of its own, of a Llama whose blocks need more than the libraries that the process loads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_python, seeing_tests

transformers = pytest.importorskip("transformers", reason="NOTHING PLANNED: pip install 'awq-ext[test]'")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks cannot be reset on this system"),
]
WINDOWS, LENGTH = 4, 128
LEARNED = ", learned"
# wide blocks: their second moments, factors and trial weights are what counts. Many tokens: the logits and their gradient do.
SHAPES = {
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 4000},
    "logits": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 250_000},
}


def make(folder: Path, shape: str) -> Path:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**SHAPES[shape], **heads, max_position_embeddings=LENGTH)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(way: str, method: str, source: Path, out: Path) -> None:
    """Quantize in this process, and print what the report tells of memory."""
    import awq_ext

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    calib = [torch.randint(0, 4000, (1, LENGTH), generator=generator) for _ in range(WINDOWS)]
    settings: dict[str, Any] = {"method": method, "group_size": 128, "n_grid": 2, "search_rows": 64, "progress": False}
    if method.endswith(LEARNED):
        settings |= {"method": method.removesuffix(LEARNED), "learn_rounding": 3}
    if way == "streamed":
        awq_ext.quantize_checkpoint(source, out, calib, **settings)
        report = json.loads((out / "awq_report.json").read_text())
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        report = awq_ext.quantize(model, calib, **settings).awq_report.to_dict()
    print(json.dumps({"planned": report["planned_memory_bytes"], "peak": report["peak_memory_bytes"]}))


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "awq" + LEARNED])
@pytest.mark.parametrize("way", ["memory", "streamed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_is_within_a_tenth_of_the_peak(shape: str, way: str, method: str, tmp_path: Path) -> None:
    source = make(tmp_path / "float", shape)
    done = run_python(__file__, way, method, str(source), str(tmp_path / "out"), **seeing_tests())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / 2**20:.0f} MiB" for name, value in found.items()})
    assert found["planned"] == pytest.approx(found["peak"], rel=0.1)


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
