"""Large scores, up to some 10,000: finite and right by every kernel, in every layout and dtype, forward and backward.

Ordinary inputs have scores of a few. Exponentials overflow from 88 on in float32, and a gradient that is NaN because
of a row whose output nobody reads (0 · NaN) shows in no forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens
from attention_zoo.testing.case import PRIME, Case, close, feed, gradients
from attention_zoo.testing.check import check
from attention_zoo.testing.numerics import kernels, truths
from attention_zoo.testing.states import carries_exactly, layouts

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 3e-2, torch.bfloat16: 0.15}
"""Of the largest value: a score of 10,000 is known to a few digits less than its dtype has, and a gradient of half
precision is made of outputs that were rounded."""


def build(case: Case, causal: bool, dtype: torch.dtype = torch.float64) -> Attention:
    """A layer whose queries and keys are long, also the queries at padding, which are the bias."""
    layer = case.build(causal=causal)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20 if parameter.ndim == 1 else 2.5)
    return layer.to(dtype)


def data(case: Case, dtype: torch.dtype) -> Tensor:
    """Tokens of all sizes, so that rows with large scores and with small ones lie beside each other."""
    sizes = torch.tensor([0.01, 1.0, 10.0, 0.1, 10.0])[torch.arange(3 * PRIME).view(3, PRIME, 1) % 5]
    return (case.data(3, PRIME) * sizes).to(dtype)


def finite(found: dict[str, Tensor], tokens: Tokens, where: str) -> None:
    """Demand gradients that are finite, and zero at padding."""
    for name, grad in found.items():
        assert bool(grad.isfinite().all()), f"{where}: the gradient of {name} is not finite"
    assert not bool(found["x"][~tokens.valid].any()), f"{where}: padding has a gradient"


def agree(
    layer: Attention, x: Tensor, tokens: Tokens, fast: Tensor, slow: tuple[Tensor, dict[str, Tensor]], where: str
) -> None:
    """Demand that a result is finite everywhere, and it and its gradients those of the slow truth at valid tokens."""
    assert bool(fast.isfinite().all()), f"{where}: the output is not finite"
    found = gradients(layer, x, fast, tokens.valid)
    finite(found, tokens, where)
    hidden, expected = slow
    close(fast[tokens.valid].double(), hidden[tokens.valid], f"{where} hidden", TOLERANCE[x.dtype])
    for name, grad in found.items():
        tolerance = TOLERANCE[x.dtype]
        if name.endswith("to_k.bias") and (queries := name.replace("to_k", "to_q")) in expected:
            # it moves all scores of a query alike: true is zero, and what is found the rounding of what cancels there
            tolerance *= max(1.0, float(expected[queries].abs().max()))
        close(grad.double(), expected[name], f"{where} gradient of {name}", tolerance)


@check()
def large_scores_are_finite_and_right(case: Case) -> None:
    """Every kernel and layout; float64 and float32 against the slow truth in float64, bfloat16 for being finite.

    (Half precision rounds queries and keys by more than a large score bears: see the next check.)
    """
    for causal in case.sides:
        exact = build(case, causal)
        slow = next(iter(truths(case, exact).values()))
        for layout, tokens in case.layouts(PRIME):
            for dtype in DTYPES:
                layer, x = build(case, causal, dtype), data(case, dtype).requires_grad_()
                where = f"{case.name} causal={causal} {dtype} {layout}, large scores"
                if dtype != torch.bfloat16:
                    truth = _truth(exact, layer, x, tokens, slow)
                for kernel, fast in kernels(layer, x, tokens).items():
                    at = f"{where} {kernel}"
                    if dtype != torch.bfloat16:
                        agree(layer, x, tokens, fast, truth, at)
                        continue
                    assert bool(fast.isfinite().all()), f"{at}: the output is not finite"
                    finite(gradients(layer, x, fast, tokens.valid), tokens, at)


def _truth(
    exact: Attention, layer: Attention, x: Tensor, tokens: Tokens, slow: Callable[[Tensor, Tokens], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of these very inputs. Discrete decisions may hang on the last digit: then by the layer itself, replaying them."""
    leaf = x.detach().double().requires_grad_()
    choices = None if x.dtype == torch.float64 else layer(x, tokens).choices
    out = slow(leaf, tokens) if choices is None else exact(leaf, tokens, choices=choices).hidden
    return out.detach(), gradients(exact, leaf, out, tokens.valid)


@check(lambda case: issubclass(case.cls, PatternAttention))
def large_scores_of_given_queries_and_keys(case: Case) -> None:
    """Every kernel on the same queries, keys and values; padding yields zeros, and has no part in gradients."""
    generator = torch.Generator().manual_seed(17)
    for causal in case.sides:
        layer = case.build(causal=causal)
        assert isinstance(layer, PatternAttention)
        for layout, tokens in case.layouts(PRIME):
            asked = tokens.valid[:, None, :, None]
            for dtype in DTYPES:
                longest = 8.0 if dtype == torch.bfloat16 else 30.0
                sizes = torch.tensor([0.01, 1.0, 8.0, longest])[torch.arange(PRIME) % 4, None]
                q, k, v, weight = torch.randn(4, 3, case.heads, PRIME, layer.head_width, generator=generator).to(dtype)
                q, k, v = (x.detach().requires_grad_() for x in ((q * sizes).to(dtype), (k * sizes).to(dtype), v))
                a, b, c = (x.detach().double().requires_grad_() for x in (q, k, v))
                truth = layer.attend(a, b, c, tokens, tokens, kernel="dense")
                expected = torch.autograd.grad((truth * weight * asked).sum(), (a, b, c))
                for kernel, reason in layer.explain(q, k, v, tokens, tokens):
                    if reason is not None:
                        continue
                    where = f"{case.name} causal={causal} {dtype} {layout}, kernel={kernel}, large scores"
                    out = layer.attend(q, k, v, tokens, tokens, kernel=kernel)
                    assert not bool(out.masked_fill(asked, 0).any()), f"{where}: padding yields something"
                    close(out.double(), truth.detach() * asked, where, TOLERANCE[dtype])
                    # a gradient at padding, too, must reach nothing
                    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
                    for name, grad, right in zip("qkv", found, expected):
                        close(grad.double(), right, f"{where}, gradient of {name}", TOLERANCE[dtype])


@check(carries_exactly)
def large_scores_through_a_state(case: Case) -> None:
    """Call by call, with gradients and as decoding does, against one call."""
    layer, x = build(case, True), data(case, torch.float64).requires_grad_()
    cuts = [5, 13, 14, 15, 20]
    for layout, tokens in layouts(case, cuts[0]):
        where = f"{case.name} {layout}, cut at {cuts}, large scores"
        whole = layer(x, tokens).hidden
        expected = gradients(layer, x, whole, tokens.valid)
        out = feed(layer, x, tokens, cuts)[0]
        if not case.can.truncated:
            agree(layer, x, tokens, out, (whole.detach(), expected), where)
        finite(gradients(layer, x, out, tokens.valid) if case.can.truncated else expected, tokens, where)
        with torch.no_grad():
            steps = feed(copy.deepcopy(layer), x, tokens, cuts)[0]
        assert bool(steps.isfinite().all()), f"{where}: the output is not finite"
        close(steps[tokens.valid], whole[tokens.valid], f"{where} without gradients", TOLERANCE[torch.float64])
