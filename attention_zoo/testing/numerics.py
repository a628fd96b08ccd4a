"""Fast equals slow: outputs, gradients, half precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attention_zoo.attention.full import Full
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens, Unsupported
from attention_zoo.testing.case import MANY, PRIME, WIDE, Case, close, gradients, run, weighed
from attention_zoo.testing.check import check


def definition(layer: PatternAttention) -> PatternAttention:
    """The same layer computing its definition, L x S materialised; the parameters are shared, so gradients compare."""
    return with_kernel(layer, "dense")


def with_kernel(layer: PatternAttention, kernel: str) -> PatternAttention:
    twin = copy.copy(layer)
    twin.kernel = kernel
    return twin


def truths(case: Case, layer: Attention) -> dict[str, Callable[[Tensor, Tokens], Tensor]]:
    """Every slow computation of what the layer computes, by name."""
    found: dict[str, Callable[[Tensor, Tokens], Tensor]] = {}
    if isinstance(layer, PatternAttention):
        slow = definition(layer)
        found["its definition (kernel=dense)"] = lambda x, tokens: slow(x, tokens).hidden
    if case.reference is not None:
        reference = case.reference
        found["its reference loop"] = lambda x, tokens: reference(layer, x, tokens)
    assert found, (
        f"{case.name}: nothing slow to compare with: derive from PatternAttention, whose definition is `bias`, or give "
        f"the class a static method reference(layer, x, tokens) -> hidden: what it computes, by plain loops"
    )
    return found


def kernels(layer: Attention, x: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Outputs of every fast kernel that runs this call; a named kernel may refuse it, `auto` may not."""
    if not isinstance(layer, PatternAttention):
        return {"": layer(x, tokens).hidden}
    found = {"kernel=auto": layer(x, tokens).hidden}
    for kernel in layer.kernels:
        if kernel.name != "dense":
            with contextlib.suppress(Unsupported):
                found[f"kernel={kernel.name}"] = with_kernel(layer, kernel.name)(x, tokens).hidden
    return found


def compare(case: Case, layer: Attention, x: Tensor, tokens: Tokens, where: str) -> None:
    """Outputs and gradients of every fast kernel against every slow truth, at valid tokens."""
    x = x.clone().requires_grad_()
    expected = {}
    for truth, compute in truths(case, layer).items():
        slow = compute(x, tokens)
        expected[truth] = (slow.detach(), gradients(layer, x, slow, tokens.valid))
    for kernel, fast in kernels(layer, x, tokens).items():
        found = gradients(layer, x, fast, tokens.valid)
        for truth, (hidden, grads) in expected.items():
            close(fast[tokens.valid], hidden[tokens.valid], f"{where}: {kernel} hidden against {truth}")
            for name, grad in grads.items():
                close(found[name], grad, f"{where}: {kernel} gradient of {name} against {truth}", 1e-11)


@check()
def fast_equals_slow(case: Case) -> None:
    """At lengths 1, W-1, W, 2W+3 and a prime; padded, packed, with holes and global tokens; every declared variant."""
    for causal in case.sides:
        for variant in case.variants():
            layer = case.build(causal=causal, **variant)
            # a variant changes scores, not layouts: one long length tells
            layouts = case.telling if variant else case.layouts
            for length in [PRIME] if variant else case.lengths:
                for layout, tokens in layouts(length):
                    where = f"{case.name} causal={causal} {variant} length {length}, {layout}"
                    compare(case, layer, case.data(3, length), tokens, where)


@check()
def fast_equals_slow_over_many_tiles(case: Case) -> None:
    """Far beyond every tile of an executor: no global token, then a single one that all later tiles must read."""
    length = MANY
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, 201:] = False
    alone = torch.zeros_like(valid)
    alone[:, 12] = True
    for causal in case.sides:
        layer = case.build(causal=causal, tile=WIDE)
        for flags in (None, alone) if case.can.global_tokens != "none" else (None,):
            where = f"{case.name} causal={causal} length {length}, {'one global token' if flags is alone else 'padded'}"
            compare(case, layer, case.data(2, length), Tokens.of(valid, flags), where)


