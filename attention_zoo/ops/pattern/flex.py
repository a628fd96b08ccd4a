"""torch's FlexAttention for any pattern that says of one query and one key what it says of all.

The pattern's own `bias` is the mask, evaluated on chip from the positions of the two tokens. Which blocks of 128 x 128
it is evaluated in is told by `near`, or by plain arithmetic where columns are positions, and blocks that are seen whole
are taken without it (flex_lists.py). Where a pattern's bias is a function of the distance, it is a table by head, and
heads visit what they reach themselves. Padding, documents, causality and position biases are honoured in all layouts;
global keys are copied behind the others, global queries are a few rows more.

Sums are taken in a fixed order, but for the gradient of a table that learns: where deterministic algorithms are asked
for, torch's switch, such a pattern is refused. float32 is exact.

torch compiles the kernel for each shape: lengths and widths of the lists are rounded up to a few sizes an octave. Rows
and columns that only fill up are in no list, so that they cost no time.

CUDA only: on a CPU FlexAttention has no backward, and uncompiled it is L x S.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Band
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.band import by_distance
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.flex_lists import Sides, both_sides
from attention_zoo.ops.pattern.globals import global_columns, with_global_rows
from attention_zoo.tokens import Tokens

BLOCK = 128
"""Rows and columns of a block: torch's kernels need no other."""
FEWEST = 16
"""Queries: they are filled up to a block, which costs less than the hundreds of launches that tiles take."""
RECOMPILATIONS = 128
"""Different shapes and patterns in one process, at most: beyond, torch raises."""

Mod = Callable[..., Tensor]


class Places(NamedTuple):
    """What is known of each row of q or of k, filled up to whole blocks; [B, n], or [1, n] where batch rows are alike.

    Fields:
        position, length: see `Tokens`.
        document: -2 for queries and -1 for keys that are not there.
    """

    position: Tensor
    length: Tensor
    document: Tensor

    @staticmethod
    def of(tokens: Tokens, there: Tensor, missing: int, count: int) -> Places:
        more = (0, count - there.shape[1])
        document = torch.where(there, tokens.document, missing)
        fields = (F.pad(tokens.position, more), F.pad(tokens.length, more), F.pad(document, more, value=missing))
        return Places(*(field.int().contiguous() for field in fields))


