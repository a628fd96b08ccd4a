"""What every mechanism is: the tokens it sees, the call it answers, the abilities it declares.

One call serves attention, block, stack and wrapper: hidden states in, hidden states out; state in, state out.

    out = layer(x, tokens, state=state)      # out.hidden [B, L, E], out.state

Letters, the same everywhere: B batch, L queries, S keys, H heads, K key/value heads, E model width, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.abilities import Abilities, Growth, able, catalogues  # noqa: F401
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.placement import check_placed
from attention_zoo.options import Factor, Heads, HeadWidth, Named, Positive, Seed, checked
from attention_zoo.rules import OneOf, Unsupported, at_least, known_options, named, one_of, shown  # noqa: F401
from attention_zoo.tokens import Tokens, check_place, check_tokens, is_integers, keep, of_tensor  # noqa: F401

VANISHING = 1e-45
BIASES = "true, false, into or out"


class Source(NamedTuple):
    """The encoder side of cross-attention."""

    hidden: Float[Tensor, "B S E"]
    tokens: Tokens


class Output(NamedTuple):
    """What every layer returns.

    Fields:
        hidden: [B, L, E], finite at padding.
        state: None in, None out.
        losses: auxiliary losses by name, weighted already; depth sums them. One that is made of tokens is a mean over
            the call's valid ones, so that calls add up by their numbers of tokens; see `weighed`.
        choices: discrete decisions (LSH buckets), to be handed back to replay them.
    """

    hidden: Float[Tensor, "B L E"]
    state: Any = None
    losses: Mapping[str, Tensor] = {}
    choices: Any = None


class Operands(NamedTuple):
    """What `attend`, a mechanism without its projections, is given.

    Fields:
        shapes: of each operand, in the order of `attend`.
        by_rows: whether those of heads lie in memory as a projection writes them, [B, L, H, D]; else [B, H, L, D].
        parameters: of the layer that `attend` uses besides.
        seen: tokens that come before the call's, of which some are among the keys.
    """

    shapes: tuple[tuple[int, ...], ...]
    by_rows: bool = False
    parameters: tuple[Tensor, ...] = ()
    seen: int = 0


def add_losses(*many: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum auxiliary losses by name, as depth does."""
    total: dict[str, Tensor] = {}
    for losses in many:
        for name, value in losses.items():
            total[name] = total[name] + value if name in total else value
    return total


def weighed(
    losses: Mapping[str, Tensor], layer: nn.Module, tokens: float, parameters: float = 1.0
) -> dict[str, Tensor]:
    """Losses of a call inside a layer's call, as shares of that: by how many of its tokens the call inside has read.

    Args:
        layer: what was called inside.
        tokens: the factor of losses that are made of tokens.
        parameters: that of losses of parameters alone, which all calls repeat.
    """
    if not losses:
        return {}
    of_tokens = {name for each in layer.modules() for name in getattr(each, "token_losses", ())}
    return {name: value * (tokens if name in of_tokens else parameters) for name, value in losses.items()}


class Layer(nn.Module):
    """Whatever answers the one call: an attention, a block, a stack, a wrapper.

    `travels` and `hands_on` are as of `Attention`; travels = "": nothing, each column is alike to it. constant_state:
    whether no gradient reaches a state that it is given.
    """

    travels: str | None = None
    hands_on: bool = False
    constant_state: bool = False

    def initial_state(self, batch_size: int) -> Any:
        """An empty state for `batch_size` rows, on the layer's device and in its dtype.

        Raises:
            Unsupported: unless the layer says what its state is.
        """
        reason = "it has no initial_state, hence keeps none"
        raise Unsupported(type(self).__name__, "state", reason, "state=None and all tokens at once")

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        tokens: Tokens | None = None,
        *,
        state: Any = None,
        source: Source | None = None,
        choices: Any = None,
    ) -> Output:
        raise NotImplementedError


_layers: WeakValueDictionary[int, Attention] = WeakValueDictionary()
_numbers = itertools.count()


def layer_of(number: int) -> Attention:
    """The attention layer of this `number`: how a compiled graph names it. RuntimeError if it is not here."""
    if number not in _layers:
        raise RuntimeError(
            f"a compiled graph asks for attention layer {number}, which this process does not have: compile the model "
            f"where it runs, and keep it as long as its graph"
        )
    return _layers[number]


