"""What the package says of arguments, in the words of options."""

from __future__ import annotations

import warnings
from pathlib import Path

import hf_directory
import pytest
from typer.testing import CliRunner

from awq_ext import cli
from awq_ext.cli.options.words import in_options

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("quantize with symmetric=True, or", "quantize with --set symmetric=true, or"),
        ("a multiple of group_size=128: leave it with skip=", "a multiple of --group-size 128: leave it with --skip"),
        (
            'use format="gptq", "mlx" or "native", with head="int4"',
            "use --format gptq, mlx or native, with --head int4",
        ),
        ("another directory, or overwrite=True", "another directory, or --overwrite"),
        *(
            (call, call)
            for call in ('f(model, format="native")', "quantize(m, bits=3)", "--set bits=3", "AwqConfig.bits=3")
        ),
    ],
)
def test_arguments_become_options_but_calls_stay_calls(said: str, typed: str) -> None:
    assert in_options(said) == typed


def test_what_is_said_of_a_bfloat16_model_for_mlx_works(tmp_path: Path) -> None:
    model = hf_directory.make(tmp_path / "float", "bfloat16")
    (tmp_path / "calib.txt").write_text("some text of this kind, again and again. " * 40)
    options = [
        "--calib",
        tmp_path / "calib.txt",
        "--samples",
        2,
        "--seq-len",
        64,
        "--group-size",
        32,
        "--method",
        "rtn",
    ]

    def quantize(*more: object) -> str:
        words = [
            "quantize",
            model,
            tmp_path / f"out{len(list(tmp_path.iterdir()))}",
            *options,
            "--format",
            "mlx",
            *more,
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown = CliRunner().invoke(cli.app, list(map(str, words)))
        assert shown.exit_code == 0, shown.output
        return " ".join(shown.stderr.split())

    assert "Quantize with --set scale_dtype=bfloat16, or load the float model with --dtype float16" in quantize()
    for way in (("--dtype", "float16"), ("--set", "scale_dtype=bfloat16")):
        assert "MLX then computes" not in quantize(*way)
