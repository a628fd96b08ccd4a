"""How far attention to compressed states is from attention to what they are made of. Rae et al. 2019, §3.1.2.

    mean ‖attn(h_s, evicted) - attn(h_s, f(evicted))‖²        of segments whose end evicts; attn has no positions

f alone learns from it: queries, keys, values and the weights of attention are detached. Compressed states are among the
table that the layer has projected, so their keys and values are taken from there; only their gradient is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_zoo.attention.compressive_functions import with_frozen
from attention_zoo.attention.compressive_plans import Picked
from attention_zoo.ops.relative.projections import is_plain
from attention_zoo.ops.softmax.function import differentiable_once


def squares(
    q: Float[Tensor, "B L H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    fresh: Float[Tensor, "B new E"],
    layers: tuple[nn.Module, nn.Module],
    picked: Sequence[Picked],
    *,
    held: int,
    scale: float,
) -> Float[Tensor, ""]:
    """The sum over all queries, heads and widths, in float32 at least.

    Args:
        k, v: of the table: `held` slots that are older, the new ones, then the tokens.
        fresh: the new compressed states; alone they receive gradients.
        layers: projections of keys and of values.
    """
    new, exact = fresh.shape[1], torch.float64 if fresh.dtype == torch.float64 else torch.float32
    plain = all(map(is_plain, layers))
    made = () if plain else tuple(with_frozen(layer, fresh).unflatten(-1, k.shape[2:]) for layer in layers)
    total: Any = None
    for each in picked:
        with torch.no_grad():
            asked = q[each.row, each.queries].transpose(1, 2)
            columns = each.tokens + (held + new)
            wanted = _attention(asked, k[each.row, columns], v[each.row, columns], scale)
        if plain:
            found_k, found_v = _Again.apply(
                fresh, (k, v), [layer.weight for layer in layers], each.row, each.slots, held
            )
        else:
            found_k, found_v = (x[each.row, each.slots] for x in made)
        found = _attention(asked, found_k, found_v, scale)
        if each.hidden is not None:
            found, wanted = (x.masked_fill(each.hidden, 0) for x in (found, wanted))
        gap = nn.functional.mse_loss(found.to(exact), wanted.to(exact), reduction="sum")
        total = gap if total is None else total + gap
    return total


def _attention(q: Float[Tensor, "n H S D"], k: Tensor, v: Tensor, scale: float) -> Float[Tensor, "n H S D"]:
    """Without positions, of keys and values [n, m, H, D]."""
    k, v = (x.transpose(1, 2) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


class _Again(torch.autograd.Function):
    """Keys and values of some new slots, [n, g, H, D], as the table has them; gradients go to what they are made of.

    Table and weights come in a tuple and a list, where autograd does not look: they learn nothing here.
    """

    @staticmethod
    def forward(ctx: Any, fresh: Tensor, table: Any, weights: Any, row: Tensor, slots: Tensor, held: int) -> Any:
        ctx.save_for_backward(fresh, *weights, row, slots)
        columns = slots + held if held else slots
        return tuple(x[row, columns] for x in table)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        fresh, to_k, to_v, row, slots = saved
        made = torch.addmm(_flat(dk) @ to_k.to(dk.dtype), _flat(dv), to_v.to(dv.dtype))
        into = torch.zeros_like(fresh)
        into[row, slots] = made.view(*slots.shape, -1).to(into.dtype)  # each slot leaves memory once
        return into, *[None] * 5


def _flat(x: Float[Tensor, "n g H D"]) -> Float[Tensor, "ng HD"]:
    return x.flatten(2).flatten(0, 1)
