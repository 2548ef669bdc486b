"""vllm_see.py FOLDER PICTURES TENSORS CLASSES: vLLM's CPU backend goes on with a text that has a picture in it, greedily.

PICTURES safetensors: pictures uint8 [B, H, W, 3]; its metadata have the text, which has "<image>" in it, and the steps.
TENSORS safetensors: generated int64 [B, T + steps], the tokens of the whole prompt first. CLASSES: "vllm", its own model, or
"transformers", the one of Transformers with vLLM's layers.
"""

from __future__ import annotations

import sys

from vllm_settings import DTYPE  # isort: skip
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import LLM, SamplingParams


def main() -> None:
    folder, given, out, classes = sys.argv[1:]
    with safe_open(given, "pt") as file:
        pictures, told = file.get_tensor("pictures"), file.metadata()
    engine = LLM(folder, model_impl=classes, dtype=DTYPE, enforce_eager=True, max_model_len=64)
    settings = SamplingParams(temperature=0, max_tokens=int(told["steps"]), ignore_eos=True, detokenize=False)
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    prompts = [{"prompt": told["text"], "multi_modal_data": {"image": image}} for image in images]
    answers = engine.generate(prompts, settings, use_tqdm=False)
    generated = [[*answer.prompt_token_ids, *answer.outputs[0].token_ids] for answer in answers]
    save_file({"generated": torch.tensor(generated)}, out)


if __name__ == "__main__":
    main()
