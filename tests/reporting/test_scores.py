"""Scores on texts: read, said, and exchanged in a card."""

from __future__ import annotations

import pytest

from awq_ext.reporting.scores import plain_scores, score_facts, table_rows, with_scores

KL = {"value": 0.01234, "low": 0.01, "high": 0.02}
SCORED = {"code": {"kl": KL, "top1": KL, "perplexity": {"value": 12.5, "low": None, "high": None}, "tokens": 4096}}
CARD = "# A model\n\n| | |\n|---|---|\n| base model | a/b |\n{}| made with | torch |\n\nmine\n"


def test_what_is_measured_is_said_and_what_is_not_is_not() -> None:
    assert list(score_facts(SCORED, "a/b")) == [
        (
            "scores on code",
            "KL divergence 0.01234 (0.01 to 0.02) nats a token; same likeliest token 0.01234 (0.01 to 0.02); "
            "perplexity 12.5; 4,096 scored",
        )
    ]
    own = {"images": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "tokens": 100}}
    (said, asked) = score_facts(own, "a/b")
    assert said == ("scores on images", "accuracy 0.5 (0.4 to 0.6); 100 scored")
    assert asked[0] == "divergence" and "--reference a/b --card" in asked[1]
    (asked,) = score_facts({}, "")
    assert "not measured" in asked[1] and "--reference FLOAT_MODEL" in asked[1]


def test_scores_take_the_place_of_those_that_were_there() -> None:
    before = CARD.format(table_rows(score_facts({}, "a/b")))
    after = with_scores(before, SCORED)
    assert after == CARD.format(table_rows(score_facts(SCORED, "a/b")))
    more = SCORED | {"prose": SCORED["code"]}
    assert with_scores(after, more) == CARD.format(table_rows(score_facts(more, "a/b")))
    assert with_scores(after, {}) == after and with_scores("mine", SCORED) == "mine"


@pytest.mark.parametrize("given", [[], 3, {"code": 3}, {"code": {"kl": 3}}])
def test_what_are_no_scores(given: object) -> None:
    with pytest.raises(TypeError, match="evaluations by the name of their text"):
        plain_scores(given)
