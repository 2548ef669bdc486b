"""The shared library of CUDA kernels: found, loaded, called (``csrc/cuda/awq_cuda.h``)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from ... import _C

VERSION = 3  # awq_cuda_version() of the interface that is called here
FILE = Path(__file__).resolve().parents[2] / "libawq_cuda.so"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOATS = tuple(TYPES)
BUILD = "AWQ_EXT_CUDA=ON at build time makes them, see docs/cuda.md"


class Library:
    """A loaded library. ``device``: the type of device whose memory its functions take, "cpu" for the emulated one of the tests."""

    def __init__(self, file: Path, device: str = "cuda") -> None:
        self.file, self.device = file, device
        self._functions = ctypes.CDLL(str(file))
        self._functions.awq_cuda_version.restype = ctypes.c_int64
        self._functions.awq_cuda_error.restype = ctypes.c_char_p
        self._functions.awq_cuda_error.argtypes = [ctypes.c_int64]
        if (version := self._functions.awq_cuda_version()) != VERSION:
            raise OSError(f"{file} is of version {version}, this package calls version {VERSION}: build it again")

    def address(self, name: str) -> int:
        """Where ``awq_cuda_<name>`` is in memory."""
        return ctypes.cast(getattr(self._functions, f"awq_cuda_{name}"), ctypes.c_void_p).value or 0

    def problem(self) -> str:
        """Say why kernels cannot run on torch's current device, in CUDA's own words; "" where they can."""
        self._functions.awq_cuda_usable.restype = ctypes.c_int64
        error = self._functions.awq_cuda_usable()
        return self._functions.awq_cuda_error(error).decode() if error else ""

    def value(self, name: str, *arguments: int) -> int:
        """Call ``awq_cuda_<name>``, whose arguments are integers or pointers, and return its result."""
        function = getattr(self._functions, f"awq_cuda_{name}")
        if function.argtypes is None:
            function.argtypes, function.restype = [ctypes.c_int64] * len(arguments), ctypes.c_int64
        return int(function(*arguments))

    def call(self, name: str, *arguments: int) -> None:
        """Call ``awq_cuda_<name>``. RuntimeError with CUDA's own words if the launch fails."""
        if error := self.value(name, *arguments):
            raise RuntimeError(
                f"awq_ext's CUDA kernel '{name}' could not be started: {self._functions.awq_cuda_error(error).decode()}. "
                "AWQ_EXT_BACKEND=reference in the environment does without these kernels"
            )


@functools.cache
def _look() -> tuple[Library | None, str]:
    """Load the library; the second value says what was found, or why there is none."""
    if torch.version.cuda is None:
        return None, f"not used: torch {torch.__version__} has no CUDA"
    if not FILE.exists():
        return None, f"not built: {BUILD}"
    if not torch.cuda.is_available():
        return None, "not used: torch sees no GPU"
    try:
        library = Library(FILE)
    except OSError as error:
        return None, f"not usable: {error}"
    torch.cuda.current_stream()  # sets up torch's context, in which the kernels run
    if problem := library.problem():
        return None, f"not usable: {problem}"
    if not _substitute:
        _call_from_cpp(library)
    return library, f"in use, torch's CUDA {torch.version.cuda}{'' if _stream() else ', each call through Python'}"


def stream_function(file: Path) -> int:
    """Find the C function of ``file``, torch's CUDA library, that gives the current stream: its address.

    0 where that library is not loaded or has none, or where it gives another stream than torch does in Python, on the default
    stream or a new one.
    """
    try:
        function = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW).aoti_torch_get_current_cuda_stream
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            found = ctypes.c_void_p()
            with torch.cuda.stream(stream):
                failed = function(ctypes.c_int32(torch.cuda.current_device()), ctypes.byref(found))
            if failed or (found.value or 0) != stream.cuda_stream:
                return 0
    except (OSError, AttributeError, RuntimeError):  # RuntimeError: no new stream, during a capture
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _stream() -> int:
    return stream_function(Path(torch.__file__).with_name("lib") / "libtorch_cuda.so")


def _call_from_cpp(library: Library | None) -> None:
    """Let ``_C.usual_cuda_linear`` call a library, or none: for None, and on a GPU whose current stream C++ cannot find."""
    stream = _stream() if library is not None and library.device == "cuda" else 0
    if library is None or (library.device == "cuda" and not stream):
        _C.use_cuda_library("cuda", 0, 0, 0, 0)
    else:
        _C.use_cuda_library(library.device, *map(library.address, ("linear", "linear_parts", "error")), stream)


_substitute: list[Library] = []


def found() -> Library | None:
    """Return the library, None where it cannot be used."""
    return _substitute[-1] if _substitute else _look()[0]


def state() -> str:
    """Say in a few words whether the kernels are used, and if not why; and whether many rows are multiplied by wgmma."""
    library, words = _look()
    return f"{words}, many rows by wgmma" if library is not None and library.value("wgmma", 64) else words


@contextlib.contextmanager
def using(library: Library) -> Iterator[None]:
    """Call another library inside the block: the emulated one, whose device is the CPU."""
    _substitute.append(library)
    try:
        _call_from_cpp(library)
        yield
    finally:
        _substitute.pop()
        _call_from_cpp(found())


def value(name: str, *arguments: int) -> int:
    """Return what ``awq_cuda_<name>`` says of numbers, for torch's current device. RuntimeError where there is no library."""
    if (library := found()) is None:
        raise RuntimeError(f"awq_ext's CUDA kernels are missing: {state()}")
    return library.value(name, *arguments)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one; it nearly always is, and then no guard need be paid for."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def run(name: str, on: Tensor, *arguments: Tensor | int | None) -> None:
    """Launch ``awq_cuda_<name>`` on the device and the current stream of ``on``; tensors are passed as pointers, None as null."""
    library = found()
    if library is None or on.device.type != library.device:
        raise RuntimeError(f"awq_ext's CUDA kernels cannot run on {on.device}: {state()}")
    values = [
        0 if a is None else a.data_ptr() if isinstance(a, Tensor) else int(a) for a in arguments
    ]  # which `arguments` keeps alive
    stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0
    with on_device(on):
        library.call(name, stream, *values)


def aligned(tensor: Tensor) -> Tensor:
    """Make a tensor contiguous, with its first byte at a multiple of 16, as kernels read it; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def expect(
    function: str, argument: str, tensor: Tensor, on: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    """Raise ValueError for another device or shape than those of ``on`` and ``shape``, TypeError for another dtype (none: any)."""
    where = f"{function}: argument '{argument}': expected"
    if tensor.device != on.device:
        raise ValueError(f"{where} a tensor on {on.device}, got one on {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{where} shape {list(shape)}, got {list(tensor.shape)}")
    if dtypes and tensor.dtype not in dtypes:
        raise TypeError(f"{where} {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
