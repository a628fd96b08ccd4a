"""The Llama family: pre-norm decoders with rotary positions, RMS norm, SwiGLU and grouped-query attention.

Touvron et al. 2023. Llama, Mistral (Jiang et al. 2023) and Qwen 2 differ in biases and in windows. A sliding window of
theirs, which counts the token itself, is our `longformer` with one fewer: layers with and without one mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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
    output_matrix,
    prefix_of,
)
from attention_zoo.integrations.weights.settings import Settings

Windows = Sequence[int | None]
"""For each layer how many tokens its queries see, their own included, as theirs count; None: all before."""


def _plan(
    settings: Settings,
    tensors: Mapping[str, Tensor],
    head: str,
    *,
    bias: bool | str,
    mlp_bias: bool,
    windows: Windows,
    kv_heads: int | None,
) -> Plan:
    """The plan of any of the family.

    Args:
        bias: of the attention's projections.
        mlp_bias: whether the feed-forward's matrices have one.
        kv_heads: the family's default where the config says nothing; null there means as many as heads.
    """
    prefix = prefix_of(tensors, "model.")
    settings.only("hidden_act", "silu", instead="a checkpoint with SwiGLU")
    settings.only("pretraining_tp", 1, instead="pretraining_tp=1, which is the same up to rounding")
    settings.only("is_encoder_decoder", False, instead="a checkpoint of a decoder alone")
    dim, depth = settings.number("hidden_size", 4096), settings.number("num_hidden_layers", 32)
    heads = settings.number("num_attention_heads", 32)
    kv_heads, head_width = settings.given("num_key_value_heads", kv_heads), settings.number("head_dim", dim // heads)
    shared = {"kv_heads": kv_heads, "head_width": head_width, "bias": bias}
    tied, matrices, unused = True, copy("embedding.weight", f"{prefix}embed_tokens.weight"), list[str]()
    tie = settings.get("tie_word_embeddings", False)
    if head == "lm":
        tied, matrices, unused = output_matrix(tensors, f"{prefix}embed_tokens.weight", "lm_head.weight", tied=tie)
    elif prefix:  # asked for without its head
        unused = [name for name in tensors if not name.startswith(prefix)]
    options = {
        "attention": [
            {"name": "full", **shared}
            if window is None
            else {"name": "longformer", "window": window - 1, "global_projections": "shared", **shared}
            for window in (windows if len(set(windows)) > 1 else windows[:1])
        ],
        "vocab": settings.number("vocab_size", 32000),
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "causal": True,
        "head": head,
        "positions": rotary(settings),
        "max_length": settings.number("max_position_embeddings", 2048),
        "pre_norm": True,
        "norm": {"name": "rms", "eps": settings.number("rms_norm_eps", 1e-6)},
        "feed_forward": {
            "name": "swiglu", "width": settings.number("intermediate_size", 11008), "bias": mlp_bias,
        },
        "embedding": {"scale": 1.0},
        "tied": tied,
    }  # fmt: skip
    into, out = bias in (True, "into"), bias is True
    rules = {**matrices, **_body(prefix, depth, into, out, mlp_bias)}
    # frequencies, which old checkpoints hold as buffers
    unused += [f"{prefix}layers.*.self_attn.rotary_emb.inv_freq", f"{prefix}rotary_emb.inv_freq"]
    return Plan(options, rules, tuple(unused), settings.number("attention_dropout", 0.0))


SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}
"""Ways to stretch positions: the options of each, theirs -> ours. All must be given."""


def rotary(settings: Settings) -> dict[str, Any]:
    """Our rotary positions from `rope_parameters`, or from the older configs' `rope_theta` and `rope_scaling`."""
    settings.only("partial_rotary_factor", 1.0, instead="a checkpoint whose whole heads turn")
    theta = settings.number("rope_theta", 10_000.0)
    parameters = settings.get("rope_parameters", {})
    given = dict(settings.get("rope_scaling", {}) or parameters)
    kind, old = given.pop("rope_type", None), given.pop("type", None)
    kind = kind or old or "default"
    base = float(given.pop("rope_theta", theta))
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", settings.number("max_position_embeddings", 2048))
    if kind not in SCALINGS or given.keys() != SCALINGS[kind].keys():
        known = "; ".join(f"{name} with {', '.join(options) or 'no options'}" for name, options in SCALINGS.items())
        raise settings.unsupported("rope_type", kind, f"it has {given} beside a base", known)
    scaled = {ours: given[theirs] for theirs, ours in SCALINGS[kind].items()}
    return {"name": "rotary", "base": base, **({"scaling": kind, **scaled} if scaled else {})}


def _body(prefix: str, depth: int, into: bool, out: bool, mlp: bool) -> Rules:
    rules = copies("norm", f"{prefix}norm", bias=False)
    for layer in range(depth):
        theirs = f"{prefix}layers.{layer}"
        for ours, name in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj")):
            rules |= copies(f"{attention_at(layer)}.{ours}", f"{theirs}.self_attn.{name}", bias=into)
        rules |= copies(f"{attention_at(layer)}.to_out", f"{theirs}.self_attn.o_proj", bias=out)
        for part in ("weight", "bias") if mlp else ("weight",):
            sources = (f"{theirs}.mlp.gate_proj.{part}", f"{theirs}.mlp.up_proj.{part}")
            rules[f"{feed_forward_at(layer)}.into.{part}"] = Rule(sources, lambda *both: torch.cat(both))
        rules |= copies(f"{feed_forward_at(layer)}.out", f"{theirs}.mlp.down_proj", bias=mlp)
        rules |= copies(norm_at(layer, 0), f"{theirs}.input_layernorm", bias=False)
        rules |= copies(norm_at(layer, 1), f"{theirs}.post_attention_layernorm", bias=False)
    return rules


def _llama(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    bias, mlp_bias = settings.get("attention_bias", False), settings.get("mlp_bias", False)
    return _plan(settings, tensors, head, bias=bias, mlp_bias=mlp_bias, windows=[None], kv_heads=None)


def _mistral(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    window = settings.given("sliding_window", 4096)
    return _plan(settings, tensors, head, bias=False, mlp_bias=False, windows=[window], kv_heads=8)


def _qwen2(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    settings.only("use_mrope", False, instead="a checkpoint of text alone")
    depth = settings.number("num_hidden_layers", 32)
    window = settings.given("sliding_window", 4096) if settings.get("use_sliding_window", False) else None
    settings.harmless("sliding_window")  # where it is not in use
    first = settings.number("max_window_layers", 28)
    default = ["full_attention" if window is None or layer < first else SLIDING for layer in range(depth)]
    kinds = settings.get("layer_types", default)
    if len(kinds) != depth or set(kinds) - {"full_attention", SLIDING} or (SLIDING in kinds and window is None):
        raise settings.unsupported(
            "layer_types", kinds, f"each of {depth} layers must be full_attention, or sliding_attention with a window",
            "a checkpoint of such layers",
        )  # fmt: skip
    windows = [window if kind == SLIDING else None for kind in kinds]
    return _plan(settings, tensors, head, bias="into", mlp_bias=False, windows=windows, kv_heads=32)


SLIDING = "sliding_attention"


def _family(plan: Callable[[Settings, Mapping[str, Tensor], str], Plan], name: str) -> Family:
    return Family(plan, (f"{name}ForCausalLM",), (f"{name}Model",))


LLAMA, MISTRAL, QWEN2 = _family(_llama, "Llama"), _family(_mistral, "Mistral"), _family(_qwen2, "Qwen2")
