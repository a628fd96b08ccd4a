"""torch's FlexAttention for any pattern that says of one query and one key what it says of all.

The pattern's own `bias` is the mask, evaluated on chip from the positions of the two tokens. Which blocks of 128 x 128
it is evaluated in is told by `near`, or by plain arithmetic where columns are positions, and blocks that are seen whole
are taken without it (flex_lists.py). Where a pattern's bias is a function of the distance, it is a table by head, and
heads visit what they reach themselves; of a pattern of blocks it is a table of links (flex_links.py). Padding,
documents, causality and position biases are honoured in all layouts; global keys are copied behind the others, and so
are global queries, of a second projection, too, and first tokens that are asked from other positions (flex_joined.py).

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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_zoo.layout.host import tensor_of
from attention_zoo.layout.kernel import Kernel
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Band, Blocks, Reach
from attention_zoo.ops.pattern import facts
from attention_zoo.ops.pattern.band import by_distance
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.first import BandAlone, taken_first, with_first_as_global
from attention_zoo.ops.pattern.flex_joined import Joined, joined, taken
from attention_zoo.ops.pattern.flex_links import Linked, link_functions, linked
from attention_zoo.ops.pattern.flex_lists import Asking, Sides, both_sides
from attention_zoo.ops.pattern.globals import global_columns
from attention_zoo.ops.pattern.triton_blocks import rows_are_costly
from attention_zoo.tokens import Tokens

BLOCK = 128
"""Rows and columns of a block: torch's kernels need no other."""
FEWEST = 2
"""Queries: they are filled up to a block, which costs less than the hundreds of launches that tiles take. One alone is
a step of decoding."""
NARROWEST, WIDEST = 16, 256
"""Channels of queries and keys; fewer are filled up."""
RECOMPILATIONS = 128
"""Different shapes and patterns in one process, at most: beyond, torch raises."""

Mod = Callable[..., Tensor]


class Places(NamedTuple):
    """What is known of each row of q or of k, filled up to whole blocks; [B, n], or [1, n] where batch rows are alike.

    Fields:
        position, length: see `Tokens`.
        document: -2 for queries and -1 for keys that are not there; from -3 down those of a second projection, whose
            queries meet its keys alone.
    """

    position: Tensor
    length: Tensor
    document: Tensor

    @staticmethod
    def of(tokens: Tokens, there: Tensor, missing: int, count: int, *, second: bool = False) -> Places:
        more = (0, count - there.shape[1])
        document = torch.where(there, -3 - tokens.document if second else tokens.document, missing)
        fields = (F.pad(tokens.position, more), F.pad(tokens.length, more), F.pad(document, more, value=missing))
        return Places(*(field.int().contiguous() for field in fields))

    @staticmethod
    def joined(parts: list[Places]) -> Places:
        """One behind the other."""
        return parts[0] if len(parts) == 1 else Places(*(torch.cat(each, 1) for each in zip(*parts)))


