"""A quantized output layer in models of Transformers, tied to the embedding or not: saved, loaded, tied no more, not resized."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Snapshot, same_bits
from tiny_transformers import BATCH, SETTINGS, assert_same_layers, float_model, load, logits, registered  # noqa: F401

import awq_ext
from awq_ext import CheckpointError, QuantLinear

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install 'awq-ext[hf]'")

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
HOLDING = ["native", "compressed-tensors", "gptq"]


def quantized(tied: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = float_model(tie_word_embeddings=tied)
    return awq_ext.quantize(model, [BATCH], **SETTINGS | {"head": "int4", "symmetric": True} | settings)


def assert_apart(model: Any, reference: Any) -> None:
    """A head of ints beside a float embedding, and nothing ties them again."""
    assert isinstance(model.lm_head, QuantLinear) and model.get_output_embeddings() is model.lm_head
    assert same_bits(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)
    assert_same_layers(model, reference)
    assert model.config.tie_word_embeddings is False and model.all_tied_weights_keys == {}
    before = logits(model)
    model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear) and torch.equal(logits(model), before)
    assert torch.equal(before, logits(reference))


@TIED
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_the_model_in_memory(head: str, tied: bool) -> None:
    model = quantized(tied, head=head)
    assert model.awq_report["lm_head"].status == head == f"int{model.lm_head.bits}"
    assert model.model.layers[0].mlp.up_proj.bits == 4
    assert_apart(model, model)
    assert_apart(copy.deepcopy(model), model)
    generated = model.generate(BATCH[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, BATCH.shape[1] + 5)


@TIED
@pytest.mark.parametrize("layout", HOLDING)
def test_every_way_through_files(layout: str, tied: bool, tmp_path: Path) -> None:
    model = quantized(tied)
    folder = awq_ext.save_pretrained(model, tmp_path / "ours", format=layout, max_shard_size="10KB")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = [awq_ext.from_pretrained(folder), load(folder)]
    loaded[1].save_pretrained(tmp_path / "theirs")
    loaded += [load(tmp_path / "theirs"), awq_ext.from_pretrained(tmp_path / "theirs")]
    # into models that were built tied
    loaded.append(awq_ext.load(float_model(tie_word_embeddings=True), folder))
    for each in loaded:
        assert_apart(each, model)


def test_eight_bits_lose_next_to_nothing() -> None:
    torch.manual_seed(0)
    model = float_model(tie_word_embeddings=True)
    wanted = logits(model)
    awq_ext.quantize(model, [BATCH], **SETTINGS | {"head": "int8", "only": ("lm_head",)})
    # a step of 1/255 of a group's range, errors even in it: a 255 * sqrt(12)th of at most 2 * 4 standard deviations
    assert (logits(model) - wanted).norm() < 8 / 255 / 12**0.5 * wanted.norm()


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_save_and_load_bit_for_bit(head: str, tmp_path: Path) -> None:
    model = quantized(head=head)
    folder = awq_ext.save(model, tmp_path / "model")
    for each in (
        awq_ext.load(float_model(tie_word_embeddings=True), folder),
        awq_ext.from_pretrained(folder),
        load(folder),
    ):
        assert_apart(each, model)


def test_a_config_that_says_tied_does_not_tie_a_head_of_ints(tmp_path: Path) -> None:
    model = quantized()
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for each in (awq_ext.from_pretrained(folder), load(folder)):
        assert_apart(each, model)


@pytest.mark.parametrize("layout", ["awq", "gemv", "gemv_fast", "llm-awq", "modelopt"])
def test_layouts_whose_readers_would_miss_it_are_refused(layout: str, tmp_path: Path) -> None:
    settings = {"group_size": 32, "head": "int4", "symmetric": True, "fold": "always", "method": "rtn"}
    says = r'lm_head is quantized.*format="compressed-tensors", "gptq", "mlx", "gguf" or "native", or quantize with head="float"'
    model = float_model(tie_word_embeddings=True)
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=says):
        awq_ext.check_format(model, BATCH, layout, settings)
    before.assert_unchanged()
    awq_ext.quantize(model, [BATCH], settings, progress=False)
    with pytest.raises(CheckpointError, match=says):
        awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    with pytest.raises(CheckpointError, match=says):
        awq_ext.convert(awq_ext.save_pretrained(model, tmp_path / "there", format="native"), tmp_path / "model", layout)
    assert not (tmp_path / "model").exists()


def test_a_layout_that_can_hold_it_is_found_before_the_work() -> None:
    model = float_model(tie_word_embeddings=True)
    for layout in HOLDING:
        awq_ext.check_format(model, BATCH, layout, group_size=16, method="rtn", head="int4")


def test_transformers_own_save_names_the_call_that_can(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'save_pretrained\(model, directory, format="compressed-tensors"\)'):
        quantized().save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_configs_of_files_name_the_head() -> None:
    from awq_ext.checkpoints.formats import LAYOUTS, Facts, Summary

    facts = Facts(64, 96, 16, 4, True)
    summary = Summary({"lm_head": facts, "model.layers.0.mlp.up_proj": facts}, heads=["lm_head"])
    assert LAYOUTS["gptq"].quantization_config(summary)["lm_head"] is True
    groups = LAYOUTS["compressed-tensors"].quantization_config(summary)["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]


def test_a_head_of_eight_bits(tmp_path: Path) -> None:
    """Beside blocks of 4: ``config_groups`` and ``dynamic`` say so."""
    with pytest.raises(CheckpointError, match=r'lm_head: it has 8 bits, not 4: use format="compressed-t.* head="int4"'):
        awq_ext.save_pretrained(quantized(head="int8"), tmp_path / "model", format="awq")
    made = quantized(head="int8")
    for layout in HOLDING:
        folder = awq_ext.save_pretrained(made, tmp_path / layout, format=layout)
        for each in (load(folder), awq_ext.from_pretrained(folder)):
            assert_apart(each, made)
            assert (each.lm_head.bits, each.model.layers[0].mlp.down_proj.bits) == (8, 4)
            assert torch.equal(each.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_vocabulary_cannot_be_resized(loaded: bool, tmp_path: Path) -> None:
    model = quantized()
    if loaded:
        model = load(awq_ext.save_pretrained(model, tmp_path / "model", format="native"))
    before = Snapshot(model)
    for arguments, options in (((100,), {}), ((96, 64), {}), ((), {"pad_to_multiple_of": 64})):
        with pytest.raises(RuntimeError, match=r'the output layer of this LlamaForCausalLM is quantized.*head="float"'):
            model.resize_token_embeddings(*arguments, **options)
    before.assert_unchanged()
    assert model.resize_token_embeddings(96) is model.resize_token_embeddings() is model.model.embed_tokens


def test_with_a_float_head_it_can() -> None:
    model = quantized(tied=True, head="float")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings is True
    assert model.resize_token_embeddings(100).num_embeddings == 100 == len(model.lm_head.weight)


def test_dequantize_gives_a_float_head(tmp_path: Path) -> None:
    model = load(awq_ext.save_pretrained(quantized(), tmp_path / "model", format="native"))
    weight = model.lm_head.weight
    model.dequantize()
    assert type(model.lm_head) is torch.nn.Linear and torch.equal(model.lm_head.weight, weight)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, weight)


def test_an_error_leaves_the_config_and_the_ties() -> None:
    model = float_model(tie_word_embeddings=True)
    before, keys = Snapshot(model), dict(model.all_tied_weights_keys)
    with pytest.warns(UserWarning, match="calibration tokens are few"), pytest.raises(UserWarning, match="half"):
        awq_ext.quantize(model, [BATCH], group_size=16, head="int4", progress=Raising())
    before.assert_unchanged()
    assert model.config.tie_word_embeddings is True and model.all_tied_weights_keys == keys
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Raising:
    """A flag that fails when it is asked."""

    def __bool__(self) -> bool:
        raise UserWarning("half")


def t5(**settings: Any) -> Any:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True, **settings)
    return transformers.T5ForConditionalGeneration(config).eval()


def test_an_encoder_and_decoder_keep_their_common_embedding(tmp_path: Path) -> None:
    """T5 scales by what its config says, and ties three embeddings by it."""
    torch.manual_seed(0)
    model, batch = t5(), {"input_ids": BATCH % 64, "decoder_input_ids": BATCH[:, :5] % 64}
    wanted = logits(model, batch)
    awq_ext.quantize(model, [batch], **SETTINGS | {"head": "int4"})
    assert isinstance(model.lm_head, QuantLinear) and model.config.tie_word_embeddings is True
    found = logits(model, batch)
    # four bits cost some percent of a random model's logits, while the missing scale of d_model^-0.5 would be more than fivefold
    assert (found - wanted).norm() < 0.5 * wanted.norm()
    model.tie_weights()
    assert torch.equal(logits(model, batch), found)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="native")
    for each in (
        awq_ext.from_pretrained(folder),
        transformers.AutoModelForSeq2SeqLM.from_pretrained(folder),
    ):
        assert torch.equal(logits(each, batch), found)
        assert each.encoder.embed_tokens.weight is each.decoder.embed_tokens.weight is each.shared.weight
        each.tie_weights()
        assert torch.equal(logits(each, batch), found)
