"""Small tokenizers of the kinds that GGUF files hold, and texts on which llama.cpp must agree with them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import awq_ext
from awq_ext.checkpoints.gguf.sentencepiece import SPACE
from awq_ext.checkpoints.gguf.tokenizers import _BYTES, _DIGITS, _NAMES

WORDS = (
    "Grüße aus Köln, ça va? Ελληνικά и русский язык, 中文字符，日本語テキスト、한국어. العربية עברית हिन्दी ไทย Tiếng Việt",
    "def f(x):\n\treturn [i**2 for i in range(10)]  # don't, I'LL, we're 1234567 3.14\n\n\n    pass   \n",
    "😀🎉👩‍👩‍👧‍👦 🇩🇪 é \u200b\ufeff \u00a0x \x01\x7f",
)
_SOURCES = sorted(Path(awq_ext.__file__).parent.glob("*/*.py"))
FEW = [path.read_text(encoding="utf-8") for path in _SOURCES[:15]]


def texts() -> list[str]:
    """Languages, code, runs of spaces and newlines, special tokens within text, random characters."""
    random_ = random.Random(0)
    ranges = ((32, 127), (160, 0x500), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (32, 33), (10, 11))
    noise = ["".join(chr(random_.randrange(*random_.choice(ranges))) for _ in range(60)) for _ in range(100)]
    runs = [
        a + letter * n + b for letter in " \n\t" for n in (1, 2, 3, 5, 8, 13, 21) for a, b in (("", ""), ("a", "b"))
    ]
    special = ["<s>Hi</s> there <|end|>\n x", f"{SPACE}{SPACE}x {SPACE}", "<|en", "<tag>a<tag> b", "<0x0A>"]
    return [*WORDS, *noise, *runs, *special, *(text[:3000] for text in FEW)]


def save(folder: Path, content: dict[str, Any], **config: Any) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, and read them as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_level(name: str) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that cuts text by what llama.cpp calls ``name``."""
    steps, whole = next(key for key, value in _NAMES.items() if value == name)
    made = Tokenizer(models.BPE(ignore_merges=whole))
    cuts = [_cut(step) for step in steps if step != _BYTES]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_BYTES in steps)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator([*FEW, *WORDS * 20], trainer)
    return json.loads(made.to_str())


def _cut(step: str) -> Any:
    if step == _DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(step), "isolated")


@cache
def _pieces() -> dict[str, Any]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator([*FEW, *WORDS * 20], trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    return json.loads(trained.to_str())["model"]


def sentencepiece(kind: str) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of a sentencepiece model: all pairs that make a token, by the score of that.

    kind: "llama", with a space before text; "gemma", without, and with runs of spaces and newlines before all other tokens.
    """
    pieces = _pieces()
    letters = [text for text in pieces["vocab"] if len(text) == 1]
    made = [a + b for a, b in pieces["merges"]]
    runs = [letter * n for n in range(12, 1, -1) for letter in (SPACE, "\n")] if kind == "gemma" else []
    special = ["<unk>", "<s>", "</s>"]
    names = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *dict.fromkeys([*runs, *made, *letters, "\n", SPACE]),
    ]
    vocabulary = {text: number for number, text in enumerate(names)}
    merges = [
        (text[:cut], text[cut:])
        for text in dict.fromkeys(made)
        if text not in runs
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    # those of runs as they are in Gemma's: not all of one token together
    mixed = [(text[:cut], text[cut:]) for cut in range(1, 12) for text in runs if cut < len(text)]
    mixed.sort(key=lambda pair: -len(pair[0] + pair[1]))
    added = [{"id": vocabulary[text], "content": text, "special": True} for text in special]
    added += [{"id": len(vocabulary), "content": "<|end|>", "special": True}]
    added += [{"id": len(vocabulary) + 1, "content": "<tag>", "special": False}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [one | flags for one in added],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if kind == "llama" else replace,
        "pre_tokenizer": None
        if kind == "llama"
        else {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary,
            "merges": [*mixed, *merges],
        },
    }  # fmt: skip
