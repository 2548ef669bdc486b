"""What a card takes over from the header of another."""

from __future__ import annotations

import pytest

from awq_ext.reporting.model_card import inherited_from


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
