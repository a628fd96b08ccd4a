"""A whole language model of the package hourglass-transformer-pytorch, beside ours with `shorten`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.contract import Unsupported, named
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Agreement, Peer
from attention_zoo.measure.whole import model_work
from attention_zoo.measure.work import Work
from attention_zoo.model.factors import Part
from attention_zoo.model.shorten import shape_of
from attention_zoo.model.transformer import Transformer

Pairs = list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
"""Theirs and ours: the same numbers, where several are one matrix over another."""
KINDS = {("mean", "repeat"): "naive", ("linear", "linear"): "linear"}
"""Pooling and up-sampling of ours, and its word for both."""
LIKE: dict[str, Any] = {
    "attention": [{"name": "full", "bias": "out"}],
    "positions": "learned",
    "head": {"name": "lm", "bias": True},
    "tied": False,
}
"""Options at which ours has its parameters, and no others."""


class HourglassTransformer(Peer):
    """Its language model at the layers, factors and widths of ours."""

    title = "hourglass-transformer-pytorch"
    fair = (
        "Whole language models with the same parameters: layers, factors, pooling, up-sampling, learned positions, "
        "logits of their own matrix; without its attention between levels. A length that is no multiple of the factors "
        "is filled up. It materialises L x L scores."
    )
    needs = "hourglass-transformer-pytorch>=0.0.6,<0.1"
    module = "hourglass_transformer_pytorch"
    backend = "full"

    def __init__(self, layer: Transformer, shape: Shape):
        from hourglass_transformer_pytorch import HourglassTransformerLM

        options = mirrored(layer)
        self.factor = max(part.factor for part in _shape(layer).parts)
        super().__init__(layer, shape)
        self.released = HourglassTransformerLM(
            num_tokens=layer.vocab, max_seq_len=max(self.length, layer.config["max_length"]), **options
        ).to(shape.device, shape.dtype)

    @property
    def multiple(self) -> int:
        return self.factor  # at others it fails, since its padding needs a module that it does not import

    def work(self, variant: str, phase: str) -> Work:
        if phase not in ("forward", "forward_backward", "train_step"):
            raise Unsupported(self.title, f"phase={phase}", "peers are not asked for it", "phase=train_step")
        shape = self.shape._replace(length=self.length)
        parameters = list(self.released.parameters())
        return model_work(lambda ids: [self.released(ids)], parameters, shape, phase=phase, vocab=self.layer.vocab)

    @classmethod
    def agreement(cls) -> Agreement:
        length, layout = 24, "1@1 1@2 2@6 1@2 1@1"
        ours = Transformer(
            **{**LIKE, "positions": {"name": "learned", "scale": 1.0}}, vocab=7, dim=16, heads=2, max_length=length,
            embedding={"scale": 1.0},
            shorten={"name": "hourglass", "layout": layout},
        ).double()  # fmt: skip
        theirs = cls(ours, Shape(2, length, torch.device("cpu"), torch.float64)).released
        pairs = all_pairs(theirs, ours)
        copy(pairs)
        ids = torch.randint(7, (2, length))
        expected, found = theirs(ids), ours(ids).logits
        weight = torch.randn_like(expected)
        gradients = zip(_gradients(expected, weight, pairs, 0), _gradients(found, weight, pairs, 1))
        far = [_apart(found.detach(), expected.detach()), *(_apart(one, other) for one, other in gradients)]
        return Agreement(far[0], max(far[1:]), cls.bound, f"{layout}, causal, {length} tokens, float64")


def _shape(model: Transformer) -> Any:
    config = model.config
    facts = {key: config[key] for key in ("causal", "reversible", "cross", "pre_norm")}
    return shape_of(config["shorten"], head=model.head_name, **facts)


def mirrored(model: Transformer) -> dict[str, Any]:
    """The options of its model at which it has the layers of ours.

    Raises:
        Unsupported: for an option of ours that it has no counterpart of.
    """
    title, config = HourglassTransformer.title, model.config
    kinds = None
    if config["shorten"] is not None:
        shape = _shape(model)
        kinds = KINDS.get((shape.options.get("pool"), shape.options.get("up")))
    if kinds is None:
        what = "it pools by mean and repeats, or is linear both ways"
        raise Unsupported(title, f"shorten={config['shorten']}", what, 'shorten="2@1 8@3 2@1"')
    plain: dict[str, Any] = {"norm": "layer", "pre_norm": True, "feed_forward": "gelu", "short_conv": 0, "cross": False}
    for key, value in {**plain, **LIKE}.items():
        given = config[key]
        if key == "attention":  # which kernel computes it is ours to choose
            given = [{each: one[each] for each in one if each != "kernel"} for one in given]
        if key == "positions":
            given = named(key, given)[0]
        if given != value:
            raise Unsupported(title, f"{key}={given}", "it is built in another way", f"{key}={value}")
    depth, factors = _nested(shape.parts)
    heads = config["heads"]
    return {
        "dim": model.dim, "heads": heads, "dim_head": model.dim // heads, "causal": model.causal, "depth": depth,
        "shorten_factor": factors, "attn_resampling": False, "updown_sample_type": kinds,
    }  # fmt: skip


def _nested(parts: Sequence[Part]) -> tuple[Any, tuple[int, ...]]:
    """Layers as it nests them, and the factor of each level against the one around it."""
    if len(parts) == 1:
        return parts[0].layers, ()
    inside, factors = _nested(parts[1:-1])
    return (parts[0].layers, inside, parts[-1].layers), (parts[1].factor // parts[0].factor, *factors)


def all_pairs(theirs: Any, model: Transformer) -> Pairs:
    """Parameters of its language model and of ours."""
    positions: Any = model.positions
    head: Any = model.head
    return [
        ((theirs.token_emb.weight,), (model.embedding.weight,)),
        ((theirs.pos_emb.weight,), (positions.table.weight,)),
        *stack_pairs(theirs.transformer, model),
        ((theirs.to_logits.weight,), (head.weight,)),
        ((theirs.to_logits.bias,), (head.bias,)),
    ]


def stack_pairs(theirs: Any, model: Transformer) -> Pairs:
    """Parameters of its stack, with the norm behind it, and of ours."""
    return [*_level(theirs, model.stack), *_linear(theirs.norm_out, model.norm)]


def _level(one: Any, other: Any) -> Pairs:
    if not hasattr(one, "valley_transformer"):
        return _stack(one, other)
    between = [(one.downsample, other.pool.linear), (one.upsample, other.up.linear)]
    return [
        *_stack(one.pre_transformer, other.before),
        *_level(one.valley_transformer, other.inside),
        *_stack(one.post_transformer, other.after),
        *(pair for a, b in between if b is not None for pair in _linear(a.proj, b)),
    ]


def _stack(one: Any, other: Any) -> Pairs:
    found: Pairs = []
    for (attention, ff), block in zip(one.layers, other.layers, strict=True):
        for layer, branch in zip((attention, ff), block.layers, strict=True):
            found += _linear(layer.norm, branch.norm)
        theirs, ours = attention.fn, block.attention
        into = ours.to_q.weight, ours.to_k.weight, ours.to_v.weight
        found.append(((theirs.to_q.weight, theirs.to_kv.weight), into))
        found += _linear(theirs.to_out, ours.to_out)
        feed = [each for each in block.layers[1].body.modules() if isinstance(each, nn.Linear)]
        found += [pair for a, b in zip((ff.fn[0], ff.fn[3]), feed, strict=True) for pair in _linear(a, b)]
    return found


def _linear(a: Any, b: Any) -> Pairs:
    return [((a.weight,), (b.weight,)), ((a.bias,), (b.bias,))]


@torch.no_grad()
def copy(pairs: Pairs) -> None:
    """Random numbers of unit size into theirs, from there into ours."""
    for theirs, ours in pairs:
        whole = torch.cat([each.add_(0.1 * torch.randn_like(each)) for each in theirs])
        for each, part in zip(ours, whole.split([len(each) for each in ours])):
            each.copy_(part)


def _gradients(out: Tensor, weight: Tensor, pairs: Pairs, side: int) -> list[Tensor]:
    leaves = [leaf for pair in pairs for leaf in pair[side]]
    found = iter(torch.autograd.grad((out * weight).sum(), leaves))
    return [torch.cat([next(found) for _ in pair[side]]) for pair in pairs]


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))
