"""Triton kernels for relative attention: the shift of the distance scores happens inside a tile, on chip.

softmax(scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}]) V, as in ops/relative/chunks.py, for keys that stand in columns as
in positions. The distances in a tile of n queries and n keys are 2n - 1 neighbours, so a tile multiplies its queries by
2n rows of the table and reads the product along its diagonals (`tl.gather`): one product more than plain attention, of
double width, and no score ever leaves the chip. Backward recomputes in three kernels without atomics: queries walk keys
(dq, du, dw), keys walk queries (dk, dv), distances walk queries (dr). O(L·reach) time, O(L·D) memory.

Distances count from the largest to 0 in the table, as in ops/relative/chunks.py. Float32 sums; products in the tensors'
own type. Letters: B batch, H heads, L queries, S keys, D head width, T distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.ops.relative import triton_kernels as kernels
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.triton import card
from attention_zoo.ops.triton.card import card_of, stages_for, warps_for

TILE = 64
"""Queries and keys of a tile, at most; 16 in the interpreter's tests."""
TILES = {"relative_forward": 64, "relative_backward_q": 32, "relative_backward_kv": 32, "relative_backward_r": 32}
"""Of each kernel: the forward keeps 64 rows, which Hopper multiplies at once; the backward has more sums than registers
for them."""
WIDEST_HEAD = 128
OFFSETS = 2**31
"""What 32 bits can say of an offset."""
card.SOURCES["relative"] = kernels


