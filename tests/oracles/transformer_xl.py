"""Transformer-XL against XLNet, its descendant in transformers: the relative shift, and the recurrence over segments.

Theirs is run segment by segment, with the hidden states of the ones before as detached memory. Its angles are computed
in float32 by the model; here its own formula gets them in the dtype of the test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens, Transformer

from .case import DEEP, Case, Errors, Leaves, compare, generator, randomise, vectors

KERNELS = ("auto", "shift", "gather")


def waves(queries: int, keys: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Their embedding of the distances from `keys` down to 0, [keys + 1, 1, E]."""
    from transformers.models.xlnet.modeling_xlnet import XLNetModel

    frequencies = 1 / torch.pow(10_000, torch.arange(0, dim, 2.0, dtype=dtype) / dim)
    return XLNetModel.positional_embedding(torch.arange(keys, -1, -1.0, dtype=dtype), frequencies)


def attention_weights(leaves: Leaves, ours: str, theirs: str, heads: int, bias_from: str = "") -> Leaves:
    """Theirs are [E, H, D]; u and v are called r_w_bias and r_r_bias."""
    found = {}
    for name in ("q", "k", "v", "r"):
        found[f"{theirs}{name}"] = leaves[f"{ours}to_{name}.weight"].T.unflatten(-1, (heads, -1))
    found[f"{theirs}o"] = leaves[f"{ours}to_out.weight"].unflatten(-1, (heads, -1))
    shared = bias_from or ours
    found[f"{theirs}r_w_bias"], found[f"{theirs}r_r_bias"] = leaves[f"{shared}u"], leaves[f"{shared}v"]
    return found


def config(dim: int, heads: int, **options: Any) -> Any:
    from transformers.models.xlnet.modeling_xlnet import XLNetConfig

    return XLNetConfig(
        d_model=dim, n_head=heads, attn_type="uni", dropout=0.0, layer_norm_eps=1e-5, **options
    )  # fmt: skip


def pieces(length: int, segment: int) -> Iterator[slice]:
    for start in range(0, length, segment):
        yield slice(start, min(start + segment, length))


