"""Text that a model writes itself: which models can, what they write, and what quantize makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext.calibration import sampled_text as generation
from awq_ext.calibration.extra_batches import generated_calls
from awq_ext.calibration.sampled_text import SEGMENT, can_generate, generated_tokens
from awq_ext.forwards.calls import Call

VOCAB, WIDTH = 64, 32
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FAST = {"group_size": 16, "fold": "never", "progress": False}


class Writer(nn.Module):
    """A decoder as transformers calls it, that always goes on with the next id; its cache counts the tokens it was shown."""

    def __init__(self, fault: str = "", **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"vocab_size": VOCAB} | config, **config)
        self.fault = fault
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lengths: list[int] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        shown = (past_key_values or 0) + input_ids.shape[1]
        if use_cache:
            self.lengths.append(shown)
            if self.fault == "raises":
                raise RuntimeError("no cache today")
        logits = 1e4 * nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB) + 0 * self.head(
            self.up(self.tokens(input_ids))
        )
        if self.fault == "nan":
            logits = logits * float("nan")
        cache = shown if use_cache and self.fault != "no cache" else None
        return SimpleNamespace(logits=logits, past_key_values=cache)


def written(model: nn.Module, count: int, longest: int = 512, tokens: Tensor | None = None, seed: int = 0) -> Tensor:
    tokens = torch.arange(VOCAB) if tokens is None else tokens
    return generated_tokens(model, tokens, count, longest, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("longest, length", [(10, 10), (SEGMENT, SEGMENT), (10 * SEGMENT, SEGMENT)])
def test_segments_go_on_from_a_random_token(longest: int, length: int) -> None:
    model = Writer()
    segments = written(model, 70 * length - 1, longest).view(-1, length)
    assert len(segments) == 70
    assert torch.equal(segments, (segments[:, :1] + torch.arange(length)) % VOCAB)
    assert segments[:, 0].unique().numel() > 30
    # one token at a time, and each with the keys and values of those before it
    assert model.lengths == [*range(1, length)] * 3


def test_only_ordinary_tokens_are_written() -> None:
    model = Writer()
    even = torch.arange(0, VOCAB, 2)
    # the next id is odd, so that all others are equally likely
    segments = written(model, 64 * SEGMENT, tokens=even)
    assert segments.unique().tolist() == even.tolist()


class Coin(Writer):
    """Id 1 after anything with a probability of 0.9, id 2 with 0.1, no other."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        odds = torch.full((VOCAB,), -torch.inf)
        odds[1:3] = torch.tensor([0.9, 0.1]).log()
        return SimpleNamespace(logits=odds.expand(*input_ids.shape, VOCAB), past_key_values=0)


def test_tokens_are_sampled_as_likely_as_the_model_says() -> None:
    segments = written(Coin(), 80 * SEGMENT).view(-1, SEGMENT)[:, 1:]
    assert segments.unique().tolist() == [1, 2]
    # 10160 draws: a standard deviation of 0.003
    assert abs(float((segments == 2).float().mean()) - 0.1) < 0.015


def test_the_same_text_each_time() -> None:
    assert torch.equal(written(Coin(), 1000), written(Coin(), 1000))
    assert not torch.equal(written(Coin(), 1000), written(Coin(), 1000, seed=1))


@pytest.mark.parametrize(
    "fault, message", [("nan", "NaN or Inf"), ("no cache", "no past_key_values"), ("raises", "today")]
)
def test_a_model_that_cannot_go_on_is_an_error(fault: str, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        written(Writer(fault), 100)


def test_who_can() -> None:
    headless = Writer()
    headless.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    assert can_generate(Writer())
    assert not can_generate(headless)
    assert not can_generate(Writer(is_encoder_decoder=True))
    assert not can_generate(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "class_name, expected", [("LlamaForCausalLM", True), ("LlamaModel", False), ("BertForMaskedLM", False)]
)
def test_who_can_among_transformers(class_name: str, expected: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    cls = getattr(transformers, class_name)
    assert can_generate(cls(cls.config_class(**SMALL))) is expected


def test_what_is_written_takes_the_place_of_ordinary_ids() -> None:
    ids, mask = torch.randint(0, VOCAB, (2, 300)), torch.ones(2, 300)
    ids[0, 0], mask[1, 200:] = 3, 0
    call = Call(kwargs={"input_ids": ids, "attention_mask": mask})
    (made,) = generated_calls(Writer(eos_token_id=3), [call], 1)
    new = made.kwargs["input_ids"]
    assert new[0, 0] == 3
    assert torch.equal(new[1, 200:], ids[1, 200:])
    assert torch.equal(made.kwargs["attention_mask"], mask)
    where = slice(1, SEGMENT)
    steps = new[0, where].diff() % VOCAB
    assert ((steps == 1) | (new[0, where][1:] == 3) | (new[0, where][:-1] == 3) | (new[0, where][:-1] == 2)).all()
    assert "generated_tokens=0" in made.hint


@pytest.mark.parametrize(
    "options, notes",
    [
        ({"method": "awq"}, []),
        ({"method": "gptq", "generated_tokens": 0}, ["calibrated on 8 batches, and on 2 windows of random tokens"]),
        (
            {"method": "awq", "generated_tokens": 0.5},
            ["calibrated on 8 batches, and on 4 windows that the model wrote"],
        ),
        (
            {"method": "awq+gptq"},
            ["calibrated on 8 batches, and on 2 windows of random tokens and 2 windows that the model wrote"],
        ),
    ],
)
def test_error_feedback_gets_a_quarter_unless_told(options: dict[str, Any], notes: list[str]) -> None:
    calib = [torch.randint(0, VOCAB, (1, 30)) for _ in range(8)]
    report = awq_ext.quantize(Writer(), calib, **options, **FAST).awq_report
    assert report.notes == notes


def test_a_model_that_fails_to_write_is_quantized_without() -> None:
    report = awq_ext.quantize(
        Writer("raises"), [torch.zeros(1, 30, dtype=torch.long)], method="gptq", **FAST
    ).awq_report
    assert report.notes[0] == "the model could not write text to calibrate on: RuntimeError: no cache today"
    assert report["up"].status == "int4"


def test_a_model_of_transformers_writes_and_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(generation, "_sampled", lambda logits, generator: logits.argmax(-1))
    segments = written(model, 300, 50).view(-1, 50)
    # the likeliest token each time, as the model tells without a cache too
    with torch.no_grad():
        logits = model(segments).logits
    assert torch.equal(logits[:, :-1].argmax(-1), segments[:, 1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.use_cache


@pytest.mark.parametrize("value, error", [(-0.1, ValueError), (float("nan"), ValueError), ("a", TypeError)])
def test_a_bad_share_is_an_error(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="generated_tokens"):
        awq_ext.AwqConfig(generated_tokens=value)
