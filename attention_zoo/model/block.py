"""Blocks and stacks. All speak the layer's call: hidden states in, hidden states out; state in, state out.

A stack is a chain of blocks, a block a chain of branches (attention, perhaps cross-attention, feed-forward), a branch
a chain of layers behind one norm. Hence states and choices are tuples of tuples of tuples.

    pre-norm    x + dropout(layers(norm(x)))        Xiong et al. 2020; the default
    post-norm   norm(x + dropout(layers(x)))        Vaswani et al. 2017

Dropout is on the outputs of branches only: inside attention, fused and recomputing kernels would lose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.contract import Layer, Output, Source, Tokens, add_losses, known_options, named, one_of
from attention_zoo.model.feed_forward import KINDS, NONE, FeedForward
from attention_zoo.model.norm import BatchNorm, build_norm, refuse_over_batch
from attention_zoo.model.placed import called
from attention_zoo.model.short_conv import GatedConvolution, ShortConvolution
from attention_zoo.ops.dropout import Dropout
from attention_zoo.options import LARGEST, Named, Positive, Probability, checked

Taps = Annotated[
    Annotated[int, Field(ge=0, le=LARGEST)] | Mapping[str, Any], Field(description="a number of taps, 0 for none")
]


class Chain(Layer):
    """Layers, one after the other. State and choices are tuples with an entry for each; losses add up."""

    travels = ""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        return tuple(layer.initial_state(batch_size) for layer in self.layers)  # type: ignore[operator]

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: tuple[Any, ...] | None = None,
        source: Source | None = None,
        choices: tuple[Any, ...] | None = None,
    ) -> Output:
        states, losses, made = [], [], []
        for index, layer in enumerate(self.layers):
            call = layer if getattr(tokens, "placement", None) is None else partial(called, layer)
            out = call(
                x,
                tokens,
                state=None if state is None else state[index],
                source=source,
                choices=None if choices is None else choices[index],
            )
            x = out.hidden
            states.append(out.state)
            losses.append(out.losses)
            made.append(out.choices)
        return Output(x, None if state is None else tuple(states), add_losses(*losses), tuple(made))


class Branch(Layer):
    """What is added to the residual stream: norm, layers, dropout.

    Args:
        layers: for instance short convolution and attention.
        dim: model width E.
        norm: see `build_norm`.
        pre_norm: norm before the layers, or after the addition.
        output_dropout: probability to drop a channel of what is added.
        cross: whether the source is for this branch.
    """

    travels = ""

    @checked
    def __init__(
        self,
        *layers: Layer,
        dim: Positive,
        norm: Named = "layer",
        pre_norm: bool = True,
        output_dropout: Probability = 0.0,
        cross: bool = False,
    ):
        super().__init__()
        self.norm = build_norm(norm, dim)
        self.body = Chain(layers)
        self.dropout = Dropout(output_dropout)
        self.norm_over_batch = isinstance(self.norm, BatchNorm)
        self.pre_norm, self.cross = pre_norm, cross

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        return self.body.initial_state(batch_size)

    def undropped(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: tuple[Any, ...] | None = None,
        source: Source | None = None,
        choices: tuple[Any, ...] | None = None,
    ) -> Output:
        """What the branch would add to x, before dropout."""
        hidden = self._normed(x, tokens) if self.pre_norm else x
        source = source if self.cross else None
        return self.body(hidden, tokens, state=state, source=source, choices=choices)

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: tuple[Any, ...] | None = None,
        source: Source | None = None,
        choices: tuple[Any, ...] | None = None,
    ) -> Output:
        out = self.undropped(x, tokens, state=state, source=source, choices=choices)
        total = x + (self.dropout(out.hidden) if self.dropout.p else out.hidden)
        if not self.pre_norm:
            total = self._normed(total, tokens)
        return out._replace(hidden=total)

    def _normed(self, x: Tensor, tokens: Tokens | None) -> Tensor:
        return self.norm(x, None if tokens is None else tokens.valid) if self.norm_over_batch else self.norm(x)


class Block(Chain):
    """Attention, cross-attention if there is one, feed-forward: each in its own branch.

    Args:
        attention: any mechanism.
        dim: model width E.
        cross: a cross-attention; default none.
        short_conv: taps of a short convolution before the attention; 0: none. `{"name": "gated", "width": 3}`: a gated
            one, in a branch of its own.
        norm, pre_norm, output_dropout: see `Branch`.
        feed_forward: one of `KINDS`, or a mapping with further options of `FeedForward`; "none": the block has none.
    """

    @checked
    def __init__(
        self,
        attention: Layer,
        *,
        dim: Positive,
        cross: Layer | None = None,
        short_conv: Taps = 0,
        norm: Named = "layer",
        pre_norm: bool = True,
        feed_forward: Named = "gelu",
        output_dropout: Probability = 0.0,
    ):
        if getattr(attention, "causal", False):
            refuse_over_batch(norm, "causal=True")
        if cross is not None:
            refuse_over_batch(norm, "cross=True")
        shared: dict[str, Any] = {"dim": dim, "norm": norm, "pre_norm": pre_norm, "output_dropout": output_dropout}
        before: list[Layer] = []
        branches: list[Layer] = []
        if isinstance(short_conv, Mapping):
            name, options = named("short_conv", short_conv)
            one_of(("gated",), short_conv=name)
            known_options(f"short_conv={name}", options, ("width",))
            branches.append(Branch(GatedConvolution(dim=dim, **options), **shared))
        elif short_conv:
            before.append(ShortConvolution(dim=dim, width=short_conv))
        branches.append(Branch(*before, attention, **shared, cross=getattr(attention, "cross", False)))
        place = len(branches) - 1
        if cross is not None:
            branches.append(Branch(cross, **shared, cross=True))
        kind, options = named("feed_forward", feed_forward)
        one_of((*KINDS, NONE), feed_forward=kind)
        known_options(f"feed_forward={kind}", options, () if kind == NONE else FeedForward.options)
        if kind != NONE:
            branches.append(Branch(FeedForward(dim=dim, kind=kind, **options), **shared))
        super().__init__(branches)
        self.place = place

    @property
    def attention(self) -> Layer:
        """The mechanism of this block."""
        branch: Any = self.layers[self.place]
        return branch.body.layers[-1]


def attentions(module: nn.Module) -> list[Layer]:
    """The mechanism of each block below, in order, whatever stands around the blocks."""
    return [each.attention for each in module.modules() if isinstance(each, Block)]


class Stack(Chain):
    """Blocks. Parameters that a mechanism shares over depth (`shared_over_depth`) become one.

    Args:
        blocks: in order.
    """

    def __init__(self, blocks: Sequence[Block]):
        super().__init__(blocks)
        first: dict[tuple[type, str], nn.Parameter] = {}
        for module in self.modules():
            for name in getattr(module, "shared_over_depth", ()):
                setattr(module, name, first.setdefault((type(module), name), getattr(module, name)))

    @property
    def attentions(self) -> list[Layer]:
        """The mechanism of each block, in order."""
        return attentions(self)

    @property
    def branches(self) -> list[Branch]:
        """All branches of all blocks, in order."""
        blocks: Any = self.layers
        return [branch for block in blocks for branch in block.layers]
