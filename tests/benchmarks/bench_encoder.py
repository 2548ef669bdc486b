"""A sentence encoder (MiniLM) at 4 bits, biases corrected and not: mean cosine of its embeddings to the float model's.

    python tests/benchmarks/bench_encoder.py [TEXT.txt ...] [--group-size 32] [--method awq gptq ...] [--json out.json]

The encoder is the one of tests/pipeline/test_encoder.py, and so are the sentences: calibrated on 768 of one part of the standard
library, scored on 256 of the other, and on the first 256 lines of at least five words of each text.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import transformers

import awq_ext
from awq_ext.evaluation.evaluate import embedding_cosine

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from test_encoder import BATCH, CALIBRATION, SCORED, batches, folder, tokens


def first_lines(path: Path) -> list[str]:
    """What a text is scored on."""
    with path.open(encoding="utf-8") as lines:
        found = (line.strip() for line in lines)
        return list(itertools.islice((line for line in found if len(line.split()) >= 5), SCORED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--method", nargs="+", default=["awq", "gptq", "awq+gptq"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = transformers.AutoModel.from_pretrained(folder(), local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    traffic = {"sentences": batches(tokenizer, "held-out", SCORED)}
    for path in args.texts:
        lines = first_lines(path)
        traffic[path.stem] = [tokens(tokenizer, lines[i : i + BATCH]) for i in range(0, len(lines), BATCH)]
    methods = {"rtn": {"method": "rtn"}}
    for method in args.method:
        methods[f"{method}, biases as they are"] = {"method": method, "bias_correction": False}
        methods[method] = {"method": method}
    found = awq_ext.compare(
        model,
        batches(tokenizer, "train", CALIBRATION),
        traffic,
        methods,
        metric=embedding_cosine,
        group_size=args.group_size,
        speed_seconds=0,
        progress=False,
    )
    print(found)
    for row in found.rows:
        cosines = (f"{row.evaluations[name].measures['embedding_cosine'].value:.4f}" for name in traffic)
        print("|", " | ".join([row.label, *cosines]), "|")
    if args.json:
        found.to_json(args.json)


if __name__ == "__main__":
    main()