def _then_built(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that calls `built` if it is the outermost one: when all options are attributes."""

    @wraps(init)
    def wrapped(self: Attention, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        if type(self).__init__ is wrapped:
            self.built()

    return wrapped


class Attention(Layer):
    """Base of all attention mechanisms: the shared options and the checks that are the same for each.

    Options are checked by the annotations of the constructors, a subclass's too; see `options`.

    Args:
        dim: model width E.
        heads: query heads H.
        kv_heads: key/value heads K, a divisor of heads; default heads.
        head_width: D; default dim / heads.
        bias: whether projections have a bias: all (True), none (False), those into the heads alone ("into", as Qwen 2)
            or those out of them alone ("out").
        scale: factor on q·k, from -10,000 to 10,000; default D^-0.5.
        causal: whether a token sees only itself and what came before.
        cross: build for cross-attention: keys and values come from `source`.
        positions: attention-level position scheme, by name or as a mapping `{"name": ..., <options>}`; embedding-level
            ones belong to the skeleton.
        seed: of everything drawn at random outside of training.

    Attributes:
        number: of this very layer in this process.

    Class attributes:
        name, declared: of the backend; its abilities at the default options.
        tiny: options at which a few dozen tokens already straddle every border of the mechanism; the contract suite
            tests under them (window 3, chunk 4, ...). Whole numbers among them are taken for lengths in tokens.
        reference: the slow truth of a mechanism that is no pattern, by plain loops in float64, differentiable:
            `reference(layer, x, tokens) -> hidden`, a static method. The contract suite compares outputs and gradients
            with it; a pattern needs none, its definition is `bias`.
        companions: layers that models of this backend mix in and that are no backends: part -> class, as dotted names.
            They are built as "backend.part".
        token_losses: names of the losses that a call makes of its tokens, maybe; those of parameters alone come from a
            method `losses`.
        wraps: whether it stands around another layer, its option `inner`; see `model.wrapper`.
        travels: what it sends where several processes own a sequence (layout/placement.py); None: it refuses that.
        hands_on: whether part of that is a state that each process waits for from the one before.

    Raises:
        Unsupported: for what the mechanism does not declare in `declared`.
        ValueError: for widths that do not fit.
    """

    name: ClassVar[str]
    declared: ClassVar[Abilities]
    tiny: ClassVar[Mapping[str, Any]] = {}
    reference: ClassVar[Any] = None
    companions: ClassVar[Mapping[str, str]] = {}
    token_losses: ClassVar[tuple[str, ...]] = ()
    wraps: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = _then_built(checked(cls.__init__))  # type: ignore[method-assign]

    @checked
    def __init__(
        self,
        *,
        dim: Positive,
        heads: Heads,
        kv_heads: Heads | None = None,
        head_width: HeadWidth | None = None,
        bias: Annotated[bool | str, OneOf(True, False, "into", "out"), Field(description=BIASES)] = True,
        scale: Factor | None = None,
        causal: bool = True,
        cross: bool = False,
        positions: Named = "none",
        seed: Seed = 0,
    ):
        super().__init__()
        self._enlist()
        if head_width is None and dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} for dim={dim} (or give head_width)")
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} for heads={heads}")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_width = dim // heads if head_width is None else head_width
        self.scale = self.head_width**-0.5 if scale is None else scale
        if abs(self.scale) < VANISHING:
            self.scale = 0.0  # which it is to float32, where torch's fused kernels take it for one and get NaN
        positions, self.position_options = named("positions", positions)
        self.causal, self.cross, self.positions, self.seed = causal, cross, positions, seed
        self.bias_into, self.bias_out = bias in (True, "into"), bias in (True, "out")
        can = self.declared
        if cross and not can.cross:
            raise Unsupported(self.name, "cross=True", "it attends to its own tokens only", able(cross=True))
        if cross and causal:
            raise ValueError("cross=True needs causal=False: the source is complete before the first query")
        if not causal and not can.two_sided:
            raise Unsupported(self.name, "causal=False", "the mechanism only looks back", able(two_sided=True))
        if causal and can.causality == "none":
            raise Unsupported(self.name, "causal=True", "the mechanism has no causal form", able(causality="strict"))
        if positions not in can.positions:
            raise Unsupported(
                self.name, f"positions={positions}", "its scores do not take that scheme", " or ".join(can.positions)
            )
        if self.position_options and positions in ("none", "relative"):
            raise ValueError(f"positions={positions} has no options, got {self.position_options!r}")
        if kv_heads != heads and not can.grouped_heads:
            raise Unsupported(self.name, f"kv_heads={kv_heads}", "keys are not grouped", "kv_heads=null")

    def built(self) -> None:
        """Refuse, after construction, options that only fit together by what a subclass made of them."""

    def _enlist(self) -> None:
        self.number = next(_numbers)
        _layers[self.number] = self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._enlist()  # a copy is another layer

    @property
    def abilities(self) -> Abilities:
        return self.declared

    @property
    def cuts_gradients(self) -> bool:
        """Whether gradients end with a call, be it with a state that is not detached."""
        return self.abilities.truncated

    @property
    def keeps(self) -> tuple[Any, ...] | None:
        """What states are, where it is checked: their type, then the shape that they hold without rows and columns."""
        return None

    def choices_shape(self, batch: int, length: int) -> tuple[int, ...] | None:
        """Shape of `Output.choices`, int32, where the mechanism makes some."""
        return None

    def made_of(self, x: Float[Tensor, "1 L E"], tokens: Layout) -> Int[Tensor, "S m"] | None:
        """The tokens of one row that each column attended to is made of alike, -1: no more. None: it is one token."""
        return None

    def pairs(self, length: int) -> float | None:
        """How many query-key pairs one forward call over `length` tokens scores per head, for the FLOP count.
        A pair costs 4·D: a dot product and a weighted value. A mechanism that spends more (relative positions: another
        dot product) counts that in. None: no formula; a pattern's pairs are then counted from its definition.
        """
        return None

    def step_pairs(self, length: int) -> float | None:
        """Those of one decoding step, whose token is the last of `length`: what it adds to all, by default."""
        pairs = self.pairs(length)
        return pairs if pairs is None or length < 2 else pairs - (self.pairs(length - 1) or 0)

    def keys_seen(self, length: int) -> Sequence[float] | None:
        """Keys that each query of a row scores, mean of heads; of hashing the most. None: a pattern's are counted."""
        return None

    def oldest_seen(self, length: int) -> Sequence[int] | None:
        """The first token that each query of a row may depend on. None: a pattern's is found by its definition."""
        return None

    def core(self, batch: int, length: int) -> Operands | None:
        """What `attend` is given for so many rows and tokens, so that it can be measured alone; None: there is none.
        By default queries, keys and values, where the class has an `attend(q, k, v)`: [B, H, L, D] and [B, K, L, D]."""
        if not hasattr(self, "attend"):
            return None
        keys = batch, self.kv_heads, length, self.head_width
        return Operands(((batch, self.heads, length, self.head_width), keys, keys))

    def explain_kernels(self, length: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
        """Every kernel, fastest first, and why it cannot run so many unpadded tokens there; the only one: "own"."""
        return [("own", None)]

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Any) -> Any:
        """The state after a call, without the call's output: a step at a long context can be had without attending."""
        return self(x, tokens, state=state).state

    def enter(
        self, x: Tensor, tokens: Tokens | None, state: Any, source: Source | None, choices: Any = None
    ) -> tuple[Tensor, Layout]:
        """Check one call; its tokens described, and x with zeros at padding, so that not even NaN spreads from it."""
        if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point():
            raise ValueError(f"x must be a dense tensor of floats, [batch, length, {self.dim}], got {of_tensor(x)}")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [batch, length, {self.dim}], got shape {tuple(x.shape)}")
        if x.shape[1] == 0 and getattr(tokens, "placement", None) is None:  # a process may own no column
            raise ValueError("x must hold at least one token, got length 0")
        if choices is not None and self.choices_shape(*x.shape[:2]) is None:
            raise Unsupported(self.name, "choices", "it makes no discrete decisions", "choices=None")
        if source is not None and not isinstance(source, Source):
            raise ValueError(f"source must be a Source(hidden, tokens), got {shown(source)}")
        if state is not None:
            if not self.causal and not self.cross:
                raise Unsupported(self.name, "state", "two-sided attention needs all tokens in one call", "causal=True")
            self._check_state(state, len(x))
        if source is not None and not self.cross:
            raise Unsupported(self.name, "source", "it was built with cross=False", "cross=True at build")
        if self.cross and source is None and state is None:
            raise ValueError("cross-attention needs source=, or a state that holds one")
        if tokens is None:
            if state is not None and not self.cross:
                raise ValueError("tokens must be given with a state: they say which positions these tokens have")
            return x, Layout.plain(x.shape[0], x.shape[1], x.device)
        check_tokens(tokens, x.shape[:2])
        check_place(tokens, x)
        layout = Layout.of(tokens)
        check_placed(self.name, self.travels, layout, state=state, source=source)
        if self.declared.global_tokens == "none" and layout.any_global:
            others = able(global_tokens=("any", "first_call"))
            raise Unsupported(self.name, "global tokens", "no token can see everything", others)
        return layout.blanked(x), layout

    def _check_state(self, state: Any, batch: int) -> None:
        """Raise a ValueError for what is no state of such a layer, or of another number of rows."""
        if self.keeps is None:
            return
        kind, *shape = self.keeps
        if not isinstance(state, kind):
            raise ValueError(
                f"state must be of {self.name}, from initial_state or the call before, got {type(state).__name__}"
            )
        held = getattr(state, "columns", state).holds
        if held != (batch, *shape):
            wanted, got = ((*x[:-1], "length", x[-1]) for x in ((batch, *shape), held))
            raise ValueError(
                f"state must hold keys of shape {wanted} like this layer and this call, got {got}".replace("'", "")
            )
