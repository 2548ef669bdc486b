"""quantize(learn_rounding=): closer outputs, what is left as it was, blocks that cannot be learned, and the way back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import Snapshot
from torch import Tensor, nn

import awq_ext
from awq_ext.config import AwqConfig
from awq_ext.demo import data
from awq_ext.demo.model import ByteLlama, ByteLlamaConfig, load_demo_model
from awq_ext.layers.quant_linear import QuantLinear
from awq_ext.pipeline.shared_run import SharedRun
from awq_ext.solving import block_solver, learned

FAST = {"method": "awq+gptq", "group_size": 16, "random_tokens": 0, "generated_tokens": 0, "progress": False}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return ByteLlama(ByteLlamaConfig(32, 64, 2, 4, 2, 64)).eval()


def windows(first: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(first)
    return [torch.randint(0, 256, (1, 40), generator=generator) for _ in range(count)]


def divergence(model: nn.Module) -> float:
    """Mean KL divergence from the demo's float model on text that took no part."""
    rows = [row[None] for row in data.held_out_tokens(2048, 128)]
    return awq_ext.evaluate(model, rows, reference=load_demo_model())["kl"].value


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 3, "packed": False}, {"symmetric": True, "fold": "never", "propagate": "quantized"}],
    ids=["int4", "fake 3 bits", "divided at run time, blocks on quantized ones"],
)
def test_learned_codes_are_closer_to_the_float_model(settings: dict[str, Any]) -> None:
    calib, common = data.calibration_batches(24, 4, 128), FAST | {"group_size": 64}
    plain, model = (awq_ext.quantize(load_demo_model(), calib, learn_rounding=n, **common, **settings) for n in (0, 80))
    assert divergence(model) < 0.95 * divergence(plain)
    for layer in model.awq_report.layers:
        assert layer.loss is None or layer.loss <= layer.loss_rtn
    for one, other in zip(plain.modules(), model.modules(), strict=True):
        assert type(one) is type(other)
        if isinstance(one, QuantLinear):
            assert torch.equal(one.zeros, other.zeros)


def test_twice_the_same(tmp_path: Any) -> None:
    calib = windows(0, 8)
    one, again = (awq_ext.quantize(llama(), calib, learn_rounding=20, **FAST).state_dict() for _ in range(2))
    assert one.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    resumed = llama()
    awq_ext.quantize(resumed, calib, learn_rounding=20, resume=tmp_path / "work", **FAST)
    again = awq_ext.quantize(llama(), calib, learn_rounding=20, resume=tmp_path / "work", **FAST).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in resumed.state_dict().items())


