"""Triton kernels: blocks of queries, each against a list of key blocks of its own; forward and backward.

The path of BigBird (blocks of neighbouring columns) and of LSH attention (chunks of sorted tokens) on CUDA. A program
takes one query block and one head, walks its list and keeps a running softmax (Dao et al. 2022, FlashAttention), so
that nothing but output and log-sum-exp is written. Backward recomputes: dq walks the same lists; dk and dv walk the
lists turned round, cut into `PIECE` entries a program, so that a block that everybody sees (a global one) is no
bottleneck, and summed without atomics, in a fixed order. O(L·list·block) time, O(L·D) memory. The device code is in
triton_kernels.py; what it needs of a card, in ops/triton/compiled.csv.

Tokens are counted in *slots*: block n holds the slots n·C ... n·C + C - 1, and a slot holds a token or is empty.
Whether a pair is seen is decided by two integers a slot: equal labels (document, bucket; negative: empty), and time.

Sums and softmax are float32; products take the tensors' own type, exact ("ieee") for float32.

Letters: B batch, H heads, K key heads, N query blocks, M key blocks, C slots in a block, W entries of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.ops.softmax import triton_kernels as kernels
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast
from attention_zoo.ops.triton import card
from attention_zoo.ops.triton.card import MANY_ELEMENTS, card_of, stages_for, warps_for

PIECE = 32
"""Entries of a turned list in one program of the backward."""
SMALLEST_COMPILED, WIDEST_BLOCK, WIDEST_HEAD = 64, 128, 256
"""Blocks and channels of ops/triton/compiled.csv: smaller ones are judged by the smallest, larger ones refused."""
OFFSETS = 2**31
"""What 32 bits can say of an offset."""
card.SOURCES["block"] = kernels


@dataclass(frozen=True)
class Lists:
    """Who sees whom.

    Fields:
        links: key blocks of each query block, in front; what follows the first `count` is not read.
        count: entries of each list.
        q_time, q_label, k_time, k_label: of the slots; a pair is seen only where labels are equal. Empty slots have a
            negative label, another one in queries than in keys.
        q_rows, k_rows: row of q, and of k and v, that each slot holds; None: slot s holds row s - first_slot of q and
            row s of k and v.
        block: C.
        causal: whether times of keys must not be later than the query's.
        strict: whether they must also differ from it.
        weight: added to the scores of a link; None: nothing.
        first_slot: see q_rows.
        whole: how many of a list's first entries are seen whole, so that they need no mask; None: none.
    """

    links: Int[Tensor, "B H N W"]
    count: Int[Tensor, "B H N"]
    q_time: Int[Tensor, "B NC"]
    q_label: Int[Tensor, "B NC"]
    k_time: Int[Tensor, "B MC"]
    k_label: Int[Tensor, "B MC"]
    block: int
    causal: bool
    strict: bool
    q_rows: Int[Tensor, "B NC"] | None = None
    k_rows: Int[Tensor, "B MC"] | None = None
    weight: Float[Tensor, "B H N W"] | None = None
    first_slot: int = 0

    whole: Int[Tensor, "B H N"] | None = None

    @cached_property
    def turned(self) -> Turned:
        """The same by block of keys, found once."""
        return turn(self, self.k_label.shape[1] // self.block)

    @staticmethod
    def packed(
        links: Int[Tensor, "B H N W"], weight: Tensor | None = None, whole: Bool[Tensor, "B H N W"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """links with the entries that are at least 0 in front, and of these the whole ones.

        Returns:
            The links, their number, the weights in the same order, and the number of whole ones.
        """
        rank = (links < 0).byte() * 2
        rank = rank if whole is None else rank + (~whole).byte()
        order = rank.argsort(dim=-1, stable=True)
        count = (links >= 0).sum(-1, dtype=torch.int32)
        weight = None if weight is None else weight.gather(-1, order).float()
        first = None if whole is None else (whole & (links >= 0)).sum(-1, dtype=torch.int32)
        return links.gather(-1, order).int(), count, weight, first


def refuse(block: int, head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why operands of this shape and type cannot run there, or None."""
    if block > WIDEST_BLOCK:
        return f"blocks of {block} do not fit on chip, at most {WIDEST_BLOCK} do"
    if head_width > WIDEST_HEAD:
        return f"heads of width {head_width} do not fit on chip, at most {WIDEST_HEAD} do"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its products are not exact in {dtype}".replace("torch.", "")
    names = ("block_forward", "block_backward_q", *passes(block, head_width))
    return card.refuse(names, *_powers(block, head_width), dtype.itemsize, card_of(device))


# --- launching them --------------------------------------------------------------------------------------------------


