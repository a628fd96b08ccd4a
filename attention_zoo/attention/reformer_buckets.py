"""The buckets of hashed tokens: how many a document has, and which were remembered, replayed or are to be hashed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import Attention
from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns
from attention_zoo.layout.ragged import ragged, take
from attention_zoo.ops.lsh import hashing, step

FACTORS = "an even number of at least 2, or two of them"


class Hashed(NamedTuple):
    """State: the projected tokens of each row's current document.

    Fields:
        columns: qk and v, [B, S, H·D], and buckets, [B, H, R, S, 1], by the seeded rotations and the bucket count of
            the length so far; R is 0 where they came from elsewhere (drawn in training, or replayed), and are to be
            hashed again.
        sorted: the order of the first of them, once steps need it.
    """

    columns: Columns
    sorted: step.Sorted | None = None


class Documents(NamedTuple):
    """What tokens are sorted within, row after row.

    Fields:
        sizes: valid tokens of each.
        slots: places that these are sorted into; as many, or more with `fill`.
    """

    sizes: Int[np.ndarray, " K"]
    slots: Int[np.ndarray, " K"]


class HashedAttention(Attention):
    """Base of attention by hashes: what they are. See `Reformer` for the meaning of its options."""

    rounds: int
    chunk: int
    look_back: int
    look_ahead: int
    factors: tuple[int, ...] | None
    fill: int
    split_above: int
    hash_seed: int | None
    resample: bool

    def factors_for(self, length: int) -> tuple[int, ...]:
        """Buckets of a document of `length` tokens, as factors that are hashed one by one."""
        if self.factors is not None:
            return self.factors
        length = -(-length // self.fill) * self.fill if self.fill else length
        return hashing.bucket_factors(length, self.chunk, self.split_above)

    def _documents(self, layout: Layout) -> Documents:
        _, sizes = ragged(layout)
        if not self.fill:
            return Documents(sizes, sizes)
        said = layout.host.length[layout.host.valid][sizes.cumsum() - 1]
        return Documents(sizes, -(-np.maximum(said, sizes) // self.fill) * self.fill)

    @property
    def _draws(self) -> bool:
        return self.training and self.resample and self.hash_seed is None

    def _buckets(
        self,
        qk: Float[Tensor, "M H D"],
        documents: Documents,
        is_new: Bool[np.ndarray, " M"],
        layout: Layout,
        state: Hashed | None,
        choices: Int[Tensor, "B H R L 1"] | None,
    ) -> Int[Tensor, "H R M"]:
        """Remembered, replayed, or hashed with as many buckets as the token's document has now."""
        device, missing = qk.device, np.ones_like(is_new)
        known: list[tuple[Bool[np.ndarray, " M"], Tensor]] = []
        if state is not None and self._remembers(state, layout):
            known.append((~is_new, _bucket_rows(state.columns.held[2], state.columns.tokens)))
            missing = missing & is_new
        if choices is not None:
            known.append((is_new, _bucket_rows(choices, layout).int()))
            missing = missing & ~is_new
        kinds: dict[tuple[int, ...], int] = {}
        kind = np.array([kinds.setdefault(self.factors_for(n), len(kinds)) for n in documents.slots.tolist()], int)
        kind = kind.repeat(documents.sizes)
        chosen = {factors: missing & (kind == number) for factors, number in kinds.items()}
        number = hashing.drawn_number() if self._draws and choices is None else 0
        rotations = {
            factors: self._rotations(factors, qk, number) for factors, mask in chosen.items() if bool(mask.any())
        }
        if len(rotations) > 1 and bool(missing.all()) and hashing.hashes_at_once(qk, rotations):
            # on the device once for a layout: layers hash the same tokens
            which = layout.plan(("hashed kind", kind.tobytes()), lambda: tensor_of(kind, device))
            return hashing.hash_kinds(qk, list(rotations.values()), which)
        for factors, drawn in rotations.items():
            mask = chosen[factors]
            tokens = qk if bool(mask.all()) else qk.index_select(0, tensor_of(mask.nonzero()[0], device))
            known.append((mask, hashing.hash_tokens(tokens, drawn, factors)))
        return _together(known, torch.Size((self.heads, self.rounds, len(qk))), device)

    def _rotations(self, factors: tuple[int, ...], like: Tensor, number: int) -> Sequence[Tensor]:
        shape = (self.heads, self.rounds, self.head_width, factors)
        if self._draws:
            return hashing.fresh_rotations(*shape, like, number)
        if self.hash_seed is not None:
            return hashing.released_rotations(self.hash_seed, *shape, like.dtype)
        return hashing.seeded_rotations(self.seed, *shape)

    def _remembers(self, state: Hashed, layout: Layout) -> bool:
        """Whether the state's buckets are those that its tokens have in this call."""
        if not self._keeps_buckets(state):
            return False
        held, new = state.columns.ledger.host, layout.host
        old = held.valid.sum(1)
        now = old + (new.valid & (new.document == held.last_document)).sum(1)
        return self._hash_alike(old, now)

    def _keeps_buckets(self, state: Hashed) -> bool:
        return not self._draws and not self.fill and state.columns.buffers[2].shape[2] == self.rounds

    def _hash_alike(self, old: Array, now: Array) -> bool:
        return all(self.factors_for(a) == self.factors_for(b) for a, b in zip(old.tolist(), now.tolist()) if a)

    def pairs(self, length: int) -> float:
        """See `Attention`; hashing counts, too: half a dot product a bucket."""
        chunks = -(-length // self.chunk)
        window = min(1 + self.look_back + self.look_ahead, chunks)
        hashing = length * sum(self.factors_for(length)) / 4
        return self.rounds * (chunks * self.chunk * window * self.chunk + hashing)

    def step_pairs(self, length: int) -> float:
        """See `Attention`: one token's windows, or all tokens where those are fewer, and its hashes."""
        return self.keys_seen(length)[-1] + self.rounds * sum(self.factors_for(length)) / 4

    def keys_seen(self, length: int) -> list[float]:
        """See `Attention`: the most, a chunk and those that it looks at in each round, never more than there are."""
        chunks = -(-length // self.chunk)
        most = self.rounds * self.chunk * min(1 + self.look_back + self.look_ahead, chunks)
        return [float(min(most, at + 1 if self.causal else length)) for at in range(length)]

    def oldest_seen(self, length: int) -> list[int]:
        """See `Attention`: a bucket may hold any of them."""
        return [0] * length


def factors_of(buckets: int | Sequence[int]) -> tuple[int, ...]:
    factors = (buckets,) if isinstance(buckets, int) else tuple(buckets)
    if len(factors) not in (1, 2) or any(type(n) is not int or n < 2 or n % 2 for n in factors):
        raise ValueError(f"buckets must be {FACTORS}, got {buckets!r}")
    return factors


def since(keys: Layout, count: int) -> Bool[np.ndarray, " M"]:
    """Which of the valid tokens, row after row, stand in the last `count` columns."""
    columns = keys.host.valid.shape[1]
    return np.broadcast_to(np.arange(columns) >= columns - count, keys.host.valid.shape)[keys.host.valid]


def _together(
    known: list[tuple[Bool[np.ndarray, " M"], Tensor]], shape: torch.Size, device: torch.device
) -> Int[Tensor, "H R M"]:
    """Buckets of all tokens, from those of each mask."""
    for mask, values in known:
        if bool(mask.all()):
            return values.int()
    buckets = torch.zeros(shape, dtype=torch.int32, device=device)
    for mask, values in known:
        buckets.index_copy_(-1, tensor_of(mask.nonzero()[0], device), values.int())
    return buckets


def _bucket_rows(buckets: Int[Tensor, "B H R S 1"], layout: Layout) -> Int[Tensor, "H R M"]:
    return take(buckets[..., 0].permute(0, 3, 1, 2), layout).movedim(0, -1)
