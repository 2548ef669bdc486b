"""Programs of this folder, run in the environments of other tools, and the trained model that they are given."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awq_ext
import awq_ext._build
from awq_ext.demo.data import calibration_batches
from awq_ext.demo.model import VOCABULARY, load_demo_model
from awq_ext.layers.ops import quant_weight

PROGRAMS = Path(__file__).parent / "programs"
FOLDER = os.environ.get("AWQ_EXT_COUNTERPARTS", "")
LIMIT = 600  # seconds a program may take
PROMPTS = (
    b"    if not isinstance(",
    b"    def __init__(self, ",
    b"if __name__ == ",
    b"        raise ValueError(",
    b"        return self._",
    b"import os\nimport sys\nfrom ",
)


def needed(name: str) -> Path:
    """The environment's Python. Without AWQ_EXT_COUNTERPARTS: skip; set, but without this environment: fail."""
    if not FOLDER:
        pytest.skip(
            f"{name} NOT TESTED: AWQ_EXT_COUNTERPARTS is not set; bash tests/counterparts/environments.sh FOLDER makes "
            "the environments, which take several GB and minutes"
        )
    python = Path(FOLDER) / name / "bin" / "python"
    if not python.exists():
        pytest.fail(f"AWQ_EXT_COUNTERPARTS={FOLDER} has no environment {name}: run environments.sh", pytrace=False)
    return python


def run(environment: str, program: str, *arguments: object, **variables: str) -> str:
    """What programs/``program`` prints, run in an environment; it must succeed. ``variables``: of its process environment."""
    command = [str(needed(environment)), "-W", "ignore", str(PROGRAMS / program), *map(str, arguments)]
    settings = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "AWQ_EXT"))},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **variables,
    }
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=LIMIT, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{program} failed in {environment}:\n{output[-6000:]}"
    return output


def our_package_alone(folder: Path) -> Path:
    """``folder``, for the path of another Python: nothing but this package, compiled module and metadata included."""
    package = folder / "awq_ext"
    package.mkdir(parents=True)
    # of an editable installation the built modules lie elsewhere than the sources
    built = (Path(module.__file__) for module in (awq_ext._C, awq_ext._build))
    for path in (*Path(awq_ext.__file__).parent.iterdir(), *built):
        if not (package / path.name).exists() and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    installed = Path(str(metadata.distribution("awq-ext").locate_file("")))
    for information in installed.glob("awq_ext-*.dist-info"):
        (folder / information.name).symlink_to(information)
    return folder


def trained_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    """The demo's trained byte-level Llama as transformers' LlamaForCausalLM; ``tied``: with the embedding as its head."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    demo = load_demo_model(dtype)
    sizes = demo.config
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.query_heads,
        num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=sizes.norm_eps,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in demo.state_dict()}
    tensors = {names[name]: tensor for name, tensor in demo.state_dict().items()}
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.to(dtype).eval()


def quantized_qwen2(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A Qwen2 in int4 that has learned something: the trained Llama's weights, with biases of q, k and v that are random."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    llama = trained_llama()
    sizes = llama.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    config = transformers.Qwen2Config(
        **{name: sizes[name] for name in names}, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )
    model = transformers.Qwen2ForCausalLM(config)
    missing, unknown = model.load_state_dict(llama.state_dict(), strict=False)
    assert (
        not unknown
        and all(name.endswith("_proj.bias") for name in missing)
        and len(missing) == 3 * sizes["num_hidden_layers"]
    )
    generator = torch.Generator().manual_seed(0)
    for name in missing:
        nn.init.normal_(model.get_parameter(name), std=0.1, generator=generator)
    chosen = {"group_size": 64, "fold": "always"} | settings
    return awq_ext.quantize(model.to(dtype).eval(), calibration_batches(count=4), **chosen)


def wide_llama() -> nn.Module:
    """The trained Llama with channels and heads of zeros, so that the default groups of 128 divide all its widths.

    What it computes is the same but for rounding and the norms' epsilon: they divide by the mean over more channels, of which the
    new ones are zero, and their weights make up for that.
    """
    narrow = trained_llama()
    config = copy.deepcopy(narrow.config)
    before, heads = config.hidden_size, config.hidden_size // config.num_attention_heads
    config.update({"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": heads})
    config.max_position_embeddings = 512
    wide = type(narrow)(config).eval()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            given = narrow.get_parameter(name)
            parameter.zero_()
            parameter[tuple(slice(size) for size in given.shape)] = given
            if parameter.dim() == 1:
                parameter.mul_((before / 256) ** 0.5)
        tokens = torch.tensor([list(PROMPTS[0])])
        torch.testing.assert_close(wide(tokens).logits, narrow(tokens).logits, rtol=1e-3, atol=1e-3)
    return wide


def byte_tokenizer() -> Any:
    """Bytes as tokens, each by its own number, as the demo's model reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's letters for bytes: printable ones stand for themselves, the others for 256 and on, in order
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    assert letters.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def quantized_llama(dtype: torch.dtype = torch.float32, tied: bool = False, **settings: Any) -> nn.Module:
    """The same in int4, all scales folded, so that every layout can hold it."""
    chosen = {"group_size": 64, "fold": "always"} | settings
    return awq_ext.quantize(trained_llama(dtype, tied), calibration_batches(count=4), **chosen)


