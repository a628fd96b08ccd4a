"""The future: neither its values nor its gradients nor its presence reach the past."""

from __future__ import annotations

import torch

from attention_zoo.contract import Tokens
from attention_zoo.testing.case import MANY, PRIME, WIDE, Case, close, piece, run, same
from attention_zoo.testing.check import check


def is_causal(case: Case) -> bool:
    return case.can.causality != "none"


def is_strict(case: Case) -> bool:
    return case.can.causality == "strict"


@check(is_causal)
def the_future_never_changes_the_past(case: Case) -> None:
    """Other values after a column, at the same shape: what lies before it stays bitwise equal.

    A mechanism with `causality="values"` may decide otherwise (a chunk border may move); it replays its choices here.
    """
    for variant in case.variants():
        for length, tile in ((PRIME, 4), (MANY, WIDE)):
            layer = case.build(causal=True, dtype=torch.float32, tile=tile, **variant)
            x = case.data(3, length, dtype=torch.float32)
            columns = (1, case.border, length - 9)
            others = [x.clone() for _ in columns]
            for column, other in zip(columns, others):
                other[:, column:] = 5 * case.data(3, length - column, seed=9, dtype=torch.float32)
            # all columns in one batch: what is compared stands in the same place of the same shape
            before, after = x.repeat(len(columns), 1, 1), torch.cat(others)
            for layout, tokens in case.layouts(length):
                many = Tokens(*(field.repeat(len(columns), 1) for field in tokens))
                out = run(layer, before, many)
                if not is_strict(case):
                    assert out.choices is not None, f"{case.name}: causality=values needs choices in its output"
                again = run(layer, after, many, choices=out.choices).hidden
                for column, was, now in zip(columns, out.hidden.split(3), again.split(3)):
                    past = tokens.valid[:, :column]
                    where = f"{case.name} {variant} length {length} {layout}: the past of column {column}"
                    same(now[:, :column][past], was[:, :column][past], where)
            if variant:
                break


@check(is_causal)
def no_gradient_comes_from_the_future(case: Case) -> None:
    """The gradient of past outputs is exactly zero at every later token."""
    layer = case.build(causal=True)
    for layout, tokens in case.layouts(PRIME):
        for column in (1, case.border, 20):
            x = case.data(3, PRIME).requires_grad_()
            out = layer(x, tokens).hidden
            past = tokens.valid & (torch.arange(PRIME) < column)
            (grad,) = torch.autograd.grad(out[past].square().sum(), x)
            leak = float(grad[:, column:].abs().max())
            assert leak == 0, f"{case.name} {layout}: outputs before column {column} have gradient {leak:.1e} after"


@check(is_strict)
def the_future_may_be_absent(case: Case) -> None:
    """A shorter call gives the same past: no length, block count or flag of what follows is read."""
    layer = case.build(causal=True)
    for layout, tokens in case.layouts(PRIME):
        x = case.data(3, PRIME)
        whole = run(layer, x, tokens).hidden
        for column in (1, case.border, case.border + 1, 20):
            past = piece(tokens, 0, column)
            short = run(layer, x[:, :column], past).hidden
            where = f"{case.name} {layout}: without what follows column {column}"
            close(short[past.valid], whole[:, :column][past.valid], where)
