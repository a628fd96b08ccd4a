"""BERT and RoBERTa: post-norm encoders with full attention and a masked language model's head.

Devlin et al. 2019; Liu et al. 2019. RoBERTa, and with it XLM-RoBERTa and CamemBERT, numbers the tokens that are not
padding from 0 (theirs: from the padding's id + 1, which shortens the table), and padding has a vector of its own.

Longformer and BigBird differ from these in their attention alone; their files build on this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    output_matrix,
    prefix_of,
)
from attention_zoo.integrations.weights.settings import Settings

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names -> ours."""


def activation(settings: Settings, name: str, default: str) -> str:
    """Our name of an activation that the config names."""
    given = settings.get(name, default)
    if given not in ACTIVATIONS:
        raise settings.unsupported(name, given, "there is no such activation here", " or ".join(ACTIVATIONS))
    return ACTIVATIONS[given]


def encoder(
    settings: Settings,
    tensors: Mapping[str, Tensor],
    head: str,
    *,
    attention: Sequence[Mapping[str, Any]] | str,
    prefix: str,
    roberta: bool,
    hidden_act: str = "gelu",
    scale: float = 1.0,
    bias: bool = True,
    length: int = 512,
) -> Plan:
    """The plan of an encoder of BERT's build.

    Args:
        attention: of our skeleton.
        prefix: of the encoder's names, dot included.
        roberta: whether positions and head are RoBERTa's.
        hidden_act, length: the family's defaults.
        scale: factor on token embeddings.
        bias: whether queries, keys and values have one.
    """
    prefix = prefix_of(tensors, prefix)
    settings.only("position_embedding_type", "absolute", instead="a checkpoint with absolute positions")
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        settings.only(name, False, instead="a checkpoint of an encoder")
    settings.only("pruned_heads", {}, instead="a checkpoint that keeps all heads")
    settings.only("directionality", "bidi", instead="a two-sided checkpoint")
    settings.harmless(
        "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"
    )
    depth, dim = settings.number("num_hidden_layers", 12), settings.number("hidden_size", 768)
    act = activation(settings, "hidden_act", hidden_act)
    dropout = settings.number("hidden_dropout_prob", 0.1)
    length, padding = settings.number("max_position_embeddings", length), settings.get("pad_token_id", 1)
    names = _ROBERTA_HEAD if roberta else _BERT_HEAD
    tied, matrices, unused = True, copy("embedding.weight", f"{prefix}embeddings.word_embeddings.weight"), list[str]()
    tie = settings.get("tie_word_embeddings", True)
    if head == "lm":
        tied, matrices, unused = output_matrix(
            tensors, f"{prefix}embeddings.word_embeddings.weight", names["decoder.weight"], tied=tie
        )
    options = {
        "attention": attention,
        "vocab": settings.number("vocab_size"),
        "dim": dim,
        "depth": depth,
        "heads": settings.number("num_attention_heads", 12),
        "causal": False,
        "head": {"name": "lm", "bias": True, "transform": "gelu" if roberta else act} if head == "lm" else "hidden",
        "positions": {"name": "learned", "scale": 1.0, **({"uncounted": padding} if roberta else {})},
        "max_length": length - padding - 1 if roberta else length,
        "pre_norm": False,
        "norm": {"name": "layer", "eps": settings.number("layer_norm_eps", 1e-12)},
        "feed_forward": {"name": act, "width": settings.number("intermediate_size", 3072)},
        "output_dropout": dropout,
        "embedding": {
            "scale": scale, "types": settings.number("type_vocab_size", 2), "normed": True, "dropout": dropout,
        },
        "tied": tied,
    }  # fmt: skip
    rules = {**matrices, **_body(prefix, depth, padding if roberta else None, bias)}
    unused = [
        *unused, f"{prefix}embeddings.position_ids", f"{prefix}embeddings.token_type_ids", f"{prefix}pooler.*",
    ]  # fmt: skip
    if head == "lm":
        # where the checkpoint holds two, the decoder's own is used there
        own = names["decoder.bias"]
        rules |= copy("head.bias", own if own in tensors else names["bias"])
        rules |= copies("head.transform.dense", names["dense"]) | copies("head.transform.norm", names["norm"])
        unused += [names["bias"], names["decoder.bias"], "cls.seq_relationship.*"]
    elif prefix:  # asked for without its head
        unused += [name for name in tensors if not name.startswith(prefix)]
    rules = {ours: _old_names(rule, tensors) for ours, rule in rules.items()}
    return Plan(options, rules, tuple(unused), settings.number("attention_probs_dropout_prob", 0.1))


_BERT_HEAD = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "bias": "cls.predictions.bias",
    "decoder.weight": "cls.predictions.decoder.weight",
    "decoder.bias": "cls.predictions.decoder.bias",
}
_ROBERTA_HEAD = {
    "dense": "lm_head.dense",
    "norm": "lm_head.layer_norm",
    "bias": "lm_head.bias",
    "decoder.weight": "lm_head.decoder.weight",
    "decoder.bias": "lm_head.decoder.bias",
}


def _body(prefix: str, depth: int, padding: int | None, bias: bool) -> Rules:
    embeddings = f"{prefix}embeddings"
    rules = copy("embedding.types.weight", f"{embeddings}.token_type_embeddings.weight")
    rules |= copies("embedding.norm", f"{embeddings}.LayerNorm")
    places = f"{embeddings}.position_embeddings.weight"
    if padding is None:
        rules |= copy("positions.table.weight", places)
    else:
        rules["positions.table.weight"] = Rule((places,), lambda table: table[padding + 1 :])
        rules["positions.nowhere"] = Rule((places,), lambda table: table[padding])
    for layer in range(depth):
        theirs = f"{prefix}encoder.layer.{layer}"
        for ours, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            rules |= copies(f"{attention_at(layer)}.{ours}", f"{theirs}.attention.self.{name}", bias=bias)
        rules |= copies(f"{attention_at(layer)}.to_out", f"{theirs}.attention.output.dense")
        rules |= copies(norm_at(layer, 0), f"{theirs}.attention.output.LayerNorm")
        rules |= copies(f"{feed_forward_at(layer)}.into", f"{theirs}.intermediate.dense")
        rules |= copies(f"{feed_forward_at(layer)}.out", f"{theirs}.output.dense")
        rules |= copies(norm_at(layer, 1), f"{theirs}.output.LayerNorm")
    return rules


def _old_names(rule: Rule, tensors: Mapping[str, Tensor]) -> Rule:
    """Norms of checkpoints that come from TensorFlow call their weight gamma and their bias beta."""

    def here(name: str) -> str:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return old if old in tensors else name

    return rule._replace(sources=tuple(here(name) for name in rule.sources))


def _bert(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    return encoder(settings, tensors, head, attention="full", prefix="bert.", roberta=False)


def _roberta(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan:
    return encoder(settings, tensors, head, attention="full", prefix="roberta.", roberta=True)


def _names(start: str, *others: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (f"{start}ForMaskedLM", *(start + other for other in others)), (f"{start}Model",)


BERT = Family(_bert, *_names("Bert", "ForPreTraining"))
ROBERTA = Family(_roberta, *_names("Roberta"))
XLM_ROBERTA = Family(_roberta, *_names("XLMRoberta"))
CAMEMBERT = Family(_roberta, *_names("Camembert"))