def refuse(head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why operands of this width and type cannot run there, or None."""
    if head_width > WIDEST_HEAD:
        return f"heads of width {head_width} do not fit on chip, at most {WIDEST_HEAD} do"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its products are not exact in {dtype}".replace("torch.", "")
    where, width = card_of(device), _power(head_width)
    reasons = (card.refuse([name], tile, width, dtype.itemsize, where) for name, tile in TILES.items())
    return next((reason for reason in reasons if reason), None)


class Starts:
    """Where the keys of each query begin, and what the kernels' tiles make of it, each found once.

    Args:
        first, own: see ops/relative/chunks.py.
        columns: S, of the keys; query i stands in column S - L + i.
    """

    def __init__(self, first: Int[Tensor, "#B L"], own: Int[Tensor, "#B L"], columns: int):
        self.first, self.own, self.columns = first.int().contiguous(), own.int().contiguous(), columns
        self._found: dict[tuple[str, int], Tensor] = {}

    def oldest(self, tile: int) -> Int[Tensor, "#B tiles"]:
        """The oldest key that any query of a tile sees."""
        return self._once("oldest", tile, self._oldest)

    def last_seer(self, tile: int) -> Int[Tensor, "#B tiles"]:
        """One past the last query that sees any key of a tile of keys. Queries between do not all see it."""
        return self._once("last seer", tile, self._last_seer)

    def _once(self, what: str, tile: int, find: Callable[[int], Tensor]) -> Tensor:
        if (what, tile) not in self._found:
            self._found[what, tile] = find(tile).int().contiguous()
        return self._found[what, tile]

    def _oldest(self, tile: int) -> Tensor:
        padded = torch.nn.functional.pad(self.first, (0, -self.first.shape[1] % tile), value=self.columns)
        return padded.unflatten(1, (-1, tile)).amin(-1)

    def _last_seer(self, tile: int) -> Tensor:
        first, S = self.first, self.columns
        # what the oldest key seen from here on is; falls to the left, so that it can be searched
        oldest = first.flip(1).cummin(1).values
        ends = torch.arange(tile, S + tile, tile, device=first.device, dtype=first.dtype).clamp(max=S)
        seers = torch.searchsorted(-oldest.contiguous(), -ends.expand(len(first), -1).contiguous(), right=True)
        return first.shape[1] - seers


class Read(NamedTuple):
    """What the kernels read.

    Fields:
        table: keys of distances, of `falling`.
        u, w: see `RelativeOperands`.
    """

    q: Float[Tensor, "B H L D"]
    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    table: Float[Tensor, "H T D"]
    u: Float[Tensor, "H D"]
    w: Float[Tensor, "H D"]

    def side_by_side(self) -> Read:
        """The same with the numbers of each row side by side, as kernels take for granted."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in self[:3])
        return Read(q, k, v, self.table, self.u.contiguous(), self.w.contiguous())


def relative_attention(given: RelativeOperands, starts: Starts, *, scale: float) -> Float[Tensor, "B H L D"]:
    """See ops/relative/chunks.py; query i stands in column S - L + i."""
    out: Tensor = _Relative.apply(*given, starts, scale)
    return out


class _Relative(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, k_own, v_own, r, u, w, starts: Starts, scale: float) -> Tensor:
        out, lse = attend(Read(q, k, v, falling(r, q.dtype), u, w), starts, scale)
        ctx.save_for_backward(q, k, v, r, u, w, out, lse)
        ctx.starts, ctx.scale = starts, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, r, u, w, out, lse = saved
        read = Read(q, k, v, falling(r, q.dtype), u, w)
        dq, dkeys, dr, shares = gradients(read, out, lse, grad, starts=ctx.starts, scale=ctx.scale)
        du, dw = shares.to(u.dtype).unbind()
        return dq, *dkeys.transpose(2, 3).unbind(), dr.to(r.dtype), du, dw, None, None


def attend(read: Read, starts: Starts, scale: float) -> tuple[Float[Tensor, "B H L D"], Float[Tensor, "B H L"]]:
    """The output, [B, L, H, D] in memory, and the log-sum-exp, without a graph."""
    q, k, v, table, u, w = read.side_by_side()
    B, H, L, D = q.shape
    out = q.new_empty(B, L, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, L, dtype=torch.float32)
    tile, meta = _meta("relative_forward", q, k, v, table, out)
    first, low = starts.first, starts.oldest(tile)
    kernels.forward[(triton.cdiv(L, tile), B * H)](
        q, k, v, table, u, w, first, low, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table.stride()[:2], *out.stride()[:3],
        *_batch(first, low), H, L, k.shape[2], table.shape[1], scale, **meta,
    )  # fmt: skip
    return out, lse


def gradients(
    read: Read,
    out: Float[Tensor, "B H L D"],
    lse: Float[Tensor, "B H L"],
    grad: Float[Tensor, "B H L D"],
    *,
    starts: Starts,
    scale: float,
) -> tuple[
    Float[Tensor, "B H L D"], Float[Tensor, "4 B S H D"], Float[Tensor, "T H D"], Float[Tensor, "2 H D"]
]:  # fmt: skip
    """Of q, [B, L, H, D] in memory; of k, v, k_own, v_own; of r, whose distances rise; of u and w in float32."""
    q, k, v, table, u, w = read.side_by_side()
    (B, H, L, D), S, T = q.shape, k.shape[2], table.shape[1]
    grad = grad.to(q.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    first, own = starts.first, starts.own
    sizes = (H, L, S, T)
    given = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table.stride()[:2], *grad.stride()[:3])
    operands = q, k, v, table, u, w, first

    dq = q.new_empty(B, L, H, D).transpose(1, 2)
    tile, meta = _meta("relative_backward_q", q, k, v, table, grad, dq)
    tiles, low = triton.cdiv(L, tile), starts.oldest(tile)
    du, dw = shares = torch.empty(2, B, H, tiles, D, device=q.device)
    kernels.backward_q[(tiles, B * H)](
        *operands, low, grad, delta, lse, dq, du, dw, *given, *dq.stride()[:3], *_batch(first, low), *sizes, scale,
        **meta,
    )  # fmt: skip

    dkeys = k.new_empty(4, B, S, H, D)
    each = dkeys.transpose(2, 3).unbind()
    tile, meta = _meta("relative_backward_kv", q, k, v, table, grad, each[0])
    last = starts.last_seer(tile)
    kernels.backward_kv[(triton.cdiv(S, tile), B * H)](
        *operands, own, last, grad, delta, lse, *each, *given, *each[0].stride()[:3],
        *_batch(first, own, last), *sizes, scale, **meta,
    )  # fmt: skip

    tile, meta = _meta("relative_backward_r", q, k, v, table, grad)
    tiles = triton.cdiv(L, tile)
    # enough programs to fill a device, also where there are few distances
    pieces = max(1, min(tiles, 1024 // max(1, triton.cdiv(T, tile) * B * H)))
    rows = triton.cdiv(tiles, pieces) * tile
    dr = torch.empty(B, H, pieces, T, D, device=q.device)
    kernels.backward_r[(triton.cdiv(T, tile), pieces, B * H)](
        *operands, grad, delta, lse, dr, *given, *_batch(first), *sizes, rows, scale, **meta
    )
    return dq, dkeys, dr.sum((0, 2)).flip(1).transpose(0, 1), shares.sum((1, 3))


def falling(r: Float[Tensor, "T H D"], dtype: torch.dtype) -> Float[Tensor, "H T D"]:
    """The table of each head, from the largest distance down to 0."""
    return r.to(dtype).transpose(0, 1).flip(1).contiguous()


def _batch(*tables: Tensor) -> tuple[int, ...]:
    """Steps from one sequence to the next: none where one table serves all."""
    return tuple(0 if len(table) == 1 else table.stride(0) for table in tables)


def _power(width: int) -> int:
    power: int = triton.next_power_of_2(width)
    return max(16, power)


def _meta(name: str, *read: Tensor) -> tuple[int, dict[str, Any]]:
    """The tile, and constants of a launch that reads and writes rows of these tensors."""
    D, tile = read[0].shape[-1], min(TILE, TILES[name])
    far = any(x.shape[-2] * x.stride(-2) >= OFFSETS for x in read)
    stages = stages_for(name, tile, _power(D), read[0].itemsize, card_of(read[0].device))
    return tile, {
        "D": D, "BD": _power(D), "N": tile, "FAR": far, "num_warps": warps_for(2 * tile * max(tile, _power(D))),
        "num_stages": stages or 1,
    }  # fmt: skip
