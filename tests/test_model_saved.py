"""A model in a file: the same after loading, bit for bit, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CAUSAL, VOCAB, entry, small, some_ids

import attention_zoo as zoo
from attention_zoo import EncoderDecoder, Transformer
from attention_zoo.attention.full import Full
from attention_zoo.attention.longformer import Longformer


def same(one, other, ids, **rest) -> bool:
    weights = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) and x.dtype == y.dtype for (a, x), (b, y) in weights) and torch.equal(
        one(ids, **rest).logits, other(ids, **rest).logits
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_round_trip_is_bitwise(name, dtype, tmp_path):
    model = small(name, short_conv=3, seed=5).to(dtype)
    path = zoo.save(model, tmp_path / "deep" / "model.safetensors")
    loaded = zoo.load(path)
    assert loaded is not model
    assert not loaded.training
    assert same(model, loaded, some_ids())
    assert [layer.seed for layer in loaded.stack.attentions] == [5, 6]


@pytest.mark.parametrize("options", [
    {"positions": "alibi"}, {"positions": "learned", "max_length": 40}, {"tied": False}, {"reversible": True},
    {"norm": "rms", "feed_forward": "swiglu"}, {"pre_norm": False}, {"head": "classify", "classes": 3, "causal": False},
], ids=str)  # fmt: skip
def test_every_option_comes_back(options, tmp_path):
    model = small("full", **options)
    loaded = zoo.load(zoo.save(model, tmp_path / "model"))
    assert same(model, loaded, some_ids())
    assert loaded.config == model.config


def test_partials_ties_and_extra_tokens_come_back(tmp_path):
    def through_a_file(*attention) -> Transformer:
        model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2, depth=4).eval()
        loaded = zoo.load(zoo.save(model, tmp_path / "model"))
        assert same(model, loaded, some_ids())
        assert loaded.parameter_count == model.parameter_count
        return loaded

    loaded = through_a_file(partial(Longformer, window=3), entry("bigbird", extra_global_tokens=2))
    assert loaded.stack.attentions[2].window == 3
    assert len(loaded.extra.embedding) == 2
    loaded = through_a_file(entry("transformer_xl"), "full")
    assert loaded.stack.attentions[0].u is loaded.stack.attentions[2].u
    assert loaded.head.weight is loaded.embedding.weight


def test_encoder_and_decoder_come_back(tmp_path):
    model = EncoderDecoder(
        encoder=small("bigbird", causal=False, head="hidden"), decoder=small("longformer", cross=True)
    ).eval()
    loaded = zoo.load(zoo.save(model, tmp_path / "model"))
    assert isinstance(loaded, EncoderDecoder)
    assert same(model, loaded, some_ids(), source=some_ids(seed=3))


def test_shared_weights_are_written_once(tmp_path):
    model = small("transformer_xl", depth=4)
    names = load_file(zoo.save(model, tmp_path / "model"))
    assert sum(name.endswith(".u") for name in names) == 1
    assert sum(tensor.numel() for tensor in names.values()) == model.parameter_count


def test_loading_draws_nothing_and_training_goes_on(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    before = torch.get_rng_state()
    loaded = zoo.load(path, device="cpu").train()
    assert torch.equal(before, torch.get_rng_state())
    loaded(some_ids()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = zoo.save(small("full"), tmp_path / "model")
    old = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        zoo.save(small("full", depth=3), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_down_is_refused(tmp_path):
    class Mine(Full):
        pass

    for attention in (lambda **options: Full(**options), Mine):
        model = Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2)
        with pytest.raises(ValueError, match="save needs attention given by name, mapping or partial"):
            zoo.save(model, tmp_path / "model")
    model = Transformer(attention=partial(Full, scale=float("inf")), vocab=VOCAB, dim=16, heads=2)
    with pytest.raises(ValueError, match="plain numbers, words and lists"):
        zoo.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"none: no such model file"):
        zoo.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such model file"):
        zoo.load(tmp_path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"hello", b"\xff" * 100):
        (tmp_path / "bad").write_bytes(damage)
        with pytest.raises(ValueError, match="bad: not a readable model file") as caught:
            zoo.load(tmp_path / "bad")
        assert "\n" not in str(caught.value)
    save_file(load_file(path), tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds tensors, but no model config"):
        zoo.load(tmp_path / "foreign")


def rewritten(path, tensors=None, **header):
    """The model file with other tensors, or other header fields."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["attention_zoo"])
    other = path.with_name("other")
    save_file(load_file(path) if tensors is None else tensors, other, {"attention_zoo": json.dumps({**old, **header})})
    return other


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = small("full")
    path = zoo.save(model, tmp_path / "model")
    tensors = load_file(path)
    assert same(model, zoo.load(rewritten(path)), some_ids())
    first = next(iter(tensors))
    lacking = {name: tensor for name, tensor in tensors.items() if name != first}
    with pytest.raises(ValueError, match=f"missing {first}, unexpected nothing"):
        zoo.load(rewritten(path, lacking))
    with pytest.raises(ValueError, match="missing nothing, unexpected a, b, c and 1 more"):
        zoo.load(rewritten(path, {**tensors, **{name: torch.zeros(1) for name in "abcd"}}))
    with pytest.raises(ValueError, match=r"embedding.weight must have shape \(11, 16\), got \(2,\)"):
        zoo.load(rewritten(path, {**tensors, "embedding.weight": torch.zeros(2)}))


@pytest.mark.parametrize(("header", "message"), [
    ({"format": 2}, "format 2 of 'Transformer' is not known here, only 1"),
    ({"kind": "os.system"}, "'os.system' is not known"),
    ({"config": {}}, "its config builds no model"),
    ({"config": {"attention": "nope", "vocab": 3}}, "its config builds no model: attention must be one of"),
    ({"config": {"attention": "full", "vocab": 3, "wat": 1}}, "its config builds no model: .*wat"),
], ids=str)  # fmt: skip
def test_wrong_headers_are_refused_in_one_line(header, message, tmp_path):
    path = zoo.save(small("full"), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        zoo.load(rewritten(path, **header))
