"""Trains the demo's model again: ``python tests/benchmarks/train_demo_model.py --out weights.safetensors``.

The defaults are the settings that made the shipped weights. Nothing in them aims at quantization; they are those of
ordinary language model training at a high learning rate: AdamW (0.9, 0.95), weight decay on matrices but not on norm
gains and embeddings, cosine schedule after a short warm-up, gradient clipping, bf16 autocast over fp32 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from awq_ext.demo import data
from awq_ext.demo.model import WEIGHTS, ByteLlama


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the blocks and the head only."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def initialize(model: ByteLlama) -> None:
    """Normal initialization; the Linears that write to the residual stream start smaller, as in GPT-2."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        std = 0.6 * parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.blocks)
        nn.init.normal_(parameter, std=std)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def training_batches(batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches of the training split: int64 [batch, length]."""
    stream = data.tokens("train")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(0, stream.numel() - length, (batch, 1), generator=generator)
        yield stream[starts + offsets].long()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting batch[:, 1:] from batch[:, :-1]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """Loss on part of the calibration split, so that the held-out split stays untouched by every decision."""
    return loss_of(model, data.windows(data.tokens("calibration"), 64, 257)).item()


def train(args: argparse.Namespace) -> ByteLlama:
    """Run the whole schedule and return the fp32 model."""
    torch.manual_seed(args.seed)
    model = ByteLlama()
    initialize(model)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    batches = training_batches(args.batch, args.length + 1, args.seed)
    began, average = time.perf_counter(), None
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - began
            print(
                f"step {step + 1}/{args.steps}  {seconds:.0f} s  train {average:.4f}  "
                f"validation {validation_loss(model):.4f} nats a byte",
                flush=True,
            )
            save_demo_model(model, args.out)
    return model


def save_demo_model(model: ByteLlama, path: Path) -> None:
    """Weights as bf16, sizes as metadata."""
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"config": json.dumps(asdict(model.config))})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults reproduce the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the bf16 weights go")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="bytes a window")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=250, help="steps between log lines and saved weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