def run_layer(seed: int, kernel: str, dtype: torch.dtype) -> Errors:
    """One layer over several segments, the last one cut short; padding on the left in whole segments."""
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    rng = random.Random(seed)
    heads, width, batch = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 3)
    dim, segment, memory = heads * width, rng.randint(1, 9), rng.randint(0, 12)
    length = rng.randint(1, 5 * segment)
    layer = zoo.build(
        "transformer_xl", dim=dim, heads=heads, bias=False, segment_length=segment, memory_length=memory, kernel=kernel
    )
    randomise(layer.to(dtype), seed)
    other = XLNetRelativeAttention(config(dim, heads)).to(dtype)
    other.layer_norm = nn.Identity()
    other.post_attention = partial(other.post_attention, residual=False)
    padded = torch.tensor([segment * rng.randint(0, (length - 1) // segment) for _ in range(batch)])
    valid = torch.arange(length) >= padded[:, None]
    tokens = Tokens.of(valid)
    in_pieces = rng.random() < 0.5

    def run_ours(x: Tensor) -> Tensor:
        if not in_pieces:
            return layer(x, tokens).hidden
        state, hidden = layer.initial_state(batch), []
        for piece in pieces(length, segment):
            out = layer(x[:, piece], tokens.cut(piece), state=state)
            state = out.state
            hidden.append(out.hidden)
        return torch.cat(hidden, 1)

    def run_theirs(leaves: Leaves, x: Tensor) -> Tensor:
        weights = attention_weights(leaves, "", "", heads)
        x, hidden = x.transpose(0, 1), []
        for piece in pieces(length, segment):
            oldest = max(0, piece.start - memory)
            kept = piece.start - oldest
            mems = x[oldest : piece.start].detach() if kept else None
            queries = piece.stop - piece.start
            keys = kept + queries
            hidden_keys = ~valid[:, oldest : piece.stop].T[None, :, :, None]
            mask = torch.ones(queries, keys, dtype=torch.bool).triu(kept + 1)[..., None, None] | hidden_keys
            r = waves(queries, keys, dim, dtype).expand(-1, batch, -1)
            call = (x[piece], None, mask.to(dtype), None, r, None)
            hidden.append(torch.func.functional_call(other, weights, call, {"mems": mems})[0])
        return torch.cat(hidden).transpose(0, 1)

    return compare(layer, run_ours, run_theirs, (vectors(seed, batch, length, dim, dtype=dtype),), valid)


def run_model(seed: int, dtype: torch.dtype) -> Errors:
    """A whole model of several layers over several segments, each layer with a memory of its own; post-norm."""
    from transformers.models.xlnet.modeling_xlnet import XLNetModel

    rng = random.Random(seed)
    heads, width, batch, depth, vocab = rng.choice([1, 2]), 8, rng.randint(1, 3), rng.randint(1, 3), 11
    dim, segment, memory = heads * width, rng.randint(2, 8), rng.randint(1, 12)
    untie, activation = rng.random() < 0.5, rng.choice(["relu", "gelu"])
    length = rng.randint(segment + 1, 5 * segment)
    options = {"segment_length": segment, "memory_length": memory, "untie_r": untie, "bias": False}
    model = Transformer(
        attention={"name": "transformer_xl", **options}, vocab=vocab, dim=dim, depth=depth, heads=heads,
        positions="relative", pre_norm=False, feed_forward=activation, head="hidden",
    )  # fmt: skip
    randomise(model.to(dtype), seed)
    other = XLNetModel(
        config(dim, heads, n_layer=depth, d_inner=4 * dim, vocab_size=vocab, mem_len=memory, ff_activation=activation)
    )
    other.to(dtype).train()
    other.relative_positional_encoding = lambda queries, keys, bsz, device: waves(queries, keys, dim, dtype).expand(
        -1, bsz, -1
    )
    ids = torch.randint(vocab, (batch, length), generator=generator(seed))

    def run_theirs(leaves: Leaves) -> Tensor:
        weights = {"word_embedding.weight": leaves["embedding.weight"] * dim**0.5}
        for index in range(depth):
            block, layer = f"stack.layers.{index}.layers", f"layer.{index}"
            first = "" if untie else "stack.layers.0.layers.0.body.layers.0."
            weights.update(attention_weights(leaves, f"{block}.0.body.layers.0.", f"{layer}.rel_attn.", heads, first))
            for name, mine in (
                ("rel_attn.layer_norm", "0.norm"),
                ("ff.layer_norm", "1.norm"),
                ("ff.layer_1", "1.body.layers.0.into"),
                ("ff.layer_2", "1.body.layers.0.out"),
            ):
                weights.update(
                    {f"{layer}.{name}.{kind}": leaves[f"{block}.{mine}.{kind}"] for kind in ("weight", "bias")}
                )
        mems, hidden = None, []
        for piece in pieces(length, segment):
            more = {"input_ids": ids[:, piece], "mems": mems, "use_mems": True, "return_dict": True}
            out = torch.func.functional_call(other, weights, (), more)
            mems = out.mems
            hidden.append(out.last_hidden_state)
        return torch.cat(hidden, 1)

    valid = torch.ones(batch, length, dtype=torch.bool)
    return compare(model, lambda: model(ids).hidden, run_theirs, (), valid)


def cases() -> Iterator[Case]:
    for seed in range(9):
        kernel = KERNELS[seed % 3]
        yield Case("transformer_xl", "XLNet attention", f"seed {seed}, {kernel}", partial(run_layer, seed, kernel))
    for seed in range(4):
        yield Case("transformer_xl", "XLNet model", f"seed {seed}", partial(run_model, seed), DEEP)
