"""Wrappers: mechanisms that stand around another layer, be it one attention or a whole stack.

    model = Transformer(attention={"name": "global_tokens", "count": 2, "inner": "longformer"}, ...)
    model = Transformer(attention="longformer", around=["global_tokens"], ...)              # the same, count by default
    layer = zoo.build("global_tokens", dim=512, heads=8, inner="longformer")                # around one layer

A wrapper owns its child, `self.inner`, and answers the layer's call: it may put columns in, lay tokens anew, call the
child once or often, and takes out what it put in. Its state is a tree, `Nested`: its own, and the child's.

    class Echo(Wrapper):
        name = "echo"

        def forward(self, x, tokens=None, *, state=None, source=None, choices=None):
            x, tokens = self.enter(x, tokens, state, source)
            out = self.inside(x, tokens, state=state and state.inner, source=source, choices=choices)
            return out._replace(hidden=2 * out.hidden, state=state and Nested((), out.state))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attention_zoo.attention.full import Full
from attention_zoo.contract import Abilities, Attention, Layer, Output, Source, Tokens, Unsupported
from attention_zoo.layout.layout import Layout
from attention_zoo.model.block import attentions
from attention_zoo.model.mechanisms import entries
from attention_zoo.options import Heads, Positive, check_target
from attention_zoo.rules import shown

ORDERS: dict[str, tuple[Any, ...]] = {
    "causality": ("none", "values", "strict"),
    "carry": ("none", "segment", "prefix"),
    "two_sided": (False, True),
    "global_tokens": ("none", "first_call", "any"),
    **dict.fromkeys(("compute", "activations", "state"), ("quadratic", "loglinear", "linear", "constant")),
    "truncated": (True, False),
}
"""Values of `Abilities` from the weakest on."""
UNDECLARED = Abilities(
    causality="values", carry="none", two_sided=True, global_tokens="none", cross=False, compute="quadratic",
    activations="quadratic", state="quadratic",
)  # fmt: skip
"""Of a layer that says nothing of itself."""


class Nested(NamedTuple):
    """State of a wrapper.

    Fields:
        own: what it keeps itself, `()` for nothing.
        inner: the state of what it stands around.
    """

    own: Any
    inner: Any


class Wrapper(Attention):
    """Base of all wrappers. A subclass says its `name` and `forward`; `own_state` if it keeps one; and
    `abilities_around` if it can do less, or more, than what stands inside.

    Args:
        inner: what it stands around: a mechanism as the option `attention` takes it, one alone where the wrapper is
            built as a layer; or a layer that is there already.
        shared: the options of `Attention`, for the mechanism inside where that does not say otherwise itself.

    Attributes:
        is_layer: whether it stands around one attention, not around a stack.

    Raises:
        Unsupported: for what the mechanism inside, or the wrapper around it, cannot do.
        ValueError: unless `inner` is one mechanism.
    """

    wraps = True
    is_layer: bool
    adds_global_tokens: ClassVar[bool] = False
    """Whether it puts tokens in that see and are seen by all."""
    usual: ClassVar[type[Attention]] = Full
    """What stands inside by default, of whose abilities the class declares its own."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "declared" in cls.__dict__:
            raise TypeError(f"{cls.__name__} must say abilities_around(inner), from which declared follows")
        cls.declared = cls.abilities_around(cls.usual.declared)

    def __init__(self, *, inner: Any = "full", dim: Positive, heads: Heads, **shared: Any):
        check_target(type(self), shared)
        child = inner if isinstance(inner, Layer) else self._built(inner, {"dim": dim, "heads": heads, **shared})
        try:
            can = self.abilities_around(abilities_of(child))
        except Unsupported as error:
            inside = {str(getattr(each, "name", type(each).__name__)) for each in attentions(child) or [child]}
            raise self._refused(error, " and ".join(sorted(inside))) from None
        self.__dict__["declared"] = can  # of this very one; the class says it for the default child
        super().__init__(dim=dim, heads=heads, **shared)
        self.inner = child
        self.is_layer = child.is_layer if isinstance(child, Wrapper) else isinstance(child, Attention)

    def _built(self, inner: Any, shared: dict[str, Any]) -> Layer:
        listed = entries(inner, option="inner")
        if len(listed) > 1:
            raise ValueError(
                f"inner must be one mechanism where {self.name} stands around one layer, got {shown(inner)}; a list is "
                f"for a stack: Transformer(attention={{'name': '{self.name}', 'inner': [...]}})"
            )
        try:
            return listed[0].make(**{**shared, **listed[0].options})
        except Unsupported as error:
            raise self._refused(error) from None

    @classmethod
    def inside_of(cls, options: Mapping[str, Any]) -> Any:
        """Which mechanisms stand inside, given all options: `inner`, unless a wrapper has another word for them."""
        return options["inner"]

    @staticmethod
    def abilities_around(inner: Abilities) -> Abilities:
        """What the wrapper can do around a layer with these abilities. As a layer by itself it has no source.

        Raises:
            Unsupported: if it cannot stand around such a layer.
        """
        return replace(inner, cross=False, adjustable=())

    @property
    def attentions(self) -> list[Layer]:
        """The mechanisms inside: of each block of a stack, or the one layer."""
        return attentions(self.inner) or [*getattr(self.inner, "attentions", [self.inner])]

    def calls(self, length: int) -> tuple[tuple[int, int], ...]:
        """How many columns the child gets of a row of `length` tokens, and how often, for the FLOP count.

        The row's last token is the last column of the last. Empty: not said, and none are counted.
        """
        return ()

    def own_state(self, batch_size: int) -> Any:
        """What the wrapper itself keeps from call to call, at the start: a tensor or a tree of such, batch first."""
        return ()

    def initial_state(self, batch_size: int) -> Nested:
        if self.abilities.carry == "none":
            raise Unsupported(self.name, "state", "it keeps none around this", "state=None and all tokens at once")
        return Nested(self.own_state(batch_size), self.inner.initial_state(batch_size))

    def enter(
        self, x: Float[Tensor, "B L E"], tokens: Tokens | None, state: Any, source: Source | None, choices: Any = None
    ) -> tuple[Float[Tensor, "B L E"], Layout]:
        """Check one call. Around a single layer padding is zeroed; a stack's calls are checked by the model.

        The child says itself which choices it takes.
        """
        if self.is_layer:
            return _entered(super().enter, x, tokens, state, source)
        return x, _described(x, tokens)

    def inside(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        """Call the child; what that refuses is refused in the wrapper's name, too."""
        try:
            return self.inner(x, tokens, state=state, source=source, choices=choices)
        except Unsupported as error:
            raise self._refused(error) from None

    def _refused(self, error: Unsupported, inside: str | None = None) -> Unsupported:
        backend = f"{self.name} around {inside or error.backend}"
        return Unsupported(backend, error.option, error.reason, error.instead)

    def _check_state(self, state: Any, batch: int) -> None:
        if not isinstance(state, Nested):
            raise ValueError(
                f"state must be of {self.name}, from initial_state or the call before, got {type(state).__name__}"
            )


# what tokens are is the host's to say: as torch.compiler.disable, without loading the compiler
@torch._disable_dynamo
def _described(x: Tensor, tokens: Tokens | None) -> Layout:
    return Layout.plain(x.shape[0], x.shape[1], x.device) if tokens is None else Layout.of(tokens)


@torch._disable_dynamo
def _entered(enter: Callable[..., tuple[Tensor, Layout]], *call: Any) -> tuple[Tensor, Layout]:
    return enter(*call)


def abilities_of(layer: Layer) -> Abilities:
    """Of a mechanism what it says; of a stack what each of its mechanisms can."""
    if (own := _said_by(layer)) is not None:
        return own
    found = [_said_by(each) or UNDECLARED for each in attentions(layer)]
    weakest = {field: min((getattr(can, field) for can in found), key=order.index) for field, order in ORDERS.items()}
    return Abilities(**weakest, cross=False)


def _said_by(layer: Layer) -> Abilities | None:
    """Asked by attribute: torch.compile may stand in between."""
    own = getattr(layer, "abilities", None)
    return own if isinstance(own, Abilities) else None
