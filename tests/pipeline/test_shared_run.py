"""Several processes that quantize one model: the bits of one process, and one clear end for all where one of them fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import team
import team_cases
import torch

pytest.importorskip(
    "transformers", reason="mixtures were NOT quantized by several processes: pip install 'awq-ext[test]'"
)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
PROGRAM = str(Path(team_cases.__file__))
QUICK = [("llama", 2), ("mixture", 4)]
OTHERS = [(case, size) for case in team_cases.CASES for size in (2, 4) if (case, size) not in QUICK]
TIMEOUT = 4.0


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["report"] == expected["report"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert [name for name, one in expected["tensors"].items() if not torch.equal(found["tensors"][name], one)] == []


def arguments(case: str, folder: Path, **options: Any) -> list[str]:
    return [PROGRAM, case, str(folder), json.dumps(options)]


@pytest.mark.parametrize(("case", "size"), QUICK + [pytest.param(*one, marks=pytest.mark.exhaustive) for one in OTHERS])
def test_every_process_gets_the_bits_of_a_single_one(case: str, size: int, tmp_path: Path) -> None:
    if case.startswith(("padded", "mixtral")):
        pytest.importorskip("transformers", reason=f"{case} was NOT quantized together: pip install 'awq-ext[test]'")
    expected = team_cases.outcome(team_cases.quantized(case))
    assert expected["report"]["quantized_parameters"] > 0
    said = team.run(size, arguments(case, tmp_path))
    for rank in range(size):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)
    assert not any(said), said


def ends(size: int, folder: Path, fault: tuple[str, int, int], seconds: float = 60, **options: Any) -> dict[int, str]:
    """What each process said at its end; not those that were killed or stopped, which this ends."""
    started = team.start(size, arguments("mixture", folder, fault=fault, timeout=TIMEOUT, **options))
    kind, struck, _ = fault
    until = time.monotonic() + seconds
    try:
        said = {}
        for one in started:
            if kind == "raise" or one.number != struck:
                code, text = one.ends(max(1.0, until - time.monotonic()))
                assert code == 3, text
                said[one.number] = text
        return said
    finally:
        for one in started:
            one.process.kill()
            one.process.communicate()


@pytest.mark.parametrize(
    ("kind", "struck"),
    [
        ("kill", 1),
        pytest.param("stop", 1, marks=pytest.mark.exhaustive),
        pytest.param("kill", 0, marks=pytest.mark.exhaustive),
        pytest.param("stop", 0, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.fault(
    "Processes and threads",
    "one of several processes is killed or stopped, or its machine is gone",
    "within three timeouts the others end with a TeamError that names it, their models as they were; the same call goes on",
)
def test_one_that_is_gone_ends_all_and_the_same_call_goes_on(kind: str, struck: int, tmp_path: Path) -> None:
    work = tmp_path / "work"
    block = 2 + struck  # of the second pair: those before are finished
    started = time.monotonic()
    said = ends(2, tmp_path, (kind, struck, block), resume=str(work))
    assert time.monotonic() - started < 50
    assert len(said) == 1
    for text in said.values():
        last = text.splitlines()[-1]  # torch itself logs that a connection to process 0 broke
        assert last.startswith(f"TeamError: process {struck} (") and "Traceback" not in text, text
        assert f"gave no sign of life for {TIMEOUT:g} s" in last and last.endswith("| model as it was")
        assert text.count("\n") == 1 or struck == 0, text
    assert len(list(work.glob("block-*.safetensors"))) == 2
    team.run(2, arguments("mixture", tmp_path, resume=str(work)))
    expected = team_cases.outcome(team_cases.quantized("mixture"))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.exhaustive
def test_another_number_of_processes_goes_on_with_the_work_of_one_that_was_killed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    ends(2, tmp_path, ("kill", 1, 3), resume=str(work))
    for size in (1, 4):  # the second finds all of it finished
        team.run(size, arguments("mixture", tmp_path, resume=str(work)))
        expected = team_cases.outcome(team_cases.quantized("mixture"))
        for rank in range(size):
            assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.fault(
    "Processes and threads",
    "one of several processes fails",
    "it raises its own error, all others a TeamError that tells of it; the models stay as they were",
)
def test_an_exception_in_one_ends_all_with_its_message(tmp_path: Path) -> None:
    said = ends(2, tmp_path, ("raise", 1, 1))
    assert said[1] == "ArithmeticError: no scales for block 1 | model as it was\n"
    assert said[0].startswith("TeamError: process 1 (")
    assert "failed: ArithmeticError: no scales for block 1" in said[0] and said[0].endswith("| model as it was\n")
