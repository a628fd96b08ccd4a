"""What a peer must say about itself to be compared: which layer of ours it mirrors, and how it is called.

An adapter is built from *our* layer, so that the pattern is the same size on both sides, and refuses options that its
library cannot mirror. `agreement` then computes both on the same small operands: a peer that does not compute what ours
does is not compared at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo import registry
from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Core, Shape, core_of
from attention_zoo.measure.work import Work, core_work, layer_work


class Agreement(NamedTuple):
    """How far a peer is from ours on the same operands.

    Fields:
        output, gradient: largest difference, over the largest value (but at least 1).
        bound: what is allowed of both.
        on: in words, at which options and size.
    """

    output: float
    gradient: float
    bound: float
    on: str

    @property
    def holds(self) -> bool:
        return max(self.output, self.gradient) <= self.bound


class Peer(ABC):
    """What others wrote, at the options of one of our layers or models.

    Class attributes:
        title: how a table calls it.
        fair: what makes the comparison fair, and what it leaves out; one or two sentences.
        needs: what to install, as pip understands it; None: torch alone.
        release: what its version must begin with.
        where: to be said after "pip install", where that is not enough.
        module: what must be importable.
        backend: which of ours it is compared with; None: with any.
        bound: see `Agreement`.
    """

    title: ClassVar[str]
    fair: ClassVar[str]
    needs: ClassVar[str | None] = None
    release: ClassVar[str] = ""
    where: ClassVar[str] = ""
    module: ClassVar[str] = "torch"
    backend: ClassVar[str | None] = None
    bound: ClassVar[float] = 1e-9

    def __init__(self, layer: Any, shape: Shape):
        """Set up for our layer, or model, and shape.

        Raises:
            Unsupported: for an option of ours that the peer has no counterpart of.
        """
        self.layer, self.shape = layer, shape
        self.length = -(-shape.length // self.multiple) * self.multiple

    @property
    def multiple(self) -> int:
        """Lengths that it takes are multiples of this. Longer input is its own cost: its library pads, too."""
        return 1

    @abstractmethod
    def work(self, variant: str, phase: str) -> Work:
        """What a cell of that variant and phase measures of the peer.

        Raises:
            Unsupported: for what it is not asked for.
        """

    @classmethod
    @abstractmethod
    def agreement(cls) -> Agreement:
        """Compare with our counterpart at a small size, outputs and gradients, in float64."""


class Adapter(Peer):
    """A peer's attention at the options of one of our layers.

    Class attributes:
        operands: what it is given: "q k v" or "qk v".
        writes_inputs: whether the call writes into its operands.
        variants: of cells that it can be measured in.
        small: options, causality and length of the comparison in `agreement`.
    """

    operands: ClassVar[str] = "q k v"
    writes_inputs: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("core", "layer")
    small: ClassVar[dict[str, Any]] = {}
    small_causal: ClassVar[bool] = True
    small_length: ClassVar[int] = 96

    def __init__(self, layer: Any, shape: Shape):
        super().__init__(layer, shape)
        self.heads, self.width = layer.heads, layer.head_width

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """[B, H, L, D] as it comes from the peer's own projection."""

    @abstractmethod
    def call(self, *operands: Tensor) -> Tensor:
        """Attend."""

    @abstractmethod
    def leave(self, out: Tensor) -> Tensor:
        """What `call` returns as [B, H, L, D]."""

    def check_phase(self, phase: str) -> None:
        if phase not in ("forward", "forward_backward"):
            raise Unsupported(self.title, f"phase={phase}", "peers are not asked for it", "phase=forward_backward")

    # --- the same for all --------------------------------------------------------------------------------------------

    def core(self) -> Core:
        """The peer's attention on random operands."""
        shape, count = self.shape, len(self.operands.split())
        native = [
            self.enter(
                torch.randn(shape.batch, self.heads, self.length, self.width, device=shape.device, dtype=shape.dtype)
            ).contiguous()
            for _ in range(count)
        ]
        return Core(
            tuple(native), self.call, self.out_shape(native[0]), self.shape.length, writes_inputs=self.writes_inputs
        )

    def out_shape(self, operand: Tensor) -> tuple[int, ...]:
        """Of what `call` returns; that of its first operand unless it says otherwise."""
        return tuple(operand.shape)

    def work(self, variant: str, phase: str) -> Work:
        """What a cell of that variant and phase measures of the peer.

        Raises:
            Unsupported: for a phase other than forward and forward_backward.
        """
        self.check_phase(phase)
        if variant == "core":
            return core_work(self.core(), backward=phase == "forward_backward")
        layer = PeerLayer(self).to(self.shape.device, self.shape.dtype)
        x = torch.randn(self.shape.batch, self.length, self.layer.dim, device=self.shape.device, dtype=self.shape.dtype)
        return layer_work(lambda x: [layer(x)], x, list(layer.parameters()), backward=phase == "forward_backward")

    @classmethod
    def agreement(cls) -> Agreement:
        """Compare with our counterpart at a small size, outputs and gradients, in float64."""
        heads, length = 2, cls.small_length
        options = {"dim": 8 * heads, "heads": heads, "causal": cls.small_causal, **cls.small}
        layer = registry.build(cls.backend or "full", **options).double()
        shape = Shape(2, length, torch.device("cpu"), torch.float64)
        adapter = cls(layer, shape)
        core = adapter.compared()
        weight = torch.randn(core.out_shape, dtype=torch.float64)
        theirs = _value_and_gradients(adapter.from_ours, core, weight)
        ours = _value_and_gradients(adapter.ours, core, weight)
        said = ", ".join(f"{key}={value}" for key, value in cls.small.items()) or "defaults"
        on = f"{said}, {'causal' if cls.small_causal else 'two-sided'}, {length} tokens, float64"
        output, *gradients = (float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(theirs, ours))
        return Agreement(output, max(gradients), cls.bound, on)

    def compared(self) -> Core:
        """What both sides are given in `agreement`, and the parameters whose gradients are compared, too."""
        return core_of(self.layer, self.shape)

    def from_ours(self, *given: Tensor) -> Tensor:
        """The peer on [B, H, L, D] of ours, padded as its library pads."""
        more = self.length - given[0].shape[2]
        native = [self.enter(nn.functional.pad(x, (0, 0, 0, more))).clone() for x in given]
        return self.leave(self.call(*native))[:, :, : given[0].shape[2]]

    def ours(self, *given: Tensor) -> Tensor:
        """Our counterpart on the same."""
        out: Tensor = self.layer.attend(*given)
        return out