@check()
def gradients_match_finite_differences(case: Case) -> None:
    """Along random directions of x and of every parameter.

    Decisions are replayed, and truncated gradients are compared inside one segment.
    """
    length = min(case.shortest, 4) if case.can.truncated else 2 * case.border + 3
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, length // 2] = False
    tokens = Tokens.of(valid, case.globals(valid))
    # what a step of h misses falls with its square, what rounding adds rises with 1/h: in between, both are below 1e-8
    generator, step = torch.Generator().manual_seed(11), 3e-6
    for causal in case.sides:
        layer = case.build(causal=causal)
        x = case.data(2, length).requires_grad_()
        out = layer(x, tokens)
        inputs = {"x": x, **dict(layer.named_parameters())}
        for name, grad in gradients(layer, x, out.hidden, valid).items():
            for _ in range(3):
                direction = torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
                ends = []
                for sign in (1, -1):
                    with moved(inputs[name], sign * step * direction), torch.no_grad():
                        ends.append(weighed(layer(x, tokens, choices=out.choices).hidden, valid))
                numeric = (ends[0] - ends[1]) / (2 * step)
                where = f"{case.name} causal={causal} length {length}: slope along a direction of {name}"
                close((grad * direction).sum(), numeric, where, 1e-7)


@contextlib.contextmanager
def moved(tensor: Tensor, by: Tensor) -> Iterator[None]:
    """The tensor a little elsewhere, for the time of a block."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(by)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


@check()
def every_parameter_gets_a_gradient(case: Case) -> None:
    """A parameter without one is dead weight, or cut off by mistake. (A key bias has one that is zero: softmax.)

    Of the outputs and the losses together, as training takes it.
    """
    valid = torch.ones(3, PRIME, dtype=torch.bool)
    tokens = Tokens.of(valid, case.globals(valid))
    for causal in case.sides:
        layer = case.build(causal=causal).train()
        out = layer(case.data(3, PRIME), tokens)
        sum(out.losses.values(), out.hidden.square().sum()).backward()
        for name, parameter in layer.named_parameters():
            where = f"{case.name} causal={causal}: parameter {name}"
            assert parameter.grad is not None, f"{where} gets no gradient"
            assert bool(parameter.grad.isfinite().all()), f"{where} gets a gradient that is not finite"
            if parameter.ndim > 1:
                assert bool(parameter.grad.ne(0).any()), f"{where} gets a gradient of zeros"


@check()
def bfloat16_loses_no_more_than_dense(case: Case) -> None:
    """At most twice the relative error of materialised full attention in bfloat16; decisions are replayed."""
    length = 4 * PRIME

    def error(layer: Attention) -> float:
        layer = layer.to(torch.bfloat16)
        x = case.data(3, length, dtype=torch.bfloat16)
        exact = run(copy.deepcopy(layer).to(torch.float64), x.double())
        rounded = run(layer, x, choices=exact.choices)
        assert rounded.hidden.dtype == torch.bfloat16, f"{case.name}: bfloat16 in, {rounded.hidden.dtype} out"
        return float((rounded.hidden.double() - exact.hidden).norm() / exact.hidden.norm())

    for causal in case.sides:
        baseline = error(Case.of(Full).build(causal=causal, kernel="dense"))
        found = error(case.build(causal=causal))
        assert found <= 2 * baseline, (
            f"{case.name} causal={causal}: relative error {found:.1e} in bfloat16, dense attention has {baseline:.1e}"
        )


@check()
def half_precision_gradients_are_finite(case: Case) -> None:
    """bfloat16 and float32, forward and backward, keep dtype and shape."""
    for causal in case.sides:
        for dtype in (torch.float32, torch.bfloat16):
            layer = case.build(causal=causal, dtype=dtype)
            for layout, tokens in case.layouts(PRIME):
                x = case.data(3, PRIME, dtype=dtype).requires_grad_()
                out = layer(x, tokens).hidden
                where = f"{case.name} causal={causal} {dtype} {layout}"
                assert out.dtype == dtype, f"{where}: {out.dtype} out"
                assert out.shape == x.shape, f"{where}: shape {tuple(out.shape)} for input {tuple(x.shape)}"
                for name, grad in gradients(layer, x, out, tokens.valid).items():
                    assert grad.dtype == dtype, f"{where}: gradient of {name} has {grad.dtype}"
                    assert bool(grad.isfinite().all()), f"{where}: gradient of {name} is not finite"


@check()
def default_options_build_at_any_length(case: Case) -> None:
    """With no option given but dim and heads, at lengths 1, 7 and 1009, forward and backward."""
    for causal in case.sides:
        layer = case.build(tiny=False, causal=causal, dim=64, dtype=torch.float32)
        for length in (1, 7, 1009):
            x = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            out = layer(x).hidden
            where = f"{case.name} causal={causal} with default options, length {length}"
            assert out.shape == x.shape, f"{where}: shape {tuple(out.shape)} for input {tuple(x.shape)}"
            grad = gradients(layer, x, out, torch.ones(1, length, dtype=torch.bool))["x"]
            assert bool(out.isfinite().all()), f"{where}: output is not finite"
            assert bool(grad.isfinite().all()), f"{where}: gradient is not finite"