def test_steps_follow_a_running_mean_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, list[Tensor]] = {}
    followed: list[tuple[int, Tensor]] = []
    alive: list[Any] = []
    move, move_learned = learned._Rounding.move, learned.kernels.move_learned

    def watched(self: Any, gradient: Tensor, rate: float) -> None:
        alive.append(self)  # else the next block's may be told by the same number
        given.setdefault(id(self), []).append(gradient.clone())
        move(self, gradient, rate)
        followed[-1] = (id(self), followed[-1][1])

    def kernel(*arguments: Any, gradient: Tensor, **settings: Any) -> None:
        followed.append((0, gradient.clone()))
        move_learned(*arguments, gradient=gradient, **settings)

    monkeypatch.setattr(learned._Rounding, "move", watched)
    monkeypatch.setattr(learned.kernels, "move_learned", kernel)
    awq_ext.quantize(llama(), windows(0, 8), learn_rounding=5, **FAST)
    assert len(given) == 14 and {len(one) for one in given.values()} == {5}
    for key, gradients in given.items():
        mean = torch.zeros_like(gradients[0])
        for gradient, used in zip(gradients, (mean for layer, mean in followed if layer == key), strict=True):
            mean = learned.MOMENTUM * mean + (1 - learned.MOMENTUM) * gradient
            # two roundings of fp32 a step in either order
            torch.testing.assert_close(used, mean, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_batch_whose_error_is_no_number_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient would stay in the running mean."""
    error, moved, asked = learned._error, [], []

    def broken(*arguments: Any) -> Tensor:
        value = error(*arguments)
        asked.append(torch.is_grad_enabled())
        return value * float("nan") if sum(asked) % 3 == 2 and asked[-1] else value

    monkeypatch.setattr(learned, "_error", broken)
    move = learned._Rounding.move
    monkeypatch.setattr(learned._Rounding, "move", lambda *given: (moved.append(given[1]), move(*given)))
    awq_ext.quantize(llama(), windows(0, 8), learn_rounding=6, **FAST)
    # 6 steps for each block, of which the 2nd and the 5th are passed over; 7 Linears in each
    assert len(moved) == 4 * 14
    assert all(bool(gradient.isfinite().all()) for gradient in moved)


def rows(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 32, generator=generator) for _ in range(4)]


class Mlp(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(32, 48), nn.Linear(48, 32), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(torch.relu(self.up(x))))


def learned_mlps(monkeypatch: pytest.MonkeyPatch, calib: list[Tensor], last: nn.Module) -> list[learned.Learned]:
    found, learn = [], block_solver.learn_rounding
    monkeypatch.setattr(block_solver, "learn_rounding", lambda *given: (found.append(learn(*given)), found[-1])[1])
    torch.manual_seed(0)
    model = nn.Sequential(*(Mlp(last) for _ in range(2))).to(calib[0].dtype).eval()
    awq_ext.quantize(model, calib, learn_rounding=60, **FAST)
    return [one for _, one in found]


def test_fp16_has_gradients_of_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a mean over 65,536 entries is less than the smallest number of fp16."""
    zeros, move = [], learned._Rounding.move

    def watched(self: Any, gradient: Tensor, rate: float) -> None:
        zeros.append(float((gradient == 0).float().mean()))
        move(self, gradient, rate)

    monkeypatch.setattr(learned._Rounding, "move", watched)
    learned_mlps(monkeypatch, [batch.mul(30).half() for batch in rows(2048)], nn.Identity())
    assert len(zeros) == 4 * 60
    assert max(zeros) < 0.1


class Gated(nn.Module):
    """Sets rows to 0 whose sum is not positive; a row near the edge is 0 in float and not behind rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.sum(-1, keepdim=True) > 0)


def test_rows_of_zeros_do_not_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(one.before < 1e3 for one in learned_mlps(monkeypatch, rows(256), Gated()))


class Policy(nn.Module):
    """Masks some entries of its output, as the logits of a policy are masked."""

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.arange(32) % 4 == 3, float("-inf"))


def test_masked_entries_of_an_output_do_not_count() -> None:
    def policy(last: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return Mlp(last).eval()

    plain, model = (awq_ext.quantize(policy(Policy()), rows(64), learn_rounding=n, blocks=[], **FAST) for n in (0, 60))
    given = rows(65)[0]
    wanted, before, after = (one(given)[:, torch.arange(32) % 4 != 3] for one in (policy(Policy()), plain, model))
    assert (after - wanted).norm() < 0.98 * (before - wanted).norm()
    assert 0 < model.awq_report.blocks[0].output_error < 1


def test_a_batch_whose_gradients_are_no_numbers_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, move = [], learned._Rounding.move
    monkeypatch.setattr(learned, "_factor", lambda probe: float("inf"))
    monkeypatch.setattr(learned._Rounding, "move", lambda *given: (moved.append(given), move(*given)))
    learned_mlps(monkeypatch, rows(16), nn.Identity())
    assert not moved


def test_without_a_gain_on_the_held_out_batches_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "RATE", 50.0)  # every code goes as far as it can, wherever that leads
    monkeypatch.setattr(learned, "SCALE_RATE", 1.0)
    calib = windows(0, 9)
    plain, model = (awq_ext.quantize(llama(), calib, learn_rounding=n, **FAST) for n in (0, 3))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


class Closed(nn.Module):
    """A block that computes without gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.block(*args, **kwargs)


def test_a_block_without_gradients_is_quantized_with_a_note() -> None:
    def closed() -> nn.Module:
        model = llama()
        model.layers[0] = Closed(model.layers[0])
        return model

    with pytest.warns(UserWarning, match="rounding not learned"):
        model = awq_ext.quantize(closed(), windows(0, 8), learn_rounding=20, **FAST)
    plain = awq_ext.quantize(closed(), windows(0, 8), **FAST)
    same, other = model.layers[0].state_dict(), plain.layers[0].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in same.items())


def test_one_batch_or_logits_teach_nothing() -> None:
    """With one batch none could decide. A whole model returns much more than it reads: all logits would be held."""
    for count, blocks in ((1, None), (8, [])):
        settings = FAST | {"blocks": blocks}
        plain, model = (awq_ext.quantize(llama(), windows(0, count), learn_rounding=n, **settings) for n in (0, 2))
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_gradients_of_the_users_parameters_are_not_touched() -> None:
    model = llama()
    marks = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name]
    norms = {name: parameter for name, parameter in model.named_parameters() if "norm" in name}
    awq_ext.quantize(model, windows(0, 8), learn_rounding=4, **FAST)
    assert norms
    for name, parameter in norms.items():
        assert parameter.grad is marks[name]
        assert (parameter.grad == 3).all()


def test_an_interrupt_while_learning_leaves_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learned._Rounding, "move", stop)
    model = llama()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        awq_ext.quantize(model, windows(0, 8), learn_rounding=4, **FAST)
    before.assert_unchanged()


def test_the_plan_counts_what_learning_holds() -> None:
    plans = [awq_ext.plan(llama(), windows(0, 1)[0], batches=8, learn_rounding=n, group_size=16) for n in (0, 1)]
    assert plans[1].planned_memory_bytes > plans[0].planned_memory_bytes


def test_several_processes_are_refused() -> None:
    opened, keeping = SimpleNamespace(config=AwqConfig(learn_rounding=2)), SimpleNamespace(team=SimpleNamespace(size=3))
    with pytest.raises(ValueError, match="learn_rounding=2 needs all calibration batches in one process, and 3 work"):
        SharedRun(opened, [], None, False, None, keeping)


def test_the_setting() -> None:
    assert AwqConfig().learn_rounding == 0
    with pytest.raises(ValueError, match=r"AwqConfig[.]learn_rounding=-1: at least 0"):
        AwqConfig(learn_rounding=-1)
