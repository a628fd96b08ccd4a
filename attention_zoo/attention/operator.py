"""A mechanism as one operator: what `torch.compile` sees of it, so that its graph never breaks inside one.

Which tiles, chunks or runs a call has is decided on the host, from its masks and positions: nothing that a compiler
could trace. So under `torch.compile` a mechanism is one opaque operator, from hidden states to hidden states, that runs
as it does in eager mode, planning included. One graph holds the whole model, `fullgraph=True` and dynamic lengths
included. The price: its projections are not fused with their neighbours (they are matrix products, which a compiler
hands to the same libraries), CUDA graphs leave it out, and a call costs the host more than in eager mode: measured on
one CPU core for one layer at 8 tokens, 2.1 ms instead of 1.1 forward and backward, 0.9 instead of 0.5 forward, guards
included. Calls with a state, as decoding makes them, and those on a shard of a sequence run eagerly instead: there the
graph does break.

A parameter that a call does not use has a gradient of zeros, where eager mode leaves None.

Backward needs what the kernels saved. The operator keeps that in a table of *tapes*, and hands out the tape's number
as a tensor, which autograd keeps as long as backward may come; when that tensor goes, the tape goes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attention_zoo.attention.calls import check_call, is_for_a_file, no_file
from attention_zoo.contract import Attention, Output, Source, Tokens, layer_of
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.softmax.function import zeros_for

TAPES: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
"""Output, losses and inputs of the operator's calls whose backward has not come yet; empty after each training step."""
_numbers = itertools.count()
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)


def one_operator(forward: Callable[..., Output]) -> Callable[..., Output]:
    """Make the forward of a mechanism one operator where `torch.compile` traces it; elsewhere leave it alone."""
    eager = torch._disable_dynamo(forward)  # as torch.compiler.disable, without loading the compiler

    @wraps(forward)
    def guarded(
        self: Attention,
        x: Tensor,
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        source: Source | None = None,
        choices: Tensor | None = None,
    ) -> Output:
        if not torch.compiler.is_compiling():
            if not isinstance(tokens, Layout):  # else a model makes the call, which checked it
                check_call(self, x, source)
            if isinstance(x, Tensor) and x.ndim == 3 and not len(x):
                return _no_rows(self, x, tokens, state, source)
            return forward(self, x, tokens, state=state, source=source, choices=choices)
        refuse_export(self.name)
        if state is not None or getattr(tokens, "placement", None) is not None:  # the operator takes tensors alone
            return eager(self, x, tokens, state=state, source=source, choices=choices)
        kind = x.device.type
        parameters = list(self.parameters())
        hidden, found, made, _ = torch.ops.attention_zoo.attend(
            x,
            [] if tokens is None else list(tokens),
            [] if source is None else [source.hidden, *source.tokens],
            [] if choices is None else [choices],
            parameters,
            [parameter.requires_grad for parameter in parameters],
            self.number,
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            torch.is_grad_enabled(),
        )
        losses: Callable[[], dict[str, Tensor]] = getattr(self, "losses", dict)
        made_of_tokens = dict(zip(self.token_losses, found.unbind()))
        made = made if self.choices_shape(*x.shape[:2]) else None
        return Output(hidden, None, {**losses(), **made_of_tokens}, made)

    return guarded


def refuse_export(name: str) -> None:
    """Raise where `torch.export` traces.

    A program is saved and runs elsewhere. What it could hold of a mechanism is the name of a layer of this process.
    """
    if torch.compiler.is_exporting():
        _refuse_export(name)


def _refuse_export(name: str) -> None:
    raise no_file(name, "torch.export")


# as torch.compiler.assume_constant_result, without loading the compiler: it calls this instead of tracing into it
_refuse_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_rows(layer: Attention, x: Tensor, tokens: Tokens | None, state: Any, source: Source | None) -> Output:
    """Of a batch without rows, as torch's own layers answer it: no rows, and gradients of zeros."""
    x, _ = layer.enter(x, tokens, state, source)
    inputs = [x, *layer.parameters(), *([] if source is None else [source.hidden])]
    shape = layer.choices_shape(*x.shape[:2])
    made = None if shape is None else torch.zeros(shape, dtype=torch.int32, device=x.device)
    losses: Callable[[], dict[str, Tensor]] = getattr(layer, "losses", dict)
    return Output(zeros_for(x, inputs), state, losses(), made)


@contextmanager
def _recording(record: bool) -> Iterator[None]:
    """Autograd, on or off. Inside an operator it is switched off below torch.enable_grad, in the dispatcher."""
    with ExitStack() as stack:
        for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), not record))
        stack.enter_context(torch.set_grad_enabled(record))
        yield


