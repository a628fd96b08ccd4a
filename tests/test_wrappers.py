"""Wrappers of the stack: by name, with a state that is a tree; a user's own in a few lines, with no other edit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import VOCAB, entry, far, in_pieces, packed, ragged, small, some_ids
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Abilities, Layer, Nested, Output, Tokens, Transformer, Unsupported, Wrapper
from attention_zoo.contract import able
from attention_zoo.integrations import weights
from attention_zoo.model import detach, reorder, reserve, state_bytes
from attention_zoo.model.global_tokens import GlobalTokens
from attention_zoo.model.reversible import ReversibleStack
from attention_zoo.model.wrapper import abilities_of
from attention_zoo.registry import recipe
from attention_zoo.testing import contract_checks
from attention_zoo.testing.numerics import definition

README = (Path(__file__).parents[1] / "README.md").read_text()
(MEMORY,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Memory" in block)
"""A wrapper as a user writes it, from the README: a package of this one file and an entry point."""

STACKS: list[dict[str, Any]] = [
    {"attention": {"name": "memory", "inner": entry("longformer")}},
    {"attention": {"name": "memory", "inner": [entry("longformer"), entry("transformer_xl")]}},
    {"attention": entry("full", positions="rotary"), "around": ["memory", {"name": "global_tokens", "count": 2}]},
    {"attention": {"name": "global_tokens", "inner": {"name": "memory", "inner": entry("bigbird")}}, "short_conv": 3},
    {"attention": entry("bigbird", extra_global_tokens=2), "around": "memory"},
]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Wrapper]]:
    """The package is installed."""
    folder = tmp_path / "installed"
    info = folder / "memory_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "memory_plugin.py").write_text(MEMORY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memory-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attention_zoo.backends]\nmemory = memory_plugin:Memory\n")
    monkeypatch.syspath_prepend(folder)
    yield recipe("memory")[0]  # type: ignore[misc]
    del sys.modules["memory_plugin"]


def build(options: dict[str, Any], **more: Any) -> Transformer:
    torch.manual_seed(7)
    shape = {"vocab": VOCAB, "dim": 16, "heads": 2, "depth": 2}
    model = Transformer(**{**shape, **options, **more}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embedding", "gate")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layout() -> Tokens:
    """Rows padded on either side, several documents in each."""
    valid = torch.stack([ragged(23, [18], "left")[0], ragged(23, [19], "right")[0], torch.ones(23, dtype=torch.bool)])
    return packed(valid, 6, 14)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("options", STACKS, ids=range(len(STACKS)))
class TestByName:
    def test_a_training_step_reaches_all_weights(self, options: dict[str, Any]) -> None:
        model = build(options).train()
        model(some_ids(), layout()).logits[layout().valid].square().mean().backward()
        without = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
        assert not [name for name in without if "gate" in name or "embedding" in name or "to_v." in name]

    @pytest.mark.parametrize("cuts", [[6], [5, 13, 14, 20], list(range(1, 23))], ids=len)
    def test_decoding_equals_the_whole_call(self, options: dict[str, Any], cuts: list[int]) -> None:
        model, ids, tokens = build(options), some_ids(), layout()
        whole = model(ids, tokens).logits
        assert model.carries
        assert far(in_pieces(model, ids, tokens, cuts)[tokens.valid], whole[tokens.valid]) < 1e-10
        assert far(in_pieces(model, ids, None, cuts), model(ids).logits) < 1e-10

    def test_ragged_rows_equal_each_alone(self, options: dict[str, Any]) -> None:
        model, ids, tokens = build(options), some_ids(), layout()
        whole = model(ids, tokens).logits
        for row in range(3):
            at = tokens.valid[row]
            alone = Tokens.of(at[at][None], document=tokens.document[row, at][None])
            assert far(model(ids[row, at][None], alone).logits[0], whole[row, at]) < 1e-10

    def test_fresh_rows_start_anew(self, options: dict[str, Any]) -> None:
        model, ids = build(options), some_ids()
        state = model(ids[:, :5], state=model.initial_state(3)).state
        fresh = torch.tensor([True, False, True])
        out = model(ids[:, 5:], state=state, fresh=fresh).logits
        assert far(out[fresh], model(ids[fresh, 5:]).logits) < 1e-10
        assert far(out[1], model(ids).logits[1, 5:]) < 1e-10

    def test_generation_is_that_without_a_cache(self, options: dict[str, Any]) -> None:
        model, ids, valid = build(options), some_ids(3, 9), ragged(9, [9, 4, 7], "left")
        written = zoo.generate(model, ids, steps=8, valid=valid, greedy=True, prefill_chunk=4)
        assert torch.equal(written, zoo.generate(model, ids, steps=8, valid=valid, greedy=True, cached=False))

    def test_a_file_brings_it_back(self, options: dict[str, Any], tmp_path: Path) -> None:
        model, ids = build(options), some_ids()
        loaded = zoo.load(zoo.save(model, tmp_path / "model.safetensors"))
        assert torch.equal(loaded(ids, layout()).logits, model(ids, layout()).logits)
        assert loaded.config == model.config

    def test_a_reversible_stack_inside_has_the_same_gradients(self, options: dict[str, Any]) -> None:
        found = []
        for recompute in (True, False):
            model = build(options, reversible=True)
            (stack,) = (each for each in model.modules() if isinstance(each, ReversibleStack))
            stack.recompute = recompute
            logits = model(some_ids(), layout()).logits[layout().valid]
            given = list(model.parameters())
            # projections of global tokens are unused where there are none
            made = torch.autograd.grad(logits.square().mean(), given, allow_unused=True)
            found.append([logits, *(torch.zeros_like(at) if grad is None else grad for at, grad in zip(given, made))])
        assert all(far(one, other) < 1e-9 for one, other in zip(*found, strict=True))

    def test_states_are_trees(self, options: dict[str, Any]) -> None:
        model, ids = build(options), some_ids()
        out = model(ids[:, :9], state=reserve(model.initial_state(3), 23))
        assert isinstance(out.state.layers, Nested)
        index = torch.tensor([2, 0])
        picked = model(ids[index, 9:], state=reorder(detach(out.state), index)).logits
        assert far(picked, model(ids).logits[index, 9:]) < 1e-10
        assert not any(each.requires_grad for each in tensors(detach(out.state)))
        assert state_bytes(out.state) > state_bytes(out.state.layers.own)


@pytest.mark.usefixtures("memory")
def test_lengthening_keeps_the_wrapper() -> None:
    for options in (
        {"attention": {"name": "memory", "inner": {"name": "global_tokens", "inner": "full", "kv_heads": 1}}},
        {"attention": {"name": "full", "kv_heads": 1}, "around": ["memory", "global_tokens"]},
    ):
        model = build({**options, "positions": "learned", "max_length": 30})
        long = weights.lengthen(model, attention="longformer", window=64, max_length=60)
        assert {layer.name for layer in long.stack.attentions} == {"longformer"}
        assert {layer.kv_heads for layer in long.stack.attentions} == {1}
        assert far(long(some_ids()).logits, model(some_ids()).logits) < 1e-10
        assert long(some_ids(1, 60)).logits.isfinite().all()


@pytest.mark.usefixtures("memory")
def test_the_words_say_the_same() -> None:
    """Name, mapping, class, partial, `around`: one model; options of a wrapper's own and of those inside."""
    same = [
        {"attention": {"name": "global_tokens", "count": 3, "inner": entry("longformer"), "kv_heads": 1}},
        {"attention": {"name": "global_tokens", "count": 3, "inner": [entry("longformer", kv_heads=1)]}},
        {"attention": partial(GlobalTokens, count=3, inner=entry("longformer", kv_heads=1))},
        {"attention": entry("longformer", kv_heads=1), "around": [{"name": "global_tokens", "count": 3}]},
        {"attention": entry("longformer", kv_heads=1), "around": partial(GlobalTokens, count=3)},
    ]
    expected = build(same[0])
    for options in same[1:]:
        model = build(options)
        assert far(model(some_ids(), layout()).logits, expected(some_ids(), layout()).logits) == 0.0
    plain = build({"attention": "global_tokens"})
    assert [layer.name for layer in plain.stack.attentions] == ["full", "full"]
    assert [layer.seed for layer in build({"attention": "global_tokens", "seed": 5}).stack.attentions] == [5, 6]
    assert "memory" in zoo.wrappers()
    assert not {*zoo.available()} & {*zoo.wrappers()}


