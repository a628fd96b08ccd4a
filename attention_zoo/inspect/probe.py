"""Attention weights asked of the very kernel that runs: what a head puts out is linear in its values, so values that
name their tokens put out the weights.

    values v_j = 1 where j is in a set, else 0   ->   what query i puts out = its weight on the set

A value made of n tokens is named by their mean: each has 1/n of its weight. What no token has made (a null value, a
memory, a state) names none, and what it puts out of its own is taken off; the weights then sum to less than 1. Of a
layer of two attentions (`hierarchical.segments` with summaries) it is the one to the layer's own columns.

Each call answers for as many sets as a head is wide, at the cost of a call: O(L) memory for any number of sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.derived_keys import DerivedKeys
from attention_zoo.contract import Attention, Unsupported
from attention_zoo.inspect.origins import Given, Origins, followed, given_to, layout_of, mean_of, plain
from attention_zoo.layout.ledger import Columns
from attention_zoo.model.encoder_decoder import EncoderDecoder

ROUNDING = 1e-3


class Part(NamedTuple):
    """One call of a layer.

    Fields:
        given: hidden states [1, S, E], their tokens, a source.
        at: what its columns stand for.
    """

    given: Given
    at: Origins


class Call:
    """One layer, and its calls that together ask for the tokens of a text, each for some.

    Raises:
        Unsupported: for a layer that makes something else of values than a weighted mean of the tokens' own.
    """

    def __init__(self, name: str, layer: Attention, parts: Sequence[Part]):
        self.name, self.layer, self.parts = name, layer, parts
        self.length = parts[0].at.length
        if not (hasattr(layer, "to_v") and hasattr(layer, "to_out")):
            raise self._refused("its heads do not weigh values of the tokens")
        nothing = torch.zeros(self.length, 1)
        self._own = [self._put_out(part, nothing) for part in parts]
        every = self.weights(torch.ones(self.length, 1))
        if bool((every < -ROUNDING).any()) or bool((every > 1 + ROUNDING).any()):
            raise self._refused("it makes keys and values of several tokens, with weights of their own")

    @classmethod
    def of(cls, layer: Attention, x: Float[Tensor, "1 L E"], tokens: Any = None) -> Call:
        """A layer by itself, whose columns are the tokens."""
        return cls("alone", layer, [Part(Given(x, tokens, None), plain(x.shape[1]))])

    @property
    def of_tokens(self) -> bool:
        """Whether its columns are the tokens, all in one call."""
        (first, *more), place = self.parts, torch.arange(self.length)
        alike = torch.equal(first.at.keys, place[:, None]) and torch.equal(first.at.asking, place)
        return not more and alike and torch.equal(first.at.columns, place)

    def weights(self, sets: Float[Tensor, "L n"]) -> Float[Tensor, "H L n"]:
        """The weight of each head's queries on each set, given by 1 for its tokens and 0 for the others."""
        width = self.layer.head_width
        found = [self._asked(sets[:, a : a + width]) for a in range(0, sets.shape[1], width)]
        return torch.cat(found, -1)

    def _asked(self, sets: Float[Tensor, "L n"]) -> Float[Tensor, "H L n"]:
        x, count = self.parts[0].given.x, sets.shape[1]
        found = x.new_zeros(self.layer.heads, self.length, count)
        for part, own in zip(self.parts, self._own):
            made = (self._put_out(part, sets) - own)[..., :count].transpose(0, 1)
            found[:, part.at.asking] = made[:, part.at.columns]
        return found

    @torch.no_grad()
    def _put_out(self, part: Part, sets: Float[Tensor, "L n"]) -> Float[Tensor, "S H D"]:
        """What the heads put out in a call whose values name these sets."""
        layer: Any = self.layer
        x, tokens, source = part.given
        columns = part.at.source if layer.cross else part.at.keys
        if columns is None:
            raise self._refused("its keys are another text's")
        names = mean_of(sets.to(x.dtype), columns)
        made_of = layer.made_of(layout_of(x, source.tokens if layer.cross else tokens))
        if made_of is not None:
            names = mean_of(names, made_of.cpu())
        named = x.new_zeros(len(names), layer.head_width)
        named[:, : sets.shape[1]] = names.to(x)
        put_out: list[Tensor] = []

        def keep(module: Any, given: tuple[Tensor, ...]) -> None:
            put_out.append(given[0])

        with self._naming(named):
            hook = layer.to_out.register_forward_pre_hook(keep)
            try:
                layer(x, tokens, source=source)
            finally:
                hook.remove()
        shape = x.shape[1], layer.heads, layer.head_width
        if len(put_out) != 1 or put_out[0].numel() != shape[0] * shape[1] * shape[2]:
            raise self._refused("what its heads put out is not one vector for each token")
        return put_out[0].reshape(shape)

    @contextmanager
    def _naming(self, named: Float[Tensor, "S D"]) -> Any:
        """While a layer is called: its values replaced, as they are projected or, derived ones, as they are held."""
        layer: Any = self.layer
        if isinstance(layer, DerivedKeys):
            answer = layer.answer

            def answer_named(q: Tensor, queries: Any, held: Columns, scale: float) -> Tensor:
                k, v = held.held
                if v.shape[2] != len(named):
                    raise self._refused("it holds other values than it says")
                return answer(q, queries, Columns.of(held.ledger, k, named.expand_as(v).contiguous()), scale)

            layer.__dict__["answer"] = answer_named
            try:
                yield
            finally:
                del layer.__dict__["answer"]
            return

        def name(module: Any, given: Any, made: Tensor) -> Tensor:
            if made.numel() % named.numel() or made.shape[-2] != len(named):
                raise self._refused("it attends to other columns than those of its tokens")
            return named.repeat(1, made.shape[-1] // named.shape[1]).expand_as(made).contiguous()

        projections = [layer.to_v, *([layer.to_v_global] if hasattr(layer, "to_v_global") else [])]
        hooks = [each.register_forward_hook(name) for each in projections]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _refused(self, reason: str) -> Unsupported:
        return Unsupported(self.layer.name, "inspect", reason, INSTEAD)


INSTEAD = (
    "full, longformer, bigbird, adaptive_span, reformer, transformer_xl, compressive, memory_compressed or "
    "h_transformer_1d"
)


def calls_of(model: Any, ids: Tensor) -> list[Call]:
    """Every attention layer of a model with what it was called with on some ids [1, L].

    Of an encoder and a decoder those of the encoder: the text is what it reads, and what the decoder says of it is not
    there.

    Raises:
        Unsupported: for what `Call` refuses, and for columns that cannot be followed.
    """
    if isinstance(model, EncoderDecoder):
        model = model.encoder
    found: list[tuple[Attention, list[Part]]] = []
    asked: dict[Attention, Tensor] = {}
    hooks = []
    with followed(model, ids.shape[1]) as now:

        def keep(layer: Any, args: tuple[Any, ...], words: Any) -> None:
            part = Part(given_to(args, words), now())
            before = asked.get(layer)
            # calls that ask for other tokens are of one pass over the text
            if before is not None and not bool(before[part.at.asking].any()):
                next(parts for each, parts in reversed(found) if each is layer).append(part)
            else:
                asked[layer] = torch.zeros(part.at.length, dtype=torch.bool)
                found.append((layer, [part]))
            asked[layer][part.at.asking] = True

        for layer in model.modules():
            if isinstance(layer, Attention) and not layer.wraps:
                hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            with torch.no_grad():
                model.eval()(ids)
        finally:
            for hook in hooks:
                hook.remove()
    # the places of layers in a model's own structure say nothing to a reader
    return [Call(f"layer {number}", *each) for number, each in enumerate(found)]
