"""Reversible stack: two residual streams, from whose end every layer's input can be computed back. Gomez et al. 2017.

    (a, b) -> (b, a + f(b))     for every branch f in turn; start (x, x), result (a + b) / 2

As in Kitaev et al. 2020, §3, but the streams end in their mean, so that heads and parameter counts are those of the
plain stack; `end="both"` leaves them side by side, as the released code does. Activations are O(1) in depth: backward
undoes one branch at a time and runs it again. What cannot be recomputed exactly is kept on a tape: the random number
generators' states (dropout draws the same mask) and each layer's `choices` (LSH buckets would flip under rounding).

- Streams are restored up to rounding, which adds up over depth: keep them in float32 (autocast does).
- Gradients reach the input, parameters, auxiliary losses and `source`, but no incoming state: it counts as constant.
  While gradients are on, a mechanism must not write into the state that it was given, since backward reads it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Output, Source, Tokens, add_losses
from attention_zoo.layout.layout import Layout
from attention_zoo.model.block import Block, Branch, Stack, attentions
from attention_zoo.ops.softmax.function import differentiable_once
from attention_zoo.options import checked
from attention_zoo.rules import OneOf, Unsupported


class ReversibleStack(Stack):
    """A stack whose backward recomputes. The branches must be pre-norm: a norm after the addition loses its input.

    `recompute = False` keeps all activations instead: the same function by plain autograd, to compare with.
    """

    recompute = True
    constant_state = True

    @checked
    def __init__(self, blocks: Sequence[Block], *, end: Annotated[bool | str, OneOf(True, "both")] = True):
        super().__init__(blocks)
        self.end = end
        if not all(branch.pre_norm for branch in self.branches):
            raise ValueError("reversible=True needs pre_norm=True: a norm after the addition cannot be undone")
        for each in attentions(self):
            if getattr(each, "token_losses", False):
                raise Unsupported(
                    str(each.name), "reversible", "its loss on hidden states is there with gradients alone",
                    "reversible=false",
                )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: tuple[Any, ...] | None = None,
        source: Source | None = None,
        choices: tuple[Any, ...] | None = None,
    ) -> Output:
        if not torch.compiler.is_compiling():
            # backward runs the layers again: what they read must be the same then
            tokens = None if tokens is None else Layout.of(tokens)
            source = None if source is None else source._replace(tokens=Layout.of(source.tokens))
        call = _Call(
            self.branches,
            tokens,
            None if state is None else [each for block in state for each in block],
            None if source is None else source.tokens,
            None if choices is None else [each for block in choices for each in block],
        )
        hidden = None if source is None else source.hidden
        record = _Record()
        if torch.is_grad_enabled() and self.recompute:
            parameters = [p for p in self.parameters() if p.requires_grad]
            a, b, *losses = _Recomputed.apply(call, record, x, x, hidden, *parameters)
            named = dict(zip(record.losses, losses))
        else:
            a, b = _run(call, record, x, x, hidden)
            named = record.losses
        new = None if state is None else self._nested(record.states)
        hidden = torch.cat([a, b], -1) if self.end == "both" else (a + b) / 2
        return Output(hidden, new, named, self._nested(record.choices))

    def _nested(self, flat: list[Any]) -> tuple[Any, ...]:
        """One entry a branch -> a tuple of tuples, as blocks hold them."""
        entries = iter(flat)
        blocks: Any = self.layers
        return tuple(tuple(next(entries) for _ in block.layers) for block in blocks)


class _Call(NamedTuple):
    """One forward's arguments, an entry a branch where a list."""

    branches: list[Branch]
    tokens: Tokens | None
    states: list[Any] | None
    source_tokens: Tokens | None
    choices: list[Any] | None

    def undropped(self, index: int, x: Tensor, source: Tensor | None, choices: Any) -> Output:
        return self.branches[index].undropped(
            x,
            self.tokens,
            state=None if self.states is None else self.states[index],
            source=None if source is None or self.source_tokens is None else Source(source, self.source_tokens),
            choices=choices,
        )