# schemas are written out: they cannot be read from annotations that a run-time checker has wrapped
_SCHEMA = (
    "(Tensor x, Tensor[] tokens, Tensor[] source, Tensor[] choices, Tensor[] parameters, bool[] learns, SymInt layer, "
    "ScalarType? autocast, bool record) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("attention_zoo::attend", mutates_args=(), schema=_SCHEMA, tags=_TAGS)
def _attend(
    x: Tensor,
    tokens: list[Tensor],
    source: list[Tensor],
    choices: list[Tensor],
    parameters: list[Tensor],
    learns: list[bool],
    layer: int,
    autocast: torch.dtype | None,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, losses of tokens, choices and the number of the tape.

    Losses are 0 where the call makes none, choices empty.

    Args:
        tokens, source, choices: empty where the call has none.
        learns: which parameters want a gradient.
        layer: its number; see `layer_of`.
        autocast: dtype of the autocast that the call stands in.
        record: whether backward may come.
    """
    module = layer_of(layer)
    x, parameters = x.detach(), [parameter.detach() for parameter in parameters]
    source = [source[0].detach(), *source[1:]] if source else []
    if record:
        for leaf in (x, *source[:1]):
            leaf.requires_grad_()
        for parameter, learn in zip(parameters, learns):
            parameter.requires_grad_(learn)
    given = dict(zip((name for name, _ in module.named_parameters()), parameters))
    with _recording(record), torch.autocast(x.device.type, autocast, autocast is not None):
        out = torch.func.functional_call(
            module,
            given,
            (x, Tokens(*tokens) if tokens else None),
            {
                "source": Source(source[0], Tokens(*source[1:])) if source else None,
                "choices": choices[0] if choices else None,
            },
        )
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        losses = torch.stack([zero, *(out.losses.get(name, zero).float() for name in module.token_losses)])[1:]
    tape = torch.tensor([next(_numbers)])
    if record:
        number = int(tape)
        TAPES[number] = (out.hidden, losses, [x, *source[:1], *parameters])
        weakref.finalize(tape.untyped_storage(), TAPES.pop, number, None)
    made = x.new_empty(0, dtype=torch.int32) if out.choices is None else out.choices.contiguous()
    return out.hidden.detach().contiguous(), losses.detach().clone(), made, tape


@_attend.register_fake
def _(x, tokens, source, choices, parameters, learns, layer, autocast, record):
    module = layer_of(int(layer))  # where blocks share their code, torch makes a symbol of what differs
    if is_for_a_file():
        raise no_file(module.name, "ahead-of-time compilation")
    shape = module.choices_shape(*x.shape[:2]) or (0,)
    return (
        torch.empty_like(x, dtype=autocast or x.dtype, memory_format=torch.contiguous_format),
        x.new_empty(len(module.token_losses), dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
        torch.empty(1, dtype=torch.int64),
    )


@torch.library.custom_op(
    "attention_zoo::attend_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor losses, Tensor tape, Tensor[] inputs) -> Tensor[]",
)
def _attend_backward(grad: Tensor, losses: Tensor, tape: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of x, the source's hidden states if there are any, and the parameters; zeros where there is none."""
    found = TAPES.pop(int(tape), None)
    if found is None:
        raise RuntimeError(
            "compiled attention keeps what backward needs for one backward only; run it without torch.compile to go "
            "back twice, or to call one layer twice on the same tensor"
        )
    *made, leaves = found
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with _recording(True):
        roots = [(each, back) for each, back in zip(made, (grad, losses)) if each.requires_grad]
        outputs, backs = zip(*roots)
        gradients = iter(torch.autograd.grad(outputs, wanted, backs, allow_unused=True))
    found_all = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
    return [
        torch.zeros_like(leaf, memory_format=torch.contiguous_format) if gradient is None else _own(gradient)
        for leaf, gradient in zip(leaves, found_all)
    ]


def _own(gradient: Tensor) -> Tensor:
    """In memory of its own: gradients of projections that ran as one are views of the same."""
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient.contiguous() if whole else gradient.clone(memory_format=torch.contiguous_format)


@_attend_backward.register_fake
def _(grad, losses, tape, inputs):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, tokens, source, choices, parameters, learns, *_ = inputs
    ctx.save_for_backward(output[3], x, *source[:1], *parameters)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.lengths, ctx.learns = (len(tokens), len(source), len(choices)), learns


def _backward(ctx: Any, grad: Tensor, losses: Tensor, *_: Tensor) -> tuple[Any, ...]:
    tape, *inputs = ctx.saved_tensors
    dx, *rest = torch.ops.attention_zoo.attend_backward(grad.contiguous(), losses.contiguous(), tape, inputs)
    tokens, source, choices = ([None] * length for length in ctx.lengths)
    if source:
        source[0] = rest.pop(0)
    dparameters = [gradient if learn else None for gradient, learn in zip(rest, ctx.learns)]
    return dx, tokens, source, choices, dparameters, None, None, None, None


_attend.register_autograd(_backward, setup_context=_setup)
