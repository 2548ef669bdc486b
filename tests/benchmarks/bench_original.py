"""Methods on models whose weights were never rounded before: a decoder, a speech model and a sentence encoder.

    python tests/benchmarks/original_models.py FOLDER
    python tests/benchmarks/bench_original.py FOLDER --calib calib.txt --text prose.txt [--recordings DIR]
        [--model mgm whisper minilm] [--setting 4,64 4,128 3,64] [--method rtn awq ...] [--json docs/bench_original.json]

mgm: calibrated on samples that the model wrote itself (FOLDER/mgm/calib.txt), scored on others of them (held-out.txt). whisper:
sentences of the texts, read by espeak-ng (Debian's package of that name); scored on the next tokens of what was said, and also
on --recordings, a folder of .wav files with a file "transcription" as Debian's pocketsphinx-testdata has one. minilm: sentences of
docstrings, as in bench_encoder.py, scored also on lines of the text. --json adds to what the file holds of other models.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import original_models
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import awq_ext
from awq_ext.evaluation.comparison import Comparison
from awq_ext.evaluation.evaluate import embedding_cosine

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

# The texts that ship with the package are not for these inputs, so the effort "balanced" is awq+gptq here.
METHODS = {
    **{name: {"method": name} for name in ("rtn", "awq", "awq+gptq")},
    "best": {"effort": "best", "builtin_text": False},
}
ROWS, BATCH = 4, 16  # of samples of MGM, and of sentences
SPOKEN = 16, 32  # utterances to calibrate on, and to score
RATE = 16000
Samples = list[dict[str, Tensor]]


def rows(tokenizer: Any, lines: list[str]) -> Samples:
    """Padded batches, each line one row; lines of like length together, so that little is padding."""
    lines = sorted(lines, key=lambda line: len(line.split()))
    parts = (lines[i : i + ROWS] for i in range(0, len(lines), ROWS))
    return [dict(tokenizer(part, padding=True, return_tensors="pt", return_token_type_ids=False)) for part in parts]


def mgm(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    calib, held_out = (rows(tokenizer, (folder / name).read_text().splitlines()) for name in original_models.OWN_TEXTS)
    return {"model": model, "calib": calib, "traffic": {"own samples": held_out}}


def sentences(path: Path, count: int) -> list[str]:
    """The first sentences of 8 to 20 plain words, which can be read aloud."""
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8").replace("@-@", "-"))
    found = (one.strip() for one in re.split(r"(?<=[.!?]) ", text))
    return [one for one in found if 8 <= len(one.split()) <= 20 and re.fullmatch(r"[A-Za-z ,;.'!?-]+", one)][:count]


def sound(path: Path) -> Tensor:
    """A mono .wav file of 16 bits as fp32 samples in [-1, 1), at the rate that Whisper reads."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise ValueError(f"{path}: one channel of 16 bits is needed")
        values = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 32768
        length = len(values) * RATE // file.getframerate()
    return F.interpolate(values[None, None], size=length, mode="linear")[0, 0]


def spoken(lines: Iterable[str]) -> list[tuple[Tensor, str]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "line.wav"
        for line in lines:
            subprocess.run(["espeak-ng", "-v", "en-us", "-w", str(file), line], check=True)
            found.append((sound(file), line))
    return found


def recorded(folder: Path) -> list[tuple[Tensor, str]]:
    lines = (folder / "transcription").read_text().splitlines()
    named = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip()) for line in lines if line.strip()]
    return [(sound(folder / f"{one[2]}.wav"), one[1]) for one in named if one]


def whisper(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])

    def sample(heard: Tensor, said: str) -> dict[str, Tensor]:
        said_ids = tokenizer(f" {said}", add_special_tokens=False)["input_ids"]
        return {
            "input_features": extractor(heard.numpy(), sampling_rate=RATE, return_tensors="pt").input_features,
            "decoder_input_ids": torch.tensor([[*start, *said_ids]]),
            # nothing is predicted at the first of the two
            "labels": torch.tensor([[-100, *said_ids, tokenizer.eos_token_id]]),
        }

    calib, held_out = (spoken(sentences(path, n)) for path, n in zip((args.calib, args.text), SPOKEN, strict=True))
    traffic = {"espeak-ng": [sample(*one) for one in held_out]}
    if args.recordings:
        traffic["a reader"] = [sample(*one) for one in recorded(args.recordings)]
    return {"model": model, "calib": [sample(*one) for one in calib], "traffic": traffic}


def lost_cosine(output: Any, expected: Any, sample: Any) -> Tensor:
    """How far the cosine to the float model's embedding is below 1, as a negative number: higher is better."""
    return embedding_cosine(output, expected, sample) - 1


def minilm(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    import test_encoder
    from bench_encoder import first_lines

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = first_lines(args.text)
    prose = [test_encoder.tokens(tokenizer, lines[i : i + BATCH]) for i in range(0, len(lines), BATCH)]
    held_out = test_encoder.batches(tokenizer, "held-out", test_encoder.SCORED)
    return {
        "model": model,
        "calib": test_encoder.batches(tokenizer, "train", test_encoder.CALIBRATION),
        "traffic": {"sentences": held_out, "prose": prose},
        "metric": lost_cosine,
    }


MODELS = {"mgm": mgm, "whisper": whisper, "minilm": minilm}


def figures(found: Comparison) -> dict[str, Any]:
    """Every measure with its interval, and of the divergence (or the lost cosine) the share that each method closes of RTN's."""
    measure = "kl" if "kl" in found.measures else lost_cosine.__name__
    methods: dict[str, Any] = {}
    for row in found.rows:
        scores = {name: {m: e[m].to_dict() for m in e.measures} for name, e in row.evaluations.items()}
        methods[row.label] = {"seconds": row.seconds, "error": row.error, "measures": scores}
        if row.config is None or row.label == "rtn" or row.error:
            continue
        left = {name: e.ratio(found["rtn"].evaluations[name], measure) for name, e in row.evaluations.items()}
        methods[row.label]["closed"] = {
            name: {"value": 1 - one.value, "low": 1 - one.high, "high": 1 - one.low} for name, one in left.items()
        }
    scored = {name: {"windows": e.windows, "tokens": e.tokens} for name, e in found.rows[0].evaluations.items()}
    return {"measure": measure, "scored": scored, "rows": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recordings", type=Path)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--setting", nargs="+", default=["4,64", "4,128", "3,64"], metavar="BITS,GROUP")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in args.model:
        folder = args.folder / name
        made = MODELS[name](folder, args)
        counts = {str(size): original_models.distinct(folder, size) for size in original_models.GROUPS}
        for setting in args.setting:
            bits, group = map(int, setting.split(","))
            began = time.perf_counter()
            found = awq_ext.compare(
                **made,
                methods={label: METHODS[label] for label in args.method},
                bits=bits,
                group_size=group,
                packed=bits == 4,
                speed_seconds=0,
                progress=False,
            )
            print(f"\n== {name}, W{bits} g{group}, {time.perf_counter() - began:.0f} s in all")
            print(found, flush=True)
            if args.json:
                results = json.loads(args.json.read_text()) if args.json.exists() else {}
                here = results.setdefault(name, {"settings": {}})
                source = original_models.SOURCES[name]
                here |= {"package": f"{source.package} {source.version}", "licence": source.licence, "distinct": counts}
                here["settings"][f"W{bits} g{group}"] = figures(found)
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
