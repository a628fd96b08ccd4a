"""What each phase does: the call that a cell measures, and what has to be ready before it.

Layer cells run the whole layer on hidden states, projections included; core cells hand queries, keys and values over
(measure/core.py), and cells of models ids (measure/whole.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attention_zoo.contract import Attention, Tokens, Unsupported
from attention_zoo.measure.core import Core, Shape, core_of
from attention_zoo.model.state import reserve

Variant = Literal["layer", "core", "model"]
Phase = Literal["forward", "forward_backward", "train_step", "prefill", "decode"]

PIECE, AHEAD = 8192, 1024
"""Tokens by which the context of a decoding step is built, and steps for which a growing cache has room."""


@dataclass
class Work:
    """One measured call.

    Fields:
        run: the call; nothing outside of it counts.
        before: what must happen before each call, unmeasured.
        tokens: how many tokens of each row one call handles.
        state: the recurrent state that the last call left, or None.
        held: tensors that are there between calls, and stay: inputs, parameters, an optimizer's moments.
        seen: tokens of each row that come before those of the call (a memory, or a prefix).
    """

    run: Callable[[], Any]
    tokens: int
    before: Callable[[], None] = lambda: None
    state: Callable[[], Any] = lambda: None
    held: Callable[[], Iterable[Tensor]] = tuple
    seen: int = 0

    def held_bytes(self) -> int:
        """Bytes that are taken before the call starts; tensors that share memory count once."""
        return sum(
            {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in self.held()}.values()
        )


def prepare(layer: Attention, shape: Shape, *, variant: str, phase: str) -> Work:
    """The call of one cell, with random inputs.

    Args:
        variant: "layer" (hidden states in) or "core" (queries, keys and values in, see `core.core_of`).
        phase: "forward", "forward_backward", "train_step" (with AdamW), "prefill" (forward that leaves a state) or
            "decode" (one more token after `length`).

    Raises:
        Unsupported: for a phase or variant that the layer has no call for.
    """
    layer.train(phase in ("forward_backward", "train_step"))
    if variant == "core":
        if phase not in ("forward", "forward_backward"):
            raise Unsupported(
                layer.name, f"phase={phase} with variant=core", "a core carries no state", "variant=layer"
            )
        return core_work(core_of(layer, shape), backward=phase == "forward_backward")
    x = torch.randn(shape.batch, shape.length, layer.dim, device=shape.device, dtype=shape.dtype)
    if phase in ("prefill", "decode"):
        return _with_state(layer, x, phase)
    parameters = list(layer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if phase == "train_step" else None

    def outputs(x: Tensor) -> list[Tensor]:
        out = layer(x)
        return [out.hidden, *out.losses.values()]

    return layer_work(outputs, x, parameters, backward=phase != "forward", optimizer=optimizer)


def layer_work(
    outputs: Callable[[Tensor], Sequence[Tensor]],
    x: Tensor,
    parameters: Sequence[Tensor],
    *,
    backward: bool,
    optimizer: torch.optim.Optimizer | None = None,
) -> Work:
    """A layer on hidden states, ours or a peer's: `outputs` gives hidden states first, then losses."""
    if not backward:
        return Work(without_gradients(lambda: outputs(x)), x.shape[1], held=lambda: [x, *parameters])
    x.requires_grad_()
    grad = torch.randn_like(x)

    def before() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    def run() -> None:
        hidden, *losses = outputs(x)
        torch.autograd.backward([hidden, *losses], [grad, *map(torch.ones_like, losses)])
        if optimizer is not None:
            optimizer.step()

    return Work(run, x.shape[1], before, held=lambda: [x, grad, *parameters, *moments(optimizer)])


def moments(optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """What an optimizer keeps of each parameter; nothing without one."""
    for kept in optimizer.state.values() if optimizer is not None else ():
        yield from (value for value in kept.values() if isinstance(value, Tensor))


def _with_state(layer: Attention, x: Tensor, phase: str) -> Work:
    if not layer.causal or layer.abilities.carry == "none":
        kind = "causal=False" if not layer.causal else "it"
        raise Unsupported(layer.name, f"phase={phase}", f"{kind} carries no state", "phase=forward")
    batch, length = x.shape[:2]
    left: dict[str, Any] = {"state": None, "next": length}

    def prefill() -> Any:
        out = layer(x, Tokens.all_valid(batch, length, x.device), state=layer.initial_state(batch))
        left["state"] = out.state
        return out

    if phase == "prefill":
        return Work(
            without_gradients(prefill), length, lambda: left.update(state=None), lambda: left["state"],
            held=lambda: [x, *layer.parameters()],
        )  # fmt: skip
    left["state"] = _context(layer, x)
    step = torch.randn_like(x[:, :1])
    one = torch.ones(batch, 1, dtype=torch.bool, device=x.device)

    def before() -> None:
        left["tokens"] = Tokens.of(one, start=left["next"])
        left["next"] += 1

    def decode() -> Any:
        # each step goes on from the last: an older state would have to be copied
        out = layer(step, left["tokens"], state=left["state"])
        left["state"] = out.state
        return out

    return Work(without_gradients(decode), 1, before, lambda: left["state"], held=lambda: [step, *layer.parameters()])


@torch.no_grad()
def _context(layer: Attention, x: Tensor) -> Any:
    """The state of a layer that has read x: what a step goes on from, without attending to all of it before."""
    state = reserve(layer.initial_state(len(x)), x.shape[1] + AHEAD)
    for start in range(0, x.shape[1], PIECE):
        piece = x[:, start : start + PIECE]
        valid = torch.ones(piece.shape[:2], dtype=torch.bool, device=x.device)
        state = layer.remember(piece, Tokens.of(valid, start=start), state=state)
    return state


def core_work(core: Core, *, backward: bool) -> Work:
    """A core on its operands, each a leaf that gets its gradient; also a peer's (measure/peers/)."""
    leaves = (*core.operands, *core.parameters)
    given: list[Tensor] = []

    def before() -> None:
        for leaf in leaves:
            leaf.grad = None
        # what writes into its inputs gets copies, whose making is not on its bill
        given[:] = [leaf.clone() if core.writes_inputs else leaf for leaf in core.operands]

    if not backward:
        forward = without_gradients(lambda: core.call(*given))
        return Work(forward, core.tokens, before, held=lambda: leaves, seen=core.seen)
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(core.out_shape, device=leaves[0].device, dtype=leaves[0].dtype)

    def run() -> None:
        core.call(*given).backward(grad)

    return Work(run, core.tokens, before, held=lambda: [*leaves, grad], seen=core.seen)


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)
