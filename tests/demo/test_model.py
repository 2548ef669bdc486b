"""The demo's model: a causal Llama over bytes, and its shipped weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from awq_ext.demo import data
from awq_ext.demo import model as demo_model
from awq_ext.demo.model import ByteLlama, ByteLlamaConfig, load_demo_model
from awq_ext.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def trained() -> ByteLlama:
    return load_demo_model(torch.float32)


def unigram_entropy(windows: torch.Tensor) -> float:
    """Entropy in nats of the bytes of the text itself: what a model without any context could reach at best."""
    counts = torch.bincount(windows.flatten(), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum().item()


def bigram_entropy(windows: torch.Tensor) -> float:
    """Entropy in nats of a byte given the one before it, from the text's own pair counts: the best of all bigrams."""
    pairs = torch.bincount((windows[:, :-1] * 256 + windows[:, 1:]).flatten(), minlength=65536).double().view(256, 256)
    joint = pairs / pairs.sum()
    given = (joint / joint.sum(1, keepdim=True))[joint > 0]
    return -(joint[joint > 0] * given.log()).sum().item()


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 17), (3, 256)])
def test_forward_shape(batch: int, length: int) -> None:
    assert ByteLlama()(torch.zeros(batch, length, dtype=torch.long)).shape == (batch, length, 256)


def test_future_bytes_do_not_change_past_logits(trained: ByteLlama) -> None:
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 256
    with torch.no_grad():
        before, after = trained(ids), trained(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30], atol=1e-4, rtol=1e-4)
    assert (before[:, 30:] - after[:, 30:]).abs().max() > 0.1


def test_position_matters(trained: ByteLlama) -> None:
    """Without rotary embeddings, the last logits could not tell two orders of the earlier bytes of one block apart."""
    with torch.no_grad():
        one, other = (trained(torch.tensor([list(text)]))[0, -1] for text in (b"abcdefg", b"fedcbag"))
    assert (one - other).abs().max() > 0.1


def test_grouped_query_heads_share_keys_and_values() -> None:
    """With k and v computed by hand for every query head, attention gives the same."""
    torch.manual_seed(0)
    attention = demo_model.Attention(ByteLlamaConfig(hidden=64, query_heads=4, kv_heads=2))
    x = torch.randn(1, 5, 64)
    cos, sin = demo_model.rotary_tables(5, 16, 10_000.0, x.device)
    query, key, value = (f(x).view(5, -1, 16) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for head in range(4):
        q = demo_model.rotate(query[:, head], cos, sin)
        k = demo_model.rotate(key[:, head // 2], cos, sin)
        weights = (q @ k.T / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
        heads.append(weights @ value[:, head // 2])
    torch.testing.assert_close(attention(x, cos, sin)[0], attention.o_proj(torch.cat(heads, -1)))


def test_llama_names(trained: ByteLlama) -> None:
    linears = {name.rpartition(".")[2] for name, m in trained.named_modules() if isinstance(m, nn.Linear)}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert all(m.in_features % 64 == 0 for m in trained.modules() if isinstance(m, nn.Linear))


def test_generate(trained: ByteLlama) -> None:
    assert trained.generate(b"import o", 12) == trained.generate(b"import o", 12)
    sampled = [trained.generate(b"def ", 24, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(trained.generate(b"x" * 300, 3)) == 3  # longer than the context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_dtype(dtype: torch.dtype) -> None:
    model = load_demo_model(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training


def test_weights_are_small() -> None:
    assert demo_model.WEIGHTS.stat().st_size <= 3_000_000


def test_trained_model_beats_counting(trained: ByteLlama) -> None:
    """Far better than byte frequencies, and better than pair frequencies taken from the scored text itself."""
    windows = data.held_out_tokens(16_384)
    loss = math.log(evaluate(trained, windows.split(16))["perplexity"].value)
    assert loss < 0.5 * unigram_entropy(windows)
    assert loss < bigram_entropy(windows)
