"""Where hashed tokens stand: sorted, cut into chunks, each with the chunks that it attends to (Kitaev et al. 2020, §2).

A document's chunks form a ring, in each round of hashing or over all rounds; no chunk holds tokens of two documents.
Letters as in ops/lsh.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Layout(NamedTuple):
    """Where sorted tokens go, the same for all heads and, but for the numbering of chunks, for all rounds.

    Fields:
        chunk: C, slots in a chunk; the last chunk of a document may be partly empty.
        document: [M], index of each token's document.
        slot: [M], slot of the i-th token in sorted order, below N·C.
        neighbours: [R·N, W], chunks that each chunk attends to, itself first; chunk n of round r is number r·N + n.
        present: [R·N, W], False where a short ring would repeat a chunk and repeats do not count.
        rounds: R.
        across_rounds: whether a window may reach into another round.
    """

    chunk: int
    document: Int[Tensor, " M"]
    slot: Int[Tensor, " M"]
    neighbours: Int[Tensor, "RN W"]
    present: Bool[Tensor, "RN W"]
    rounds: int
    across_rounds: bool


def lay_out(
    sizes: Int[Tensor, " K"],
    *,
    rounds: int,
    chunk: int,
    look_back: int,
    look_ahead: int,
    across_rounds: bool,
    slots: Int[Tensor, " K"] | None = None,
) -> Layout:
    """Chunks of K documents with `sizes` tokens each, every one at least 1.

    Each document's chunks form a ring in each round or, `across_rounds`, one ring over all rounds. A ring shorter than
    the window shows a chunk once.

    Args:
        slots: at least `sizes`: make chunks for so many, the last of which may be empty, and let short rings show a
            chunk as often as their window reaches it (a step of a whole ring or more stays at the own chunk).
    """
    device = sizes.device
    chunks = ((sizes if slots is None else slots) + chunk - 1) // chunk
    first = chunks.cumsum(0) - chunks
    documents = torch.arange(len(sizes), device=device)
    document = documents.repeat_interleave(sizes)
    within = torch.arange(len(document), device=device) - (sizes.cumsum(0) - sizes)[document]
    slot = first[document] * chunk + within
    owner = documents.repeat_interleave(chunks)
    total = len(owner)
    inside = torch.arange(total, device=device) - first[owner]
    ring, start = chunks[owner][None, :, None], first[owner][None, :, None]
    steps = torch.tensor([0, *range(-1, -look_back - 1, -1), *range(1, look_ahead + 1)], device=device)
    number = torch.arange(rounds, device=device)[:, None, None]
    if slots is not None:
        steps = torch.where(steps.abs() < ring * (rounds if across_rounds else 1), steps, 0)
    if across_rounds:
        place = (number * ring + inside[None, :, None] + steps) % (rounds * ring)
        neighbours = place // ring * total + start + place % ring
    else:
        neighbours = number * total + start + (inside[None, :, None] + steps) % ring
    neighbours = neighbours.view(rounds * total, -1)
    width = neighbours.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool, device=device).tril(-1)
    present = ~((neighbours[:, :, None] == neighbours[:, None, :]) & earlier).any(-1)
    if slots is not None:
        present = torch.ones_like(present)
    return Layout(chunk, document, slot, neighbours, present, rounds, across_rounds)


def sort_tokens(buckets: Int[Tensor, "H R M"], document: Int[Tensor, " M"]) -> Int[Tensor, "H R M"]:
    """Order by (document, bucket, place)."""
    key = document * (buckets.amax() + 1) + buckets
    return key.argsort(dim=-1, stable=True)
