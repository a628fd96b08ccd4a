"""BigBird (Zaheer et al. 2020), the encoder: BERT with block-sparse attention.

The random links are those that the released code has in evaluation (`plan=reference_eval`; see
attention/bigbird_plans.py). To train on, `lengthen(model, attention="bigbird", plan="uniform")` gives links as the
paper draws them.

Up to (5 + 2 · num_random_blocks) · block_size tokens theirs and ours attend to everything. Theirs does so for good once
it has met such a short batch; ours decides for every row anew. Theirs plans by the padded length of the batch:
`tokens_of` says so to ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_zoo.integrations.weights.bert import encoder
from attention_zoo.integrations.weights.family import Family, Plan
from attention_zoo.integrations.weights.settings import Settings


def _plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    kind = settings.get("attention_type", "block_sparse")
    block, random = settings.number("block_size", 64), settings.number("num_random_blocks", 3)
    if kind not in ("block_sparse", "original_full"):
        raise settings.unsupported("attention_type", kind, "there is no such kind", "block_sparse or original_full")
    bias = settings.get("use_bias", True)
    attention: dict[str, Any] = {"name": "full", "bias": True if bias else "out"}
    if kind == "block_sparse":
        attention |= {"name": "bigbird", "block": block, "random": random, "plan": "reference_eval"}
    rescaled = settings.get("rescale_embeddings", False)
    return encoder(
        settings, tensors, head, attention=[attention], prefix="bert.", roberta=False, hidden_act="gelu_new",
        scale=settings.number("hidden_size", 768) ** 0.5 if rescaled else 1.0, bias=bias, length=4096,
    )  # fmt: skip


BIGBIRD = Family(_plan, ("BigBirdForMaskedLM", "BigBirdForPreTraining"), ("BigBirdModel",))
