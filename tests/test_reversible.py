"""The reversible stack: the same function and gradients as plain autograd, at memory that does not grow with depth."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from small_models import CAUSAL, entry, far, in_pieces, packed, ragged, small, some_ids
from torch import nn

from attention_zoo import Output, Source, Tokens, Transformer, Unsupported
from attention_zoo.attention.full import Full
from attention_zoo.attention.reformer import Reformer
from attention_zoo.measure.memory import peak_memory
from attention_zoo.registry import recipe


class Priced(Full):
    """Full attention with an auxiliary loss on its output."""

    def forward(self, x, tokens=None, **rest):
        out = super().forward(x, tokens, **rest)
        return Output(
            out.hidden, out.state, {"price": out.hidden.square().mean(), "fixed": x.new_ones(())}, out.choices
        )


class Noisy(Full):
    """Full attention that draws from the default generator in training."""

    def forward(self, x, tokens=None, **rest):
        out = super().forward(x, tokens, **rest)
        return out._replace(hidden=out.hidden * (1 + torch.rand_like(out.hidden))) if self.training else out


def gradients(model: Transformer, recompute: bool, run) -> tuple[list, torch.Tensor]:
    """Gradients of `run(model)`, and the random state that its backward leaves."""
    model.stack.recompute = recompute
    model.zero_grad()
    torch.manual_seed(3)
    run(model).backward()
    return [p.grad for p in model.parameters()], torch.rand(())


def agree(model: Transformer, run, bound: float = 1e-9) -> None:
    (one, after_one), (other, after_other) = gradients(model, True, run), gradients(model, False, run)
    assert torch.equal(after_one, after_other)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in other)
    for (name, _), a, b in zip(model.named_parameters(), one, other):
        assert (a is None) == (b is None) or far(b if a is None else a, torch.zeros(())) == 0, name
        if a is not None and b is not None:
            assert far(a, b) <= bound * max(1.0, b.abs().max().item()), name


def score(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[..., 0].mean()


@pytest.mark.parametrize("output_dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "names",
    [*((name,) for name in CAUSAL if not recipe(name)[0].token_losses), ("reformer", "transformer_xl", "longformer")],
    ids="/".join,
)
def test_gradients_equal_plain_autograd(names, output_dropout):
    model = small(*names, reversible=True, depth=5, short_conv=3, output_dropout=output_dropout).train()
    ids, tokens = some_ids(), packed(ragged(23, [23, 15, 6], "right"), 9)
    agree(model, lambda m: score(m(ids, tokens).logits[tokens.valid]))


def test_a_loss_on_hidden_states_is_refused():
    with pytest.raises(Unsupported, match="compressive: reversible is not supported"):
        small("compressive", reversible=True)


def test_it_is_the_two_stream_formula():
    model = small("full", reversible=True, depth=3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    a = b = x
    for block in model.stack.layers:
        attention, wide = block.layers
        a = a + attention.body(attention.norm(b)).hidden
        b = b + wide.body(wide.norm(a)).hidden
    assert far(model.stack(x).hidden, (a + b) / 2) < 1e-12


def test_fresh_hashes_are_replayed_and_dropout_after_them_too():
    """Reformer draws rotations in forward and is given its buckets in backward: then the generator stands elsewhere."""
    model = small("reformer", reversible=True, depth=6, output_dropout=0.4).train()
    assert model.stack.attentions[0].resample
    ids = some_ids(2, 61)
    agree(model, lambda m: score(m(ids).logits))


class Forgetful(Reformer):
    """Hashes again instead of replaying its choices."""

    def forward(self, x, tokens=None, *, choices=None, **rest):
        return super().forward(x, tokens, **rest)


def test_buckets_are_replayed_since_they_would_flip():
    """bfloat16 restores inputs up to rounding: near the border of two buckets, some would hash elsewhere."""

    def error(cls: type[Reformer]) -> float:
        torch.manual_seed(0)
        attention = partial(cls, chunk=4, rounds=2, buckets=64, resample=False)
        model = Transformer(attention=attention, vocab=11, dim=16, heads=2, depth=6, reversible=True, short_conv=3)
        model.to(torch.bfloat16)
        ids = some_ids(2, 256)
        flat = []
        for recompute in (True, False):
            grads, _ = gradients(model, recompute, lambda m: score(m(ids).logits.float()))
            flat.append(torch.cat([grad.float().flatten() for grad in grads]))
        return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()

    replayed, forgotten = error(Reformer), error(Forgetful)
    assert replayed < 0.5 * forgotten


def test_auxiliary_losses_sum_over_depth_and_reach_their_parameters():
    torch.manual_seed(0)
    model = Transformer(attention=Priced, vocab=11, dim=16, heads=2, depth=3, reversible=True).double()
    ids = some_ids()
    assert model(ids).losses["fixed"].item() == 3
    agree(model, lambda m: (lambda out: score(out.logits) + 5 * out.losses["price"])(m(ids)))
    only = gradients(model, True, lambda m: m(ids).losses["price"])[0]
    assert sum(grad.abs().sum() for grad in only if grad is not None) > 0


def test_layers_that_draw_draw_the_same_again():
    torch.manual_seed(0)
    model = Transformer(
        attention=Noisy, vocab=11, dim=16, heads=2, depth=4, reversible=True, output_dropout=0.2
    ).double()
    agree(model, lambda m: score(m(some_ids()).logits))


def test_backward_leaves_the_generator_alone():
    model = small("reformer", reversible=True, output_dropout=0.3).train()
    loss = score(model(some_ids()).logits)
    torch.manual_seed(5)
    loss.backward()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_gradients_reach_the_source():
    model = small("longformer", reversible=True, cross=True, depth=3)
    hidden = torch.randn(3, 8, 16, dtype=torch.float64, requires_grad=True)
    source = Source(hidden, Tokens.of(ragged(8, [8, 5, 2], "right")))
    agree(model, lambda m: score(m(some_ids(), source=source).logits))
    grads = []
    for recompute in (True, False):
        model.stack.recompute = recompute
        grads += torch.autograd.grad(score(model(some_ids(), source=source).logits), hidden)
    assert far(*grads) < 1e-10
    assert grads[0].abs().sum() > 0


def test_frozen_parameters_stay_without_gradient():
    model = small("full", reversible=True)
    for parameter in model.stack.attentions[0].parameters():
        parameter.requires_grad_(False)
    agree(model, lambda m: score(m(some_ids()).logits))
    assert all(parameter.grad is None for parameter in model.stack.attentions[0].parameters())


@pytest.mark.parametrize("name", ["longformer", "transformer_xl"])
def test_gradients_with_a_carried_state(name):
    model = small(name, reversible=True, depth=3, short_conv=3)
    ids = some_ids()
    with torch.no_grad():
        state = model(ids[:, :9], state=model.initial_state(3)).state
    agree(model, lambda m: score(m(ids[:, 9:], state=state).logits))
    assert far(in_pieces(model, ids, None, [4, 9]), model(ids).logits) < 1e-10


def test_choices_come_back_nested_and_replay():
    model = small("reformer", "full", reversible=True, depth=2).train()
    x = torch.randn(2, 29, 16, dtype=torch.float64)
    first = model.stack(x)
    assert first.choices[0][0][0].shape[:3] == (2, 2, 2)
    assert first.choices[1] == ((None,), (None,))
    assert torch.equal(model.stack(x, choices=first.choices).hidden, first.hidden)
    assert not torch.equal(model.stack(x).hidden, first.hidden)


def test_autocast_is_the_same_in_backward():
    torch.manual_seed(0)
    model = Transformer(attention="full", vocab=11, dim=16, heads=2, depth=4, reversible=True, ff_chunks=2)
    ids = some_ids()
    seen = []
    wide = model.stack.branches[1].body.layers[0].into
    wide.register_forward_hook(lambda m, args, out: seen.append(out.dtype))

    def run(m):
        with torch.autocast("cpu", torch.bfloat16):
            return score(m(ids).logits.float())

    agree(model, run, bound=2e-2)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) > 4


def test_memory_is_constant_in_depth():
    def peak(depth: int, reversible: bool) -> int:
        torch.manual_seed(0)
        shape = {"vocab": 11, "dim": 16, "heads": 2, "ff_mult": 2, "head": "hidden"}
        model = Transformer(attention=entry("longformer"), depth=depth, reversible=reversible, **shape)
        model(some_ids(1, 64)).hidden.sum().backward()  # gradients exist before the measurement: they grow with depth
        ids = some_ids(1, 2048)
        return peak_memory(lambda: model(ids).hidden.sum().backward()).peak_bytes

    shallow, deep = peak(2, True), peak(8, True)
    assert deep < 1.15 * shallow
    assert peak(8, False) > 2.5 * peak(2, False)
    assert deep < 0.5 * peak(8, False)


def test_nothing_outlives_the_call():
    model = Transformer(attention=Priced, vocab=11, dim=16, heads=2, reversible=True)
    gc.disable()  # so that a cycle stays
    try:
        out = model(some_ids())
        price = weakref.ref(out.losses["price"])
        assert price() is not None
        del out
        assert price() is None
    finally:
        gc.enable()


def test_a_second_derivative_is_refused():
    model = small("full", reversible=True)
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.stack(x).hidden.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_inference_keeps_no_graph_and_agrees():
    model = small("full", reversible=True)
    ids = some_ids()
    with torch.no_grad():
        quiet = model(ids).logits
    assert not quiet.requires_grad
    assert torch.equal(quiet, model(ids).logits)
    assert isinstance(model.norm, nn.LayerNorm)