def weights_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name of each quantized layer -> the weight it stands for, without its run-time scale, [out, in]."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, awq_ext.QuantLinear)}
    assert layers
    sizes = {
        name: (layer.in_features, layer.out_features, layer.group_size, layer.bits) for name, layer in layers.items()
    }
    return {
        name: quant_weight(layer.tiles, layer.tile_scales, layer.tile_zeros, *sizes[name]).to(dtype)
        for name, layer in layers.items()
    }


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Same layers, same bits."""
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype and torch.equal(weight, theirs[name]), name


def read_by(environment: str, program: str, folders: Iterable[Path]) -> dict[Path, dict[str, Tensor]]:
    """What ``program`` FOLDER WEIGHTS ... finds in each of ``folders``, in one run."""
    files = {folder: folder.with_name(f"{folder.name}.safetensors") for folder in folders}
    run(environment, program, *(each for pair in files.items() for each in pair))
    return {folder: load_file(file) for folder, file in files.items()}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files in ``folder``."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def prompt_file(folder: Path, text: bytes = PROMPTS[0]) -> Path:
    """The bytes of ``text`` as tokens int64 [1, T] of a safetensors file."""
    file = folder / "prompt.safetensors"
    save_file({"tokens": torch.tensor([list(text)])}, file)
    return file


def clear_prompt(folder: Path, model: nn.Module, margin: float = 0.1) -> tuple[Path, Tensor]:
    """A prompt and its greedy continuation by 16 tokens, int64 [1, T + 16], in which others must agree.

    Of PROMPTS the one in which the best logit of ``model`` leads most clearly throughout: by more than ``margin``.
    """
    answers = {}
    for text in PROMPTS:
        tokens = torch.tensor([list(text)])
        generated = model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            best = model(generated).logits[0, len(text) - 1 : -1].float().topk(2).values
        answers[(best[:, 0] - best[:, 1]).min().item()] = (text, generated)
    lead = max(answers)
    assert lead > margin, f"no prompt decides anything: a lead of {lead:.3f}"
    text, generated = answers[lead]
    return prompt_file(folder, text), generated


def tiny_qwen2(dtype: torch.dtype = torch.float16, **settings: Any) -> nn.Module:
    """A random Qwen2, which has biases, in int4."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    batches = [torch.randint(64, (2, 32)) for _ in range(4)]
    return awq_ext.quantize(model.to(dtype).eval(), batches, **({"fold": "always"} | settings))


# what a GGUF file can hold: settings of quantized_llama, by name
GGUF_SETTINGS: dict[str, dict[str, Any]] = {
    "Q4_0": {"symmetric": True, "group_size": 32},
    "Q4_1": {"group_size": 32},
    "Q8_0": {"symmetric": True, "group_size": 32, "bits": 8},
    "mixed": {"symmetric": True, "head": "int8", "per_layer": {"*.down_proj": {"bits": 8}}},
}


def tiny_phi(**settings: Any) -> nn.Module:
    """A random Phi in int4; its fc2 comes after a GELU, so its scale is applied at run time."""
    transformers = pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, num_attention_heads=4)).eval()
    return awq_ext.quantize(model, [torch.randint(64, (2, 32)) for _ in range(4)], **settings)
