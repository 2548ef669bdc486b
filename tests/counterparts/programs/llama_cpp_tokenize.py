"""llama_cpp_tokenize.py FILE TEXTS OUT: llama.cpp's tokens of TEXTS, by the tokenizer of a GGUF file, and those texts again.

TEXTS: a JSON list. OUT: a JSON list of [token numbers with what is added at the start, what they are written as].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama_cpp import Llama

file, texts, out = sys.argv[1:]
model = Llama(file, vocab_only=True, verbose=False)
found = []
for text in json.loads(Path(texts).read_text(encoding="utf-8")):
    tokens = model.tokenize(text.encode(), add_bos=True, special=True)
    found.append([tokens, model.detokenize(tokens, special=True).decode(errors="replace")])
Path(out).write_text(json.dumps(found), encoding="utf-8")