def bucket(length: int) -> int:
    """The next length that kernels are compiled for: whole blocks, four lengths an octave."""
    step = max(BLOCK, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


# --- what a pair is --------------------------------------------------------------------------------------------------


def pair_functions(call: PatternCall, q: Places, k: Places, tables: Tables, beyond: int) -> tuple[Mod, Mod | None]:
    """Whether a pair is seen, and what is added to its score; of tensors that the compiler captures.

    Args:
        beyond: keys from this column on are those that the pattern does not concern, the global ones.
    """
    pattern, causal = call.pattern, call.pattern.causal
    q_position, q_length, q_document = q
    k_position, k_length, k_document = k

    fixed = None if tables.pattern is None else tables.pattern.detach()  # torch's masks know no gradients

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor, table: Tensor | None = fixed) -> Tensor:
        if table is not None:
            return at(table, b, h, i, j)
        queries = _one(q_position[b, i], q_length[b, i], q_document[b, i])
        keys = _one(k_position[b, j], k_length[b, j], k_document[b, j])
        return pattern.bias(queries, keys).reshape(())

    def at(table: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        n = table.shape[1] // 2
        return table[h, (k_position[b, j] - q_position[b, i] + n).clamp(0, 2 * n - 1)]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = q_document[b, i] == k_document[b, j]
        if causal:
            found = found & (k_position[b, j] <= q_position[b, i])
        near = bias(b, h, i, j) > -torch.inf
        return found & (near if beyond == k_position.shape[1] else near | (j >= beyond))

    weighs = pattern.reach.weights != "uniform"
    if tables.position is None and not weighs:
        return seen, None

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if weighs:
            # -inf is the mask's to say
            more = bias(b, h, i, j, tables.pattern).clamp(min=torch.finfo(torch.float32).min)
            value = value + torch.where(j < beyond, more, 0)
        return value if tables.position is None else value + at(tables.position, b, h, i, j)

    return seen, score


class Tables(NamedTuple):
    """What is added for a key d positions after the query, [H, 2n] at d + n; None: nothing, or no table says it.

    Fields:
        pattern: by a pattern whose bias is a function of the distance; it may learn.
        position: by the position scheme.
    """

    pattern: Tensor | None
    position: Tensor | None


def _one(position: Tensor, length: Tensor, document: Tensor) -> Tokens:
    """Fields of one token, as [1, 1]."""
    position, length, document = (x.reshape(1, 1) for x in (position, length, document))
    yes = torch.ones_like(position, dtype=torch.bool)
    return Tokens(position, yes, ~yes, document, length)


# --- running it ------------------------------------------------------------------------------------------------------


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sides,
    functions: tuple[Mod, Mod | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, both differentiable."""
    # imported here: it loads torch's compiler
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    (forth, back, whole_forth, whole_back), (seen, score) = lists, functions
    mask = BlockMask(
        seq_lengths=(q.shape[2], k.shape[2]),
        kv_num_blocks=forth.number,
        kv_indices=forth.blocks,
        full_kv_num_blocks=whole_forth.number,
        full_kv_indices=whole_forth.blocks,
        q_num_blocks=back.number,
        q_indices=back.blocks,
        full_q_num_blocks=whole_back.number,
        full_q_indices=whole_back.blocks,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=seen,
    )
    grouped = q.shape[1] != k.shape[1]
    more: dict[str, Any] = {"score_mod": score, "block_mask": mask, "scale": scale, "enable_gqa": grouped}
    if not q.is_cuda:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **more)
        return out, aux.lse
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        # the other kernel, for few queries, reads lists of another kind
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        out, aux = _compiled()(q, k, v, return_aux=AuxRequest(lse=True), kernel_options=options, **more)
    return out, aux.lse


def _run(call: PatternCall) -> Tensor:
    L, S = call.lengths
    Lb, Sb = bucket(L), bucket(S)
    index, queries, keys = _places(call, Lb, Sb)
    lists = both_sides(call, BLOCK, Lb // BLOCK, Sb // BLOCK, (keys.position.shape[1] - Sb) // BLOCK)
    functions = pair_functions(call, queries, keys, Tables(_of_pattern(call), _by_distance(call)), Sb)
    if index is None:
        k, v = filled(call.k, Sb), filled(call.v, Sb)
    else:
        k, v = _WithGlobals.apply(call.k, call.v, *index)
    out, lse = attend(filled(call.q, Lb), k, v, lists, functions, call.scale)
    if call.sink is not None:
        # one more key, whose value is zero; a row that sees nothing else stays zero, with finite gradients
        share = (lse.clamp(min=-1e30) - call.sink[:, None]).sigmoid()[..., None]
        out = (out * share).to(out.dtype)
    return with_global_rows(call, out[:, :, :L], in_one=True)


def filled(x: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind it."""
    return x if x.shape[2] == rows else F.pad(x, (0, 0, 0, rows - x.shape[2]))


class _WithGlobals(torch.autograd.Function):
    """Keys and values, filled up, and those of global tokens behind them: one copy each."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, columns: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(marked)
        ctx.keys = k.shape[2]
        index = columns.expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index)

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (marked,) = ctx.saved_tensors
        index, found = marked.expand(-1, dk.shape[1], -1, dk.shape[3]), []
        for grad in (dk, dv):
            first = dk.shape[2] - marked.shape[2]
            found.append(grad[:, :, : ctx.keys].scatter_add(2, index, grad[:, :, first:]))
        return *found, None, None


def _places(call: PatternCall, rows: int, columns: int) -> tuple[tuple[Tensor, Tensor] | None, Places, Places]:
    """Of queries and keys, found once for a layout; global keys stand behind the others, from these columns.

    With global keys also the columns [B, 1, n, 1] of all of them, the first ones filled up with any, and of those that
    are global alone.
    """

    def queries() -> Places:
        return Places.of(call.queries, call.queries.valid, -2, rows)

    def keys() -> tuple[tuple[Tensor, Tensor] | None, Places]:
        if not call.any_global_key:
            return None, Places.of(call.keys, call.keys.valid, -1, columns)
        index, chosen = global_columns(call.keys)
        count = bucket(index.shape[1])
        plain = Places.of(call.keys, call.keys.valid & ~call.keys.is_global, -1, columns)
        marked = Places.of(chosen, chosen.valid, -1, count)
        behind, S = F.pad(index, (0, count - index.shape[1])), call.k.shape[2]
        own = torch.arange(columns, device=index.device).clamp_(max=S - 1).expand(len(index), -1)
        places = Places(*(torch.cat(x, 1) for x in zip(plain, marked)))
        return (torch.cat([own, behind], 1)[:, None, :, None], behind[:, None, :, None]), places

    index, places = call.keys.plan(("flex keys", BLOCK, columns), keys)
    return index, call.queries.plan(("flex queries", rows), queries), places


def _of_pattern(call: PatternCall) -> Tensor | None:
    """The pattern's bias of a key d positions after the query, [H, 2n] at d + n, n in few sizes."""
    reach = call.pattern.reach
    if reach.weights != "distance":
        return None
    n = bucket((reach.farthest or 0) + 2)  # beyond it is as at its ends: -inf
    find = lambda: (Layout.plain(1, 1, call.q.device, start=n), Layout.plain(1, 2 * n, call.q.device))  # noqa: E731
    found = call.pattern.bias(*call.keys.plan(("distances", n), find)).flatten(0, 2)
    return found.expand(call.q.shape[1], -1)


def _by_distance(call: PatternCall) -> Tensor | None:
    """Position bias of a key d positions after the query, [H, 2n] at d + n."""
    reach = call.pattern.reach
    everywhere = reach.farthest is None or reach.first > 0 or call.any_global_key
    if not (call.has_position_bias and everywhere):
        return by_distance(call, (reach.farthest or 0) + 1)
    return by_distance(call, bucket(call.k.shape[2] if call.aligned else int(call.keys.host.position.max()) + 1))


def _on_cuda(call: PatternCall) -> str | None:
    reason = facts.on_cuda(call)
    return reason and f"{reason}: there it has no backward"


def _has_compiler(call: PatternCall) -> str | None:
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def refuse(q: Tensor) -> str | None:
    """Why it cannot run these queries, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no kernel in {q.dtype}".replace("torch.", "")
    if q.shape[3] < 16:
        return f"heads must be 16 wide at least, not {q.shape[3]}"
    return None if q.shape[2] >= FEWEST else f"fewer than {FEWEST} queries are no work for it"


def _takes_queries(call: PatternCall) -> str | None:
    return refuse(call.q)


def _sums_in_order(call: PatternCall) -> str | None:
    if call.learned and torch.are_deterministic_algorithms_enabled():
        return "the pattern has learned weights, whose gradient it sums in no fixed order"
    if call.learned and call.pattern.reach.weights != "distance":
        return "the pattern has learned weights that are no function of the distance"
    return None


def _heads_alike(call: PatternCall) -> str | None:
    reach = call.pattern.reach
    if reach.weights == "distance":
        return None
    if reach.weights == "uniform" and isinstance(reach, Band) and reach.same_for_all and isinstance(reach.stride, int):
        return None  # the reach says it all
    one = (tokens.cut(slice(0, 1)) for tokens in (call.queries, call.keys))
    return None if call.pattern.bias(*one).shape[1] == 1 else "heads have patterns of their own"


FITS = (_takes_queries, _sums_in_order, _heads_alike)
"""What it needs on any device."""
FLEX: Kernel[PatternCall] = Kernel(
    "flex",
    _run,
    (_on_cuda, _has_compiler, *FITS),
    "torch's FlexAttention, compiled: any layout, of patterns that are a function of two positions",
    (facts.is_one_function, facts.first_in_text),
    whole=True,
)
