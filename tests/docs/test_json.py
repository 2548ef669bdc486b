"""docs/json.md lists what ``--json`` writes: nothing more, nothing less, in the type that it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_directory
import pytest
from typer.testing import CliRunner

from awq_ext import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
PAGE = Path(__file__).parents[2] / "docs" / "json.md"
TYPES = {"number": (int, float), "string": str, "bool": bool, "any": object}


def documented(name: str, at: str = "") -> dict[str, tuple[str, bool]]:
    """Key -> (type, whether it may be missing) of a table of the page; tables that it refers to are put in their places."""
    part = PAGE.read_text(encoding="utf-8").split(f"<!-- json: {name} -->")[1].strip().split("\n\n")[0]
    found: dict[str, tuple[str, bool]] = {}
    for line in part.splitlines()[2:]:
        key, kind = (cell.strip() for cell in line.split("|")[1:3])
        optional, place = key.endswith("?"), f"{at}{key.removesuffix('?')}"
        if kind in TYPES:
            found[place] = (kind, optional)
        else:
            found |= {k: (t, o or optional) for k, (t, o) in documented(kind, f"{place}.").items()}
    return found


def leaves(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for name, held in value.items():
            yield from leaves(held, (*at, name))
    elif isinstance(value, list) and value:
        for held in value:
            yield from leaves(held, (*at, "[]"))
    else:
        yield at, value


def split(key: str) -> list[str]:
    return key.replace("[]", ".[]").split(".")


def fits(path: tuple[str, ...], key: str, kind: str) -> bool:
    """Words in capitals stand for any name; what is in a value of any type is not told. An empty list or object ends early."""
    parts = split(key)
    if len(path) < len(parts) or (len(path) > len(parts) and kind != "any"):
        return False
    return all(p == name or re.fullmatch("[A-Z_]+", p) for p, name in zip(parts, path, strict=False))


def mismatches(name: str, figures: Any) -> list[str]:
    keys, seen, wrong = documented(name), set(), []
    for path, value in leaves(figures):
        matching = [key for key, (kind, _) in keys.items() if fits(path, key, kind)]
        matching.sort(key=lambda key: sum(part.isupper() for part in split(key)))  # a name of its own counts first
        if value is None or value in ({}, []):
            deeper = [
                k for k, (_, optional) in keys.items() if optional and fits((*path, *split(k)[len(path) :]), k, "any")
            ]
            if not (deeper or (matching and keys[matching[0]][1])):
                wrong.append(f"{path} is {value!r}")
        elif not matching:
            wrong.append(f"{path} is not documented")
        else:
            kind = keys[matching[0]][0]
            if not isinstance(value, TYPES[kind]) or (kind == "number" and isinstance(value, bool)):
                wrong.append(f"{path} is no {kind}: {value!r}")
        seen |= set(matching)
        wrong += [f"{part!r} has a space" for part in path if " " in part and "METHOD" not in str(matching)]
    return wrong + [
        f"{key} is never written" for key, (_, optional) in keys.items() if not optional and key not in seen
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    hf_directory.make(folder / "m")
    for name in ("calib", "code"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} {i}" for i in range(300)))
    run(folder, "quantize", "m", "o", *CALIB)
    return folder


CALIB = ("--calib", "calib.txt", "--samples", "4", "--seq-len", "64", "--group-size", "32", "--set", "n_grid=2")
COMMANDS = {
    "quantize": ("m", "o2", *CALIB, "--traffic", "code.txt", "--tokens", "128"),
    "report": ("o",),
    "eval": ("o", "code.txt", "--reference", "m", "--seq-len", "64", "--tokens", "128"),
    "compare": (
        "m",
        *CALIB,
        "--traffic",
        "code.txt",
        "--tokens",
        "128",
        "--method",
        "rtn",
        "--method",
        "awq,clip=false",
    ),
    "inspect": ("o",),
    "bench": ("--shape", "64x96", "--rows", "1", "--group-size", "32", "--seconds", "0.05"),
    "doctor": (),
    "demo": ("--tokens", "512"),
}


def run(folder: Path, command: str, *arguments: str) -> None:
    here = [str(folder / word) if (folder / word).exists() or word in ("o", "o2") else word for word in arguments]
    shown = CliRunner().invoke(cli.app, [command, *here])
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.exhaustive) if name == "demo" else name for name in COMMANDS]
)
def test_the_page_lists_what_is_written(command: str, made: Path, tmp_path: Path) -> None:
    run(made, command, *COMMANDS[command], "--json", str(tmp_path / "f.json"))
    assert mismatches(command, json.loads((tmp_path / "f.json").read_text())) == []


def test_every_command_that_writes_json_is_on_the_page() -> None:
    takes = {name for name in COMMANDS if "--json" in CliRunner().invoke(cli.app, [name, "-h"]).output}
    names = {command.name for command in cli.app.registered_commands}
    others = {name for name in names - takes if "--json" in CliRunner().invoke(cli.app, [name, "-h"]).output}
    assert takes == set(COMMANDS) and others == set()


def test_what_is_missing_or_new_is_found() -> None:
    figures = {"code": {"windows": 1, "tokens": "many", "kl": {"value": 1.0, "low": None, "high": 2}, "odd key": 3}}
    found = mismatches("eval", figures)
    assert [line for line in found if "no number" in line] and [line for line in found if "has a space" in line]
    assert "TEXT.seconds is never written" in found and len(found) == 4
