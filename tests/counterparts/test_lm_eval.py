"""EleutherAI's lm_eval on a model in int4: the example of docs/ecosystem.md as it stands, on questions in a local file, offline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from counterparts.counterpart import byte_tokenizer, needed, our_package_alone, quantized_llama, run

import awq_ext

PAGE = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
# a start of code, ways to go on, and the right one: what the demo's model was trained on
QUESTIONS = [
    {"question": "import os\nimport", "choices": ["sys", "qzx"], "answer": 0},
    {"question": "if __name__ ==", "choices": ["7 and 8", '"__main__":'], "answer": 1},
    {"question": "    def __init__(self,", "choices": ["name: str", "zzz ) ) )", "%% %%"], "answer": 0},
    {"question": "        raise", "choices": ["import x", "ValueError("], "answer": 1},
    {"question": "    if not", "choices": ["isinstance(", "kkkkkkkkkkk"], "answer": 0},
]
# what the example leaves in ``found`` for a comparison
KEEP = """
import json

found["samples"] = {
    sample["doc_id"]: [answer[0] for answer in sample["filtered_resps"]] for sample in found["samples"]["mine"]
}
with open("found.json", "w") as file:
    json.dump({name: found[name] for name in ("results", "samples")}, file)
"""


def snippet(name: str) -> str:
    """A piece of code of the page, which marks it."""
    found = re.search(rf"<!-- {name} -->\n\n```\w*\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def log_likelihood(model: torch.nn.Module, question: str, choice: str) -> float:
    """Of a choice, written after the question and a space, in bytes as tokens."""
    start, whole = question.encode(), f"{question} {choice}".encode()
    tokens = torch.tensor([list(whole)])
    with torch.no_grad():
        logs = model(tokens).logits[0, :-1].double().log_softmax(-1)
    return float(logs.gather(1, tokens[0, 1:, None])[len(start) - 1 :].sum())


def test_lm_eval_scores_a_model_written_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("lm-eval")
    model = quantized_llama()
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = chr(256)  # byte 0: lm_eval asks every tokenizer for one
    awq_ext.save_pretrained(model, tmp_path / "my-model-awq", tokenizer=tokenizer)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(snippet("lm_eval: task"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "example.py").write_text(snippet("lm_eval: program") + KEEP)
    monkeypatch.chdir(tmp_path)
    beside = our_package_alone(tmp_path / "beside")
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    output = run("lm-eval", str(tmp_path / "example.py"), PYTHONPATH=str(beside), **offline)
    found = json.loads((tmp_path / "found.json").read_text())
    right = 0
    for number, row in enumerate(QUESTIONS):
        ours = [log_likelihood(model, row["question"], choice) for choice in row["choices"]]
        assert found["samples"][str(number)] == pytest.approx(ours, rel=1e-4)
        right += max(range(len(ours)), key=ours.__getitem__) == row["answer"]
    share = found["results"]["mine"]["acc,none"]
    assert share == right / len(QUESTIONS) and share > 0.5 and str(share) in output
