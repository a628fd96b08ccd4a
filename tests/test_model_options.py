"""Components with options: each option does what it says, comes back from a file, and is refused where it is wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from recorded import RECORDED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import far, ragged, small, some_ids

import attention_zoo as zoo
from attention_zoo import Tokens, Unsupported
from attention_zoo.model.feed_forward import FeedForward
from attention_zoo.positions import Learned, Rotary
from attention_zoo.training.config import register

OPTIONS = [
    {"norm": {"name": "rms", "eps": 0.1}},
    {"norm": {"name": "layer", "eps": 0.1}, "pre_norm": False},
    {"feed_forward": {"name": "swiglu", "width": 5, "bias": False}},
    {"feed_forward": "gelu_tanh"},
    {"feed_forward": {"name": "silu", "width": 3}},
    {"positions": {"name": "learned", "scale": 0.5, "uncounted": 3}, "causal": False, "max_length": 30},
    {"positions": {"name": "sinusoidal", "base": 50.0}},
    {"positions": {"name": "rotary", "base": 90.0, "scaling": "linear", "factor": 2.0}},
    {"head": {"name": "lm", "bias": True, "transform": "relu"}, "norm": {"name": "rms", "eps": 1e-3}},
    {"embedding": {"scale": 2.0, "types": 3, "normed": True, "dropout": 0.25}},
    {"origin": {"model_type": "mine", "attention_dropout": 0.0}},
]


def shaken(**options):
    """A model whose zeros (biases of heads, say) are no zeros: what is not honoured shows."""
    model = small("full", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, dtype=parameter.dtype) / 5
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_comes_back_from_a_file(options, tmp_path) -> None:
    model, ids = shaken(**options), some_ids()
    loaded = zoo.load(zoo.save(model, tmp_path / "model"))
    assert loaded.config == model.config
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_files_of_before_there_were_options_still_load(tmp_path) -> None:
    model = small("longformer", positions="learned", max_length=40)
    path = zoo.save(model, tmp_path / "model")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["attention_zoo"])
    for key in ("embedding", "origin"):
        assert header["config"].pop(key) is None
    save_file(load_file(path), path, {"attention_zoo": json.dumps(header)})
    assert torch.equal(zoo.load(path)(some_ids()).logits, model(some_ids()).logits)


def test_options_come_through_hydra() -> None:
    register()
    with initialize_config_module("attention_zoo.conf", version_base="1.3"):
        composed = compose("train", ["model.norm={name: rms, eps: 0.01}", "model.feed_forward={name: relu, width: 7}"])
    model = instantiate(composed.model)(attention="full", vocab=9)
    assert model.norm.eps == 0.01
    assert model.stack.layers[0].layers[1].body.layers[0].into.out_features == 7
    json.dumps(model.config)


# --- each by its definition ------------------------------------------------------------------------------------------


def test_embedding_is_the_sum_of_token_place_and_type() -> None:
    model = shaken(
        positions={"name": "learned", "scale": 3.0}, max_length=30,
        embedding={"scale": 2.0, "types": 3, "normed": True}, norm={"name": "layer", "eps": 0.2},
    )  # fmt: skip
    ids, types = some_ids(), torch.randint(3, (3, 23))
    seen = []
    model.stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, types=types)
    embedding = model.embedding
    x = 2 * embedding.weight[ids] + 3 * model.positions.table.weight[:23] + embedding.types.weight[types]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 0.2).sqrt()
    assert far(seen[0], x * embedding.norm.weight + embedding.norm.bias) < 1e-12
    assert torch.equal(model(ids).logits, model(ids, types=torch.zeros_like(ids)).logits)


def test_types_at_padding_never_matter_and_wrong_ones_are_refused() -> None:
    model, ids = shaken(embedding={"types": 2}), some_ids()
    tokens = Tokens.of(ragged(23, [23, 9, 4], "left"))
    types = torch.randint(2, ids.shape)
    other = torch.where(tokens.valid, types, 77)
    assert torch.equal(model(ids, tokens, types=types).logits, model(ids, tokens, types=other).logits)
    for wrong, message in (
        (types + 1, r"types must lie in \[0, 2\), got 1 to 2"),
        (types.float(), "types must be integers of shape"),
        (types[:, 1:], "types must be integers of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, types=wrong)
    with pytest.raises(ValueError, match="types needs a model whose embedding has some"):
        small("full")(ids, types=types)


def test_uncounted_tokens_take_no_position() -> None:
    model = shaken(positions={"name": "learned", "uncounted": 3}, causal=False, max_length=30)
    seen = []
    model.positions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor([[5, 3, 6, 7, 3], [3, 5, 5, 5, 5]])
    model(ids)
    model(ids, Tokens.of(torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]).bool()))
    assert seen[0].tolist() == [[0, -1, 1, 2, -1], [-1, 0, 1, 2, 3]]
    assert seen[1].tolist() == [[0, -1, 1, 2, -1], [-1, -1, 0, 1, 2]]
    table = model.positions
    assert torch.equal(table(torch.tensor([[-1, 2]]))[0], torch.stack([table.nowhere, table.table.weight[2]]) * 4)
    with pytest.raises(Unsupported, match="uncounted with causal=True"):
        small("full", positions={"name": "learned", "uncounted": 3})


def test_head_has_a_transform_and_a_bias() -> None:
    model = shaken(head={"name": "lm", "bias": True, "transform": "gelu"}, norm={"name": "rms", "eps": 0.3})
    out = model(some_ids())
    wide = torch.nn.functional.gelu(model.head.transform.dense(out.hidden))
    wide = wide / (wide.square().mean(-1, keepdim=True) + 0.3).sqrt() * model.head.transform.norm.weight
    assert far(out.logits, wide @ model.embedding.weight.T + model.head.bias) < 1e-12


@pytest.mark.parametrize(("bias", "into", "out"), [(True, 1, 1), (False, 0, 0), ("into", 1, 0), ("out", 0, 1)])
@pytest.mark.parametrize("name", RECORDED)
def test_biases_are_where_they_were_asked_for(name, bias, into, out) -> None:
    layer = zoo.build(name, dim=16, heads=2, bias=bias)
    found = {
        key: getattr(layer, key).bias is not None for key in ("to_q", "to_k", "to_qk", "to_v") if hasattr(layer, key)
    }
    assert len(found) >= 2
    assert set(found.values()) == {bool(into)}
    assert (layer.to_out.bias is not None) == bool(out)


def test_the_older_flat_form_of_the_feed_forward_is_the_same() -> None:
    given = {"attention": "full", "vocab": 11, "dim": 16, "heads": 2}
    for flat, mapping in (
        ({"ff_mult": 2}, {"name": "gelu", "mult": 2}),
        ({"ff_mult": 4, "ff_chunks": 3, "feed_forward": "swiglu"}, {"name": "swiglu", "chunks": 3}),
        ({"ff_mult": 4, "feed_forward": {"name": "relu", "width": 5}}, {"name": "relu", "width": 5}),
    ):
        models = []
        for options in (flat, {"feed_forward": mapping}):
            torch.manual_seed(0)
            models.append(zoo.Transformer(**given, **options))
        one, other = (model.state_dict() for model in models)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        one, other = ([m.chunks for m in model.modules() if isinstance(m, FeedForward)] for model in models)
        assert one == other


def test_activations_and_widths_of_the_feed_forward() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    cubic = x + 0.044715 * x**3
    for kind, expected in (
        ("gelu", x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        ("gelu_tanh", x * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic)) / 2),
        ("relu", x.clamp(min=0)),
        ("silu", x / (1 + torch.exp(-x))),
    ):
        layer = FeedForward(dim=6, kind=kind, width=6, bias=False).double()
        assert layer.into.bias is None
        assert layer.out.bias is None
        with torch.no_grad():
            for linear in (layer.into, layer.out):
                linear.weight.copy_(torch.eye(6))
        assert far(layer(x).hidden, expected) < 1e-12


def test_rotary_pairs_slow_down_as_asked() -> None:
    position = torch.arange(50)[None]
    x = torch.randn(1, 2, 50, 16, dtype=torch.float64)
    plain, linear = Rotary(heads=2, head_width=16), Rotary(heads=2, head_width=16, scaling="linear", factor=4.0)
    assert far(plain.rotate(x, position), linear.rotate(x, 4 * position)) < 1e-12
    ramp = Rotary(heads=2, head_width=16, scaling="llama3", factor=8.0, original_length=100, base=1000.0)
    steps = ramp.steps(torch.device("cpu"), torch.float64).tolist()
    for pair, step in enumerate(steps):
        whole = 1000.0 ** (-pair / 8)
        turns = 100 * whole / (2 * math.pi)
        share = min(max((turns - 1) / 3, 0), 1)
        assert step == pytest.approx(whole * (share + (1 - share) / 8), rel=1e-12)
    assert steps[0] == 1.0
    assert steps[-1] == pytest.approx(1000.0 ** (-7 / 8) / 8)


def test_learned_positions_of_a_scale() -> None:
    table = Learned(dim=4, max_length=3, scale=1.0)
    assert torch.equal(table(torch.tensor([[2, 0]])), table.table.weight[[2, 0]][None])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"norm": {"name": "rms", "epsilon": 1}}, "norm=rms has no option epsilon; it has eps"),
    ({"norm": {"eps": 1}}, "norm must be a word, or a mapping with a name and options, got {'eps': 1}"),
    ({"norm": 3}, "norm must be a word, or a mapping"),
    ({"norm": {"name": "group"}}, "norm must be one of layer, rms, batch, got 'group'"),
    (
        {"feed_forward": {"name": "relu", "wide": 3}},
        "feed_forward=relu has no option wide; it has bias, chunks, mult, width",
    ),
    ({"feed_forward": {"name": "relu", "mult": 0}, "ff_mult": None}, "feed_forward.mult must be an integer"),
    ({"feed_forward": {"name": "relu", "mult": 3}}, "ff_mult is feed_forward's mult, got 2 beside 3; give one"),
    ({"feed_forward": {"name": "relu", "width": 0}}, "feed_forward.width must be an integer of at least 1, got 0"),
    ({"positions": {"name": "learned", "size": 3}}, "positions=learned has no option size; it has scale, uncounted"),
    ({"positions": {"name": "rotary", "theta": 3}}, "positions=rotary has no option theta; it has base, factor"),
    ({"positions": {"name": "rotary", "base": 0}}, "positions.base must be above 0, got 0"),
    ({"positions": {"name": "rotary", "scaling": "yarn"}}, "positions.scaling must be one of none, lin"),
    ({"positions": {"name": "rotary", "low_freq_factor": 9}}, "positions.low_freq_factor must be above 0 and "),
    ({"positions": {"name": "none", "base": 3}}, "positions=none has no options, got {'base': 3}"),
    ({"positions": {"name": "alibi", "slope": 3}}, "positions=alibi has no option slope; it has none"),
    ({"head": {"name": "hidden", "bias": True}}, "head=hidden has no option bias; it has none"),
    ({"head": {"name": "lm", "transform": "tanh"}}, "head.transform must be one of gelu, gelu_tanh, relu, silu, "),
    ({"embedding": {"size": 3}}, "embedding has no option size; it has dropout, normed, scale, types"),
    ({"embedding": {"types": -1}}, "embedding.types must be an integer of at least 0, got -1"),
    ({"embedding": {"dropout": 1.0}}, "embedding.dropout must be a probability below 1, got 1.0"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(options, message) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("{", r"\{").replace(".", r"\.")) as caught:
        small("full", **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="bias must be true, false, into or out, got 'qkv'"):
        zoo.build("full", dim=16, heads=2, bias="qkv")


def test_a_gated_convolution_loads_by_the_name_that_its_taps_once_had():
    model = zoo.Transformer(attention="full", vocab=9, dim=8, heads=2, short_conv={"name": "gated", "width": 3})
    old = {name: value.clone() for name, value in model.state_dict().items()}
    taps = [name for name in old if name.endswith("body.layers.0.weight") and old[name].ndim == 2]
    assert len(taps) == 2
    for name in taps:
        old[f"{name.removesuffix('weight')}conv.weight"] = old.pop(name) + 1
    model.load_state_dict(old)
    assert all(torch.equal(model.state_dict()[n], old[f"{n.removesuffix('weight')}conv.weight"]) for n in taps)