class _Record:
    """What a forward leaves behind besides its streams."""

    def __init__(self) -> None:
        self.states: list[Any] = []
        self.losses: dict[str, Tensor] = {}
        self.choices: list[Any] = []
        self.random: list[tuple[_Random, _Random]] = []


class _Random(NamedTuple):
    """States of the default generators: the CPU's, and the accelerator's that holds the hidden states."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @staticmethod
    def of(device: torch.device) -> _Random:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return _Random(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _run(call: _Call, record: _Record, a: Tensor, b: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
    for index in range(len(call.branches)):
        before = _Random.of(b.device)
        out = call.undropped(index, b, source, None if call.choices is None else call.choices[index])
        # dropout has a state of its own: a layer whose choices are replayed need not draw what it drew for them
        record.random.append((before, _Random.of(b.device)))
        a, b = b, a + call.branches[index].dropout(out.hidden)
        record.states.append(out.state)
        record.choices.append(out.choices)
        record.losses = add_losses(record.losses, out.losses)
    return a, b


class _Precision(NamedTuple):
    """Autocast as it was in forward; backward threads do not inherit it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device: torch.device) -> _Precision:
        kind = device.type
        return _Precision(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> torch.autocast:
        # no cache: a weight cast without gradient in forward must not be taken for one with gradient
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Leave the default generators as they were found."""
    found = _Random.of(device)
    try:
        yield
    finally:
        found.restore()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, record, a, b, source, *parameters):
        ctx.call, ctx.parameters, ctx.precision = call, parameters, _Precision.now(a.device)
        with ctx.precision.again():
            a, b = _run(call, record, a, b, source)
        ctx.save_for_backward(a, b, source)
        # not the record itself: its losses become outputs, and outputs that own their own graph are never freed
        ctx.random, ctx.choices, ctx.losses = record.random, record.choices, list(record.losses)
        return a, b, *record.losses.values()

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, da, db, *dlosses):
        a, b, source = saved
        weights = dict(zip(ctx.losses, dlosses))
        trained = {id(parameter) for parameter in ctx.parameters}
        gradients: dict[int, Tensor] = {}
        dsource = None
        with _generators_kept(a.device):
            for index in reversed(range(len(ctx.call.branches))):
                branch = ctx.call.branches[index]
                parameters = [p for p in branch.parameters() if id(p) in trained]
                through_source = branch.cross and ctx.needs_input_grad[4]
                before, between = ctx.random[index]
                with torch.enable_grad(), ctx.precision.again():
                    x = a.detach().requires_grad_()
                    s = None if source is None else source.detach().requires_grad_(through_source)
                    before.restore()
                    out = ctx.call.undropped(index, x, s, ctx.choices[index])
                    between.restore()
                    added = branch.dropout(out.hidden)
                outputs = [(added, db.to(added.dtype))]
                outputs += [(value, weights[name]) for name, value in out.losses.items() if value.requires_grad]
                inputs = [x, *([s] if through_source else []), *parameters]
                dx, *rest = torch.autograd.grad(
                    [value for value, _ in outputs], inputs, [weight for _, weight in outputs], allow_unused=True
                )
                if through_source:
                    dsource = _sum(dsource, rest.pop(0))
                for parameter, gradient in zip(parameters, rest):
                    if gradient is not None:
                        gradients[id(parameter)] = _sum(gradients.get(id(parameter)), gradient)
                # after: (a, b) = (b', a' + f(b')), so that a' = b - f(a) and b' = a
                a, b = b - added.detach(), a
                da, db = db, _sum(dx, da)
        return None, None, da, db, dsource, *(gradients.get(id(parameter)) for parameter in ctx.parameters)


def _sum(one: Tensor | None, other: Tensor | None) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return one + other
