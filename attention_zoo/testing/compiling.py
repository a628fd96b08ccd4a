"""torch.compile: a mechanism is one operator in the graph, forward and backward, at any length."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from attention_zoo.contract import Attention, Unsupported
from attention_zoo.testing.case import Case, close
from attention_zoo.testing.check import check

HOW = "put @one_operator (attention_zoo.attention.operator) on its forward"


@check()
def it_compiles_as_one_operator(case: Case) -> None:
    """One graph without a break serves three lengths, and equals eager mode; torch.export is refused by name.

    A wrapper may break it: where it puts columns follows from what the tokens are.
    """
    torch._dynamo.reset()
    layer = case.build(causal=case.sides[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own compiler warns of its own code
        try:
            found = [_both(layer, case.data(2, length)) for length in (33, 65, 40)]
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise AssertionError(
                f"{case.name}: torch.compile(layer, fullgraph=True, dynamic=True) must hold it in one graph, got "
                f"{type(error).__name__}: {reason}; {HOW}"
            ) from error
        for compiled, eager in found:
            for mine, theirs in zip(compiled, eager, strict=True):
                close(mine, theirs, f"{case.name}: torch.compile against eager mode", 1e-9)
        refused = None
        try:
            torch.export.export(layer, (case.data(1, 9),), strict=False)
        except Exception as error:
            refused = error
    assert isinstance(refused, Unsupported), f"{case.name}: torch.export must be refused, got {refused!r}; {HOW}"
    torch._dynamo.reset()


def _both(layer: Attention, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradient of x, compiled and eager."""
    results = []
    for call in (torch.compile(layer, backend="aot_eager", fullgraph=not layer.wraps, dynamic=True), layer):
        leaf = x.clone().requires_grad_()
        out = call(leaf).hidden
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaf)])
    return results[0], results[1]
