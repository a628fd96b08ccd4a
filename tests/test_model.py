"""The skeleton: what goes in, what comes out, and what every option does."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from importlib import resources

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small_models import CAUSAL, TWO_SIDED, VOCAB, entry, far, packed, ragged, small, some_ids
from torch import nn

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer, Unsupported
from attention_zoo.attention.full import Full
from attention_zoo.attention.transformer_xl import TransformerXL
from attention_zoo.measure.memory import peak_memory
from attention_zoo.model import parameter_count, unequal
from attention_zoo.model.block import Block
from attention_zoo.model.feed_forward import FeedForward
from attention_zoo.positions import Axial, Learned, Sinusoidal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", sorted({*CAUSAL, *TWO_SIDED}))
@pytest.mark.parametrize("length", [1, 7, 29])
def test_every_mechanism_trains_in_every_role(name, causal, length):
    if name not in (CAUSAL if causal else TWO_SIDED):
        with pytest.raises(Unsupported, match="causal"):
            small(name, causal=causal)
        return
    model = small(name, causal=causal, short_conv=3).train()
    out = model(some_ids(2, length))
    assert out.logits.shape == (2, length, VOCAB)
    assert out.hidden.shape == (2, length, 16)
    assert out.state is None
    out.logits.square().mean().backward()
    assert torch.isfinite(model.embedding.weight.grad).all()
    assert model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sorted({*CAUSAL, *TWO_SIDED}))
def test_padding_ids_never_matter_and_rows_are_alone(name, side):
    model = small(name, causal=name in CAUSAL, short_conv=3)
    counts = [23, 14, 5]
    valid, ids = ragged(23, counts, side), some_ids()
    out = model(ids, Tokens.of(valid))
    other = model(torch.where(valid, ids, -100), Tokens.of(valid))
    assert torch.equal(out.logits[valid], other.logits[valid])
    assert torch.isfinite(out.hidden).all()
    for row in range(3):
        alone = model(ids[row : row + 1, valid[row]])
        assert far(alone.logits[0], out.logits[row, valid[row]]) < 1e-10


@pytest.mark.parametrize("name", sorted({*CAUSAL, *TWO_SIDED}))
def test_packed_documents_are_apart(name):
    model = small(name, causal=name in CAUSAL, short_conv=4)
    ids = some_ids()
    whole = model(ids, packed(torch.ones_like(ids, dtype=torch.bool), 2, 11)).logits
    for part in (slice(0, 2), slice(2, 11), slice(11, 23)):
        assert far(model(ids[:, part]).logits, whole[:, part]) < 1e-10


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "reformer"])
def test_the_past_is_blind_to_the_future(name):
    model = small(name, short_conv=3)
    ids = some_ids()
    changed = ids.clone()
    changed[:, 15:] = (ids[:, 15:] + 1) % VOCAB
    one, other = model(ids).logits, model(changed).logits
    assert torch.equal(one[:, :15], other[:, :15])
    assert not torch.equal(one[:, 15:], other[:, 15:])


@pytest.mark.parametrize("options", [
    {"pre_norm": False}, {"norm": "rms"}, {"feed_forward": "swiglu"}, {"feed_forward": "relu"}, {"tied": False},
    {"short_conv": 2}, {"output_dropout": 0.5}, {"ff_mult": 1}, {"head": "tokens", "classes": 5},
], ids=str)  # fmt: skip
def test_every_option_changes_the_function_and_every_parameter_learns(options):
    plain, model = small("full"), small("full", **options).train()
    ids = some_ids()
    logits = model(ids).logits
    logits.log_softmax(-1)[..., 0].mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    same_shape = logits.shape == (3, 23, VOCAB)
    assert not same_shape or far(logits, plain(ids).logits) > 1e-3


def test_post_norm_outputs_are_normed_and_pre_norm_has_a_last_norm():
    block = Block(Full(dim=16, heads=2), dim=16, pre_norm=False)
    hidden = block(torch.randn(2, 9, 16) * 7).hidden
    assert far(hidden.mean(-1), torch.zeros(2, 9)) < 1e-5
    assert far(hidden.var(-1, correction=0), torch.ones(2, 9)) < 1e-3
    assert isinstance(small("full").norm, nn.LayerNorm)
    assert isinstance(small("full", pre_norm=False).norm, nn.Identity)


def test_a_block_is_the_formula():
    block = Block(Full(dim=16, heads=2), dim=16).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    first, second = block.layers
    y = x + block.attention(first.norm(x)).hidden
    wide = second.body.layers[0]
    y = y + wide.out(nn.functional.gelu(wide.into(second.norm(y))))
    assert torch.equal(block(x).hidden, y)


class Priced(Full):
    """Full attention with auxiliary losses."""

    def forward(self, x, tokens=None, **rest):
        out = super().forward(x, tokens, **rest)
        losses = {"fixed": x.new_ones(()), **({"odd": x.new_ones(())} if self.seed % 2 else {})}
        return out._replace(losses=losses)


@pytest.mark.parametrize("reversible", [False, True])
def test_auxiliary_losses_sum_over_depth_by_name(reversible):
    model = Transformer(attention=Priced, vocab=VOCAB, dim=16, heads=2, depth=5, reversible=reversible)
    assert {name: value.item() for name, value in model(some_ids()).losses.items()} == {"fixed": 5, "odd": 2}


def test_swiglu_has_as_many_parameters():
    counts = {kind: parameter_count(FeedForward(dim=96, kind=kind)) for kind in ("gelu", "relu", "swiglu")}
    assert unequal(counts, 0.01) == []
    layer = FeedForward(dim=8, kind="swiglu")
    x = torch.randn(2, 3, 8)
    gate, value = layer.into(x).chunk(2, -1)
    assert torch.allclose(layer(x).hidden, layer.out(gate * torch.sigmoid(gate) * value))


@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu"])
def test_chunked_feed_forward_is_the_same_function(kind):
    whole, pieces = (small("full", feed_forward=kind, ff_chunks=chunks).train() for chunks in (1, 5))
    ids = some_ids()
    results = []
    for model in (whole, pieces):
        logits = model(ids).logits
        logits.square().mean().backward()
        results.append((logits, [parameter.grad for parameter in model.parameters()]))
    assert far(results[0][0], results[1][0]) < 1e-12
    assert all(far(a, b) < 1e-12 for a, b in zip(results[0][1], results[1][1]))
    with torch.no_grad():
        assert far(pieces(ids).logits, results[0][0]) < 1e-12


def test_chunked_feed_forward_saves_memory():
    def peak(chunks: int) -> int:
        layer = FeedForward(dim=32, mult=8, chunks=chunks)
        x = torch.randn(1, 2048, 32, requires_grad=True)
        return peak_memory(lambda: layer(x).hidden.sum().backward()).peak_bytes

    assert peak(16) < 0.4 * peak(1)


def test_dropout_is_on_what_branches_add_alone():
    model = small("full", output_dropout=0.5, depth=1)
    inside = {}
    for name, module in model.named_modules():
        if isinstance(module, Full | FeedForward):
            module.register_forward_hook(lambda m, args, out, name=name: inside.setdefault(name, []).append(out.hidden))
    assert not any(isinstance(module, nn.Dropout) for module in model.stack.attentions[0].modules())
    ids = some_ids()
    quiet = model(ids)
    noisy = model.train()(ids)
    attention, _ = inside
    # the first branch's attention saw the same and said the same; what was added of it is half zeros
    assert torch.equal(*inside[attention])
    assert far(quiet.logits, noisy.logits) > 1e-3
    branch = model.stack.branches[0]
    x = torch.randn(3, 23, 16, dtype=torch.float64)
    added = branch(x).hidden - x
    share = (added == 0).double().mean().item()
    assert 0.4 < share < 0.6
    assert torch.equal(model.eval()(ids).logits, quiet.logits)


# --- positions -----------------------------------------------------------------------------------------------------


def test_sinusoidal_is_its_formula_at_any_position():
    table = Sinusoidal(dim=6)(torch.tensor([[0, 3, 1_000_000]])).double()
    for column, position in enumerate((0, 3, 1_000_000)):
        for pair in range(3):
            angle = torch.tensor(position / 10_000 ** (pair / 3), dtype=torch.float64)
            assert abs(table[0, column, pair] - angle.sin()) < 1e-6
            assert abs(table[0, column, pair + 3] - angle.cos()) < 1e-6
    with pytest.raises(ValueError, match="even dim, got 5"):
        Sinusoidal(dim=5)


@pytest.mark.parametrize("scheme", [Learned, Axial])
def test_tables_have_unit_variance_distinct_rows_and_an_end(scheme):
    table = scheme(dim=64, max_length=90)
    rows = table(torch.arange(90)[None])[0]
    assert abs(rows.var().item() - 1) < 0.1
    assert torch.pdist(rows).min() > 0.1
    with pytest.raises(ValueError, match="max_length=90, got position 90"):
        table(torch.tensor([[90]]))


def test_axial_is_smaller_than_learned():
    assert parameter_count(Axial(dim=64, max_length=10_000)) == 2 * 100 * 32
    assert parameter_count(Axial(dim=5, max_length=7)) == 3 * 2 + 3 * 3


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "axial", "rotary", "alibi"])
def test_every_scheme_tells_orders_apart(positions):
    """Two-sided attention alone does not: it is the control."""
    ids, swapped = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 3, 2, 4]])
    blind = small("full", causal=False, positions="none")
    assert far(blind(ids).logits[:, 0], blind(swapped).logits[:, 0]) < 1e-12
    model = small("full", causal=False, positions=positions, max_length=4)
    assert far(model(ids).logits[:, 0], model(swapped).logits[:, 0]) > 1e-4


def test_attention_level_words_reach_every_layer_and_embedding_level_ones_none():
    assert [layer.positions for layer in small("full", "longformer", positions="rotary").stack.attentions] == [
        "rotary"
    ] * 2
    assert [layer.positions for layer in small("full", positions="learned").stack.attentions] == ["none"] * 2
    assert small("transformer_xl", positions="relative").stack.attentions[0].positions == "relative"
    assert small("full", positions="rotary").positions is None


@pytest.mark.parametrize(
    ("name", "positions"), [("full", "relative"), ("transformer_xl", "alibi"), ("reformer", "rotary")]
)
def test_positions_that_a_mechanism_cannot_honour_are_refused_at_build(name, positions):
    with pytest.raises(Unsupported, match=f"{name}: positions={positions} is not supported"):
        small(name, positions=positions)


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions must be one of sinusoidal, .*relative, got 'sinus'"):
        small("full", positions="sinus")


# --- mechanisms over depth -----------------------------------------------------------------------------------------


def test_a_list_is_tiled_and_seeds_count_up():
    model = small("full", "transformer_xl", "longformer", depth=5, seed=40)
    assert [layer.name for layer in model.stack.attentions] == [
        "full", "transformer_xl", "longformer", "full", "transformer_xl",
    ]  # fmt: skip
    assert [layer.seed for layer in model.stack.attentions] == [40, 41, 42, 43, 44]
    with pytest.raises(ValueError, match="depth must be at least the number of mechanisms listed, 3, got 2"):
        small("full", "transformer_xl", "longformer", depth=2)


def test_names_mappings_partials_and_callables_say_the_same():
    def model(attention):
        torch.manual_seed(7)
        return Transformer(attention=attention, vocab=VOCAB, dim=16, heads=2)

    ids = some_ids()
    made = [
        model(attention)(ids).logits
        for attention in ("full", {"name": "full"}, [Full], partial(Full, kernel="auto"), lambda **o: Full(**o))
    ]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_an_entrys_own_options_win():
    model = small("full", depth=1)
    assert model.stack.attentions[0].kv_heads == 2
    model = Transformer(
        attention=[{"name": "full", "kv_heads": 1, "seed": 9}, partial(Full, positions="rotary")],
        vocab=VOCAB, dim=16, heads=2, depth=4,
    )  # fmt: skip
    assert [layer.kv_heads for layer in model.stack.attentions] == [1, 2, 1, 2]
    assert [layer.positions for layer in model.stack.attentions] == ["none", "rotary", "none", "rotary"]
    assert [layer.seed for layer in model.stack.attentions] == [9, 1, 11, 3]


@pytest.mark.parametrize(("attention", "message"), [
    ([], "at least one mechanism"),
    ("longfromer", "did you mean longformer"),
    ({"window": 3}, "needs a name"),
    ({"name": "full", "causal": False}, "causal is the model's to say"),
    (partial(Full, dim=4), "dim is the model's to say"),
    ({"name": "longformer", "windw": 3}, "did you mean window"),
    (3, "attention must be a name, a mapping, a callable or a list"),
], ids=str)  # fmt: skip
def test_wrong_mechanisms_are_refused_in_one_line(attention, message):
    with pytest.raises(ValueError, match=message):
        Transformer(attention=attention, vocab=VOCAB)


def test_parameters_shared_over_depth_are_one_per_class():
    model = small("transformer_xl", "full", depth=4)
    one, other = model.stack.attentions[0], model.stack.attentions[2]
    assert one.u is other.u
    assert one.v is other.v
    twin = copy.deepcopy(model)
    assert twin.stack.attentions[0].u is twin.stack.attentions[2].u
    assert twin.stack.attentions[0].u is not one.u
    untied = Transformer(attention={**entry("transformer_xl"), "untie_r": True}, vocab=VOCAB, dim=16, heads=2)
    assert untied.stack.attentions[0].u is not untied.stack.attentions[1].u
    assert isinstance(one, TransformerXL)


def test_counts_include_everything_once_and_unequal_models_are_called_out():
    model = Transformer(attention="full", vocab=VOCAB, dim=16, heads=2, depth=1)
    attention, wide, norms = 4 * (16 * 16 + 16), 16 * 64 + 64 + 64 * 16 + 16, 3 * 2 * 16
    assert model.parameter_count == VOCAB * 16 + attention + wide + norms
    assert small("full", tied=False).parameter_count - small("full").parameter_count == VOCAB * 16
    assert unequal({"a": 100, "b": 110, "c": 125}) == ["c has 25 % more parameters than a (125 against 100)"]
    assert unequal({}) == []


# --- heads ---------------------------------------------------------------------------------------------------------


def test_lm_head_tied_and_untied():
    tied, free = small("full"), small("full", tied=False)
    ids = some_ids()
    out = tied(ids)
    assert torch.equal(out.logits, out.hidden @ tied.embedding.weight.T)
    assert tied.head.weight is tied.embedding.weight
    assert free.head.weight is not free.embedding.weight


@pytest.mark.parametrize("side", ["left", "right"])
def test_classify_pools_valid_tokens_alone(side):
    valid, ids = ragged(23, [23, 14, 5], side), some_ids()
    for pooling in ("mean", "first"):
        model = small("full", causal=False, head="classify", classes=5, pooling=pooling)
        out = model(ids, Tokens.of(valid))
        assert out.logits.shape == (3, 5)
        for row in range(3):
            hidden = out.hidden[row, valid[row]]
            pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
            assert far(out.logits[row], model.head.linear(pooled)) < 1e-12
        assert far(model(ids[:1]).logits, out.logits[:1]) < 1e-12


def test_token_labels_and_hidden():
    model = small("full", causal=False, head="tokens", classes=5)
    out = model(some_ids())
    assert torch.equal(out.logits, model.head.linear(out.hidden))
    assert small("full", head="hidden")(some_ids()).logits is None


@pytest.mark.parametrize(("options", "message"), [
    ({"head": "lmm"}, "head must be one of lm, tokens, classify, pretraining, hidden, got 'lmm'"),
    ({"head": "classify"}, "got classes=None with head=classify"),
    ({"classes": 3}, "got classes=3 with head=lm"),
    ({"head": "classify", "classes": 3, "pooling": "max"}, "pooling must be one of mean, first, got 'max'"),
    ({"head": "classify", "classes": 3, "pooling": "first"}, "pooling=first needs causal=False"),
    ({"norm": "group"}, "norm must be one of layer, rms, batch, got 'group'"),
    ({"feed_forward": "tanh"}, "feed_forward must be one of gelu, gelu_tanh, relu, silu, swiglu, none, got 'tanh'"),
    ({"ff_chunks": 0}, "ff_chunks must be an integer of at least 1, got 0"),
    ({"short_conv": -1}, "short_conv must be a number of taps, 0 for none, got -1"),
    ({"output_dropout": 1.5}, "output_dropout must be a probability below 1, got 1.5"),
    ({"heads": 3}, "heads must divide dim, got heads=3 for dim=16"),
    ({"vocab": 0}, "vocab must be an integer of at least 1, got 0"),
    ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
    ({"reversible": True, "pre_norm": False}, "reversible=True needs pre_norm=True"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        small("full", **options)


@pytest.mark.parametrize(("ids", "extra", "message"), [
    (torch.full((1, 3), VOCAB), {}, r"ids must lie in \[0, 11\), got 11"),
    (torch.full((1, 3), -1), {}, r"ids must lie in \[0, 11\), got -1"),
    (torch.zeros(1, 3), {}, "ids must be integers"),
    (torch.zeros(3, dtype=torch.long), {}, "ids must be integers"),
    (torch.zeros(1, 0, dtype=torch.long), {}, "length >= 1"),
    (torch.zeros(1, 3, dtype=torch.long), {"tokens": Tokens.all_valid(1, 4)}, r"tokens must be of shape \(1, 3\)"),
    (torch.zeros(1, 3, dtype=torch.long), {"fresh": torch.ones(2, dtype=torch.bool)}, "fresh must be bool of shape"),
], ids=str)  # fmt: skip
def test_wrong_input_is_refused_in_one_line(ids, extra, message):
    with pytest.raises(ValueError, match=message):
        small("full")(ids, **extra)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_in_conf_builds_with_options_that_exist(size):
    text = resources.files("attention_zoo.conf").joinpath("model", f"{size}.yaml").read_text()
    build = instantiate(OmegaConf.create(text))
    assert build.func is Transformer
    assert build.keywords.keys() <= inspect.signature(Transformer).parameters.keys()
    model = build(attention=[entry("full")], vocab=VOCAB)
    assert model(some_ids(1, 3)).logits.shape == (1, 3, VOCAB)


def test_the_package_exports_the_skeleton():
    for name in ("Transformer", "EncoderDecoder", "generate", "save", "load"):
        assert name in zoo.__all__
        assert callable(getattr(zoo, name))
