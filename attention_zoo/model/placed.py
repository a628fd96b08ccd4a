"""Layers over a sequence whose columns lie in several processes (`layout.placement`): which way each goes.

A layer that says what it sends (`travels`) does it itself. Of others, one that carries a differentiable state from call
to call is run by handing that state on, process after process (ops/hand_over/): right for whatever is right in
decoding, but each process waits for the one before. What has neither way is refused, by name, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention_zoo.contract import Attention, Layer, Output, Source, Tokens, Unsupported, able, add_losses
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.placement import Placement, alone
from attention_zoo.ops.hand_over.pipeline import in_turn, neighbours

OPTION = "parallel.sequence"


def called(
    layer: Any, x: Tensor, tokens: Tokens | None, *, state: Any, source: Source | None, choices: Any, parts: int = 1
) -> Output:
    """The layer's call, in the way that it has for the columns that this process owns.

    Args:
        parts: lots that rows are handed on in, at most: where nothing else keeps other processes busy.
    """
    placement = getattr(tokens, "placement", None)
    if placement is None or layer.travels is not None:
        return layer(x, tokens, state=state, source=source, choices=choices)
    assert isinstance(tokens, Layout)
    return handed_over(layer, x, tokens, parts=parts)


def stack_of(model: Any, *, last_only: bool) -> Callable[..., Output]:
    """The model's stack, for the columns that this process owns.

    Raises:
        Unsupported: for `last_only`.
    """
    if last_only:
        raise Unsupported(
            "last_only=True", OPTION, "a row's last token is with one process alone", "last_only=False and its columns"
        )
    return partial(_stacked, model)


def _stacked(model: Any, x: Tensor, tokens: Tokens | None, *, state: Any, source: Source | None) -> Output:
    """What the model's stack makes of its columns; refused where some part of the model has no way for a placement."""
    placement: Placement = tokens.placement  # type: ignore[union-attr]
    if state is not None or source is not None:
        given = "a state" if source is None else "a source"
        raise Unsupported("this model", f"{OPTION} with {given}", "a sequence is one call of a decoder", "none of it")
    placement.own.plan(("checked", id(model)), lambda: check(model, placement))
    return called(model.stack, x, tokens, state=None, source=None, choices=None, parts=2 * placement.size)


def handed_over(layer: Layer, x: Tensor, layout: Layout, *, parts: int = 1) -> Output:
    """The layer's call from the state of the process before, whose state goes to the process behind.

    Raises:
        Unsupported: unless the layer's state says all that later columns need, gradients included.
    """
    placement: Placement = layout.placement
    layout.plan(("may be handed over", id(layer)), lambda: check_handed_over(layer, placement))
    outs = in_turn(
        lambda part, tokens, state, rows: layer(part, tokens, state=state),
        layer.initial_state, x, alone(layout), neighbours(placement, x.device), parts,
    )  # fmt: skip
    # of parameters alone, hence the same in all lots and processes: shares of it
    total = add_losses(*(out.losses for out in outs))
    losses = {name: value / (len(outs) * placement.size) for name, value in total.items()}
    return Output(torch.cat([out.hidden for out in outs]) if len(outs) > 1 else outs[0].hidden, None, losses)


def _name(layer: Layer) -> str:
    return str(getattr(layer, "name", type(layer).__name__))


def refuse_handed_over(layer: Layer) -> None:
    """Raise Unsupported unless the layer may be run by handing its state on."""
    why = why_not(layer)
    if why is not None:
        instead = able(causality="strict", carry="prefix", truncated=False)
        raise Unsupported(_name(layer), OPTION, why, f"{OPTION}=1, or {instead}")


