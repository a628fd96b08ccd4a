"""Attention weights asked of the very kernel that runs: what a head puts out is linear in its values, so values that
name their tokens put out the weights.

    values v_j = 1 where j is in a set, else 0   ->   what query i puts out = its weight on the set

A value made of n tokens is named by their mean: each has 1/n of its weight. What no token has made (a null value, a
memory, a summary in its own segment) names none, and what it puts out of its own is taken off; the weights then sum to
less than 1. A layer may have two attentions, each asked by itself (ways.py).

Each call answers for as many sets as a head is wide, at the cost of a call: O(L) memory for any number of sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Attention, Source
from attention_zoo.inspect.origins import Given, Part, followed, given_to, mean_of, plain
from attention_zoo.inspect.ways import Own, ways_of
from attention_zoo.model.encoder_decoder import EncoderDecoder

ROUNDING = 1e-3


class Call:
    """One attention of a layer, and its calls that together ask for the tokens of a text, each for some.

    Attributes:
        name: of the layer, and of this attention where the layer has two.
        number: of the layer.
        length: keys that are told apart: tokens of the text, or of a source, or vectors.
        asked: tokens that ask.

    Raises:
        Unsupported: for a layer that makes something else of values than a weighted mean of the tokens' own.
    """

    def __init__(self, name: str, way: Own, parts: Sequence[Part], number: int = 0):
        self.name, self.number = f"{name}: {way.said}" if way.said else name, number
        self.way, self.layer, self.parts = way, way.layer, parts
        self.length, self.asked = way.length(parts[0]), parts[0].at.length
        self.width = way.attention.head_width
        self._members = [way.members(part) for part in parts]
        nothing = torch.zeros(self.length, 1)
        self._own = [self._put_out(index, nothing) for index in range(len(parts))]
        every = self.weights(torch.ones(self.length, 1))
        if bool((every < -ROUNDING).any()) or bool((every > 1 + ROUNDING).any()):
            raise way.refused("it makes keys and values of several tokens, with weights of their own")

    @classmethod
    def all_of(
        cls, layer: Attention, x: Float[Tensor, "1 L E"], tokens: Any = None, source: Source | None = None
    ) -> list[Call]:
        """Of a layer by itself, whose columns are the tokens, and those of its source the tokens of another text."""
        at = plain(x.shape[1], None if source is None else source.hidden.shape[1])
        return [cls("alone", way, [Part(Given(x, tokens, source), at)]) for way in ways_of(layer)]

    @classmethod
    def of(cls, layer: Attention, x: Float[Tensor, "1 L E"], tokens: Any = None, source: Source | None = None) -> Call:
        """The first of these."""
        return cls.all_of(layer, x, tokens, source)[0]

    @property
    def of_tokens(self) -> bool:
        """Whether its columns are the tokens, all in one call."""
        (first, *more), place = self.parts, torch.arange(self.asked)
        alike = torch.equal(first.at.keys, place[:, None]) and torch.equal(first.at.asking, place)
        return not more and alike and torch.equal(first.at.columns, place)

    @property
    def of_one_text(self) -> bool:
        """Whether queries and keys are tokens of the same text, so that one is some tokens away from another."""
        other = self.layer.cross and self.parts[0].at.source_length is not None
        return self.way.keys != "state vectors" and not other

    def weights(self, sets: Float[Tensor, "S n"]) -> Float[Tensor, "H L n"]:
        """The weight of each head's queries on each set, given by 1 for its keys and 0 for the others."""
        found = [self._asked(sets[:, a : a + self.width]) for a in range(0, sets.shape[1], self.width)]
        return torch.cat(found, -1)

    def share(self) -> Float[Tensor, " H"] | None:
        """Of what a layer of two attentions adds, how much comes of this one; see ways.py."""
        found = [self.way.share(part) for part in self.parts]
        here = [each[:, part.at.columns] for each, part in zip(found, self.parts) if each is not None]
        return torch.cat(here, 1).double().mean(1).cpu() if here else None

    def _asked(self, sets: Float[Tensor, "S n"]) -> Float[Tensor, "H L n"]:
        x, count = self.parts[0].given.x, sets.shape[1]
        found = x.new_zeros(self.layer.heads, self.asked, count)
        for index, (part, own) in enumerate(zip(self.parts, self._own)):
            made = (self._put_out(index, sets) - own)[..., :count].transpose(0, 1)
            asking, rows = self.way.asking(part)
            found[:, asking] = made[:, rows]
        return found

    @torch.no_grad()
    def _put_out(self, index: int, sets: Float[Tensor, "S n"]) -> Float[Tensor, "R H D"]:
        """What the heads put out in a call whose values name these sets."""
        x, tokens, source = self.parts[index].given
        names = mean_of(sets.to(x.dtype), self._members[index])
        named = x.new_zeros(len(names), self.width)
        named[:, : sets.shape[1]] = names.to(x)
        put_out: list[Tensor] = []
        with self.way.naming(named):
            hook = self.way.out.register_forward_pre_hook(lambda module, given: put_out.append(given[0]))
            try:
                self.layer(x, tokens, source=source)
            finally:
                hook.remove()
        found = [self.way.cut(each) for each in put_out]
        shape = self.way.rows(self.parts[index]), self.layer.heads, self.width
        if len(found) != 1 or found[0].numel() != shape[0] * shape[1] * shape[2]:
            raise self.way.refused("what its heads put out is not one vector for each token")
        return found[0].reshape(shape)


@torch.no_grad()
def calls_of(model: Any, ids: Tensor, target: Tensor | None = None) -> list[Call]:
    """Every attention of the layers of a model with what they were called with on some ids [1, L].

    Args:
        target: of an encoder and a decoder, what the latter has written of the text so far, [1, M]; None: the layers of
            the encoder alone, which reads the text.

    Raises:
        Unsupported: for what `Call` refuses, and for columns that cannot be followed.
    """
    if not isinstance(model, EncoderDecoder):
        if target is not None:
            raise ValueError("target is what a decoder beside an encoder has written, and this model is no such pair")
        return _heard(model, plain(ids.shape[1]), "layer", lambda: model.eval()(ids))
    found = _heard(model.encoder, plain(ids.shape[1]), "layer", lambda: model.eval().encode(ids))
    if target is not None:
        begin = plain(target.shape[1], ids.shape[1])
        found += _heard(model.decoder, begin, "decoder layer", lambda: model(target, source=ids))
    return found


def _heard(model: Any, begin: Any, name: str, run: Any) -> list[Call]:
    """The attentions of the layers of a stack, while something is run."""
    found: list[tuple[Attention, list[Part]]] = []
    asked: dict[Attention, Tensor] = {}
    hooks = []
    with followed(model, begin) as now:

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
            run()
        finally:
            for hook in hooks:
                hook.remove()
    # the places of layers in a model's own structure say nothing to a reader
    return [
        Call(f"{name} {number}", way, parts, number)
        for number, (layer, parts) in enumerate(found)
        for way in ways_of(layer)
    ]