def forward(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    lists: Lists,
    *,
    scale: float,
    out: Float[Tensor, "B H n D"],
) -> Float[Tensor, "B H n"]:
    """Write the attention of every query (every slot, where rows are gathered) to `out`.

    Queries in no slot are left as they are in `out`.

    Returns:
        The log-sum-exp, -inf where nothing is seen.
    """
    q, k, v = map(_rows_last, (q, k, v))
    lse = torch.full(out.shape[:3], -torch.inf, device=q.device)
    grid = (lists.links.shape[2], q.shape[0] * q.shape[1])
    kernels.forward[grid](
        q, k, v, out, lse, *_listed(lists), *_tables(lists), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], *lse.stride()[:2], *_sizes(q, k, lists), scale,
        **_meta("block_forward", lists, q, k, v, out),
    )  # fmt: skip
    return lse


def backward(
    grad: Float[Tensor, "B H L D"],
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    delta: Float[Tensor, "B H L"],
    lse: Float[Tensor, "B H L"],
    lists: Lists,
    *,
    scale: float,
    dq: Float[Tensor, "B H n D"],
    dk: Float[Tensor, "B K s D"],
    dv: Float[Tensor, "B K s D"],
) -> None:
    """Write the gradients of every query, key and value (of every slot, where rows are gathered) to dq, dk and dv.

    All sums are taken in a fixed order: the same call gives the same bits.

    Args:
        grad, delta, lse: of the rows of q: of the output, its product with the output summed over D, and the (merged)
            log-sum-exp.
    """
    q, k, v, grad = map(_rows_last, (q, k, v, grad))
    lse, delta = lse.contiguous(), delta.contiguous()
    (B, H, _, D), K, C = q.shape, k.shape[1], lists.block
    N, M = lists.links.shape[2], lists.k_label.shape[1] // C
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    kernels.backward_q[(N, B * H)](
        q, k, v, grad, delta, lse, dq, *_listed(lists), *_tables(lists), *strides, *dq.stride()[:3],
        *lse.stride()[:2], *_sizes(q, k, lists), scale, **_meta("block_backward_q", lists, q, k, v, grad, dq),
    )  # fmt: skip
    turned = lists.turned
    pieces_k, pieces_v = torch.empty(2, len(turned.block), C * D, device=q.device)
    *slots, _, W, _, groups, first = _sizes(q, k, lists)
    _, _, _, weight = _listed(lists)
    for name in passes(C, D):
        kernels.backward_kv[(len(turned.block),)](
            q, k, v, grad, delta, lse, pieces_k, pieces_v, *turned[:5], weight, *_tables(lists), *strides,
            *lse.stride()[:2], *slots, N, W, H, M, groups, first, scale, FOR_K=name != "block_backward_v",
            FOR_V=name != "block_backward_k", **_meta(name, lists, q, k, v, grad),
        )  # fmt: skip
    BC, BD = _powers(C, D)
    for pieces, into in ((pieces_k, dk), (pieces_v, dv)):
        kernels.sum_pieces[(M, B * K)](
            pieces, turned.first, into, *into.stride()[:3], into.shape[2], H, K, M, C=C, D=D, BC=BC, BD=BD,
            num_warps=4, num_stages=1,
        )  # fmt: skip


def passes(block: int, head_width: int) -> tuple[str, ...]:
    """Backward for keys and values at once, or, where both sums would not fit into registers, one after the other."""
    BC, BD = _powers(block, head_width)
    if max(BC, SMALLEST_COMPILED) * BD >= MANY_ELEMENTS:  # so that smaller blocks are judged by what was compiled
        return "block_backward_k", "block_backward_v"
    return ("block_backward_kv",)


