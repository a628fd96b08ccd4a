"""Locality-sensitive hashing of vectors by random rotations: near directions tend to share a bucket.

    bucket(x) = argmax [xR; -xR]        R random and normal, one for each head and round (Andoni et al. 2015)

O(M·D·buckets) a head and round, with the square root of the buckets where two factors are hashed one by one.
Letters: M tokens, H heads, R rounds, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.kernel import triton_reason

DIRECT = 64
"""Buckets hashed by one argmax; more are the product of two, which costs the square root of it."""


def bucket_factors(tokens: int, chunk: int, direct: int = DIRECT) -> tuple[int, ...]:
    """Buckets for a document: the largest power of two that is at most 2·tokens/chunk (the paper's), at least 2.

    A power of two, so that a growing document is hashed anew only when its length has doubled. Above `direct` it is
    split into two factors, each hashed by itself.
    """
    exponent = max(1, (2 * tokens // chunk).bit_length() - 1)
    if 1 << exponent <= direct:
        return (1 << exponent,)
    return 1 << exponent // 2, 1 << exponent - exponent // 2


@lru_cache(maxsize=64)
def seeded_rotations(seed: int, heads: int, rounds: int, width: int, factors: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random rotations as a function of `seed`: for each factor [H, D, R, buckets/2], float64 on the CPU.

    Fewer rounds or buckets are the first of more, so that a document hashes the same beside longer ones. Do not modify.
    """
    found = []
    for place, count in enumerate(factors):
        drawn = []
        for number in range(rounds):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + place * 100_003 + number) % 2**63)
            drawn.append(
                torch.stack(
                    [torch.randn(heads, width, generator=generator, dtype=torch.float64) for _ in range(count // 2)], -1
                )
            )
        found.append(torch.stack(drawn, 2))
    return tuple(found)


def drawn_number() -> int:
    """From torch's default generator of the CPU, which checkpointing replays: one a call, whatever rows are in it, so
    that processes which share the rows of a batch draw the same."""
    return int(torch.empty((), dtype=torch.int64).random_())


def fresh_rotations(
    heads: int, rounds: int, width: int, factors: tuple[int, ...], like: Tensor, number: int
) -> tuple[Tensor, ...]:
    """The same for this call alone, by a number that was drawn for it; on the device and in the dtype of `like`."""
    place = sum(count * 0x9E3779B9 << 8 * index for index, count in enumerate(factors))
    generator = torch.Generator(like.device)
    generator.manual_seed((number + place) % 2**63)
    given: Any = {"generator": generator, "dtype": like.dtype, "device": like.device}
    return tuple(torch.randn(heads, width, rounds, count // 2, **given) for count in factors)


def released_rotations(
    hash_seed: int, heads: int, rounds: int, width: int, factors: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same as Hugging Face draws them with this `hash_seed` on a CPU: all factors at once, in `dtype`."""
    generator = torch.Generator().manual_seed(hash_seed)
    drawn = torch.randn(heads, width, rounds, sum(factors) // 2, generator=generator, dtype=dtype)
    return drawn.split([count // 2 for count in factors], -1)


FEW = 64
"""Tokens that are hashed for all heads in one product, as in a step: operators cost more than what they do there."""
AT_ONCE = 1 << 16
"""Products of tokens and rotations that are held for several heads at once; more are held for one."""


def hash_tokens(
    q: Float[Tensor, "M H D"], rotations: Sequence[Tensor], factors: tuple[int, ...]
) -> Int[Tensor, "H R M"]:
    """Bucket of each token in each round; with several factors, the mixed-radix number of their buckets."""
    M, H, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    rounds = rotations[0].shape[2]
    some = max(1, AT_ONCE // max(1, M * rounds * max(factors)))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        turns = [turn[..., : count // 2].to(q.device, exact) for turn, count in zip(rotations, factors)]
        if triton_reason(q.device) is None:
            return _at_once(q.transpose(0, 1).to(exact), turns, factors)
        buckets = torch.zeros(H, rounds, M, dtype=torch.int32, device=q.device)
        for start in range(0, H, some):
            heads = slice(start, min(start + some, H))
            vectors, found, radix = q[:, heads].transpose(0, 1).to(exact), None, 1
            for turn, count in zip(turns, factors):
                turned = turn[heads].flatten(2)
                if M <= FEW:
                    best = _largest_of_few((vectors @ turned).unflatten(2, (rounds, -1))).transpose(1, 2)
                else:
                    # one product a head: several at once are slower where there are many tokens
                    each = [r.T @ x.T for r, x in zip(turned, vectors)]
                    y = each[0][None] if len(each) == 1 else torch.stack(each)
                    best = _largest(y.unflatten(1, (rounds, -1)))
                found = best if found is None else found.add_(best, alpha=radix)
                radix *= count
            assert found is not None
            buckets[heads] = found
    return buckets


def _largest_of_few(y: Float[Tensor, "*tokens n"]) -> Int[Tensor, "*tokens"]:
    """As `_largest`, in fewer operators."""
    best, n = y.abs().argmax(-1, keepdim=True), y.shape[-1]
    return torch.where(y.gather(-1, best) >= 0, best, best + n)[..., 0].int()


def _largest(y: Float[Tensor, "h R n M"]) -> Int[Tensor, "h R M"]:
    """argmax [y; -y]: the largest magnitude, the first of them, and which half it came from."""
    n = y.shape[2]
    if n == 1:
        return (y[:, :, 0] < 0).int()
    if n == 2:
        first, second = y.unbind(2)
        other = second.abs() > first.abs()
        return other.int().add_(torch.where(other, second, first) < 0, alpha=2)
    # torch's argmax takes four times as long as finding the largest, and then who is as large
    size = y.abs()
    equals = size == size.amax(2, keepdim=True)
    kind = torch.uint8 if n <= 255 else torch.int32
    from_last = torch.arange(n, 0, -1, dtype=kind, device=y.device)[:, None]
    best = n - equals.to(kind).mul_(from_last).amax(2).int()
    best.clamp_(max=n - 1)  # NaN is as large as nobody
    return best.add_(y.gather(2, best[:, :, None].long())[:, :, 0] < 0, alpha=n)


def _at_once(q: Float[Tensor, "H M D"], turns: Sequence[Tensor], factors: Sequence[int]) -> Int[Tensor, "H R M"]:
    """The same in one product for all heads: on a GPU launches cost, and what is held does not."""
    found, radix = None, 1
    for turn, count in zip(turns, factors):
        y = torch.bmm(q, turn.flatten(2)).unflatten(-1, turn.shape[2:])
        best = torch.cat([y, -y], -1).argmax(-1)
        found = best if found is None else found + best * radix
        radix *= count
    assert found is not None
    return found.transpose(1, 2).int()


def hashes_at_once(q: Tensor, rotations: Mapping[tuple[int, ...], Sequence[Tensor]]) -> bool:
    """Whether one product may hash tokens of several kinds: on a GPU, each kind by one factor."""
    return triton_reason(q.device) is None and all(len(factors) == 1 for factors in rotations)


def hash_kinds(
    q: Float[Tensor, "M H D"], rotations: Sequence[Sequence[Tensor]], kind: Int[Tensor, " M"]
) -> Int[Tensor, "H R M"]:
    """As `hash_tokens`, of tokens each of which has rotations of its own: all are turned by all, in one product."""
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        turns = torch.cat([turn.to(q.device, exact) for (turn,) in rotations], -1)
        y = torch.bmm(q.transpose(0, 1).to(exact), turns.flatten(2)).unflatten(-1, turns.shape[2:])
        some = y.split([turn.shape[-1] for (turn,) in rotations], -1)
        found = torch.stack([torch.cat([each, -each], -1).argmax(-1) for each in some])
        index = kind[None, None, :, None].expand(1, *found.shape[1:])
        return found.gather(0, index)[0].transpose(1, 2).int()
