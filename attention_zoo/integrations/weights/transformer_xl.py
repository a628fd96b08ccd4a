"""Transformer-XL (Dai et al. 2019), as transformers up to 4.35 runs and saves it (`model_type` transfo-xl).

Theirs has no padding mask: rows are full. It begins with memories of zeros, and sees them. A call is a segment there;
here segments follow positions and `segment_length`, which the config does not know. With `same_length`, as released,
that makes no difference: every token sees the last `mem_len` tokens, itself among them. Without, a token sees its
segment from the beginning, and the results are theirs where calls and segments agree; `segment_length` may be set on
the layers of the converted model, and is `mem_len` until then.

With `pre_lnorm` the zeros of the first memory pass through each layer's norm; what comes out is kept as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo.integrations.weights.family import Family, Plan
from attention_zoo.integrations.weights.mapping import (
    Rule,
    Rules,
    attention_at,
    copies,
    copy,
    feed_forward_at,
    norm_at,
    prefix_of,
)
from attention_zoo.integrations.weights.settings import Settings


def _plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    prefix = prefix_of(tensors, "transformer.")
    settings.only("attn_type", 0, instead="a checkpoint with attn_type=0, the relative attention of the paper")
    settings.only("adaptive", True, instead="a checkpoint with adaptive=true; without cutoffs it is a plain softmax")
    if (sampled := settings.number("sample_softmax", -1)) > 0:
        raise settings.unsupported("sample_softmax", sampled, "logits are computed in full", "sample_softmax=-1")
    settings.harmless(
        "init", "init_range", "init_std", "proj_init_std", "proj_share_all_but_first", "trainer_compatible",
        "pruned_heads",
    )  # fmt: skip
    depth, dim, width = settings.number("n_layer", 18), settings.number("d_model", 1024), settings.number("d_head", 64)
    cutoffs, divide = settings.get("cutoffs", [20000, 40000, 200000]), settings.number("div_val", 4)
    d_embed = settings.number("d_embed", 1024)
    tied = bool(settings.get("tie_word_embeddings", True))
    tied_projections = [bool(word) for word in settings.get("tie_projs", [False] + [True] * len(cutoffs))]
    pre_norm, untie = bool(settings.get("pre_lnorm", False)), bool(settings.get("untie_r", True))
    dropout = settings.number("dropout", 0.1)
    projected = divide > 1 or d_embed != dim
    options: dict[str, Any] = {
        "attention": _attention(settings, width, untie),
        "vocab": settings.number("vocab_size", 267735),
        "dim": dim,
        "depth": depth,
        "heads": settings.number("n_head", 16),
        "causal": True,
        "head": {"name": "lm", **({"tied_projections": tied_projections} if projected else {})}
        if head == "lm"
        else head,
        "positions": "relative",
        "pre_norm": pre_norm,
        "last_norm": False,
        "norm": {"name": "layer", "eps": settings.number("layer_norm_epsilon", 1e-5)},
        "feed_forward": {"name": "relu", "width": settings.number("d_inner", 4096)},
        "output_dropout": dropout,
        "embedding": {"cutoffs": cutoffs, "divide": divide, "width": d_embed, "dropout": dropout},
        "tied": tied,
    }
    clusters = len(cutoffs) + 1
    tables = clusters if divide > 1 else 1
    rules = _body(prefix, depth, untie, pre_norm)
    unused = [f"{prefix}pos_emb.inv_freq", *([] if untie else [f"{prefix}layers.*.dec_attn.r_[rw]_bias"])]
    for index in range(tables):
        rules |= copy(f"embedding.tables.{index}.weight", f"{prefix}word_emb.emb_layers.{index}.weight")
        if projected:
            rules |= copy(f"embedding.projections.{index}", f"{prefix}word_emb.emb_projs.{index}")
    if head != "lm":
        return Plan(options, rules, (*unused, "crit.*"), settings.number("dropatt", 0.0))
    for index in range(tables):
        rules |= copy(f"head.biases.{index}", f"crit.out_layers.{index}.bias")
        if tied:
            unused.append(f"crit.out_layers.{index}.weight")
        else:
            rules |= copy(f"head.weights.{index}", f"crit.out_layers.{index}.weight")
    for index in range(clusters if projected else 0):
        if tied_projections[index]:
            unused.append(f"crit.out_projs.{index}")
        else:
            rules |= copy(f"head.projections.{index}", f"crit.out_projs.{index}")
    if clusters > 1:
        rules |= copy("head.clusters.weight", "crit.cluster_weight") | copy("head.clusters.bias", "crit.cluster_bias")
    return Plan(options, rules, tuple(unused), settings.number("dropatt", 0.0))


def _attention(settings: Settings, width: int, untie: bool) -> dict[str, Any]:
    memory, same_length = settings.number("mem_len", 1600), bool(settings.get("same_length", True))
    clamp = settings.number("clamp_len", 1000)
    if memory < 1 and same_length:
        raise settings.unsupported("mem_len", memory, "with same_length a token then sees nothing", "mem_len=1 or more")
    return {
        "name": "transformer_xl",
        "head_width": width,
        "bias": False,
        "segment_length": max(1, memory),
        # theirs counts the token itself among those
        "memory_length": memory - 1 if same_length else memory,
        "same_length": same_length,
        "untie_r": untie,
        "clamp_length": clamp if clamp > 0 else None,
        "initial_memory": "zeros",
    }


def _body(prefix: str, depth: int, untie: bool, pre_norm: bool) -> Rules:
    rules: Rules = {}
    for layer in range(depth):
        ours, theirs = attention_at(layer), f"{prefix}layers.{layer}"
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            rules[f"{ours}.{name}.weight"] = Rule(
                (f"{theirs}.dec_attn.qkv_net.weight",), lambda stacked, part=part: stacked.chunk(3)[part]
            )
        rules |= copies(f"{ours}.to_r", f"{theirs}.dec_attn.r_net", bias=False)
        rules |= copies(f"{ours}.to_out", f"{theirs}.dec_attn.o_net", bias=False)
        if untie or not layer:
            biases = f"{theirs}.dec_attn." if untie else prefix
            rules |= copy(f"{ours}.u", f"{biases}r_w_bias") | copy(f"{ours}.v", f"{biases}r_r_bias")
        shift = f"{theirs}.dec_attn.layer_norm.bias"
        rules[f"{ours}.blank"] = Rule((shift,), lambda bias: bias if pre_norm else bias * 0)
        rules |= copies(norm_at(layer, 0), f"{theirs}.dec_attn.layer_norm")
        rules |= copies(f"{feed_forward_at(layer)}.into", f"{theirs}.pos_ff.CoreNet.0")
        rules |= copies(f"{feed_forward_at(layer)}.out", f"{theirs}.pos_ff.CoreNet.3")
        rules |= copies(norm_at(layer, 1), f"{theirs}.pos_ff.layer_norm")
    return rules


TRANSFORMER_XL = Family(_plan, ("TransfoXLLMHeadModel",), ("TransfoXLModel",))
