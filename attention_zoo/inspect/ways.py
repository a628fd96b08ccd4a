"""The attentions of a layer: whose values stand in for what, and where what the heads put out is read.

    Own        a layer's own, to the tokens that its columns, or the keys that it makes of them, are made of
    Among      that among the summaries of `hierarchical`: a summary is its segment's tokens alike, whose it also asks
    Window     block_recurrent's window
    Vectors    block_recurrent's state, whose vectors are no tokens: they are drawn themselves

Window and Vectors are two softmaxes that sum to 1 each. Which of them counts is said by `share`: of the lengths of
what a head's two parts add to the layer's output, the part's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_zoo.attention.block_recurrent import BlockRecurrent
from attention_zoo.attention.derived_keys import DerivedKeys
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.attention.segments import Segments
from attention_zoo.attention.summaries import Summaries
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.inspect.origins import Part, joined_of, layout_of, of_made
from attention_zoo.layout.ledger import Columns


class Own:
    """See the module.

    Attributes:
        layer: what is called.
        attention: what projects, `layer` or a part of it.
        said: what it is called beside the layer; "" where the layer has no other.
        keys: what the keys are.
    """

    said, keys = "", "tokens"

    def __init__(self, layer: Attention):
        self.layer: Any = layer
        self.attention: Any = layer
        if layer.cross:
            self.keys = "source tokens"
        if not (hasattr(self.attention, "to_v") and hasattr(self.attention, "to_out")):
            raise self.refused("its heads do not weigh values of the tokens")

    @property
    def formula(self) -> PatternAttention | None:
        """The pattern that its weights are, by definition; None: there is none."""
        return self.attention if isinstance(self.attention, PatternAttention) else None

    @property
    def out(self) -> nn.Module:
        """What is called with that which the heads put out."""
        return self.attention.to_out

    def length(self, part: Part) -> int:
        """How many keys there are to be told apart."""
        return part.at.length if part.at.source_length is None or not self.layer.cross else part.at.source_length

    def members(self, part: Part) -> Int[Tensor, "S m"]:
        """Which of these each value is made of alike; -1: none."""
        x, tokens, source = part.given
        columns = part.at.source if self.layer.cross else part.at.keys
        if columns is None:
            raise self.refused("its keys are another text's")
        seen, at = (source.hidden, source.tokens) if self.layer.cross else (x, tokens)
        made_of = self.layer.made_of(seen, layout_of(seen, at))
        return columns if made_of is None else of_made(columns, made_of.cpu())

    def asking(self, part: Part) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The tokens that ask, and where in what the heads put out."""
        return part.at.asking, part.at.columns

    def rows(self, part: Part) -> int:
        """How many of these there are."""
        return part.given.x.shape[1]

    def cut(self, put_out: Tensor) -> Tensor:
        """What the heads of this attention put out, of all that is."""
        return put_out

    def share(self, part: Part) -> Float[Tensor, "H n"] | None:
        """See the module; None where the layer has one attention."""
        return None

    @contextmanager
    def naming(self, named: Float[Tensor, "S D"]) -> Iterator[None]:
        """While the layer is called: its values replaced, as they are projected or, derived ones, as they are held."""
        layer = self.attention
        if isinstance(layer, DerivedKeys):
            answer = layer.answer

            def answer_named(q: Tensor, queries: Any, held: Columns, scale: float) -> Tensor:
                k, v = held.held
                if v.shape[2] != len(named):
                    raise self.refused("it holds other values than it says")
                return answer(q, queries, Columns.of(held.ledger, k, named.expand_as(v).contiguous()), scale)

            with _instead(layer, "answer", answer_named):
                yield
            return

        def name(module: Any, given: Any, made: Tensor) -> Tensor:
            if made.numel() % named.numel() or made.shape[-2] != len(named):
                raise self.refused("it attends to other columns than those of its tokens")
            return named.repeat(1, made.shape[-1] // named.shape[1]).expand_as(made).contiguous()

        projections = [layer.to_v, *([layer.to_v_global] if hasattr(layer, "to_v_global") else [])]
        with ExitStack() as hooks:
            for each in projections:
                hooks.callback(each.register_forward_hook(name).remove)
            yield

    def refused(self, reason: str) -> Unsupported:
        return Unsupported(self.layer.name, "inspect", reason, INSTEAD)


INSTEAD = "any mechanism whose heads weigh the values of tokens: all of attention_zoo's own"


@contextmanager
def _instead(layer: nn.Module, name: str, method: Any) -> Iterator[None]:
    layer.__dict__[name] = method
    try:
        yield
    finally:
        del layer.__dict__[name]


class Among(Own):
    """See the module."""

    def __init__(self, layer: Summaries | Segments):
        super().__init__(layer)
        self.attention = layer.among if isinstance(layer, Segments) else layer
        self.said = "summaries" if isinstance(layer, Segments) else ""

    @property
    def formula(self) -> None:
        return None

    def _summaries(self, part: Part) -> tuple[Tensor, Tensor, int]:
        """Columns of the summaries, and the segment of every column, beside the number of segments."""
        x, tokens, _ = part.given
        position = layout_of(x, tokens).position[0].cpu()
        segment = position // self.attention.size
        return self.attention._is_summary(position).nonzero()[:, 0], segment, int(segment.max()) + 1

    def members(self, part: Part) -> Int[Tensor, "S m"]:
        summaries, segment, _ = self._summaries(part)
        return joined_of(part.at.keys, [segment == segment[at] for at in summaries])

    def asking(self, part: Part) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        asking, columns = super().asking(part)
        if self.attention.causal:  # all columns ask
            return asking, columns
        summaries, segment, count = self._summaries(part)
        row = torch.full((count,), -1)
        row[segment[summaries]] = torch.arange(len(summaries))
        return asking, row[segment[columns]]

    def rows(self, part: Part) -> int:
        return super().rows(part) if self.attention.causal else len(self._summaries(part)[0])


class Window(Own):
    """See the module."""

    said = "window"

    def __init__(self, layer: BlockRecurrent):
        # the layer itself has no values of tokens
        self.layer, self.attention = layer, layer.local

    @property
    def out(self) -> nn.Module:
        return self.layer.to_out

    def cut(self, put_out: Tensor) -> Tensor:
        return put_out.chunk(2, -1)[0]

    def share(self, part: Part) -> Float[Tensor, "H n"]:
        near, far = _lengths(self.layer, part)
        return near / (near + far).clamp(min=torch.finfo(near.dtype).tiny)


class Vectors(Window):
    """See the module."""

    said, keys = "state", "state vectors"

    @property
    def formula(self) -> None:
        return None

    def length(self, part: Part) -> int:
        return self.layer.states

    def members(self, part: Part) -> Int[Tensor, "S 1"]:
        return torch.arange(self.layer.states)[:, None]

    def cut(self, put_out: Tensor) -> Tensor:
        return put_out.chunk(2, -1)[1]

    def share(self, part: Part) -> Float[Tensor, "H n"]:
        return 1 - super().share(part)

    @contextmanager
    def naming(self, named: Float[Tensor, "S D"]) -> Iterator[None]:
        states = self.layer._states

        def states_named(*given: Any) -> tuple[Any, Tensor, Tensor]:
            vectors, k, v = states(*given)
            return vectors, k, named[:, None].expand_as(v).contiguous()

        with _instead(self.layer, "_states", states_named):
            yield


def _lengths(layer: BlockRecurrent, part: Part) -> tuple[Float[Tensor, "H n"], Float[Tensor, "H n"]]:
    """How long what each head's two parts add to the output is: ‖W a‖² = aᵀ(WᵀW)a."""
    kept: list[Tensor] = []
    hook = layer.to_out.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    try:
        layer(part.given.x, part.given.tokens)
    finally:
        hook.remove()
    parts = kept[0][0].unflatten(-1, (2 * layer.heads, -1)).transpose(0, 1)
    weight = layer.to_out.weight.unflatten(1, (2 * layer.heads, -1)).transpose(0, 1)
    near, far = ((parts @ (weight.mT @ weight)) * parts).sum(-1).clamp(min=0).sqrt().chunk(2)
    return near, far


def ways_of(layer: Attention) -> list[Own]:
    """The attentions of a layer.

    Raises:
        Unsupported: for one whose heads weigh no values.
    """
    if isinstance(layer, BlockRecurrent):
        return [Window(layer), Vectors(layer)]
    if isinstance(layer, Summaries):
        return [Among(layer)]
    if isinstance(layer, Segments) and layer.document:
        return [Own(layer), Among(layer)]
    return [Own(layer)]
