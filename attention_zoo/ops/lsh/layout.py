"""Where hashed tokens stand: sorted, cut into chunks, each with the chunks that it attends to (Kitaev et al. 2020, §2).

A document's chunks form a ring, in each round of hashing or over all rounds; no chunk holds tokens of two documents.
Letters as in ops/lsh/chunks.py.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attention_zoo.layout.host import array_of, on_host, tensor_of

KEPT, KEPT_DOCUMENTS = 1024, 64
"""Most tokens, and documents, of a layout that is kept for later calls."""


class ChunkLayout(NamedTuple):
    """Where sorted tokens go, the same for all heads and, but for the numbering of chunks, for all rounds.

    Fields:
        chunk: C, slots in a chunk; the last chunk of a document may be partly empty.
        document: [M], index of each token's document.
        slot: [M], slot of the i-th token in sorted order, below N·C.
        neighbours: [R·N, W], chunks that each chunk attends to, itself first; chunk n of round r is number r·N + n.
        present: [R·N, W], False where a short ring would repeat a chunk and repeats do not count.
        rounds: R.
        across_rounds: whether a window may reach into another round.
        look_back, look_ahead: chunks of a window, before its own and after it.
        filled: whether there may be empty chunks, and short rings repeat theirs.
        kept: what a kernel made of the fields above.
    """

    chunk: int
    document: Int[Tensor, " M"]
    slot: Int[Tensor, " M"]
    neighbours: Int[Tensor, "RN W"]
    present: Bool[Tensor, "RN W"]
    rounds: int
    across_rounds: bool
    look_back: int
    look_ahead: int
    filled: bool
    kept: dict[Hashable, Any]


def lay_out(
    sizes: Int[np.ndarray, " K"],
    *,
    rounds: int,
    chunk: int,
    look_back: int,
    look_ahead: int,
    across_rounds: bool,
    slots: Int[np.ndarray, " K"] | None = None,
    device: torch.device | str = "cpu",
) -> ChunkLayout:
    """Chunks of K documents with `sizes` tokens each, every one at least 1.

    Each document's chunks form a ring in each round or, `across_rounds`, one ring over all rounds. A ring shorter than
    the window shows a chunk once.

    Args:
        slots: at least `sizes`: make chunks for so many, the last of which may be empty, and let short rings show a
            chunk as often as their window reaches it (a step of a whole ring or more stays at the own chunk).
        device: of the result.
    """
    chunks = ((sizes if slots is None else slots) + chunk - 1) // chunk
    first = chunks.cumsum() - chunks
    documents = np.arange(len(sizes))
    document = documents.repeat(sizes)
    within = np.arange(len(document)) - (sizes.cumsum() - sizes)[document]
    slot = first[document] * chunk + within
    owner = documents.repeat(chunks)
    total = len(owner)
    inside = np.arange(total) - first[owner]
    ring, start = chunks[owner][None, :, None], first[owner][None, :, None]
    steps = np.array([0, *range(-1, -look_back - 1, -1), *range(1, look_ahead + 1)])
    number = np.arange(rounds)[:, None, None]
    if slots is not None:
        steps = np.where(np.abs(steps) < ring * (rounds if across_rounds else 1), steps, 0)
    if across_rounds:
        place = (number * ring + inside[None, :, None] + steps) % (rounds * ring)
        neighbours = place // ring * total + start + place % ring
    else:
        neighbours = number * total + start + (inside[None, :, None] + steps) % ring
    neighbours = neighbours.reshape(rounds * total, -1)
    width = neighbours.shape[1]
    earlier = np.tril(np.ones((width, width), bool), -1)
    present = ~((neighbours[:, :, None] == neighbours[:, None, :]) & earlier).any(-1)
    if slots is not None:
        present = np.ones_like(present)
    place = partial(tensor_of, device=device)
    fields = (place(document), place(slot), place(neighbours), place(present))
    return ChunkLayout(chunk, *fields, rounds, across_rounds, look_back, look_ahead, slots is not None, {})


def laid_out(
    sizes: Int[np.ndarray, " K"], *, slots: Int[np.ndarray, " K"] | None, device: torch.device, **shape: Any
) -> ChunkLayout:
    """`lay_out`; of few tokens the same object for the same arguments, since a short call would wait for it."""
    if sizes.sum() > KEPT or len(sizes) > KEPT_DOCUMENTS or device.type != "cpu":
        return lay_out(sizes, slots=slots, device=device, **shape)
    given = None if slots is None else tuple(slots.tolist())
    return _kept(tuple(sizes.tolist()), given, tuple(shape.items()))


@lru_cache(maxsize=16)
def _kept(sizes: tuple[int, ...], slots: tuple[int, ...] | None, shape: tuple[tuple[str, Any], ...]) -> ChunkLayout:
    return lay_out(np.array(sizes), slots=None if slots is None else np.array(slots), **dict(shape))


def sort_tokens(buckets: Int[Tensor, "H R M"], document: Int[Tensor, " M"]) -> Int[Tensor, "H R M"]:
    """Order by (document, bucket, place)."""
    if not on_host(buckets.device):
        return (document * (buckets.amax() + 1) + buckets).argsort(dim=-1, stable=True)
    bucket, number = array_of(buckets), array_of(document)
    each, place = int(bucket.max()) + 1, len(number).bit_length()
    most = (int(number[-1]) + 1) * each << place
    assert most < 1 << 63, "tokens x documents x buckets are numbered by 63 bits"
    # numbers that all differ, each with its place in its last bits, numpy sorts ten times as fast (AVX-512) as torch
    # sorts what has to stay in order
    dtype = np.int32 if most < 1 << 31 else np.int64
    base = (number * each << place) + np.arange(len(number))
    keys = base.astype(dtype) + np.left_shift(bucket.astype(dtype), place, dtype=dtype)
    keys.sort(-1)
    return tensor_of(keys & ((1 << place) - 1), buckets.device)
