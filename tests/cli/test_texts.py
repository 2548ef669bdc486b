"""Files of texts: what each kind holds, what is refused, and where the windows come from."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import hf_directory
import pytest
from typer.testing import CliRunner

from awq_ext import cli
from awq_ext.cli.texts import drawn_windows, read_text, windows

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
SHOWN = "user: hi\nassistant: ho\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return hf_directory.tokenizer()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "one"}, "one"),
        ("one", "one"),
        (CHAT, SHOWN),
        ({"messages": CHAT}, SHOWN),
        ({"conversations": SHARED}, SHOWN),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, SHOWN),
        ({"text": "one", "label": 3}, "one"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_json(row: Any, text: str, suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [row, {"text": "two"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n" if suffix == ".jsonl" else json.dumps(rows, indent=1))
    assert read_text(path, tokenizer) == f"{text}\ntwo"


def test_tables(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "answer"])
        writer.writeheader()
        writer.writerows(
            [{"id": 1, "text": 'one, "two"\nthree', "answer": "a"}, {"id": 2, "text": "four", "answer": "b"}]
        )
    assert read_text(path, tokenizer) == 'one, "two"\nthree\nfour'
    assert read_text(path, tokenizer, "answer") == "a\nb"
    with pytest.raises(ValueError, match=r"row 1 has no field 'nothing': it has \['answer', 'id', 'text'\]"):
        read_text(path, tokenizer, "nothing")


def test_parquet(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("text that looks like text")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(ImportError, match="pip install pyarrow"):
            read_text(path, tokenizer)
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet NOT TESTED: pip install pyarrow")
    with pytest.raises(ValueError, match="is no Parquet file"):
        read_text(path, tokenizer)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": ["one", "two"]}), path)
    assert read_text(path, tokenizer) == "one\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 3}', r"line 1: 'text' is a int"),
        ("a.jsonl", "[1]", r"line 1 is a list"),
        ("a.jsonl", '{"messages": 3}', r"line 1: 'messages' is a int"),
        ("a.jsonl", '{"question": "x"}', r"line 1 has neither of 'text', .*it has \['question'\]; .* \(--field NAME;"),
        ("a.json", '{"text": "one"}', "holds a dict: a list of rows"),
        ("a.json", "[", "a.json is no JSON"),
        ("a.pdf", "text", r"what is in a \.pdf is not known: \.txt, "),
        ("a", "text", "file without a suffix is not known"),
        ("a.arrow", "text", "rename plain text to .txt"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name, tokenizer)


def test_a_chat_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = hf_directory.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    (tmp_path / "a.json").write_text(json.dumps([CHAT]))
    with pytest.raises(ValueError, match=r"row 1: the tokenizer's chat template refuses its messages: no system role"):
        read_text(tmp_path / "a.json", tokenizer)


def test_a_chat_for_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    tokenizer = hf_directory.tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "a.json").write_text(json.dumps([CHAT]))
    says = r"row 1 is a chat, and this model's tokenizer has no chat template: give rows with a field 'text', or a"
    with pytest.raises(ValueError, match=says):
        read_text(tmp_path / "a.json", tokenizer)


def test_a_shorter_window_is_advised_where_it_would_be_one(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six")
    with pytest.raises(ValueError, match=r"fewer than one window of 100: give more text, or a smaller --seq-len$"):
        windows([tmp_path / "a.txt"], tokenizer, 2, 100)
    with pytest.raises(ValueError, match=r"fewer than one window of 4096: give more text$"):
        windows([tmp_path / "a.txt"], tokenizer, 2, 4096)


def test_a_line_ends_where_json_says(tokenizer: Any, tmp_path: Path) -> None:
    """U+2028 may stand in a JSON string, and is no end of a line there."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_text(path, tokenizer) == "one\u2028two"


@pytest.mark.parametrize("size", [1000, 300_000])  # tokenized as a whole, and too long for that
def test_windows_are_drawn_from_all_of_the_text(size: int, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"{i:07}" for i in range(size // 8)))
    found = [tokenizer.decode(window[0]) for window in drawn_windows([path], tokenizer, 10, 16)]
    places = [path.read_text().index(text) for text in found]
    # one in each tenth of the text, the last of which a window ends
    assert [place * 10 // size for place in places] == pytest.approx(range(10), abs=1)
    assert places == sorted(set(places))
    again = [tokenizer.decode(window[0]) for window in drawn_windows([path], tokenizer, 10, 16)]
    other = [tokenizer.decode(window[0]) for window in drawn_windows([path], tokenizer, 10, 16, seed=1)]
    assert again == found != other
    everything = drawn_windows([path], tokenizer, 10**6, 16)
    assert len(everything) == (size - 1) // 16


def test_windows_to_score_are_the_first(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    assert [tokenizer.decode(window[0]) for window in windows([tmp_path / "a.txt"], tokenizer, 2, 5)] == [
        "01234",
        "56789",
    ]


def test_a_field_is_read_from_every_file_that_has_rows(tmp_path: Path) -> None:
    model = hf_directory.make(tmp_path / "model")
    for name, word in (("calib", "why? "), ("served", "how? ")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": word * 60, "text": "not this"}) + "\n")
    (tmp_path / "plain.txt").write_text("of no fields, " * 30)

    def run(*arguments: object):
        options = ["--seq-len", 64, "--tokens", 128, "--samples", 2, "--method", "rtn", "--group-size", 32]
        options += ["--set", "n_grid=2", "--json", "-", "--field", "question"]
        return CliRunner().invoke(cli.app, list(map(str, ["compare", model, *arguments, *options])))

    traffic = ["--traffic", tmp_path / "served.jsonl", "--traffic", tmp_path / "plain.txt"]
    shown = run("--calib", tmp_path / "calib.jsonl", *traffic)
    assert shown.exit_code == 0, shown.output
    scored = json.loads(shown.stdout)["rows"][0]["evaluations"]
    assert {name: found["tokens"] for name, found in scored.items()} == {"served": 126, "plain": 126}
    shown = run("--calib", tmp_path / "plain.txt", *traffic[2:])
    assert shown.exit_code == 1 and "--field question: no file has fields" in shown.output


def test_the_command_takes_a_column_and_tells_of_few_tokens(tmp_path: Path) -> None:
    model = hf_directory.make(tmp_path / "model")
    rows = [{"question": "why? " * 40, "label": 1}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*more: object):
        options = [
            "--calib",
            tmp_path / "a.jsonl",
            "--samples",
            2,
            "--seq-len",
            64,
            "--group-size",
            32,
            "--set",
            "n_grid=2",
        ]
        return CliRunner().invoke(cli.app, list(map(str, ["quantize", model, tmp_path / "out", *options, *more])))

    refused = run()
    assert refused.exit_code == 1 and "name the field of its text" in " ".join(refused.output.split())
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a process that pytest does not watch
        shown = run("--field", "question")
    assert shown.exit_code == 0, shown.output
    assert len([line for line in shown.stderr.splitlines() if line.startswith("warning: 128 calibration tokens")]) == 1
    assert "quantizing: block 2/2" in shown.stderr