class PeerLayer(nn.Module):
    """Hidden states in, hidden states out: linear projections around a peer's attention."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        width = adapter.heads * adapter.width
        self.adapter = adapter
        self.into = nn.ModuleList(nn.Linear(adapter.layer.dim, width) for _ in adapter.operands.split())
        self.to_out = nn.Linear(width, adapter.layer.dim)

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        projected = (project(x).unflatten(-1, (adapter.heads, adapter.width)).transpose(1, 2) for project in self.into)
        out = adapter.leave(adapter.call(*(adapter.enter(each) for each in projected)))
        return self.to_out(out.transpose(1, 2).flatten(2))


class Given(nn.Module):
    """Stands in for a projection: whatever it is asked for, it hands out what it was given."""

    tensor: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.tensor


def stand_in(module: nn.Module, *names: str) -> list[Given]:
    """Put something that hands out what it was given in the place of these projections."""
    given = [Given() for _ in names]
    for name, each in zip(names, given):
        setattr(module, name, each)
    return given


def as_rows(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H·D], as a linear layer writes it."""
    return x.transpose(1, 2).flatten(2)


def as_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H·D] -> [B, H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def in_turn(works: Sequence[Work], tokens: int) -> Work:
    """Calls that follow one another, such as those of segments, as one call for so many tokens."""

    def run() -> None:
        for each in works:
            each.run()

    def before() -> None:
        for each in works:
            each.before()

    return Work(run, tokens, before, held=lambda: [tensor for each in works for tensor in each.held()])


def nothing(batch: int, length: int, width: int, like: Tensor) -> Tensor:
    """Hidden states that nobody reads: the right shape, and no memory."""
    return like.new_zeros(()).expand(batch, length, width)


def _value_and_gradients(call: Callable[..., Tensor], core: Core, weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in core.operands]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [*leaves, *core.parameters])]