def bucket(length: int) -> int:
    """The next length that kernels are compiled for: whole blocks, four lengths an octave."""
    step = max(BLOCK, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


# --- what a pair is --------------------------------------------------------------------------------------------------


def pair_functions(
    call: PatternCall, q: Places, k: Places, tables: Tables, rows: int, beyond: int, links: Linked | None = None
) -> tuple[Mod, Mod | None]:
    """Whether a pair is seen, and what is added to its score; of tensors that the compiler captures.

    Args:
        rows, beyond: queries from this row on, and keys from this column on, are those that the pattern does not
            concern, the global ones.
        links: of a pattern of blocks.
    """
    pattern, causal = call.pattern, call.pattern.causal
    q_position, q_length, q_document = q
    k_position, k_length, k_document = k

    fixed = None if tables.pattern is None else tables.pattern.detach()  # torch's masks know no gradients

    linked_to, of_links = (None, None) if links is None else link_functions(links)

    first, newest = pattern.reach.first, _newest(pattern.reach)

    def bias(b: Tensor, h: Tensor, i: Tensor, j: Tensor, table: Tensor | None = fixed) -> Tensor:
        if table is not None:
            found = at(table, b, h, j, q_position[b, i])
            return torch.where(k_position[b, j] < first, 0, found) if first else found
        queries = _one(q_position[b, i], q_length[b, i], q_document[b, i])
        keys = _one(k_position[b, j], k_length[b, j], k_document[b, j])
        return pattern.bias(queries, keys).reshape(())

    def at(table: Tensor, b: Tensor, h: Tensor, j: Tensor, position: Tensor) -> Tensor:
        n = table.shape[1] // 2
        return table[h, (k_position[b, j] - position + n).clamp(0, 2 * n - 1)]

    def asks_from(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The query's position to this key."""
        position = q_position[b, i]
        if newest is None:
            return position
        return torch.where((k_position[b, j] < first) & concerned(i, j), position.clamp(max=newest), position)

    apart = [n for n, places in ((rows, q_position), (beyond, k_position)) if n < places.shape[1]]

    def concerned(i: Tensor, j: Tensor) -> Tensor:
        return (i < rows) & (j < beyond) if rows < q_position.shape[1] else j < beyond

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = q_document[b, i] == k_document[b, j]
        if causal:
            found = found & (k_position[b, j] <= q_position[b, i])
        near = bias(b, h, i, j) > -torch.inf if linked_to is None else linked_to(b, h, i, j)
        return found & (near | ~concerned(i, j) if apart else near)

    weighs = pattern.reach.weights != "uniform" if links is None else links.weight is not None
    if tables.position is None and not weighs:
        return seen, None

    def weight(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if of_links is not None:
            return of_links(b, h, i, j)
        # -inf is the mask's to say
        return bias(b, h, i, j, tables.pattern).clamp(min=torch.finfo(torch.float32).min)

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if weighs:
            value = value + torch.where(concerned(i, j), weight(b, h, i, j), 0)
        return value if tables.position is None else value + at(tables.position, b, h, j, asks_from(b, i, j))

    return seen, score


class Tables(NamedTuple):
    """What is added for a key d positions after the query, [H, 2n] at d + n; None: nothing, or no table says it.

    Fields:
        pattern: by a pattern whose bias is a function of the distance; it may learn.
        position: by the position scheme.
    """

    pattern: Tensor | None
    position: Tensor | None


def _newest(reach: Reach) -> int | None:
    """The last position from which the first tokens are asked, where positions are counted in a cache."""
    return reach.newest if isinstance(reach, Band) and reach.in_cache else None


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


def channels_for(width: int) -> int:
    """How many channels rows of that width are filled up to: torch's kernels take no fewer."""
    return max(width, NARROWEST)


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

    if (missing := channels_for(v.shape[3]) - v.shape[3]) > 0:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        out, lse = attend(q, k, v, lists, functions, scale)
        return out[..., :-missing], lse
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
    given, call = call.keys, with_first_as_global(call)
    plan, queries, keys = _places(call, given)
    rows, columns = plan.rows // BLOCK, plan.columns // BLOCK
    asking = Asking(queries.position.shape[1] // BLOCK - rows, plan.second // BLOCK)
    more = keys.position.shape[1] // BLOCK - columns - asking.columns
    lists = both_sides(call, BLOCK, rows, columns, more, asking)
    tables = Tables(_of_pattern(call), _by_distance(call))
    both = queries.position.shape[1], keys.position.shape[1]
    links = linked(call, *both) if isinstance(call.pattern.reach, Blocks) else None
    functions = pair_functions(call, queries, keys, tables, plan.rows, plan.columns, links)
    out, lse = attend(*joined(call.q, call.k, call.v, plan, call.second, call.turned), lists, functions, call.scale)
    return taken(out, lse, call.sink, plan, call.lengths[0])


def _places(call: PatternCall, given: Layout) -> tuple[Joined, Places, Places]:
    """How queries and keys stand, and what each of them is; found once for a layout.

    Args:
        given: the keys before first tokens were marked among them.
    """
    (L, S), second = call.lengths, call.second is not None
    rows, columns, behind = bucket(L), bucket(S), bucket(L) if second else 0
    asks, (_, H, _, D), K = call.any_global_query or second, call.q.shape, call.k.shape[1]

    def find_queries() -> tuple[Places, Tensor | None, Tensor | None]:
        plain = Places.of(call.queries, call.queries.valid, -2, rows)
        if not asks:
            return plain, None, None
        index, chosen = global_columns(call.queries)
        count = bucket(index.shape[1])
        everyone = Places.of(chosen, chosen.valid, -2, count, second=second)
        back = np.broadcast_to(np.arange(L), (len(index), L)).copy()
        mask = call.queries.host.is_global & call.queries.host.valid
        back[mask] = (rows + mask.cumsum(1) - 1)[mask]  # in the order of `global_columns`
        return (
            Places.joined([plain, everyone]),
            _up_to(index, count, H, D),
            _up_to(tensor_of(back, index.device), L, H, D),
        )

    def find_keys() -> tuple[Places, Tensor | None, Tensor | None]:
        parts, marked, there, first = [], None, call.keys.valid, None
        if call.any_global_key:
            index, chosen = global_columns(call.keys)
            count, there = bucket(index.shape[1]), there & ~call.keys.is_global
            if call.turned is not None:
                first = taken_first(given, call.pattern.reach.first, F.pad(index, (0, count - index.shape[1])))
            marked, parts = _up_to(index, count, K, D), [Places.of(chosen, chosen.valid, -1, count)]
        parts.insert(0, Places.of(call.keys, there, -1, columns))
        if second:
            parts.append(Places.of(call.queries, call.queries.valid, -1, behind, second=True))
        return Places.joined(parts), marked, first

    queries, asking, back = call.queries.plan(("flex queries", BLOCK, H, D, asks, second), find_queries)
    # the plan keeps what the key's id is of
    key = ("flex keys", BLOCK, K, D, id(call.queries) if second else None)
    (keys, marked, first), _ = call.keys.plan(key, lambda: (find_keys(), call.queries))
    return Joined(rows, asking, columns, marked, behind, back, first), queries, keys


def _up_to(columns: Tensor, count: int, heads: int, width: int) -> Tensor:
    """Columns [B, n] to be gathered, filled up, for all heads and channels."""
    return F.pad(columns, (0, count - columns.shape[1]))[:, None, :, None].expand(-1, heads, -1, width)


def _of_pattern(call: PatternCall) -> Tensor | None:
    """The pattern's bias of a key d positions after the query, [H, 2n] at d + n, n in few sizes."""
    reach = call.pattern.reach
    n = bucket((reach.farthest or 0) + 2)  # beyond it is as at its ends: -inf
    if _heads_have_bands(reach):
        return call.keys.plan(("bands", reach, call.q.shape[1], n), lambda: _by_table(call, n))
    return _by_table(call, n) if reach.weights == "distance" and not reach.first else None


def _by_table(call: PatternCall, n: int) -> Tensor:
    """The pattern's bias of each distance, [H, 2n]."""
    find = lambda: (Layout.plain(1, 1, call.q.device, start=n), Layout.plain(1, 2 * n, call.q.device))  # noqa: E731
    pattern = BandAlone(call.pattern) if call.pattern.reach.first else call.pattern
    found = pattern.bias(*call.keys.plan(("distances of the pattern", n), find)).flatten(0, 2)
    return found.expand(call.q.shape[1], -1)


def _heads_have_bands(reach: Reach) -> bool:
    """Whether each head sees all within a band of its own, as where they step differently."""
    return isinstance(reach, Band) and reach.weights == "uniform" and bool(reach.heads)


def _by_distance(call: PatternCall) -> Tensor | None:
    """Position bias of a key d positions after the query, [H, 2n] at d + n."""
    reach = call.pattern.reach
    everywhere = reach.farthest is None or reach.first > 0 or call.any_global_key or call.any_global_query
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
    return None if q.shape[2] >= FEWEST else f"fewer than {FEWEST} queries are no work for it"


def _takes_queries(call: PatternCall) -> str | None:
    return refuse(call.q)


def _sums_in_order(call: PatternCall) -> str | None:
    if call.learned and torch.are_deterministic_algorithms_enabled():
        return "the pattern has learned weights, whose gradient it sums in no fixed order"
    if call.learned and (call.pattern.reach.weights != "distance" or call.pattern.reach.first):
        return "the pattern has learned weights that are no function of the distance"
    return None


def _heads_alike(call: PatternCall) -> str | None:
    reach = call.pattern.reach
    if isinstance(reach, Blocks) or (reach.weights == "distance" and not reach.first) or _heads_have_bands(reach):
        return None
    if reach.weights == "uniform" and isinstance(reach, Band) and reach.same_for_all and isinstance(reach.stride, int):
        return None  # the reach says it all
    one = (tokens.cut(slice(0, 1)) for tokens in (call.queries, call.keys))
    return None if call.pattern.bias(*one).shape[1] == 1 else "heads have patterns of their own"


def _takes_turned(call: PatternCall) -> str | None:
    if call.turned is None or 2 * call.q.shape[3] <= WIDEST:
        return None
    return f"queries that are turned for first tokens are twice as wide, and may be {WIDEST} wide at most"


FITS = (_takes_queries, _takes_turned, _sums_in_order, _heads_alike)
"""What it needs on any device."""
FLEX: Kernel[PatternCall] = Kernel(
    "flex",
    _run,
    (_on_cuda, _has_compiler, *FITS),
    "torch's FlexAttention, compiled: any layout, of patterns that are a function of two positions",
    (facts.is_one_function,),
    whole=True,
    along=True,
    leads=rows_are_costly,
)
