"""Which tokens of a text the columns are made of that a layer somewhere in a model is called with.

Layers of a plain stack get the text's own tokens. Others do not, and are followed where a model calls them:

    a wrapper      puts columns in, or calls what is inside often: found by giving it tokens that carry their number,
                   once as it is and once doubled, and looking at what arrives inside. What doubles is the token of that
                   number; what stays is the wrapper's own (memory, a summary, a global token), and no token's.
    a level        its groups, by the layout that pools them: a column stands for its group's tokens alike, and asks for
                   those that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attention_zoo.contract import Layer, Output, Unsupported
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.windows import windows
from attention_zoo.model.level import Level
from attention_zoo.model.wrapper import Wrapper


class Origins(NamedTuple):
    """Of the S columns of a call, against a text of L tokens.

    Fields:
        keys: [S, m], the tokens that each column is made of alike; -1: none.
        length: L.
        asking: [n], the tokens that have a query in the call.
        columns: [n], the columns of these queries.
        source: as `keys`, of the columns of the call's source; None: it has none that is known.
        source_length: of the source's text, where that is another; None: it is the same.
    """

    keys: Int[Tensor, "S m"]
    length: int
    asking: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    source: Int[Tensor, "S m"] | None = None
    source_length: int | None = None


class Given(NamedTuple):
    """What a layer was called with: hidden states [1, S, E], their tokens, a source."""

    x: Tensor
    tokens: Any
    source: Any


class Part(NamedTuple):
    """One call of a layer, and what its columns stand for."""

    given: Given
    at: Origins


def plain(length: int, source_length: int | None = None) -> Origins:
    """Columns that are the tokens, and those of a source the tokens of another text."""
    place = torch.arange(length)
    source = None if source_length is None else torch.arange(source_length)[:, None]
    return Origins(place[:, None], length, place, place, source, source_length)


def mean_of(x: Float[Tensor, "L n"], members: Int[Tensor, "S m"]) -> Float[Tensor, "S n"]:
    """The mean of each column's members, zero where it has none."""
    there = (members >= 0)[..., None]
    total = (x[members.clamp(min=0)] * there).sum(1)
    return total / there.sum(1).clamp(min=1)


def _picked(x: Int[Tensor, "n ..."], index: Tensor) -> Tensor:
    """x[index], and -1 where that is -1."""
    found = x[index.clamp(min=0)]
    return found.masked_fill((index < 0).view(*index.shape, *[1] * (x.ndim - 1)), -1)


def of_made(columns: Int[Tensor, "S m"], members: Int[Tensor, "G n"]) -> Int[Tensor, "G mn"]:
    """What keys are made of that are made of columns."""
    return _picked(columns, members).flatten(1)


def joined_of(columns: Int[Tensor, "S m"], groups: list[Bool[Tensor, " S"]]) -> Int[Tensor, "G n"]:
    """All that the columns of each group are made of."""
    found = [columns[group].flatten() for group in groups]
    found = [each[each >= 0] for each in found]
    width = max(map(len, found), default=0)
    return torch.stack([F.pad(each, (0, width - len(each)), value=-1) for each in found])


def _inside(outer: Origins, members: Tensor, column: Int[Tensor, " S"]) -> Origins:
    """Columns made of others: `members` [S2, m] of each, and `column`, which of them asks for each of the others."""
    columns = column[outer.columns]
    there = columns >= 0
    return outer._replace(keys=of_made(outer.keys, members), asking=outer.asking[there], columns=columns[there])


def of_groups(level: Level, tokens: Layout, outer: Origins) -> Origins:
    """What is inside of a level: its groups, and those that were to be grouped as its source."""
    at = windows(tokens, level.size, causal=level.causal, reach=level.reach)
    # columns of [0 | lead before | tokens] and of [0 | past before | groups]: see `Windows`
    members = (at.members[0] - 1 - at.last.shape[1]).clamp(min=-1).cpu()
    own = (at.own[0] - 1 - at.latest.shape[1]).clamp(min=-1).cpu()
    found = _inside(outer, members, own)
    return found._replace(source=outer.keys, source_length=None) if level.unpooled else found


