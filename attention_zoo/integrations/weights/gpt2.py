"""GPT-2 (Radford et al. 2019): a pre-norm decoder with full attention and learned positions.

Its linear layers are stored transposed, and queries, keys and values as one.
"""

from __future__ import annotations

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
    output_matrix,
    prefix_of,
)
from attention_zoo.integrations.weights.settings import Settings


def _plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    prefix = prefix_of(tensors, "transformer.")
    settings.only("add_cross_attention", False, instead="a checkpoint of a decoder alone")
    settings.only("is_encoder_decoder", False, instead="a checkpoint of a decoder alone")
    settings.only("pruned_heads", {}, instead="a checkpoint that keeps all heads")
    # the first only says in which precision they compute the same scores; the others feed heads not converted
    settings.harmless(
        "reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj",
    )  # fmt: skip
    dim, depth = settings.number("n_embd", 768), settings.number("n_layer", 12)
    heads, length = settings.number("n_head", 12), settings.number("n_positions", 1024)
    tied, matrices, unused = True, copy("embedding.weight", f"{prefix}wte.weight"), list[str]()
    tie = settings.get("tie_word_embeddings", True)
    if head == "lm":
        tied, matrices, unused = output_matrix(tensors, f"{prefix}wte.weight", "lm_head.weight", tied=tie)
    elif prefix:  # asked for without its head
        unused = [name for name in tensors if not name.startswith(prefix)]
    options = {
        "attention": _attention(settings, dim // heads, depth),
        "vocab": settings.number("vocab_size", 50257),
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "causal": True,
        "head": head,
        "positions": {"name": "learned", "scale": 1.0},
        "max_length": length,
        "pre_norm": True,
        "norm": {"name": "layer", "eps": settings.number("layer_norm_epsilon", 1e-5)},
        "feed_forward": {
            "name": activation(settings, "activation_function", "gelu_new"),
            "width": settings.number("n_inner", 4 * dim),
        },
        "output_dropout": settings.number("resid_pdrop", 0.1),
        "embedding": {"scale": 1.0, "dropout": settings.number("embd_pdrop", 0.1)},
        "tied": tied,
    }
    # causal masks, which old checkpoints hold as buffers
    unused += [f"{prefix}h.*.attn.bias", f"{prefix}h.*.attn.masked_bias"]
    return Plan(options, {**matrices, **_body(prefix, depth, dim)}, tuple(unused), settings.number("attn_pdrop", 0.1))


def _attention(settings: Settings, head_width: int, depth: int) -> list[dict[str, Any]]:
    """Full attention, whose scores may be scaled otherwise; by one entry for all layers, or for each its own."""
    scaled = settings.get("scale_attn_weights", True)
    by_layer = settings.get("scale_attn_by_inverse_layer_idx", False)
    scale = head_width**-0.5 if scaled else 1.0
    return [{"name": "full", "scale": scale / (layer + 1)} for layer in range(depth if by_layer else 1)]


def _body(prefix: str, depth: int, dim: int) -> Rules:
    rules = copy("positions.table.weight", f"{prefix}wpe.weight") | copies("norm", f"{prefix}ln_f")
    for layer in range(depth):
        theirs = f"{prefix}h.{layer}"
        for index, ours in enumerate(("to_q", "to_k", "to_v")):
            rules |= _transposed(f"{attention_at(layer)}.{ours}", f"{theirs}.attn.c_attn", index * dim, dim)
        rules |= _transposed(f"{attention_at(layer)}.to_out", f"{theirs}.attn.c_proj")
        rules |= _transposed(f"{feed_forward_at(layer)}.into", f"{theirs}.mlp.c_fc")
        rules |= _transposed(f"{feed_forward_at(layer)}.out", f"{theirs}.mlp.c_proj")
        rules |= copies(norm_at(layer, 0), f"{theirs}.ln_1") | copies(norm_at(layer, 1), f"{theirs}.ln_2")
    return rules


def _transposed(ours: str, theirs: str, start: int = 0, width: int | None = None) -> Rules:
    """A linear layer of theirs, or the `width` outputs of it from `start`."""

    def part(tensor: Tensor) -> Tensor:
        tensor = tensor.t()  # a bias stays as it is
        return tensor if width is None else tensor.narrow(0, start, width)

    return {f"{ours}.{name}": Rule((f"{theirs}.{name}",), part) for name in ("weight", "bias")}


GPT2 = Family(_plan, ("GPT2LMHeadModel",), ("GPT2Model",))
