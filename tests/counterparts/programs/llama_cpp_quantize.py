"""llama_cpp_quantize.py FILE OUT TYPE: llama.cpp's own quantizer, from a GGUF file to one of TYPE, such as Q4_0."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

file, out, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
settings.allow_requantize = True
settings.nthread = 1
assert llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(settings)) == 0
