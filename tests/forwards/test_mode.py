"""The mode of calibration: what it changes of a model, and that all of it is as before, also after an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from awq_ext.forwards.mode import calibration_mode


def model() -> nn.Module:
    """Training and eval mode mixed; an encoder and a decoder with a cache each, of which one is on."""
    made = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2), "none": nn.Linear(2, 2)})
    made["encoder"].config = SimpleNamespace(use_cache=True)
    made["decoder"].config = SimpleNamespace(use_cache=False)
    made["none"].config = SimpleNamespace()
    made.config = made["encoder"].config
    made["decoder"].eval()
    return made


def flags(made: nn.Module) -> list[bool]:
    return [module.training for module in made.modules()]


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_all_is_as_before(error: type[BaseException] | None) -> None:
    made = model()
    before = flags(made)
    assert len(set(before)) == 2
    try:
        with calibration_mode(made):
            assert not any(flags(made))
            assert made.config.use_cache is False
            if error is not None:
                raise error
    except (ZeroDivisionError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert flags(made) == before
    assert made.config.use_cache is True
    assert made["decoder"].config.use_cache is False
    assert vars(made["none"].config) == {}


def test_a_module_takes_over_the_flag_of_the_one_whose_place_it_took() -> None:
    made = model()
    old, new = made["encoder"], nn.Linear(2, 2).eval()
    with calibration_mode(made):
        made["encoder"] = new
    assert new.training
    assert old.training