def test_extra_global_tokens_are_the_same_wrapper() -> None:
    """BigBird's own option differs from the wrapper around it in its global blocks alone, which a window hides."""
    etc = build({"attention": entry("longformer"), "around": [{"name": "global_tokens", "count": 3}]})
    model = build({"attention": entry("bigbird", extra_global_tokens=3)})
    assert type(model.stack) is type(etc.stack) is GlobalTokens
    assert model.stack.embedding.shape == etc.stack.embedding.shape == (3, 16)
    assert torch.equal(model.stack.embedding, etc.stack.embedding)


def test_weights_from_before_load(tmp_path: Path) -> None:
    """State dicts and files in which the extra global tokens stood beside the stack."""
    model = build({"attention": entry("bigbird", extra_global_tokens=2)})
    old = {
        name.replace("stack.embedding", "extra.embedding").replace("stack.inner.", "stack."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "extra.embedding" in old
    fresh = build({"attention": entry("bigbird", extra_global_tokens=2)})
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(old)
    assert torch.equal(fresh(some_ids()).logits, model(some_ids()).logits)

    path = zoo.save(model, tmp_path / "model.safetensors")
    kept = load_file(path)
    header = {"format": 1, "kind": "Transformer", "config": {k: v for k, v in model.config.items() if k != "around"}}
    save_file(
        {
            name.replace("stack.embedding", "extra.embedding").replace("stack.inner.", "stack."): tensor
            for name, tensor in kept.items()
        },
        path,
        {"attention_zoo": json.dumps(header)},
    )
    assert torch.equal(zoo.load(path)(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.usefixtures("memory")
def test_wrappers_on_either_side_of_an_encoder_and_decoder() -> None:
    encoder = build({"attention": "global_tokens"}, causal=False, head="hidden")
    decoder = build({"attention": "longformer", "around": ["memory", "global_tokens"]}, cross=True)
    model = zoo.EncoderDecoder(encoder=encoder, decoder=decoder).double().eval()
    ids, source = some_ids(), (some_ids(3, 7, seed=1), Tokens.of(ragged(7, [7, 3, 5], "left")))
    assert far(in_pieces(model, ids, None, [4, 5, 13], source=source), model(ids, source=source).logits) < 1e-10


@pytest.mark.slow
# torch's own compiler warns of its own code
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
@pytest.mark.usefixtures("memory")
def test_a_compiled_model_is_the_same() -> None:
    torch._dynamo.reset()
    model = build({"attention": "full", "around": ["memory", "global_tokens"]}, depth=1)
    ids = some_ids(2, 5)
    expected = model(ids).logits
    assert far(torch.compile(model, backend="eager")(ids).logits, expected) < 1e-10
    model.stack = torch.compile(model.stack, backend="eager")
    assert model.carries
    assert far(in_pieces(model, ids, None, [3]), expected) < 1e-10


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors(part)


def remembered(layer: Any, x: Tensor, tokens: Tokens) -> Tensor:
    """The memory by plain loops over rows, documents and tokens, around the definition of what is inside."""
    hidden = definition(layer.inner)(x, tokens).hidden
    rows = []
    for row in range(len(x)):
        said, memory, document = [], torch.zeros(x.shape[-1]).to(hidden), -1
        for column in range(x.shape[1]):
            if bool(tokens.valid[row, column]) and int(tokens.document[row, column]) != document:
                memory, document = torch.zeros_like(memory), int(tokens.document[row, column])
            said.append(hidden[row, column] + layer.gate * memory)
            if bool(tokens.valid[row, column]):
                memory = memory / 2 + hidden[row, column]
        rows.append(torch.stack(said))
    return torch.stack(rows)


@pytest.mark.parametrize("name", [
    "fast_equals_slow", "any_cut_equals_one_call", "undeclared_abilities_are_refused_at_build",
    "undeclared_abilities_are_refused_at_the_call", "wrong_calls_are_refused", "wrong_options_are_refused",
    "copies_compute_the_same", "the_same_seed_trains_identically",
])  # fmt: skip
def test_a_wrapper_around_one_layer_is_under_the_contract(memory: type[Wrapper], name: str) -> None:
    """Some checks of the suite; of the shipped wrappers all are run with those of the other mechanisms."""
    (check,) = (each for each in contract_checks("memory", reference=remembered) if each.name == name)
    check()


class Silent(Layer):
    """A layer that declares nothing."""

    def __init__(self, **given: Any):
        super().__init__()
        self.linear = nn.Linear(given["dim"], given["dim"])

    def forward(self, x, tokens=None, **rest) -> Output:
        return Output(self.linear(x))


def test_a_layer_without_a_state_says_so() -> None:
    with pytest.raises(Unsupported, match="Silent: state is not supported: it has no initial_state"):
        Silent(dim=4).initial_state(2)
    model = Transformer(attention=Silent, vocab=VOCAB, dim=16, heads=2)
    assert not model.carries
    with pytest.raises(Unsupported, match="this model: state is not supported"):
        model.initial_state(2)


def test_abilities_come_from_what_is_inside() -> None:
    def around(*inner: str) -> Any:
        return zoo.Transformer(attention=[entry(name) for name in inner], around="global_tokens", vocab=9, dim=16,
                               heads=2).stack.abilities  # fmt: skip

    assert around("longformer").state == "constant"
    assert around("longformer", "bigbird").state == "linear"
    assert around("longformer", "bigbird").global_tokens == "first_call"
    assert around("full", "longformer").compute == "quadratic"
    mixed = small("longformer", "reformer")
    assert abilities_of(mixed.stack).causality == "values"
    assert zoo.build("global_tokens", dim=16, heads=2, inner="longformer").abilities.compute == "linear"


def test_a_wrapper_says_what_it_can_around_others() -> None:
    class Short(GlobalTokens):
        """Keeps nothing from call to call."""

        @staticmethod
        def abilities_around(inner: Abilities) -> Abilities:
            return replace(inner, carry="none")

    assert Short.declared.carry == "none"
    model = Transformer(attention=Short, vocab=VOCAB, dim=16, heads=2)
    assert not model.carries
    with pytest.raises(Unsupported, match="global_tokens: state is not supported: it keeps none around this"):
        Short(dim=16, heads=2).initial_state(1)
    with pytest.raises(TypeError, match=r"Stubborn must say abilities_around\(inner\), from which declared follows"):
        type("Stubborn", (Wrapper,), {"declared": Short.declared})


def test_messages_name_mechanisms_by_what_they_can() -> None:
    """Whatever else is registered besides."""
    assert able(cross=True).split(" or ")[0] == "full"
    assert {"bigbird", "full", "longformer"} <= set(able(global_tokens=("any", "first_call")).split(" or "))
    assert able(carry="nonesuch") == "a mechanism that declares carry"
    with pytest.raises(Unsupported, match=r"causal=False .* use .*bigbird or full or .*longformer or .*reformer"):
        zoo.build("transformer_xl", dim=16, heads=2, causal=False)


@pytest.mark.parametrize(("options", "message"), [
    ({"attention": ["full", "global_tokens"]}, "attention must list mechanisms of blocks, got global_tokens, which"),
    ({"attention": {"name": "global_tokens", "inner": ["full", "global_tokens"]}}, "inner must list mechanisms of"),
    ({"attention": {"name": "global_tokens", "inner": None}}, "inner must name the mechanism that global_tokens st"),
    ({"attention": {"name": "global_tokens", "inner": []}}, "inner must name at least one mechanism"),
    ({"attention": {"name": "global_tokens", "inner": "ful"}}, "inner must be one of .*did you mean full"),
    ({"attention": {"name": "global_tokens", "inner": 3}}, "inner must be a name, a mapping, a callable or a list"),
    ({"attention": {"name": "global_tokens", "inner": Silent(dim=4)}}, "inner must say which mechanism"),
    ({"attention": {"name": "global_tokens", "count": 0}}, "count must be an integer of at least 1, got 0"),
    ({"attention": {"name": "global_tokens", "window": 3}}, "global_tokens: option window is not supported"),
    ({"attention": {"name": "global_tokens", "inner": "reformer"}}, "global_tokens around reformer: a mechanism wi"),
    ({"attention": "transformer_xl", "around": "global_tokens"}, "global_tokens around transformer_xl: a mechanism"),
    ({"attention": "full", "around": ["longformer"]}, "around must list wrappers, .*global_tokens.*, got 'longform"),
    ({"attention": "full", "around": [{"name": "global_tokens", "inner": "full"}]}, "around must leave inner to att"),
    ({"attention": "full", "around": [{"name": "global_tokens", "kv_heads": 1}]}, "around must leave kv_heads to at"),
    ({"attention": "full", "around": 3}, "around must be a name, a mapping, a callable or a list"),
    ({"attention": "full", "around": [lambda **given: None]}, "around must list wrappers"),
    ({"attention": {"name": "global_tokens", "inner": ["full"] * 3}}, "depth must be at least the number"),
], ids=lambda value: re.sub(r" at 0x\w+", "", str(value)))  # fmt: skip
def test_what_cannot_be_is_refused_when_it_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        Transformer(**options, vocab=VOCAB, dim=16, heads=2)
    assert "\n" not in str(caught.value)


def test_a_bare_layer_takes_one_mechanism_inside() -> None:
    with pytest.raises(ValueError, match="inner must be one mechanism where global_tokens stands around one layer"):
        zoo.build("global_tokens", dim=16, heads=2, inner=["full", "longformer"])
    with pytest.raises(Unsupported, match="global_tokens around reformer: kv_heads=1 is not supported"):
        zoo.build("global_tokens", dim=16, heads=2, inner="reformer", kv_heads=1)
    with pytest.raises(Unsupported, match=r"global_tokens: cross=True is not supported.* use full instead"):
        zoo.build("global_tokens", dim=16, heads=2, causal=False, cross=True)
    with pytest.raises(Unsupported, match="lengthen: attention=global_tokens is not supported"):
        weights.lengthen(small("full"), attention="global_tokens")


def test_states_of_other_trees_are_refused() -> None:
    plain, wrapped = small("full"), build({"attention": "global_tokens"})
    with pytest.raises(ValueError, match="state must be of a model with global_tokens around its stack, got one with"):
        wrapped(some_ids(), state=plain.initial_state(3))
    with pytest.raises(ValueError, match="state must be of a model with as many wrappers around its stack, got one of"):
        plain(some_ids(), state=wrapped.initial_state(3))
    with pytest.raises(ValueError, match="state must be of a model with 2 blocks, got one of 3"):
        wrapped(some_ids(), state=build({"attention": "global_tokens"}, depth=3).initial_state(3))
    wrapped.stack = torch.compile(wrapped.stack, backend="eager")  # which nothing here runs
    assert wrapped.carries
    with pytest.raises(ValueError, match="state must be of a model with global_tokens around its stack, got one with"):
        wrapped(some_ids(), state=plain.initial_state(3))
    layer = zoo.build("global_tokens", dim=16, heads=2)
    with pytest.raises(ValueError, match="state must be of global_tokens, from initial_state or the call before"):
        layer(torch.randn(1, 3, 16), Tokens.all_valid(1, 3), state=layer.inner.initial_state(1))
