"""LSH attention against Hugging Face's and reformer-pytorch's, with their buckets replayed.

Both look back over the border of rounds (`wrap="reference"`) and hold a token from attending to itself by a large
finite number, where ours is exact. A token that sees nothing else then has a log-sum-exp of -1e5 (-5e4), of which the
last place is 1.5e-11 in float64 and 0.008 in float32; merging several rounds makes that the error of its output. Such
tokens are left out of the strict cases, and compared by themselves in float64.

Padding: theirs sorts it to the end of each round, ours drops it. That is the same while it all fits into the last
chunk; beyond, theirs has chunks of padding to look back to, and `fill` leaves them empty places. With that and its
`hash_seed` ours needs no replayed buckets. reformer-pytorch sorts padding among the tokens, so that none is given.

Counting repeated pairs once, reformer-pytorch overlooks those met over the border of rounds: it divides by 1e-9 where
it should by 1. Queries of a first chunk are left out there, in which ours and theirs differ by up to 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.attention.reformer import Reformer
from attention_zoo.ops.lsh.hashing import hash_tokens

from .case import FLOAT32, FLOAT64, Bounds, Case, Errors, Leaves, at_columns, compare, padding, randomise, vectors

KERNELS = ("auto", "dense")
ROUNDED = Bounds(
    {torch.float32: Errors(2e-6, 2e-6), torch.float64: FLOAT64},
    "Scores are not scaled down: of one element on an Intel Xeon ours is 5e-7 from its own float64, theirs 1.1e-6.",
)
ALONE = Bounds(
    {torch.float64: Errors(5e-11, 5e-11)},
    "Theirs weighs several rounds of a token that sees only itself by a log-sum-exp of -1e5 (-5e4), whose last place "
    "is 1.5e-11 in float64. In float32 it is 0.008: such tokens are left out of the rows above.",
)
HASHED = Bounds(
    ALONE.errors,
    "In float32 a bucket may flip by rounding, which changes outputs at O(1). Tokens that see only themselves are "
    "among them, for which see the note on these.",
)
COUNTED = Bounds(
    {torch.float32: FLOAT32, torch.float64: Errors(1e-7, 1e-7)},
    "Theirs adds 1e-9 to the times that each pair was met: 2e-8 in the output.",
)


def build(seed: int, heads: int, width: int, dtype: torch.dtype, **options: object) -> Reformer:
    layer = zoo.build("reformer", dim=heads * width, heads=heads, bias=False, wrap="reference", seed=seed, **options)
    assert isinstance(layer, Reformer)
    layer.to_out = nn.Identity()  # theirs ends before the last projection
    randomise(layer.to(dtype), seed)
    return layer


def compare_tokens(
    layer: Reformer,
    tokens: Tokens,
    buckets: Tensor,
    run_theirs: Callable[[Leaves, Tensor], Tensor],
    x: Tensor,
    alone: bool,
    skip: Tensor | None = None,
) -> Errors:
    """Compare token by token and head by head.

    Args:
        buckets: [B, H, R, L], replayed.
        skip: bool [B, L, H], what not to compare.
        alone: whether tokens that see only themselves count, whose output is their value.
    """

    def per_head(y: Tensor) -> Tensor:
        return y.unflatten(-1, (layer.heads, -1))

    def run_ours(x: Tensor) -> Tensor:
        return per_head(layer(x, tokens, choices=buckets[..., None].int()).hidden)

    counts = tokens.valid[..., None].expand(-1, -1, layer.heads)
    counts = counts if skip is None else counts & ~skip
    if not alone:
        with torch.no_grad():
            lonely = (run_ours(x) == per_head(layer.to_v(x))).all(-1) & counts
            theirs = per_head(run_theirs(dict(layer.named_parameters()), x))
            assert torch.allclose(theirs[lonely], per_head(layer.to_v(x))[lonely], rtol=2e-2)
        counts = counts & ~lonely
    return compare(layer, run_ours, lambda leaves, x: per_head(run_theirs(leaves, x)), (x,), counts)


def run_hugging_face(seed: int, rounds: int, causal: bool, alone: bool, dtype: torch.dtype) -> Errors:
    """LSHSelfAttention: no 1/sqrt(D) in the scores, an epsilon in the norm of keys."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

    rng = random.Random(seed)
    heads, width, batch, chunk = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 2), rng.choice([4, 6, 16])
    back, ahead = rng.choice([(1, 0), (1, 0), (2, 0), (1, 1)])
    length = chunk * rng.randint(1 + back + ahead, 8)
    count = rng.choice([2, 4, 6, [2, 4], [4, 6]])
    layer = build(
        seed, heads, width, dtype, rounds=rounds, chunk=chunk, buckets=count, causal=causal, look_back=back,
        look_ahead=ahead, scale=1.0, key_norm_epsilon=1e-6, kernel=rng.choice(KERNELS),
    )  # fmt: skip
    config = ReformerConfig(
        hidden_size=heads * width,
        attention_head_size=width,
        num_attention_heads=heads,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=back,
        lsh_num_chunks_after=ahead,
        num_hashes=rounds,
        num_buckets=count,
        is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=seed,
    )
    other = LSHSelfAttention(config, layer_idx=0).to(dtype)
    valid = padding(rng, batch, length, rng.choice(["none", "right", "left", "holes"]), chunk - 1)

    def call(leaves: Leaves, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = {"query_key.weight": leaves["to_qk.weight"], "value.weight": leaves["to_v.weight"]}
        out = torch.func.functional_call(other, weights, (x,), {"attention_mask": valid.to(dtype)})
        return out.hidden_states, out.buckets

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    factors = (count,) if isinstance(count, int) else tuple(count)
    with torch.no_grad():
        buckets = call(dict(layer.named_parameters()), x)[1]
        most = torch.tensor(factors).prod() + (not bool(valid.all()))  # padding has a bucket of its own
        buckets = buckets - most * torch.arange(rounds)[:, None]
        # our hashing by their rotations
        torch.manual_seed(seed)
        drawn = torch.randn(heads, width, rounds, sum(factors) // 2, dtype=dtype)
        mine = hash_tokens(
            layer.to_qk(x)[valid].unflatten(-1, (heads, -1)), drawn.split([n // 2 for n in factors], -1), factors
        )
        if dtype == torch.float64:  # in float32 a bucket may flip by rounding
            assert torch.equal(buckets.permute(1, 2, 0, 3)[:, :, valid], mine.long())
    return compare_tokens(layer, Tokens.of(valid), buckets, lambda leaves, x: call(leaves, x)[0], x, alone)


def run_as_released(seed: int, causal: bool, dtype: torch.dtype) -> Errors:
    """Nothing replayed: rotations, bucket counts, any padding, windows longer than all chunks are ours to find."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

    rng = random.Random(seed)
    heads, width, batch, chunk = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 3), rng.choice([2, 3, 4, 8])
    rounds, back, ahead = 1 if causal else rng.randint(1, 4), rng.randint(0, 3), rng.randint(0, 2)
    length = chunk * rng.randint(2, 9) if rng.random() < 0.8 else rng.randint(1, chunk)
    count = rng.choice([None, None, 2, 6, [2, 4]])
    layer = build(
        seed, heads, width, dtype, rounds=rounds, chunk=chunk, buckets=count, causal=causal, look_back=back,
        look_ahead=ahead, scale=1.0, key_norm_epsilon=1e-6, fill=chunk, hash_seed=seed, split_above=2 * chunk,
        kernel=rng.choice(KERNELS),
    )  # fmt: skip
    config = ReformerConfig(
        hidden_size=heads * width,
        attention_head_size=width,
        num_attention_heads=heads,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=back,
        lsh_num_chunks_after=ahead,
        num_hashes=rounds,
        num_buckets=count,
        max_position_embeddings=1,
        is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=seed,
    )
    other = LSHSelfAttention(config, layer_idx=0).to(dtype)
    valid = padding(rng, batch, length, rng.choice(["none", "right", "left", "holes"]))

    def run_theirs(leaves: Leaves, x: Tensor) -> Tensor:
        weights = {"query_key.weight": leaves["to_qk.weight"], "value.weight": leaves["to_v.weight"]}
        mask = {"attention_mask": valid.to(dtype)}
        return torch.func.functional_call(other, weights, (x,), mask).hidden_states

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    return compare(layer, lambda x: layer(x, at_columns(Tokens.of(valid))).hidden, run_theirs, (x,), valid)


def run_reformer_pytorch(
    seed: int, rounds: int, causal: bool, alone: bool, dtype: torch.dtype, *, across: bool = True, once: bool = False
) -> Errors:
    """LSHSelfAttention of reformer-pytorch: it can stay inside buckets and count a repeated pair once, too."""
    from reformer_pytorch import LSHSelfAttention

    rng = random.Random(seed)
    heads, width, batch, chunk = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 2), rng.choice([4, 6, 16])
    length = 2 * chunk * rng.randint(1, 4)
    layer = build(
        seed, heads, width, dtype, rounds=rounds, chunk=chunk, buckets=length // chunk, causal=causal,
        attend_across_buckets=across, correct_duplicates=once, kernel=rng.choice(KERNELS),
    )  # fmt: skip
    other = LSHSelfAttention(
        heads * width,
        heads=heads,
        bucket_size=chunk,
        n_hashes=rounds,
        causal=causal,
        dim_head=width,
        random_rotations_per_head=True,
        attend_across_buckets=across,
        allow_duplicate_attention=not once,
    ).to(dtype)
    other.to_out = nn.Identity()
    seen = []
    other.lsh_attn.register_forward_hook(lambda module, inputs, out: seen.append(out[2]))

    def run_theirs(leaves: Leaves, x: Tensor) -> Tensor:
        torch.manual_seed(seed)  # they hash anew at each call
        weights = {"toqk.weight": leaves["to_qk.weight"], "tov.weight": leaves["to_v.weight"]}
        return torch.func.functional_call(other, weights, (x,))

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    with torch.no_grad():
        run_theirs(dict(layer.named_parameters()), x)
        buckets = seen[0].view(batch, heads, rounds, length) - length // chunk * torch.arange(rounds)[:, None]
    place = buckets.argsort(dim=-1, stable=True).argsort(-1)
    skip = (place < chunk).any(2).transpose(1, 2) if once and across and rounds > 1 else None
    return compare_tokens(layer, Tokens.all_valid(batch, length), buckets, run_theirs, x, alone, skip)


def cases() -> Iterator[Case]:
    for seed in range(12):
        for causal in (False, True):
            yield Case(
                "reformer", "Hugging Face Reformer, nothing replayed", f"seed {seed}, causal {causal}",
                partial(run_as_released, seed, causal), HASHED,
            )  # fmt: skip
    for seed in range(6):
        for rounds in (1, 4):
            for causal in (False, True):
                exact = rounds == 1 or not causal
                direction = "causal" if causal else "two-sided"
                name = f"seed {seed}, {direction}, {rounds} rounds"
                hugging_face = partial(run_hugging_face, seed, rounds, causal)
                lucidrains = partial(run_reformer_pytorch, seed, rounds, causal)
                yield Case("reformer", "Hugging Face Reformer", name, partial(hugging_face, exact), ROUNDED)
                yield Case("reformer", "reformer-pytorch", name, partial(lucidrains, exact))
                if not exact:
                    yield Case(
                        "reformer", "Hugging Face, tokens that see only themselves", name,
                        partial(hugging_face, True), ALONE,
                    )  # fmt: skip
                    yield Case(
                        "reformer", "reformer-pytorch, tokens that see only themselves", name,
                        partial(lucidrains, True), ALONE,
                    )  # fmt: skip
                inside = partial(lucidrains, False, across=False)
                counted = partial(lucidrains, False, across=seed % 2 == 0, once=True)
                yield Case("reformer", "reformer-pytorch, inside buckets", name, inside)
                yield Case("reformer", "reformer-pytorch, repeated pairs once", name, counted, COUNTED)