def of_columns(wrapper: Wrapper, given: Given, outer: Origins) -> list[Origins]:
    """What is inside of a wrapper, for each of its calls of that."""
    x = given.x
    number = x.new_ones(x.shape, dtype=torch.float64)
    number[..., 0] = torch.arange(1, x.shape[1] + 1)
    once, twice = (_arrived(wrapper, given._replace(x=factor * number)) for factor in (1, 2))
    found = []
    for one, two in zip(once, twice, strict=True):
        is_token = (one[:, 1:] == 1).all(-1) & (two == 2 * one).all(-1)
        if not bool((is_token | (one == two).all(-1)).all()):
            raise Unsupported(
                wrapper.name, "inspect", "what it gives to the layer inside is neither tokens nor its own",
                "the mechanism inside by itself",
            )  # fmt: skip
        token = torch.where(is_token, one[:, 0].long() - 1, -1).cpu()
        column = torch.full((x.shape[1],), -1)
        column[token[token >= 0]] = (token >= 0).nonzero()[:, 0]
        found.append(_inside(outer, token[:, None], column))
    return found


def _arrived(wrapper: Any, given: Given) -> list[Float[Tensor, "S E"]]:
    """What a wrapper calls its inner layer with."""
    inside, ear = wrapper.inner, _Ear()
    wrapper.inner = ear
    try:
        wrapper.forward(given.x, given.tokens, source=given.source)  # not called: hooks are for the model's own calls
    finally:
        wrapper.inner = inside
    if any(len(each) != 1 for each in ear.heard):
        raise Unsupported(
            wrapper.name, "inspect", "it lays one text into several rows", "the mechanism inside by itself"
        )
    return [each[0] for each in ear.heard]


class _Ear(Layer):
    """Stands inside of a wrapper, keeps what it gets, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def forward(self, x: Tensor, tokens: Any = None, **words: Any) -> Output:
        self.heard.append(x)
        return Output(torch.zeros_like(x))


@contextmanager
def followed(model: nn.Module, begin_with: Origins) -> Iterator[Callable[[], Origins]]:
    """While a model reads one text: what columns stand for at the place that it is calling now."""
    now = [begin_with]
    with ExitStack() as hooks:

        def around(inside: nn.Module, enter: Callable[[], Origins]) -> None:
            begin = inside.register_forward_pre_hook(lambda *call: now.append(enter()))
            end = inside.register_forward_hook(lambda *call: now.pop() and None)
            hooks.callback(begin.remove)
            hooks.callback(end.remove)

        # whoever stands around comes first, so that what is inside finds its columns told
        for module in model.modules():
            if isinstance(module, Wrapper | Level):
                inside = module.inner if isinstance(module, Wrapper) else module.inside
                around(inside, _entering(module, now, hooks))
        yield lambda: now[-1]


def _entering(module: Wrapper | Level, now: list[Origins], hooks: ExitStack) -> Callable[[], Origins]:
    """The columns inside at each call that the module makes."""
    coming: list[Origins] = []

    def called(module: Any, args: Any, words: Any) -> None:
        given = given_to(args, words)
        if isinstance(module, Level):
            coming[:] = [of_groups(module, layout_of(given.x, given.tokens), now[-1])]
        else:
            coming[:] = of_columns(module, given, now[-1])

    hooks.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
    return lambda: coming.pop(0)


def given_to(args: tuple[Any, ...], words: dict[str, Any]) -> Given:
    """The arguments of a layer's call as a hook gets them."""
    return Given(args[0].detach(), args[1] if len(args) > 1 else words.get("tokens"), words.get("source"))


def layout_of(x: Tensor, tokens: Any) -> Layout:
    """The layout of a call's columns."""
    return Layout.plain(1, x.shape[1], x.device) if tokens is None else Layout.of(tokens)
