"""Read and write Hugging Face directories and texts for the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from ..checkpoints.conversions import transformers
from ..checkpoints.formats import CheckpointError
from ..checkpoints.gguf.single import complete, directory_of, is_gguf, shown
from ..checkpoints.quantized_dir import CONFIG, QUANTIZATION
from ..checkpoints.shards import first_json
from ..checkpoints.version_1 import VERSION_1
from ..checkpoints.write import Overwrite
from ..forwards.spill import can_spill
from ..integrations import foresee
from ..integrations.hub import folder_of
from ..integrations.pretrained import from_pretrained, write_pretrained
from ..layers.quant_linear import QuantLinear
from ..reporting.readers import DEFAULT_FORMAT, lines, rounded, zero_points_told
from ..streaming.checkpoint import work_folder
from .console import say
from .options.checks import DTYPES

_TOKENIZERS = ("*token*", "vocab*", "*.model", "*.spm", "tekken*")
# of a batch: enough to see which layers a model calls
_FEW_TOKENS = 32


def folder(source: Path, revision: str | None = None, token: str | None = None) -> Path:
    """Find the directory of a model: itself, or that of ORG/NAME or ORG/NAME@REVISION on the hub, downloaded if need be.

    Of a GGUF file: see :func:`directory_of`.
    A usage error for a revision of a directory, and for two revisions.
    """
    if source.is_dir() or is_gguf(source):
        if revision is not None:
            raise typer.BadParameter(f"{source} is a path, which has no revisions", param_hint="--revision")
        return directory_of(source)
    name, _, named = str(source).partition("@")
    if named and revision not in (None, named):
        raise typer.BadParameter(f"{revision}, but {source} names another: give one of them", param_hint="--revision")
    return folder_of(name, named or revision, token)


def load_model(directory: Path, dtype: str = "auto", trusted: bool = False, device: str = "cpu") -> nn.Module:
    """Load the causal language model of a directory, float or quantized in any layout, in evaluation mode.

    trusted: whether code that lies beside the weights may run. ValueError for a model that needs it otherwise.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if not (directory / CONFIG).exists():
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    try:
        return _load(directory, chosen_dtype(dtype) or dtype, trusted).to(device)
    except (ValueError, OSError) as error:
        _ask_for_trust(directory, error, trusted)
        raise


def chosen_dtype(dtype: str) -> torch.dtype | None:
    """Return what ``--dtype`` names; None for "auto"."""
    return None if dtype == "auto" else getattr(torch, dtype)


@contextmanager
def told_to_go_on(out_dir: Path) -> Iterator[None]:
    """Say after a Ctrl-C in the body that the same command goes on, where any block was finished."""
    try:
        yield
    except KeyboardInterrupt:
        work = work_folder(out_dir)
        if count := len(list(work.glob("block-*.safetensors"))):
            say(f"{count} finished blocks are in {escape(str(work))}: the same command goes on from there")
        raise


def _ask_for_trust(directory: Path, error: Exception, trusted: bool) -> None:
    """Raise ValueError that names the option, where ``error`` is that code beside the weights was not to run."""
    if not trusted and "trust_remote_code" in str(error):
        raise ValueError(
            f"{shown(directory)} has a class of its own, whose code runs only with --trust-remote-code: it can do whatever you "
            "can, so read its .py files first"
        ) from error


def _load(directory: Path, dtype: str | torch.dtype, trusted: bool) -> nn.Module:
    if is_quantized(directory):
        return from_pretrained(directory, None if dtype == "auto" else dtype, trust_remote_code=trusted)
    if not sys.stderr.isatty():  # no bars in log files
        transformers().utils.logging.disable_progress_bar()
    auto = transformers().AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=trusted).eval()


def is_quantized(directory: Path) -> bool:
    """Tell whether a directory says of itself that its weights are quantized."""
    config = read_config(directory)
    return (directory / VERSION_1).exists() or any(config.get(key) for key in QUANTIZATION)


def read_config(directory: Path) -> Mapping[str, Any]:
    """Read config.json; empty where there is none. ValueError for one that is damaged."""
    return first_json(directory, CONFIG) or {}


def load_tokenizer(directory: Path, trusted: bool = False) -> Any:
    """Load the tokenizer of a directory. ValueError where there is none that can be loaded; trusted: as for a model."""
    if not read_config(directory):
        raise ValueError(f"{directory} has no config.json: a Hugging Face directory is needed")
    complete(directory)
    # without files transformers 5 makes tokenizers of some models that know next to no words
    if not any(True for pattern in _TOKENIZERS for _ in directory.glob(pattern)):
        raise ValueError(f"{shown(directory)}: it has no tokenizer (tokenizer.json)")
    try:
        auto = transformers().AutoTokenizer
        return auto.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except (ValueError, OSError, TypeError, KeyError) as error:
        _ask_for_trust(directory, error, trusted)
        files = sorted(file.name for file in directory.glob("*token*"))
        what = (
            f"its tokenizer ({', '.join(files)}) cannot be loaded" if files else "it has no tokenizer (tokenizer.json)"
        )
        raise ValueError(f"{shown(directory)}: {what}: {' '.join(str(error).split())}") from error


