"""How far the queries of a mechanism reach: the one thing that it says beside its definition, as a value.

A reach is a promise about `bias`: no key outside of it is seen. Kernels and caches follow from it. What it also says of
the keys inside (`weights`) decides how fast they are:

    uniform    0 inside, -inf outside: the reach is the whole definition
    counts     logarithms of how often a key counts, and never of more than a few: nobody need look for largest scores
    distance   any bias that depends on the difference of positions alone: one mask serves all tiles
    any        anything

    Band(4)  Band(back=64, ahead=64, stride=2)  Band(4, first=2)  Blocks(64, links)  Anywhere()  Band(4) | Blocks(...)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array, array_of
from attention_zoo.options import LARGEST
from attention_zoo.rules import one_of, shown

Weights = Literal["uniform", "counts", "distance", "any"]
WEIGHTS = ("uniform", "counts", "distance", "any")
PerHead = int | tuple[int, ...]
Links = Callable[[Tensor, Tensor], tuple[Int[Tensor, "#B H R m"], Float[Tensor, "#B H R m"]]]
Rows = Callable[[Array, Array], Bool[np.ndarray, "*n"]]
Found = TypeVar("Found")
KEPT = 8
"""Most calls of which a pattern of blocks keeps what follows from its links."""
BEFORE: Mapping[str, str] = {
    "near": "reach = Band(...) | Blocks(...) | Anywhere()",
    "strides": "reach = Band(back, stride=...)",
    "shift_invariant": 'reach = Band(..., weights="distance")',
    "unweighted": 'reach = ...(..., weights="uniform")',
    "counts_keys": 'reach = ...(..., weights="counts")',
    "contiguous": "reach = Band(back)",
    "links_blocks": "reach = Blocks(size, links, most)",
    "linked": "reach = Blocks(size, links, most)",
    "blocks_of": "reach = Blocks(..., knows_length=True)",
    "sees_all": "reach = Blocks(..., whole=...)",
    "kernels": "reach: kernels follow from it",
}
"""What patterns said before there was `reach`, and how it is said now."""


@dataclass(frozen=True)
class Tiles:
    """Ranges of tiles of `size` columns, inclusive: positions of queries and keys, the length of the keys' document.

    Broadcast to [B, query tiles, key tiles]; each pair lies in one document, whatever it is.
    """

    q_lo: Array
    q_hi: Array
    k_lo: Array
    k_hi: Array
    length: Array
    size: int


class Reach:
    """Base of all reaches. Two may be joined by `|`: a key is within it that is within one of them."""

    weights: Weights = "any"

    @property
    def farthest(self) -> int | None:
        """How many positions back the farthest key is that a later query may see; None: any. Lets caches forget."""
        return None

    @property
    def farthest_ahead(self) -> int | None:
        """The same of keys after a query, where it may see the future; None: any."""
        return self.farthest

    @property
    def first(self) -> int:
        """So many tokens at the start of a document are within reach of all, and never forgotten."""
        return 0

    def inside(self, query: Tensor, key: Tensor) -> Bool[Tensor, "#H *n"]:
        """Whether keys at these positions are within reach of queries at those: the definition, where it is all.

        Raises:
            NotImplementedError: where positions alone do not say it.
        """
        raise NotImplementedError(f'{type(self).__name__} does not say which keys are within reach: weights="any"')

    def near(self, tiles: Tiles) -> Bool[np.ndarray, "B q k"]:
        """May any query of the one tile see any key of the other? Never False where it does."""
        raise NotImplementedError

    def __or__(self, other: Reach) -> Either:
        if not isinstance(other, Reach):
            raise ValueError(f"a reach can be joined with another one, got {other!r}")
        return Either((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class Anywhere(Reach):
    """Every key of the own document."""

    weights: Weights = "any"

    def __post_init__(self) -> None:
        one_of(WEIGHTS, weights=self.weights)

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones(1, *torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)

    def near(self, tiles: Tiles) -> Array:
        return np.ones(np.broadcast_shapes(tiles.q_lo.shape, tiles.k_lo.shape), bool)


@dataclass(frozen=True)
class Band(Reach):
    """Keys at distances 0, `stride`, 2 · `stride`, ... of a query, on both sides; causal, the base hides the future.

    Fields:
        back: how many of them before the query. A number, or one for each head.
        ahead: how many after it; default as many.
        stride: distance between them, in positions. A number, or one for each head.
        first: tokens at the start of a document that all see besides.
        in_cache: whether to those no distance is longer than it is in a cache of them and the band (Xiao et al. 2023).
    """

    back: PerHead
    ahead: PerHead | None = None
    stride: PerHead = 1
    first: int = 0
    weights: Weights = "any"
    in_cache: bool = False

    def __post_init__(self) -> None:
        one_of(WEIGHTS, weights=self.weights)
        for name, least in (("back", 0), ("ahead", 0), ("stride", 1), ("first", 0)):
            value = getattr(self, name)
            each = value if isinstance(value, tuple) and name != "first" else (value,)
            if value is None and name == "ahead":
                continue
            if value == () or any(type(one) is not int or not least <= one <= LARGEST for one in each):
                raise ValueError(f"Band: {name} must be {_whole(least)}, got {shown(value)}")
        _flag("Band", in_cache=self.in_cache)
        if self.in_cache and (not self.first or self.weights not in ("uniform", "distance")):
            raise ValueError("Band: in_cache needs first tokens, and weights that are uniform or follow the distance")
        if len(self.heads) > 1:
            raise ValueError(
                f"Band: back, ahead and stride must be of the same heads, got {sorted(self.heads)} of them"
            )

    @property
    def heads(self) -> set[int]:
        """For how many heads it says something of their own."""
        return {len(x) for x in (self.back, self.ahead, self.stride) if isinstance(x, tuple)}

    @property
    def strides(self) -> Sequence[int]:
        """For each head, or one for all."""
        return self.stride if isinstance(self.stride, tuple) else (self.stride,)

    @property
    def contiguous(self) -> bool:
        """Whether it has no gaps, and no tokens beyond it."""
        return max(self.strides) == 1 and not self.first

    @property
    def same_for_all(self) -> bool:
        """Whether heads differ in their strides at most, and both sides are alike."""
        return isinstance(self.back, int) and self.ahead in (None, self.back)

    @property
    def farthest(self) -> int:
        return _most(self.back, self.stride)

    @property
    def newest(self) -> int:
        """The position of the newest token in a full cache of the first tokens and the band."""
        return self.first + self.farthest

    @property
    def farthest_ahead(self) -> int:
        return self.farthest if self.ahead is None else _most(self.ahead, self.stride)

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        gap = query - key
        back, stride = (_by_head(x, gap) for x in (self.back, self.stride))
        ahead = back if self.ahead is None else _by_head(self.ahead, gap)
        return ((gap <= back * stride) & (-gap <= ahead * stride) & (gap % stride == 0)) | (key < self.first)

    def near(self, tiles: Tiles) -> Array:
        found = (tiles.q_lo - tiles.k_hi <= self.farthest) & (tiles.k_lo - tiles.q_hi <= self.farthest_ahead)
        return found | (tiles.k_lo < self.first) if self.first else found


def _by_head(count: PerHead, like: Tensor) -> Tensor:
    return torch.tensor(count).view(-1, *[1] * like.ndim)


def _most(count: PerHead, stride: PerHead) -> int:
    counts, strides = (x if isinstance(x, tuple) else (x,) for x in (count, stride))
    heads = max(len(counts), len(strides))
    return max(a * b for a, b in zip(counts * (heads // len(counts)), strides * (heads // len(strides))))


@dataclass(frozen=True, eq=False)
class Blocks(Reach):
    """Whole blocks of keys, listed for each row of blocks of queries; blocks are counted within the document.

    Fields:
        size: tokens of a block.
        links: (row [#B, R], blocks of its document [#B, #R]) -> different key blocks [#B, H, R, m] of each row, and
            what is added to their scores (-inf: unseen). A causal pattern puts the own block last and no later one
            before it, and is told 0 blocks. It must follow from its arguments alone, on whatever device they are.
        most: how many blocks `links` lists for a row.
        knows_length: whether links depend on how many blocks the document has, as causal ones must not.
        whole: rows that see everything without being seen by everything, (row, blocks) -> bool, in numpy; None: none.
    """

    size: int
    links: Links
    most: int
    knows_length: bool = False
    whole: Rows | None = None
    weights: Weights = "any"
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        one_of(WEIGHTS, weights=self.weights)
        for name in ("size", "most"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise ValueError(f"Blocks: {name} must be {_whole(1)}, got {shown(value)}")
        _flag("Blocks", knows_length=self.knows_length)
        if not callable(self.links):
            raise ValueError(f"Blocks: links must be a function of rows and numbers of blocks, got {self.links!r}")
        if self.whole is not None and not callable(self.whole):
            raise ValueError(f"Blocks: whole must be a function of rows and numbers of blocks, got {self.whole!r}")

    def kept(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """What follows from the links and the key alone, from call to call; the last few."""
        known: tuple[Found] | None = self._kept.get(key)
        if known is None:
            known = (make(),)
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept), None), None)  # another thread may have been faster
            self._kept[key] = known
        return known[0]

    def lists(self, row: Int[np.ndarray, "#B R"], blocks: Int[np.ndarray, "#B #R"]) -> tuple[Tensor, Tensor]:
        """`links` of these rows, on the host."""
        rows, counts = (torch.from_numpy(np.ascontiguousarray(each, np.int64)) for each in (row, blocks))
        links, weight = self.links(rows, counts)
        return links.detach(), weight.detach()

    def blocks_of(self, length: Array) -> Array:
        """How many blocks documents of these lengths have, as `links` wants to hear it."""
        return (length + self.size - 1) // self.size if self.knows_length else np.zeros_like(length)

    def near(self, tiles: Tiles) -> Array:
        first, last, low, high = (x // self.size for x in (tiles.q_lo, tiles.q_hi, tiles.k_lo, tiles.k_hi))
        blocks = self.blocks_of(tiles.length)
        most = blocks.max(-1, keepdims=True)
        if bool(((blocks == most) | (blocks == 0)).all()):
            blocks = most  # one document: the links of a row are the same for all key tiles
        # tiles that span more rows of blocks than a tile without holes are taken whole
        widest = tiles.size // self.size + 2
        found = last - first >= widest
        for step in range(widest):
            row = first + step
            found = found | (self._hit(row, blocks, low, high) & (row <= last))
        return found

    def _hit(self, row: Array, blocks: Array, low: Array, high: Array) -> Array:
        """Whether each of these rows, of a document of so many blocks, is linked to one from `low` to `high`."""
        highest = int(high.max(initial=0)) + 1
        row = row.clip(-1, highest)  # of tiles without tokens
        pairs, shape = np.broadcast_arrays(row, blocks), np.broadcast_shapes(row.shape, blocks.shape)
        asked, place = np.unique(np.stack(pairs).reshape(2, -1), axis=1, return_inverse=True)
        rows, counts = asked[0][None], asked[1][None]
        links, weight = (array_of(x)[0] for x in self.lists(rows, counts))  # [H, R, m]
        linked = np.zeros((len(asked[0]), highest + 2), bool)
        head, index, link = np.nonzero((weight > -np.inf) & (links <= highest))
        linked[index, links[head, index, link]] = True
        if self.whole is not None:
            linked[self.whole(rows, counts)[0]] = True
        before = np.concatenate([np.zeros((len(linked), 1), np.int64), linked.cumsum(1)], 1)
        place = place.reshape(shape)
        return before[place, high.clip(-1, highest) + 1] > before[place, low.clip(0, highest + 1)]


@dataclass(frozen=True)
class Either(Reach):
    """What is within one of several reaches; `weights` is "any": where they overlap, only `bias` knows."""

    parts: tuple[Reach, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(x, Reach) for x in self.parts):
            raise ValueError(f"Either: parts must be one or more reaches, got {shown(self.parts)}")
        heads = {count for part in self.parts if isinstance(part, Band) for count in part.heads}
        if len(heads) > 1:
            raise ValueError(f"Either: its bands must be of the same heads, got {sorted(heads)} of them")

    @property
    def farthest(self) -> int | None:
        return _largest([part.farthest for part in self.parts])

    @property
    def farthest_ahead(self) -> int | None:
        return _largest([part.farthest_ahead for part in self.parts])

    @property
    def first(self) -> int:
        return max(part.first for part in self.parts)

    def near(self, tiles: Tiles) -> Array:
        found = self.parts[0].near(tiles)
        for part in self.parts[1:]:
            found = found | part.near(tiles)
        return found


def _whole(least: int) -> str:
    return f"a whole number from {least} to {LARGEST}"


def _flag(reach: str, **fields: bool) -> None:
    for name, value in fields.items():
        if type(value) is not bool:
            raise ValueError(f"{reach}: {name} must be true or false, got {shown(value)}")


def _largest(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None


def _parts(reach: Reach) -> tuple[Reach, ...]:
    return reach.parts if isinstance(reach, Either) else (reach,)
