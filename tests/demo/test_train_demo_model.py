"""The script that trains the demo's model again: it learns, and what it saves can be loaded."""

from __future__ import annotations

import torch
from benchmarks import train_demo_model

from awq_ext.demo.model import ByteLlama, ByteLlamaConfig, load_demo_model


def test_training_lowers_the_loss_and_saves(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train_demo_model, "validation_loss", lambda model: 0.0)
    out = tmp_path / "w.safetensors"
    settings = f"--out {out} --steps 12 --batch 2 --length 32 --warmup 2 --log-every 6".split()
    threads = torch.get_num_threads()
    try:
        train_demo_model.main(settings)
    finally:
        torch.set_num_threads(threads)
    losses = [float(line.split("train ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] < 6.5
    assert load_demo_model(path=out).config == ByteLlamaConfig()


def test_save_and_load(tmp_path) -> None:
    model = ByteLlama(ByteLlamaConfig(hidden=64, intermediate=64, blocks=1, query_heads=2, kv_heads=1))
    train_demo_model.save_demo_model(model, tmp_path / "m.safetensors")
    again = load_demo_model(path=tmp_path / "m.safetensors")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16))


def test_batches_come_again_with_their_seed() -> None:
    assert torch.equal(*(next(train_demo_model.training_batches(2, 16, seed=7)) for _ in range(2)))
