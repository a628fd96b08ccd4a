"""Longformer (Beltagy et al. 2020): RoBERTa with windows, one a layer, and global tokens with their own projections.

Their attention_window counts both sides, our `window` one. Their global_attention_mask is our `Tokens.is_global`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attention_zoo.integrations.weights.bert import encoder
from attention_zoo.integrations.weights.family import Family, Plan
from attention_zoo.integrations.weights.mapping import attention_at, copies, prefix_of
from attention_zoo.integrations.weights.settings import Settings


def _plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    depth = settings.number("num_hidden_layers", 12)
    windows = settings.get("attention_window", 512)
    windows = [windows] * depth if isinstance(windows, int) else list(windows)
    if len(windows) != depth or any(window < 2 or window % 2 for window in windows):
        raise settings.unsupported("attention_window", windows, "one even number a layer is needed", f"{depth} of them")
    settings.only("attention_dilation", [1] * depth, instead="a checkpoint without dilation")
    settings.only("autoregressive", False, instead="a two-sided checkpoint")
    settings.only("ignore_attention_mask", False, instead="a checkpoint that honours the mask")
    settings.harmless("attention_mode", "onnx_export")
    attention = [{"name": "longformer", "window": window // 2, "global_projections": "separate"} for window in windows]
    plan = encoder(settings, tensors, head, attention=attention, prefix="longformer.", roberta=True)
    prefix = prefix_of(tensors, "longformer.")
    for layer in range(depth):
        for name in ("query", "key", "value"):
            theirs = f"{prefix}encoder.layer.{layer}.attention.self.{name}_global"
            plan.rules.update(copies(f"{attention_at(layer)}.to_{name[0]}_global", theirs))
    return plan


LONGFORMER = Family(_plan, ("LongformerForMaskedLM",), ("LongformerModel",))
