"""A stack around a shorter one: blocks, k tokens into one, what stands inside, one into k, blocks.

    h = before(x);   y = inside(pool(h, k));   out = after(h + up(y))

`inside` is a stack, or a level again. Its columns are groups of a document's valid tokens (`layout.windows`), so
padding, packed documents and cuts of a stream change nothing, and any mechanism can stand there. A call with a state
runs what is inside for the groups that it opens alone: at k tokens of k - 1 steps out of k nothing at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Layer, Output, Source, Tokens, add_losses, weighed
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.windows import Windows, windows
from attention_zoo.model.block import attentions
from attention_zoo.model.level_placed import output_in_place, padding
from attention_zoo.model.resample import Pool, Up, taken
from attention_zoo.place import place_of


class Beside(torch.autograd.Function):
    """The same; a mark in the graph: what lies behind is computed for others' sake, no loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Halfway(NamedTuple):
    """State of a level.

    Fields:
        before, inside, after: of what it is made of.
        tokens: [B, k - 1, E], the last tokens before shortening.
        groups: [B, reach, E], the last groups that came out of what is inside.
    """

    before: Any
    inside: Any
    after: Any
    tokens: Float[Tensor, "B k E"]
    groups: Float[Tensor, "B n E"]


class Level(Layer):
    """See the module.

    Args:
        before, after: stacks at the length of the input.
        inside: what is shorter.
        pool, up: how one gets there and back.
        reach: how many groups a token's up-sampling reads, its own among them.
        causal: whether groups end with the token that opens them; else they begin with it.
        unpooled: whether what is inside has the tokens that were pooled for its source.

    Attributes:
        always_inside: whether what is inside is run also where no group opens, on a column of padding, which changes
            nothing: its weights may be shared out among processes, of which others have such groups.
    """

    always_inside = False

    def __init__(
        self, before: Layer, inside: Layer, after: Layer, *, pool: Pool, up: Up, reach: int = 1, causal: bool = True,
        unpooled: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.before, self.pool, self.inside, self.up, self.after = before, pool, inside, up, after
        self.size, self.reach, self.causal, self.unpooled = pool.size, reach, causal, unpooled
        if causal and not unpooled:
            self.travels = "tokens and groups beside cuts"

    @property
    def attentions(self) -> list[Layer]:
        """The mechanism of each block, in order."""
        return attentions(self)

    def initial_state(self, batch_size: int) -> Halfway:
        parts = [each.initial_state(batch_size) for each in (self.before, self.inside, self.after)]
        (device, dtype), width = place_of(self), self.pool.dim
        empty = (torch.zeros(batch_size, n, width, device=device, dtype=dtype) for n in (self.size - 1, self.reach))
        return Halfway(*parts, *empty)

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Halfway | None = None,
        source: Source | None = None,
        choices: tuple[Any, ...] | None = None,
    ) -> Output:
        if state is not None and not isinstance(state, Halfway):
            raise ValueError(f"state must be of a model with as many levels, got {type(state).__name__}")
        if getattr(tokens, "placement", None) is not None:
            return output_in_place(self, x, Layout.of(tokens))  # type: ignore[arg-type]
        layout, at = _planned(self, x, tokens)
        given = (None, None, None) if state is None else state[:3]
        chosen = (None, None, None) if choices is None else choices
        first = self.before(x, layout, state=given[0], source=source, choices=chosen[0])
        held = None if state is None else state.tokens
        groups = self.pool(first.hidden, held, at)
        # between two groups nothing inside is run
        middle = Output(groups, given[1])
        if groups.shape[1] or self.always_inside:
            seen = Source(first.hidden, layout) if self.unpooled else source
            call: dict[str, Any] = {"state": given[1], "source": seen, "choices": chosen[1]}
            if groups.shape[1]:
                middle = self.inside(groups, at.groups, **call)
                share = at.groups.read / max(1, layout.read)
                middle = middle._replace(losses=weighed(middle.losses, self.inside, share))
            else:
                beside = Layout.known(padding(len(x)), x.device)
                middle = self.inside(first.hidden[:, :1] * 0, beside, **call)
                middle = middle._replace(hidden=groups + Beside.apply(middle.hidden)[:, :0], losses={})
        latest = None if state is None else state.groups
        wide = self.up(first.hidden, middle.hidden, latest, at)
        last = self.after(wide, layout, state=given[2], source=source, choices=chosen[2])
        outs = first, middle, last
        new = None
        if state is not None:
            new = Halfway(
                first.state,
                middle.state,
                last.state,
                taken(first.hidden, held, self.size - 1, at.last),
                taken(middle.hidden, latest, self.reach, at.latest),
            )
        return Output(last.hidden, new, add_losses(*(out.losses for out in outs)), tuple(out.choices for out in outs))


# where tokens stand is the host's to say: as torch.compiler.disable, without loading the compiler
@torch._disable_dynamo
def _planned(level: Level, x: Tensor, tokens: Tokens | None) -> tuple[Layout, Windows]:
    layout = Layout.plain(x.shape[0], x.shape[1], x.device) if tokens is None else Layout.of(tokens)
    return layout, windows(layout, level.size, causal=level.causal, reach=level.reach)
