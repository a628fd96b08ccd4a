"""One mechanism under test: how it is built, what it is fed, how two results are compared.

Everything here is tiny (width 16, a few dozen tokens), in float64 unless a check says otherwise, and drawn from its own
generators: running the suite leaves torch's random state as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Abilities, Attention, Output, Tokens
from attention_zoo.registry import recipe

Reference = Callable[[Attention, Tensor, Tokens], Tensor]
"""The slow truth of a mechanism that is no pattern, by plain loops: `reference(layer, x, tokens) -> hidden`."""

PRIME = 29
MANY = 307
"""Tokens far beyond a tile of `WIDE` rows; in tiles of a few rows so many would only repeat what `PRIME` shows."""
WIDE = 64
EXACT = 1e-12
"""What two float64 orders of the same sums may differ by, relative to the largest value."""


@dataclass(frozen=True)
class Case:
    """A mechanism and the options it is tested under. `Case.of` makes one.

    Fields:
        name: of the backend, for messages.
        cls: the Attention class.
        defaults: its default options.
        tiny: options at which short lengths straddle every border; `cls.tiny` and what `Case.of` was given.
        reference: the slow truth, `cls.reference` or what `Case.of` was given; None for patterns, whose definition is
            their `dense` kernel.
    """

    name: str
    cls: type[Attention]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    reference: Reference | None = None

    dim = 16
    heads = 2

    @staticmethod
    def of(backend: str | type[Attention], *, reference: Reference | None = None, **options: Any) -> Case:
        """A registered name or a class; `options` come on top of its `tiny` ones."""
        cls, defaults = recipe(backend) if isinstance(backend, str) else (backend, {})
        name = backend if isinstance(backend, str) else cls.name
        return Case(name, cls, defaults, {**cls.tiny, **options}, reference or cls.reference)

    @property
    def can(self) -> Abilities:
        return self.cls.declared

    @property
    def sides(self) -> list[bool]:
        """The values of `causal` that the mechanism declares."""
        return [True] * (self.can.causality != "none") + [False] * self.can.two_sided

    @property
    def border(self) -> int:
        """W: the longest length in tokens among the tiny options; 4 where there is none."""
        return max([size for size in self._sizes if size > 1], default=4)

    @property
    def shortest(self) -> int:
        """The shortest length in tokens among the tiny options; 4 where there is none."""
        return min([size for size in self._sizes if size > 1], default=4)

    @property
    def _sizes(self) -> list[int]:
        return [size for size in self.tiny.values() if isinstance(size, int) and not isinstance(size, bool)]

    @property
    def lengths(self) -> list[int]:
        """1, W-1, W, 2W+3 and a prime that is longer."""
        return sorted({1, max(1, self.border - 1), self.border, 2 * self.border + 3, PRIME})

    def telling(self, length: int) -> Iterator[tuple[str, Tokens]]:
        """Of `layouts`, those in which positions are not columns: for options that change scores, not layouts."""
        for name, tokens in self.layouts(length):
            if name == "padded left" or "documents" in name:
                yield name, tokens

    def variants(self) -> Iterator[dict[str, Any]]:
        """The tiny options alone, then other widths, each declared position scheme, and grouped heads."""
        yield {}
        yield {"head_width": 6, "bias": False, "scale": 0.3}
        for scheme in self.can.positions:
            if scheme != "none":
                yield {"positions": scheme}
        if self.can.grouped_heads:
            yield {"kv_heads": 1}

    def build(
        self, *, dtype: torch.dtype = torch.float64, tiny: bool = True, tile: int = 4, **options: Any
    ) -> Attention:
        """A layer in evaluation mode, the same at every call, with weights large enough to make sharp distributions.

        Args:
            dtype: of its parameters.
            tiny: whether to use the tiny options.
            tile: rows and columns of a pattern's tiles; small, so that short lengths straddle many borders.
            options: of the constructor.
        """
        options = {"dim": self.dim, "heads": self.heads, **self.defaults, **(self.tiny if tiny else {}), **options}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)  # of all devices it takes longer than the layer
            layer = self.cls(**options)
            with torch.no_grad():
                for parameter in layer.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(2)
                    else:
                        # biases start at zero in many layers, and a zero bias hides whether padding is masked
                        parameter.add_(0.2 * torch.randn_like(parameter))
        if isinstance(layer, PatternAttention) and tiny:
            layer.tile = tile
        return layer.to(dtype).eval()

    def data(self, batch: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.dim, generator=generator, dtype=torch.float64).to(dtype)

    def globals(self, valid: Tensor, before: int | None = None) -> Tensor | None:
        """A few global tokens, in the first `before` columns; None where the mechanism has none."""
        if self.can.global_tokens == "none":
            return None
        generator = torch.Generator().manual_seed(3)
        flags = (torch.rand(valid.shape, generator=generator) < 0.15) & valid
        if before is not None:
            flags[:, before:] = False
        return flags

    def layouts(self, length: int) -> Iterator[tuple[str, Tokens]]:
        """Every way in which three rows of tokens may lie in a batch, by name."""
        whole = torch.ones(3, length, dtype=torch.bool)
        kept = [length, -(-2 * length // 3), -(-length // 4)]
        yield "all valid", Tokens.of(whole)
        for side in ("right", "left"):
            yield f"padded {side}", Tokens.of(ragged(length, kept, side))
        if length > 3:
            holes = torch.ones(3, length, dtype=torch.bool)
            holes[0, 1::3] = False
            holes[1, length // 2 :: 2] = False
            yield "holes", Tokens.of(holes)
            document = torch.arange(length)[None] // torch.tensor([[max(1, length // 2)], [3], [length]])
            yield "documents", Tokens.of(ragged(length, kept, "left"), document=document)
            flags = self.globals(holes)
            if flags is not None:
                yield "global tokens", Tokens.of(whole, self.globals(whole))
                yield "global tokens, documents and holes", Tokens.of(holes, flags, document)


def ragged(length: int, kept: Sequence[int], side: str = "right") -> Tensor:
    """Bool [len(kept), length]: each row keeps that many tokens; the padding lies on `side`."""
    column, count = torch.arange(length)[None], torch.tensor(kept)[:, None]
    return column < count if side == "right" else column >= length - count


def piece(tokens: Tokens, start: int, stop: int) -> Tokens:
    """What a call that is given only these columns would say of them: it does not know what follows."""
    part = tokens.cut(slice(start, stop))
    first = part.valid.long().argmax(1, keepdim=True)
    begin = torch.where(part.valid.any(1), part.position.gather(1, first)[:, 0], 0)
    return Tokens.of(part.valid, part.is_global, part.document, begin)


def feed(layer: Attention, x: Tensor, tokens: Tokens, cuts: Sequence[int], state: Any = None) -> tuple[Tensor, Any]:
    """Call by call, cut before the columns in `cuts`: the concatenated hidden states and the last state."""
    state = layer.initial_state(x.shape[0]) if state is None else state
    hidden = []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]]):
        out = layer(x[:, start:stop], piece(tokens, start, stop), state=state)
        hidden.append(out.hidden)
        state = out.state
    return torch.cat(hidden, 1), state


def weighed(out: Tensor, valid: Tensor) -> Tensor:
    """A fixed random weighing of the valid outputs: the loss whose gradients are compared."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (out * weight.to(out.dtype))[valid].sum()


