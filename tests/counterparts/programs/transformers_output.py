"""transformers_output.py FOLDER BATCH TENSORS: plain Transformers loads a directory, by the class it names, and runs one batch.

BATCH safetensors: the model's arguments. TENSORS safetensors: output, logits or last hidden states, fp32; its metadata
has the classes of the modules that hold quantized weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main() -> None:
    folder, batch, out = map(Path, sys.argv[1:])
    config = json.loads((folder / "config.json").read_text())
    # gptqmodel's CPU kernel computes in bfloat16, decompressed weights are the float16 of their scales
    dtype = torch.bfloat16 if config["quantization_config"]["quant_method"] == "awq" else torch.float32
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=dtype).eval()
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(batch).items()}
    found = model.to(dtype)(**given)
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    save_file({"output": output.float().contiguous()}, out, {"kernels": " ".join(sorted(kinds))})


if __name__ == "__main__":
    main()