def save_model(
    model: nn.Module,
    directory: Path,
    format: str,
    overwrite: Overwrite = False,
    spill: bool = False,
    verify: bool = False,
) -> None:
    """Write the quantized model with its tokenizer and its report; with ``spill`` about one layer at a time is in memory.

    Then let it compute as programs do that load the directory: it is scored next.
    """
    write_pretrained(model, directory, format, overwrite=overwrite, spill=spill and can_spill(), verify=verify)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.bits in rounded(format):
            module.compute = "int8"


def check_format(model: nn.Module, batch: Tensor, format: str, settings: Mapping[str, Any]) -> None:
    """Say before the work, in CheckpointError, that a format cannot hold what would become of the model, with the ways out."""
    try:
        foresee.check_format(model, batch[:, :_FEW_TOKENS], format, **settings)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n--format native, which awq_ext alone loads, holds every model") from None


# Tried in this order where nobody chose a size.
_SMALLER_GROUPS = (64, 32)


def with_groups_that_fit(model: nn.Module, batch: Tensor, format: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take smaller groups, and say so, where the usual size does not divide widths; else as :func:`check_format`."""
    try:
        check_format(model, batch, format, settings)
        return dict(settings)
    except CheckpointError as error:
        found = error
    usual = settings["group_size"]
    for size in (one for one in _SMALLER_GROUPS if one < usual):
        smaller = {**settings, "group_size": size}
        with suppress(CheckpointError):
            check_format(model, batch, format, smaller)
            say(
                f"[yellow]note:[/yellow] groups of {size}: {usual} does not divide every width of this model "
                "(choose with --group-size)"
            )
            return smaller
    raise found


def with_usual_groups(model: nn.Module, batch: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take the groups that ``awq-ext quantize`` would take for the usual format; the given ones if it could hold none."""
    widths = {
        "bits": 4,
        "packed": True,
        "head": "float",
        "per_layer": {},
        "fold": "always",
    }  # groups alone are asked about
    try:
        size = with_groups_that_fit(model, batch, DEFAULT_FORMAT, {**settings, **widths})["group_size"]
    except CheckpointError:
        size = settings["group_size"]
    return {**settings, "group_size": size}


def tell_readers(console: Console, directory: Path, format: str) -> None:
    """Print where a model was written, and who loads it with which command."""
    console.print(f"written to {escape(str(directory))} ({format}), which these load:", soft_wrap=True)
    zero_points = zero_points_told(read_config(directory).get("quantization_config") or {})
    for line in lines(format, str(directory), zero_points):
        console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)


def refuse_quantized(directory: Path) -> None:
    """Raise a usage error for the directory of a model that is quantized already."""
    if not is_quantized(directory):
        return
    config = read_config(directory)
    said = next((config[key] for key in QUANTIZATION if config.get(key)), {})
    bits, method = said.get("bits", said.get("w_bit", 4)), said.get("quant_method", "mlx" if said else "awq_ext")
    raise typer.BadParameter(
        f"{shown(directory)} is already int{bits if isinstance(bits, int) else 4} ({method}): give the float "
        "model that it was made from. awq-ext convert changes its layout, awq-ext inspect says what is in it",
        param_hint="MODEL",
    )


def note_lengths(model: nn.Module, batches: Sequence[Tensor], wanted: int = 0) -> None:
    """Say on standard error what makes figures worth less: too little text, or windows longer than the model was made for."""
    if len(batches) < wanted:
        say(f"[yellow]note:[/yellow] the calibration text has {len(batches)} windows, {wanted} were asked for")
    config = getattr(model, "config", None)
    most = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if isinstance(most, int) and batches[0].shape[1] > most:
        say(
            f"[yellow]note:[/yellow] windows of {batches[0].shape[1]} tokens are longer than the {most} that the model was "
            "made for (max_position_embeddings): give a smaller --seq-len"
        )


def note_same_texts(calib: Sequence[Path], named: Mapping[str, Path]) -> None:
    """Say on standard error which texts are calibrated on and scored on, too: their figures are better than those of others."""
    there = [path for path in calib if path.exists()]
    if same := [str(path) for path in named.values() if any(path.samefile(one) for one in there)]:
        say(
            f"[yellow]warning:[/yellow] {escape(', '.join(same))}: calibrated on and scored on. On text that calibration did not "
            "see the figures would be worse: give other text with --traffic"
        )


def named_texts(entries: Sequence[str]) -> dict[str, Path]:
    """Read ``code=src.txt`` or ``src.txt`` as name (the file's own by default) and path. ValueError for what is no file."""
    found: dict[str, Path] = {}
    for entry in entries:
        name, equals, rest = entry.partition("=")
        path = Path(rest if equals else entry)
        name = name if equals else path.stem
        if not path.is_file():
            raise ValueError(f"{path} is no file: give texts as PATH or NAME=PATH")
        if name in found:
            raise ValueError(f"two texts are called {name!r}: name one, NAME={path}")
        found[name] = path
    return found
