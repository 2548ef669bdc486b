"""What a card takes over from the header of another."""

from __future__ import annotations

import pytest

from awq_ext.reporting.model_card import _tokens, inherited_from
from awq_ext.reporting.report import AwqReport, LayerReport


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("license: mit", "license: mit"),
        ("title: x\nlicense: apache-2.0\ntags:\n- a", "license: apache-2.0"),
        ("language:\n- en\n- 'no'\nlicense: mit", "language:\n- en\n- 'no'\nlicense: mit"),
        ("language: [en, fr]", "language: [en, fr]"),
        (
            'license_link: https://some.org/x\nlicense_name: "a: b"',
            'license_link: https://some.org/x\nlicense_name: "a: b"',
        ),
        ("base_model: a/b\nmodel-index:\n- license: mit", ""),
        *(
            (broken, "")
            for broken in ("license: [", "license: a: b", "language:\n- - x", "license: |\n  long", "license: *x")
        ),
    ],
)
def test_words_and_lists_of_words_are_taken_over(header: str, taken: str) -> None:
    assert inherited_from(f"---\n{header}\n---\nlicense: proprietary\n") == taken
    assert inherited_from(f"---\n{header}") == inherited_from(f"# Title\n---\n{header}\n---\n") == ""


def test_as_many_built_in_tokens_as_given_ones_are_not_the_same_ones() -> None:
    """A limit on both is shared in halves."""
    told = {"calibration_tokens": 4096, "builtin_tokens": 4096, "layers": [LayerReport("a", 1, 1, "int4", tokens=8192)]}
    assert _tokens(AwqReport(config={"builtin_text": True}, **told)) == "4,096 tokens given, 4,096 built-in"
    assert _tokens(AwqReport(config={"builtin_text": False}, **told)) == "4,096 built-in tokens"