def check_handed_over(layer: Layer, placement: Placement) -> Layer:
    """The layer. As `refuse_handed_over`, and raise unless these columns and tokens go with that."""
    refuse_handed_over(layer)
    name = _name(layer)
    if not np.array_equal(np.concatenate(placement.columns), np.arange(placement.whole.valid.shape[1])):
        raise Unsupported(
            name, f"{OPTION} with columns in several runs", "its state goes from each process to the next",
            "contiguous columns (zig-zag is for models of rings alone)",
        )  # fmt: skip
    if not all(map(len, placement.columns)):
        raise Unsupported(
            name, f"{OPTION} with a process that owns no column", "its state goes through a call of each process",
            "a column for every process, be it padding",
        )  # fmt: skip
    host, first = placement.whole.host, [each for each in mechanisms(layer) if each.abilities.global_tokens != "any"]
    put_in = any(getattr(each, "adds_global_tokens", False) for each in first)
    begins = host.valid & (host.position == 0)  # where a wrapper puts some in
    later = (host.is_global & host.valid) | (begins & put_in)
    if first and bool(later[:, len(placement.columns[0]) :].any()):
        raise Unsupported(
            name, f"{OPTION} with global tokens that come later", "only its first call may bring some",
            "global tokens in the columns of the first process alone, or full inside",
        )  # fmt: skip
    return layer


def mechanisms(layer: nn.Module) -> Iterator[Attention]:
    """The outermost ones of a layer: itself, or those of its blocks."""
    if isinstance(layer, Attention):
        yield layer
    else:
        for child in layer.children():
            yield from mechanisms(child)


def why_not(layer: Layer) -> str | None:
    """Why a layer cannot be run by handing its state on; None: it can."""
    inside = [each for each in layer.modules() if isinstance(each, Attention)]
    can = [each.abilities for each in mechanisms(layer)]
    if not can:
        return "it does not say what it needs of other processes' columns"
    if not all(each.causal for each in inside):
        return "two-sided, it needs what other processes have, and does not say how to fetch it"
    if any(each.causality != "strict" for each in can):
        return "its choices are made of the whole sequence at once (hashes are sorted), so no process can make its own"
    if any(each.carry != "prefix" for each in can):
        return "it keeps no state that could go from process to process"
    if any(each.cuts_gradients for each in inside):
        return "its gradients end with a call, so they would end where processes' columns do"
    if any(getattr(each, "constant_state", False) for each in layer.modules()):
        return "a reversible stack inside gives no gradient to the state that it is handed"
    if any(each.token_losses for each in inside):
        return "its loss is a mean over tokens of one call"
    return None


def check(model: Any, placement: Placement) -> Any:
    """The model. Raise Unsupported unless every part of it has a way to run on these columns of a sequence."""
    refuse(model)
    for layer in beyond_columns(model.stack):
        if layer.travels is None:
            check_handed_over(layer, placement)
    return model


def refuse(model: Any) -> None:
    """Raise Unsupported unless every part of a model has a way to run on some columns of a sequence.

    Args:
        model: a `Transformer`.
    """
    if not hasattr(model, "stack"):
        raise Unsupported(type(model).__name__, OPTION, "it is not known how its columns hang together", f"{OPTION}=1")
    if model.cross:
        raise Unsupported("cross=True", OPTION, "a source's columns are not cut", f"{OPTION}=1")
    if model.head_name in ("classify", "pretraining"):
        raise Unsupported(
            f"head={model.head_name}", OPTION, "it pools all columns of a row", f"head=lm or tokens, or {OPTION}=1"
        )
    if getattr(model.positions, "uncounted", None) is not None:
        raise Unsupported("positions with uncounted tokens", OPTION, "they count the row's tokens", "other positions")
    for layer in beyond_columns(model.stack):
        if layer.travels is None:
            refuse_handed_over(layer)


def beyond_columns(module: nn.Module) -> Iterator[Layer]:
    """The layers that need more than the column itself: the outermost, and what stands in those that call it so."""
    if isinstance(module, Layer) and module.travels != "":
        yield module
        if module.travels is None or isinstance(module, Attention):
            return
    for child in module.children():
        yield from beyond_columns(child)
