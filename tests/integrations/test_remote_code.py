"""Models whose code lies beside their weights (auto_map, trust_remote_code)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import architectures
import hf_directory
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, logits
from typer.testing import CliRunner

import awq_ext
from awq_ext import CheckpointError, cli
from awq_ext.integrations.transformers_models import with_local_code

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")

CODE = {
    "configuration_tower.py": """
from transformers import PretrainedConfig

class TowerConfig(PretrainedConfig):
    model_type = "tower"

    def __init__(self, hidden_size=32, floors=2, vocab_size=96, **rest):
        self.hidden_size, self.floors, self.vocab_size = hidden_size, floors, vocab_size
        super().__init__(**rest)
""",
    "floors.py": """
from torch import nn

class Floor(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 64), nn.Linear(64, size)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())
""",
    "modeling_tower.py": """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_tower import TowerConfig
from .floors import Floor

class TowerForCausalLM(PreTrainedModel):
    config_class = TowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList(Floor(config.hidden_size) for _ in range(config.floors))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **rest):
        x = self.embed(input_ids)
        for floor in self.floors:
            x = floor(x)
        return CausalLMOutput(logits=self.head(x))
""",
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float model with its code; what transformers imports of it goes to a cache of this test's own."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / f"tower-{tmp_path.parent.name}-{tmp_path.name}".replace("_", "-")
    folder.mkdir()
    for name, text in CODE.items():
        (folder / name).write_text(text)
    config = {
        "model_type": "tower",
        "architectures": ["TowerForCausalLM"],
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_tower.TowerConfig",
            "AutoModelForCausalLM": "modeling_tower.TowerForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    trusted: dict[str, Any] = {"trust_remote_code": True}
    read = transformers.AutoConfig.from_pretrained(folder, **trusted)
    torch.manual_seed(0)
    model = architectures.loud(transformers.AutoModelForCausalLM.from_config(read, **trusted))
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_the_code_of_a_model_travels_with_it(format: str, source: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    awq_ext.quantize(model, [BATCH], group_size=32, fold="always", method="rtn", progress=False)
    expected = logits(model)
    awq_ext.save_pretrained(model, tmp_path / "int4", format=format)
    awq_ext.convert(tmp_path / "int4", tmp_path / "other", format="native")
    shutil.rmtree(source)
    for folder in (tmp_path / "int4", tmp_path / "other"):
        assert {file.name for file in folder.glob("*.py")} == {*CODE}
        assert torch.equal(logits(awq_ext.from_pretrained(folder, trust_remote_code=True)), expected)
        with pytest.raises(CheckpointError, match="trust_remote_code=True"):
            awq_ext.from_pretrained(folder)


def test_auto_map_names_files_beside_it_rather_than_a_repository(source: Path) -> None:
    mapped = {
        "AutoConfig": "someone/tower--configuration_tower.TowerConfig",
        "AutoTokenizer": ["someone/tower--modeling_tower.Tokenizer", None],
        "AutoModel": "someone/other--elsewhere.Tower",
    }
    found = with_local_code({"auto_map": mapped, "hidden_size": 1}, source)
    assert found == {
        "auto_map": {
            "AutoConfig": "configuration_tower.TowerConfig",
            "AutoTokenizer": ["modeling_tower.Tokenizer", None],
            "AutoModel": "someone/other--elsewhere.Tower",
        },
        "hidden_size": 1,
    }
    assert with_local_code({"auto_map": mapped}, None) == {"auto_map": mapped}


@pytest.mark.filterwarnings("ignore")  # of calibration tokens that are few
def test_the_commands_run_it_only_when_told(source: Path, tmp_path: Path) -> None:
    hf_directory.tokenizer().save_pretrained(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, source)
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 260}
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    more = {name: torch.randn(260, 32) for name in ("embed.weight", "head.weight")}
    save_file(weights | more, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "calib.txt").write_text("some text, again and again. " * 20)

    def run(*arguments: object):
        return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})

    text, sizes = tmp_path / "calib.txt", ["--seq-len", 64]
    calibrated = ["--calib", text, "--samples", 2, "--group-size", 32, *sizes]
    for arguments in (
        ["quantize", source, tmp_path / "int4", *calibrated, "--method", "rtn"],
        ["compare", source, *calibrated, "--traffic", text, "--method", "rtn"],
        ["eval", tmp_path / "int4", text, "--reference", source, *sizes],
    ):
        shown = run(*arguments)
        assert shown.exit_code == 1 and "runs only with --trust-remote-code" in shown.output, shown.output
        assert len(shown.stderr.splitlines()) == 1
        shown = run(*arguments, "--trust-remote-code")
        assert shown.exit_code == 0, shown.output
