"""BigBird against Hugging Face's block-sparse attention: its random links are replayed by the `reference` plans.

Theirs plans by the padded length, and its last block is the padded one; ours by the number of tokens. Both mean the
same where padding only fills up the last block; where there is more, ours is told the padded length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens

from .case import FLOAT64, Bounds, Case, Errors, Leaves, at_columns, compare, padding, randomise, vectors

KERNELS = ("auto", "blocks", "tiles", "dense")
SHORT = Bounds(
    {torch.float32: Errors(1e-6, 8e-6), torch.float64: FLOAT64},
    "Where a softmax is nearly one-hot the gradients of queries cancel: by the CPU ours is 1.9e-6 to 3.5e-6 from its "
    "own float64 there, theirs 1.7e-6 to 1.9e-6.",
)
LONG = Bounds(
    {torch.float32: Errors(5e-6, 5e-6), torch.float64: FLOAT64},
    "Scores of up to 10 amplify rounding in float32: at 1,024 tokens theirs is 1.9e-6 from its own float64 result.",
)


def weights(leaves: Leaves) -> Leaves:
    names = {"query": "to_q", "key": "to_k", "value": "to_v"}
    return {f"{other}.{kind}": leaves[f"{mine}.{kind}"] for other, mine in names.items() for kind in ("weight", "bias")}


def run(seed: int, kernel: str, plan: str, dtype: torch.dtype, blocks: int | None = None) -> Errors:
    """Random block, links, length and padding; `blocks` to reach the lengths of the older plan."""
    from transformers.models.big_bird import modeling_big_bird as released

    rng = random.Random(seed)
    heads, width, links, batch = rng.choice([1, 2, 3]), 4, rng.randint(1, 3), 2
    block = 1024 // blocks if blocks else rng.choice([2, 4, 8])
    full = plan == "full"
    if blocks is None:
        most = 2 * links + 5  # so many blocks are still attended to in full
        blocks = rng.randint(1, most) if full else rng.randint(most + 1, most + 8)
    kind = rng.choice(["none", "fill", "right", "left", "holes"])
    length = blocks * block
    valid = padding(rng, batch, length, "right" if kind == "fill" else kind, block - 1 if kind == "fill" else None)
    tokens = Tokens.of(valid)
    tokens = tokens if kind in ("none", "fill") else at_columns(tokens)
    layer = zoo.build(
        "bigbird", dim=heads * width, heads=heads, causal=False, block=block, random=links, seed=seed, kernel=kernel,
        plan="reference" if full else plan,
    )  # fmt: skip
    layer.tile = 16
    randomise(layer.to(dtype), seed)
    config = released.BigBirdConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        block_size=block,
        num_random_blocks=links,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=4096,
    )
    if full:
        theirs = released.BigBirdSelfAttention(config)
    else:
        theirs = released.BigBirdBlockSparseAttention(config, seed=seed).train(plan == "reference")
    theirs.to(dtype)

    def run_theirs(leaves: Leaves, x: Tensor) -> Tensor:
        if full:
            call = (x, torch.where(valid, 0.0, -10_000.0).to(dtype)[:, None, None])
        else:
            masks = released.BigBirdModel.create_masks_for_block_sparse_attn
            blocked, *others = masks(valid.to(dtype), block)
            call = (x, *others, blocked, blocked)
        hidden = torch.func.functional_call(theirs, weights(leaves), call)[0]
        return nn.functional.linear(hidden, leaves["to_out.weight"], leaves["to_out.bias"])

    x = vectors(seed, batch, length, heads * width, dtype=dtype)
    return compare(layer, lambda x: layer(x, tokens).hidden, run_theirs, (x,), valid)


def cases() -> Iterator[Case]:
    for seed in range(8):
        kernel = KERNELS[seed % 4]
        name = f"seed {seed}, {kernel}"
        yield Case("bigbird", "Hugging Face BigBird, training", name, partial(run, seed, kernel, "reference"))
        yield Case("bigbird", "Hugging Face BigBird, evaluation", name, partial(run, seed, kernel, "reference_eval"))
        full = partial(run, seed, kernel, "full")
        yield Case("bigbird", "Hugging Face BigBird, short and so in full", name, full, SHORT)
    for seed, blocks in ((0, 16), (1, 32)):
        yield Case(
            "bigbird", "Hugging Face BigBird, training, 1,024 tokens", f"seed {seed}, {blocks} blocks",
            partial(run, seed, "auto", "reference", blocks=blocks), LONG,
        )  # fmt: skip