def _rows_last(x: Tensor) -> Tensor:
    """The kernels step by one from channel to channel."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _listed(lists: Lists) -> tuple[Tensor, ...]:
    """Pointers in the order of the kernels; what is missing is never read."""
    links = lists.links.contiguous()
    none = links if lists.whole is None else lists.whole.contiguous()
    weight = links if lists.weight is None else lists.weight.contiguous()
    return links, lists.count.contiguous(), none, weight


def _tables(lists: Lists) -> tuple[Tensor, ...]:
    none = lists.links
    q_rows, k_rows = (none if rows is None else rows.contiguous() for rows in (lists.q_rows, lists.k_rows))
    slots = (x.contiguous() for x in (lists.q_time, lists.q_label, lists.k_time, lists.k_label))
    q_time, q_label, k_time, k_label = slots
    return q_rows, q_time, q_label, k_rows, k_time, k_label


def _sizes(q: Tensor, k: Tensor, lists: Lists) -> tuple[int, ...]:
    N, W = lists.links.shape[2:]
    slots = (lists.q_label.shape[1], lists.k_label.shape[1])
    return (*slots, N, W, q.shape[1], q.shape[1] // k.shape[1], lists.first_slot)


def _powers(C: int, D: int) -> tuple[int, int]:
    BC, BD = (max(16, triton.next_power_of_2(n)) for n in (C, D))
    return BC, BD


def _meta(name: str, lists: Lists, *read: Tensor) -> dict[str, Any]:
    """Constants of a launch that reads and writes rows of these tensors."""
    C, D = lists.block, read[0].shape[-1]
    BC, BD = _powers(C, D)
    far = any(x.shape[2] * x.stride(2) >= OFFSETS for x in read)
    stages = stages_for(name, BC, BD, read[0].itemsize, card_of(read[0].device))
    return {
        "C": C, "D": D, "BC": BC, "BD": BD, "CAUSAL": lists.causal, "STRICT": lists.strict,
        "HAS_ROWS": lists.q_rows is not None, "HAS_WEIGHT": lists.weight is not None,
        "HAS_WHOLE": lists.whole is not None, "FAR": far,
        "num_warps": warps_for(BC * max(BC, BD)), "num_stages": stages or 1,
    }  # fmt: skip


class Turned(NamedTuple):
    """Lists by block of keys, cut into pieces.

    Fields:
        entries: flat entries of the lists; of a block of keys those that see it whole first.
        block: of each piece its (batch, head, block of keys).
        start, border, stop: of each piece its first entry, the first that needs a mask, and one past the last.
        first: [blocks + 1], the first piece of each block, and how many there are.
    """

    entries: Int[Tensor, " e"]
    block: Int[Tensor, " p"]
    start: Int[Tensor, " p"]
    border: Int[Tensor, " p"]
    stop: Int[Tensor, " p"]
    first: Int[Tensor, " n"]


def turn(lists: Lists, M: int) -> Turned:
    """The lists turned round, without waiting for the device: there are pieces enough, the last may be empty."""
    B, H, _, W = lists.links.shape
    device, blocks = lists.links.device, B * H * M
    place = torch.arange(W, device=device)
    owner = torch.arange(B * H, device=device).view(B, H, 1, 1)
    key = torch.where(place < lists.count[..., None], owner * M + lists.links, blocks)
    masked = torch.ones_like(key) if lists.whole is None else (place >= lists.whole[..., None]).long()
    key, masked = key.flatten(), masked.flatten()
    entries = (2 * key + masked).argsort(stable=True)
    count, whole = (
        torch.zeros(blocks + 1, dtype=torch.long, device=device).scatter_add_(0, key, each)[:blocks]
        for each in (torch.ones_like(key), 1 - masked)
    )
    begin = count.cumsum(0) - count
    pieces = ((count + PIECE - 1) // PIECE).clamp(min=1)  # at least one, which writes the zeros
    before = pieces.cumsum(0)
    piece = torch.arange(blocks + key.numel() // PIECE, device=device)
    block = torch.searchsorted(before, piece, right=True).clamp(max=blocks - 1)
    start = begin[block] + (piece - (before - pieces)[block]) * PIECE
    stop = torch.maximum(start, torch.minimum(start + PIECE, (begin + count)[block]))
    border = torch.minimum(torch.maximum(start, (begin + whole)[block]), stop)
    first = torch.nn.functional.pad(before, (1, 0))
    return Turned(*(x.int() for x in (entries, block, start, border, stop, first)))


def block_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    lists: Lists,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """Attention along the lists, differentiable; zeros where a query sees nothing. S is M·C, rows are not gathered.

    Args:
        sink: for each head the score of one more key, whose value is zero.
    """
    out: Tensor = _Blocks.apply(q, k, v, sink, lists, scale)
    return out


class _Blocks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, lists: Lists, scale: float) -> Tensor:
        B, H, L, D = q.shape
        out = q.new_zeros(B, L, H, D).transpose(1, 2)  # as the next projection reads it
        lse = forward(q, k, v, lists, scale=scale, out=out)
        if sink is not None:
            # merged: backward takes what the whole softmax sums to, whoever its keys are
            apart, lse = lse, torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
            out.mul_((apart - lse).exp_()[..., None])
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.lists, ctx.scale = lists, scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = saved
        delta, dsink = (grad.float() * out.float()).sum(-1), None
        if sink is not None:
            shares = (sink.to(lse.dtype)[:, None] - lse).exp_()
            dsink = shares.mul_(delta).sum((0, 2)).neg_().to(sink.dtype)
        dq = torch.zeros_like(out)  # channels last in memory, as the kernels write them, whatever came in
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        backward(grad.to(q.dtype), q, k, v, delta, lse, ctx.lists, scale=ctx.scale, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, dsink, None, None
