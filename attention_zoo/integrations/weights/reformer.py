"""Reformer (Kitaev et al. 2020) as transformers has it: a causal or a masked language model.

Layers of LSH and local attention, reversible, whose two streams end side by side; axial or learned positions.

- Everything that theirs does with lengths is followed: filling up to the common multiple of the chunk lengths, bucket
  counts from that, chunks of padding. Give `weights.tokens_of(mask)` with a batch of rows of several lengths.
- Theirs keeps the bucket count of the first call longer than a chunk for good. A config that names none is read as that
  of a model that has not been called: each call finds its own.
- Theirs draws rotations anew at each call unless `hash_seed` is given; then ours are the same. Without, ours follow
  our seed in evaluation.
- Equal text needs the whole prefix at each step: `generate(..., cached=False)` here, `use_cache=False` there. With
  caches both approximate, each in its way.
- The bias of the head is taken as the version did that wrote the checkpoint. In transformers 4, which trained the
  released ones, `lm_head.bias` and `lm_head.decoder.bias` were one tensor and part of the logits. In transformers 5
  up to 5.23 the first is saved alone and not used. In 5.24 both are saved, each by itself, and the second alone is
  used. (So 5.24 starts from zero where only the first was saved: it loses the bias of transformers 4; ours keeps it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo.integrations.weights.bert import activation
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

DEFAULT_LAYERS = ["local", "lsh", "local", "lsh", "local", "lsh"]
QUERY_KEY_VALUE = {
    "lsh": {"to_qk": "query_key", "to_v": "value"},
    "local": {"to_q": "query", "to_k": "key", "to_v": "value"},
}


def _plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    prefix = prefix_of(tensors, "reformer.")
    settings.only("tie_word_embeddings", False, instead="a checkpoint with an output matrix of its own")
    settings.only("pruned_heads", {}, instead="a checkpoint that keeps all heads")
    # how a call is run, and what other heads and first weights look like
    settings.harmless(
        "chunk_size_lm_head", "axial_norm_std", "num_hidden_layers", "num_chunks_after", "sinusoidal_pos_embds"
    )
    kinds = list(settings.get("attn_layers", DEFAULT_LAYERS))
    if not kinds or not set(kinds) <= {"lsh", "local"}:
        raise settings.unsupported("attn_layers", kinds, "layers are lsh or local", "a list of these words")
    causal, dim = bool(settings.get("is_decoder", False)), settings.number("hidden_size", 256)
    dropout = settings.number("hidden_dropout_prob", 0.05)
    positions, length, rules = _positions(settings, prefix)
    bias = _bias_of_head(settings, tensors) if head == "lm" else None
    options: dict[str, Any] = {
        "attention": _layers(settings, kinds, causal),
        "vocab": settings.number("vocab_size", 320),
        "dim": dim,
        "depth": len(kinds),
        "heads": settings.number("num_attention_heads", 12),
        "causal": causal,
        "head": {"name": "lm", "bias": bias is not None} if head == "lm" else "hidden",
        "positions": positions,
        "max_length": length,
        "pre_norm": True,
        "norm": {"name": "layer", "eps": settings.number("layer_norm_eps", 1e-12)},
        "feed_forward": {
            "name": activation(settings, "hidden_act", "relu"), "width": settings.number("feed_forward_size", 512),
        },
        "output_dropout": dropout,
        "embedding": {"scale": 1.0, "dropout": dropout},
        "tied": False,
        "reversible": "both",
    }  # fmt: skip
    rules |= _body(prefix, kinds)
    unused = [f"{prefix}encoder.layers.*mask_value_float*", "lm_head.bias", "lm_head.decoder.bias"]
    if head == "lm":
        rules |= copy("head.weight", "lm_head.decoder.weight")
        if bias is not None:
            rules |= copy("head.bias", bias)
    elif prefix:
        unused += [name for name in tensors if not name.startswith(prefix)]
    inside = max(
        (settings.number("lsh_attention_probs_dropout_prob", 0.0) if "lsh" in kinds else 0.0),
        (settings.number("local_attention_probs_dropout_prob", 0.05) if "local" in kinds else 0.0),
    )
    settings.harmless("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    return Plan(options, rules, tuple(unused), inside)


def _bias_of_head(settings: Settings, tensors: Mapping[str, Tensor]) -> str | None:
    """The key of the bias that was part of the logits; None if none was. The oldest configs name no version."""
    major = str(settings.get("transformers_version", "0")).partition(".")[0]
    if "lm_head.decoder.bias" in tensors:
        return "lm_head.decoder.bias"
    return "lm_head.bias" if not major.isdigit() or int(major) < 5 else None


def _layers(settings: Settings, kinds: list[str], causal: bool) -> list[dict[str, Any]]:
    chunks = {
        "lsh": settings.number("lsh_attn_chunk_length", 64),
        "local": settings.number("local_attn_chunk_length", 64),
    }
    fill = math.lcm(*(chunks[kind] for kind in set(kinds)))
    found = {}
    for kind, chunk in chunks.items():
        back = settings.number(f"{kind}_num_chunks_before", 1)
        ahead = settings.number(f"{kind}_num_chunks_after", 0)
        if causal and ahead and kind in kinds:
            name = f"{kind}_num_chunks_after"
            raise settings.unsupported(name, ahead, "a causal model does not look ahead", f"{name}=0")
        found[kind] = {
            "head_width": settings.number("attention_head_size", 64),
            "bias": False,
            "chunk": chunk,
            "look_back": back,
            "look_ahead": ahead,
            "fill": fill,
        }
    length, seed = settings.number("max_position_embeddings", 4096), settings.get("hash_seed")
    found["local"] = {"name": "reformer.local", **found["local"]}
    found["lsh"] = {
        "name": "reformer",
        **found["lsh"],
        "rounds": settings.number("num_hashes", 1),
        "buckets": settings.get("num_buckets"),
        "wrap": "reference",
        "key_norm_epsilon": 1e-6,
        "scale": 1.0,
        "split_above": 2 * max(int((length // chunks["lsh"]) ** 0.5), chunks["lsh"]),
        "hash_seed": seed,
    }
    return [dict(found[kind]) for kind in kinds]


def _positions(settings: Settings, prefix: str) -> tuple[dict[str, Any], int, Rules]:
    """Our scheme, the number of positions, and where its tables come from."""
    theirs = f"{prefix}embeddings.position_embeddings"
    shape, widths = settings.get("axial_pos_shape", [64, 64]), settings.get("axial_pos_embds_dim", [64, 192])
    length = settings.number("max_position_embeddings", 4096)
    if not settings.get("axial_pos_embds", True):
        return {"name": "learned", "scale": 1.0}, length, copy("positions.table.weight", f"{theirs}.embedding.weight")
    if len(shape) != 2 or len(widths) != 2:
        raise settings.unsupported("axial_pos_shape", shape, "positions have two axes", "two numbers")
    rules = {
        "positions.row.weight": Rule((f"{theirs}.weights.0",), lambda table: table[:, 0]),
        "positions.column.weight": Rule((f"{theirs}.weights.1",), lambda table: table[0]),
    }
    scheme = {"name": "axial", "columns": shape[1], "row_width": widths[0], "scale": 1.0}
    return scheme, shape[0] * shape[1], rules


def _body(prefix: str, kinds: list[str]) -> Rules:
    rules = copy("embedding.weight", f"{prefix}embeddings.word_embeddings.weight")
    for layer, kind in enumerate(kinds):
        ours, theirs = attention_at(layer), f"{prefix}encoder.layers.{layer}"
        for mine, name in QUERY_KEY_VALUE[kind].items():
            rules |= copies(f"{ours}.{mine}", f"{theirs}.attention.self_attention.{name}", bias=False)
        rules |= copies(f"{ours}.to_out", f"{theirs}.attention.output.dense", bias=False)
        rules |= copies(norm_at(layer, 0), f"{theirs}.attention.layer_norm")
        rules |= copies(norm_at(layer, 1), f"{theirs}.feed_forward.layer_norm")
        rules |= copies(f"{feed_forward_at(layer)}.into", f"{theirs}.feed_forward.dense.dense")
        rules |= copies(f"{feed_forward_at(layer)}.out", f"{theirs}.feed_forward.output.dense")
    return rules | copies("norm", f"{prefix}encoder.layer_norm")


REFORMER = Family(_plan, ("ReformerModelWithLMHead", "ReformerForMaskedLM"), ("ReformerModel",))
