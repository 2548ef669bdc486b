"""EleutherAI's lm_eval on a model in float and in int4: which of two ways a text goes on?

    python tests/benchmarks/bench_lm_eval.py MODEL_DIR --calib calib.txt --texts prose.txt de=multi-de.txt ... [--lines]
        [--questions 200] [--method rtn awq+gptq best] [--group-size 64] [--samples 32] [--seq 512] [--json docs/bench_lm_eval.json]

Needs lm_eval (docs/ecosystem.md). A question is 16 words of a paragraph; the choices are its next 6 words, and the same with two
neighbours among them swapped. --lines: each line is a text of its own, as those of original_models.py are, and the question is all
of it up to the choices. Beside lm_eval's accuracy and its standard error the output says how many questions a model answers
otherwise than the float one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

import awq_ext
from awq_ext.cli import hf, texts
from awq_ext.cli.options.settings import parse_method

STEM, CHOICE = 16, 6  # words
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def swapped(words: list[str], draw: random.Random) -> list[str] | None:
    """The words with two neighbours swapped that differ; None where no two do."""
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if not places:
        return None
    i = draw.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def questions(text: str, count: int, lines: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Make up to ``count`` questions. Which choice is the right one is drawn; no two questions choose between the same words."""
    draw = random.Random(seed)
    found = []
    for part in text.splitlines() if lines else re.split(r"\n\s*\n", text):
        words = part.split()
        for start in range(0, len(words) - STEM - CHOICE + 1, STEM + CHOICE):
            stem = words[0 if lines else start : start + STEM]
            right = words[start + STEM : start + STEM + CHOICE]
            wrong = swapped(right, draw)
            if wrong is not None:
                answer = draw.randrange(2)
                choices = [" ".join(one) for one in ((right, wrong) if answer == 0 else (wrong, right))]
                found.append({"question": " ".join(stem), "choices": choices, "answer": answer})
    draw.shuffle(found)
    return found[:count]


def write_tasks(folder: Path, asked: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in asked.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file))


def scored(model: torch.nn.Module, tokenizer: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    """Let lm_eval score a model: accuracy and standard error of each task, and which choice each question got."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=16),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )

    def one(name: str) -> dict[str, Any]:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        logs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        result = found["results"][name]
        chosen = [max(range(len(row)), key=row.__getitem__) for row in logs]
        return {"acc": result["acc,none"], "stderr": result["acc_stderr,none"], "chosen": chosen}

    return {name: one(name) for name in names}


def calibration(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    if not args.lines:
        return texts.windows([args.calib], tokenizer, args.samples, args.seq)
    lines = args.calib.read_text(encoding="utf-8").splitlines()
    return [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]


def add(args: argparse.Namespace, found: dict[str, Any], counts: dict[str, int]) -> None:
    """Put what was found into the file, other models kept."""
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    rows = {
        label: {name: {key: one[key] for key in ("acc", "stderr", "other_answers")} for name, one in row.items()}
        for label, row in found.items()
    }
    setting = f"W{args.bits} g{args.group_size}"
    results[args.model.absolute().name] = {"setting": setting, "questions": counts, "rows": rows}
    args.json.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", required=True, metavar="[NAME=]PATH")
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--method", nargs="+", default=["rtn", "awq+gptq", "best"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    os.environ["HF_DATASETS_OFFLINE"] = "1"
    tokenizer = hf.load_tokenizer(args.model)
    calib = calibration(args, tokenizer)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        named = hf.named_texts(args.texts)
        asked = {n: questions(p.read_text(encoding="utf-8"), args.questions, args.lines) for n, p in named.items()}
        write_tasks(Path(folder), asked)
        for label in ("float", *args.method):
            model = hf.load_model(args.model, "auto")
            if label != "float":
                own = {} if not args.lines else {"builtin_text": False}
                settings = {"bits": args.bits, "group_size": args.group_size, "packed": args.bits == 4}
                method = {name: value for name, value in parse_method(label).items() if name != "label"}
                awq_ext.quantize(model, calib, tokenizer=tokenizer, seq_len=args.seq, **settings | own | method)
            found[label] = scored(model, tokenizer, Path(folder), list(asked))
            for name, one in found[label].items():
                beside = zip(one["chosen"], found["float"][name]["chosen"], strict=True)
                one["other_answers"] = sum(a != b for a, b in beside)
                told = f"{one['acc']:.3f} ± {one['stderr']:.3f}, {one['other_answers']} answered otherwise"
                print(f"{label}, {name}: {told} of {len(asked[name])}", flush=True)
            if args.json:  # after each, so that an interrupt loses nothing that was measured
                add(args, found, {name: len(rows) for name, rows in asked.items()})


if __name__ == "__main__":
    main()
