"""Full attention and the skeleton against torch.nn: MultiheadAttention, TransformerEncoder, TransformerDecoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import EncoderDecoder, Source, Tokens, Transformer

from .case import DEEP, Case, Errors, Leaves, compare, generator, padding, randomise, vectors

KERNELS = ("auto", "sdpa", "tiles", "dense")


def attention_weights(leaves: Leaves, ours: str, theirs: str) -> Leaves:
    """MultiheadAttention stacks the three projections."""
    found = {f"{theirs}out_proj.{kind}": leaves[f"{ours}to_out.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        found[f"{theirs}in_proj_{kind}"] = torch.cat([leaves[f"{ours}to_{name}.{kind}"] for name in "qkv"])
    return found


def future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def run_attention(seed: int, kernel: str, role: str, dtype: torch.dtype) -> Errors:
    """One layer: two-sided, causal, or over a source."""
    rng = random.Random(seed)
    heads, width, batch = rng.choice([1, 2, 3]), rng.choice([4, 8]), rng.randint(1, 3)
    length, there = rng.randint(1, 50), rng.randint(1, 50)
    dim = heads * width
    cross, causal = role == "cross", role == "causal"
    layer = zoo.build("full", dim=dim, heads=heads, causal=causal, cross=cross, kernel=kernel)
    layer.tile = 16
    randomise(layer.to(dtype), seed)
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=dtype)
    # torch's fused kernel has no mask for that, which ours says
    kinds = ["none", "right"] if causal and kernel == "sdpa" else ["none", "right", "left", "holes"]
    kind = rng.choice(kinds)
    valid = padding(rng, batch, length, kind)
    keys = padding(rng, batch, there, kind) if cross else valid
    inputs = [vectors(seed, batch, length, dim, dtype=dtype)]
    if cross:
        inputs.append(vectors(seed + 1, batch, there, dim, dtype=dtype))

    def run_ours(x: Tensor, source: Tensor | None = None) -> Tensor:
        return layer(
            x, Tokens.of(valid), source=None if source is None else Source(source, Tokens.of(keys))
        ).hidden  # fmt: skip

    def run_theirs(leaves: Leaves, x: Tensor, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        options = {
            "key_padding_mask": ~keys,
            "attn_mask": future(length) if causal else None,
            "need_weights": False,
        }
        call = (x, source, source)
        return torch.func.functional_call(theirs, attention_weights(leaves, "", ""), call, options)[0]

    return compare(layer, run_ours, run_theirs, tuple(inputs), valid)


def stack_weights(leaves: Leaves, ours: str, depth: int, cross: bool) -> Leaves:
    """Of an encoder's or decoder's layers, and its last norm if it has one."""
    found: Leaves = {}

    def copy(other: str, mine: str) -> None:
        found.update({f"{other}.{kind}": leaves[f"{ours}{mine}.{kind}"] for kind in ("weight", "bias")})

    for layer in range(depth):
        block, other = f"stack.layers.{layer}.layers", f"layers.{layer}"
        found.update(attention_weights(leaves, f"{ours}{block}.0.body.layers.0.", f"{other}.self_attn."))
        last = 2 if cross else 1
        if cross:
            found.update(attention_weights(leaves, f"{ours}{block}.1.body.layers.0.", f"{other}.multihead_attn."))
        copy(f"{other}.linear1", f"{block}.{last}.body.layers.0.into")
        copy(f"{other}.linear2", f"{block}.{last}.body.layers.0.out")
        for branch in range(last + 1):
            copy(f"{other}.norm{branch + 1}", f"{block}.{branch}.norm")
    if f"{ours}norm.weight" in leaves:
        copy("norm", "norm")
    return found


def foreign(kind: str, depth: int, dim: int, heads: int, norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer if kind == "encoder" else nn.TransformerDecoderLayer
    one = layer(dim, heads, 4 * dim, 0.0, activation, batch_first=True, norm_first=norm_first)
    norm = nn.LayerNorm(dim) if norm_first else None
    if kind == "encoder":
        return nn.TransformerEncoder(one, depth, norm, enable_nested_tensor=False)
    return nn.TransformerDecoder(one, depth, norm)


def run_skeleton(seed: int, kind: str, pre_norm: bool, dtype: torch.dtype) -> Errors:
    """From ids to hidden states or logits: encoder, causal language model, or encoder and decoder."""
    rng = random.Random(seed)
    heads, width, depth, vocab = rng.choice([1, 2]), 8, rng.randint(1, 3), 11
    dim, activation = heads * width, rng.choice(["relu", "gelu"])
    options = {
        "attention": "full", "vocab": vocab, "dim": dim, "depth": depth, "heads": heads, "positions": "none",
        "pre_norm": pre_norm, "feed_forward": activation,
    }  # fmt: skip
    encoder = Transformer(causal=False, head="hidden", **options)
    decoder = Transformer(causal=True, cross=kind == "both", head="lm", **options)
    models = {
        "encoder": encoder,
        "language model": decoder,
        "both": EncoderDecoder(encoder=encoder, decoder=decoder) if kind == "both" else None,
    }
    model = models[kind]
    randomise(model.to(dtype), seed)
    batch, length, there = rng.randint(1, 3), rng.randint(1, 30), rng.randint(1, 30)
    padded = rng.choice(["none", "right", "left", "holes"])
    valid, keys = padding(rng, batch, length, padded), padding(rng, batch, there, padded)
    ids, source = (torch.randint(vocab, (batch, n), generator=generator(seed)) for n in (length, there))
    other = {name: foreign(name, depth, dim, heads, pre_norm, activation).to(dtype) for name in ("encoder", "decoder")}

    def embed(leaves: Leaves, prefix: str, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, leaves[f"{prefix}embedding.weight"]) * dim**0.5

    def encode(leaves: Leaves, prefix: str, ids: Tensor, valid: Tensor, causal: bool) -> Tensor:
        more = {"src_key_padding_mask": ~valid, "mask": future(ids.shape[1]) if causal else None}
        weights = stack_weights(leaves, prefix, depth, False)
        return torch.func.functional_call(other["encoder"], weights, (embed(leaves, prefix, ids),), more)

    def run_ours() -> Tensor:
        more = {"source": (source, Tokens.of(keys))} if kind == "both" else {}
        out = model(ids, Tokens.of(valid), **more)
        return out.hidden if kind == "encoder" else out.logits

    def run_theirs(leaves: Leaves) -> Tensor:
        if kind != "both":
            hidden = encode(leaves, "", ids, valid, kind != "encoder")
            return hidden if kind == "encoder" else hidden @ leaves["embedding.weight"].T
        memory = encode(leaves, "encoder.", source, keys, False)
        weights = stack_weights(leaves, "decoder.", depth, True)
        more = {"tgt_mask": future(length), "tgt_key_padding_mask": ~valid, "memory_key_padding_mask": ~keys}
        call = (embed(leaves, "decoder.", ids), memory)
        hidden = torch.func.functional_call(other["decoder"], weights, call, more)
        return hidden @ leaves["decoder.embedding.weight"].T

    return compare(model, run_ours, run_theirs, (), valid)


def cases() -> Iterator[Case]:
    for seed in range(8):
        kernel = KERNELS[seed % 4]
        for role in ("two-sided", "causal", "cross"):
            yield Case(
                "full", f"torch.nn.MultiheadAttention, {role}", f"seed {seed}, {kernel}",
                partial(run_attention, seed, kernel, role),
            )  # fmt: skip
    oracles = {
        "encoder": "torch.nn.TransformerEncoder",
        "language model": "torch.nn.TransformerEncoder, causal",
        "both": "torch.nn.TransformerEncoder and Decoder",
    }
    for seed in range(4):
        for kind, oracle in oracles.items():
            for pre_norm in (True, False):
                name = f"seed {seed}, {'pre' if pre_norm else 'post'}-norm"
                yield Case("the skeleton", oracle, name, partial(run_skeleton, seed, kind, pre_norm), DEEP)