def gradients(layer: Attention, x: Tensor, out: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Of `weighed(out, valid)`: for x and for each parameter, zeros where there is none."""
    loss = weighed(out, valid)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return {
        name: torch.zeros_like(at) if grad is None else grad
        for name, at, grad in zip(names, inputs, found, strict=True)
    }


def close(actual: Tensor, expected: Tensor, where: str, tolerance: float = EXACT) -> None:
    """Demand equality up to `tolerance` times the largest expected value (at least 1)."""
    assert actual.shape == expected.shape, f"{where}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    actual, expected = actual.detach(), expected.detach()
    error = (actual - expected).abs()
    bound = tolerance * max(1.0, float(expected.abs().max()))
    worst = float(error.max())
    # `not <=` also refuses NaN
    assert worst <= bound, f"{where}: differs by {worst:.2e}, allowed {bound:.1e}, first at {_first(~(error <= bound))}"


def same(actual: Tensor, expected: Tensor, where: str) -> None:
    """Demand bitwise equality."""
    assert actual.shape == expected.shape, f"{where}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    differs = actual != expected
    assert not bool(differs.any()), (
        f"{where}: not bitwise equal, off by {float((actual - expected).abs().max()):.2e}, first at {_first(differs)}"
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def run(layer: Attention, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
    """One call without gradients."""
    with torch.no_grad():
        return layer(x, tokens, **more)
