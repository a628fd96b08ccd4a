"""What each phase does: the call that a cell measures, and what has to be ready before it.

Layer cells run the whole layer on hidden states, projections included; core cells hand queries, keys and values over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Attention, Tokens, Unsupported

Variant = Literal["layer", "core"]
Phase = Literal["forward", "forward_backward", "train_step", "prefill", "decode"]


@dataclass
class Work:
    """One measured call.

    Fields:
        run: the call; nothing outside of it counts.
        before: what must happen before each call, unmeasured.
        tokens: how many tokens of each row one call handles.
        state: the recurrent state that the last call left, or None.
    """

    run: Callable[[], Any]
    tokens: int
    before: Callable[[], None] = lambda: None
    state: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Shape:
    """What the inputs of a cell look like."""

    batch: int
    length: int
    device: torch.device
    dtype: torch.dtype


def prepare(layer: Attention, shape: Shape, *, variant: str, phase: str) -> Work:
    """The call of one cell, with random inputs.

    Args:
        variant: "layer" (hidden states in) or "core" (q, k, v in; patterns only).
        phase: "forward", "forward_backward", "train_step" (with AdamW), "prefill" (forward that leaves a state) or
            "decode" (one more token after `length`).

    Raises:
        Unsupported: for a phase or variant that the layer has no call for.
    """
    layer.train(phase in ("forward_backward", "train_step"))
    if variant == "core":
        return _core(layer, shape, phase)
    x = torch.randn(shape.batch, shape.length, layer.dim, device=shape.device, dtype=shape.dtype)
    if phase in ("prefill", "decode"):
        return _with_state(layer, x, phase)
    if phase == "forward":
        return Work(_without_gradients(lambda: layer(x)), shape.length)
    return _training(layer, x, phase)


def _training(layer: Attention, x: Tensor, phase: str) -> Work:
    x.requires_grad_()
    grad = torch.randn_like(x)
    parameters = list(layer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if phase == "train_step" else None

    def before() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    def run() -> None:
        out = layer(x)
        auxiliary = list(out.losses.values())
        torch.autograd.backward([out.hidden, *auxiliary], [grad, *(torch.ones_like(loss) for loss in auxiliary)])
        if optimizer is not None:
            optimizer.step()

    return Work(run, x.shape[1], before)


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
        return Work(_without_gradients(prefill), length, lambda: left.update(state=None), lambda: left["state"])
    _without_gradients(prefill)()
    step = torch.randn_like(x[:, :1])
    one = torch.ones(batch, 1, dtype=torch.bool, device=x.device)

    def before() -> None:
        left["tokens"] = Tokens.of(one, start=left["next"])
        left["next"] += 1

    def decode() -> Any:
        # Each step goes on from the last: a state that was written in place must not be used again.
        out = layer(step, left["tokens"], state=left["state"])
        left["state"] = out.state
        return out

    return Work(_without_gradients(decode), 1, before, lambda: left["state"])


def _core(layer: Attention, shape: Shape, phase: str) -> Work:
    if not isinstance(layer, PatternAttention):
        raise Unsupported(layer.name, "variant=core", "it is no pattern on given q, k, v", "variant=layer")
    if phase not in ("forward", "forward_backward"):
        raise Unsupported(layer.name, f"phase={phase} with variant=core", "q, k, v carry no state", "variant=layer")
    heads = (layer.heads, layer.kv_heads, layer.kv_heads)
    q, k, v = (
        torch.randn(shape.batch, count, shape.length, layer.head_width, device=shape.device, dtype=shape.dtype)
        for count in heads
    )
    if phase == "forward":
        return Work(_without_gradients(lambda: layer.attend(q, k, v)), shape.length)
    for operand in (q, k, v):
        operand.requires_grad_()
    grad = torch.randn_like(q)

    def before() -> None:
        q.grad = k.grad = v.grad = None

    return Work(lambda: layer.attend(q, k, v).backward(grad), shape.length, before)


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)
