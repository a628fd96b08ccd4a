"""Cross-attention: queries here, keys and values from a source, which a state may hold."""

from __future__ import annotations

import torch

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Source, Tokens, Unsupported
from attention_zoo.testing.case import PRIME, Case, close, gradients, piece, ragged, run, same
from attention_zoo.testing.check import check
from attention_zoo.testing.numerics import definition
from attention_zoo.testing.refusals import refused


def crosses(case: Case) -> bool:
    return case.can.cross


def source_of(case: Case) -> Source:
    return Source(case.data(3, PRIME, seed=4), Tokens.of(ragged(PRIME, [PRIME, 9, 1], "left")))


@check(crosses)
def cross_attention_equals_its_definition(case: Case) -> None:
    """Outputs and gradients, the source's included; padding of either side, NaN included, does not matter."""
    layer = case.build(causal=False, cross=True)
    assert isinstance(layer, PatternAttention)
    slow = definition(layer)
    source = source_of(case)
    tokens = Tokens.of(ragged(11, [11, 7, 4]))
    hidden = torch.where(source.tokens.valid[..., None], source.hidden, torch.nan).requires_grad_()
    x = torch.where(tokens.valid[..., None], case.data(3, 11), torch.nan)
    results = []
    for one in (layer, slow):
        out = one(x, tokens, source=Source(hidden, source.tokens)).hidden
        assert bool(out.isfinite().all()), f"{case.name}: cross-attention spreads NaN from padding"
        results.append((out, gradients(one, hidden, out, tokens.valid)))
    (fast, found), (truth, expected) = results
    close(fast[tokens.valid], truth[tokens.valid], f"{case.name}: cross-attention against its definition")
    for name, grad in found.items():
        close(grad, expected[name], f"{case.name}: cross-attention, gradient of {name}", 1e-11)


@check(crosses)
def a_padded_source_equals_the_source_alone(case: Case) -> None:
    layer = case.build(causal=False, cross=True)
    source, x = source_of(case), case.data(3, 11)
    whole = run(layer, x, source=source).hidden
    for row in range(3):
        at = source.tokens.valid[row]
        alone = Source(source.hidden[row : row + 1, at], Tokens.all_valid(1, int(at.sum())))
        close(
            run(layer, x[row : row + 1], source=alone).hidden, whole[row : row + 1], f"{case.name}: source {row} alone"
        )


@check(crosses)
def a_row_without_a_source_sees_nothing(case: Case) -> None:
    """By every kernel, of one query or more: zeros before the output map, whatever the padding holds."""
    source, x = source_of(case), case.data(3, 5)
    tokens = Tokens.of(source.tokens.valid & torch.tensor([[True], [False], [True]]))
    plain = case.build(causal=False, cross=True)
    assert isinstance(plain, PatternAttention)
    for name in ("auto", *(kernel.name for kernel in plain.kernels)):
        layer = case.build(causal=False, cross=True, kernel=name)
        assert isinstance(layer, PatternAttention)
        nothing = layer.to_out(torch.zeros_like(layer.to_out.weight[:1]))
        for length in (5, 1):
            try:
                with torch.no_grad():
                    found = layer(x[:, :length], source=Source(source.hidden, tokens)).hidden[1]
            except Unsupported:  # this kernel does not run here
                continue
            close(found, nothing.expand_as(found), f"{case.name}: kernel={name} and a source of padding alone")


@check(crosses)
def a_state_holds_the_source(case: Case) -> None:
    """Given at the first call only, the source serves all later calls; without either the call is refused."""
    layer = case.build(causal=False, cross=True)
    source, x, tokens = source_of(case), case.data(3, 11), Tokens.all_valid(3, 11)
    whole = run(layer, x, source=source).hidden
    state = layer.initial_state(3)
    for step in range(11):
        now = piece(tokens, step, step + 1)
        out = run(layer, x[:, step : step + 1], now, state=state, source=source if step == 0 else None)
        state = out.state
        close(out.hidden, whole[:, step : step + 1], f"{case.name}: step {step} with the source in the state")
    refused(case, lambda: run(layer, x), "source", kind=ValueError)


@check(crosses)
def other_rows_of_the_source_do_not_matter(case: Case) -> None:
    layer = case.build(causal=False, cross=True)
    source, x = source_of(case), case.data(3, 11)
    other = source.hidden.clone()
    other[1:] = 3.0
    same(
        run(layer, x, source=Source(other, source.tokens)).hidden[:1],
        run(layer, x, source=source).hidden[:1],
        f"{case.name}: the source of another row",
    )
