"""What every mechanism is: the tokens it sees, the call it answers, the abilities it declares.

One call serves attention, block, stack and wrapper: hidden states in, hidden states out; state in, state out.

    out = layer(x, tokens, state=state)      # out.hidden [B, L, E], out.state

Letters, the same everywhere: B batch, L queries, S keys, H heads, K key/value heads, E model width, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Growth = Literal["constant", "linear", "loglinear", "quadratic"]


class Unsupported(ValueError):
    """A mechanism was asked for something that it does not declare. Raised at build, never silently ignored."""

    def __init__(self, backend: str, option: str, reason: str, instead: str):
        super().__init__(f"{backend}: {option} is not supported: {reason}; use {instead} instead")
        self.backend, self.option, self.reason, self.instead = backend, option, reason, instead


class Tokens(NamedTuple):
    """What each column is, besides its vector. Every field is [B, L]; build it with `Tokens.of`.

    Fields:
        position: place within the token's own document; strictly increases over its valid columns. Anything at padding.
        valid: False at padding, on either side or in holes.
        is_global: sees and is seen by every token of its document (still causal where the layer is).
        document: attention, memory and recurrent state never cross documents (packing). Never falls along a row.
        length: number of tokens of the token's document up to the end of the call. Only two-sided patterns may read it,
            since a causal token must not know what follows.
    """

    position: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    is_global: Bool[Tensor, "B L"]
    document: Int[Tensor, "B L"]
    length: Int[Tensor, "B L"]

    @staticmethod
    def of(valid: Tensor, is_global: Tensor | None = None, document: Tensor | None = None, start: Any = 0) -> Tokens:
        """Number the valid tokens of each document from 0; those of a row's first document from `start`.

        Args:
            valid: bool [B, L], True keeps a token.
            is_global: bool [B, L]; default none.
            document: non-negative int [B, L] that never falls along the valid tokens of a row; default one document.
            start: int or int [B], position of the first valid token: what earlier calls have already consumed.

        Raises:
            ValueError: for a wrong shape or dtype, naming the argument.
        """
        if valid.ndim != 2 or valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be a bool tensor [batch, length] where True keeps a token, "
                f"got {valid.dtype} of shape {tuple(valid.shape)}"
            )
        B, L = valid.shape
        device = valid.device
        for name, given, kind in (("is_global", is_global, torch.bool), ("document", document, None)):
            if given is None:
                continue
            if given.shape != valid.shape:
                raise ValueError(f"{name} must have the shape of valid, {(B, L)}, got {tuple(given.shape)}")
            if given.dtype.is_floating_point or (kind is torch.bool and given.dtype != torch.bool):
                raise ValueError(f"{name} must be {'bool' if kind else 'integer'}, got {given.dtype}")
        begin = torch.as_tensor(start, device=device, dtype=torch.long).expand(B)[:, None]
        flags = torch.zeros_like(valid) if is_global is None else is_global & valid
        count = valid.long().cumsum(1)
        if document is None:
            position = (begin + count - 1).clamp(min=0)
            length = (begin + count[:, -1:]).expand(B, L) if L else position
            return Tokens(position, valid, flags, torch.zeros_like(position), length)
        filled = torch.where(valid, document.long(), -1)
        running = filled.cummax(1).values if L else filled
        if bool((valid & (document.long() < running)).any()) or bool((valid & (document < 0)).any()):
            raise ValueError("document must be non-negative and never fall along the valid tokens of a row")
        before = nn.functional.pad(running[:, :-1], (1, 0), value=-1)
        first = valid & (running != before)
        base = torch.where(first, count - 1, 0).cummax(1).values if L else count
        index = (first.long().cumsum(1) - 1).clamp(min=0)
        shift = torch.where(index == 0, begin, 0)
        position = (count - 1 - base + shift).clamp(min=0)
        totals = torch.zeros_like(count).scatter_add_(1, index, valid.long())
        return Tokens(position, valid, flags, running.clamp(min=0), totals.gather(1, index) + shift)

    @staticmethod
    def all_valid(batch: int, length: int, device: Any = None) -> Tokens:
        """One document of `length` valid tokens from position 0 in each of `batch` rows."""
        return Tokens.of(torch.ones(batch, length, dtype=torch.bool, device=device))

    @staticmethod
    def none(batch: int, device: Any = None) -> Tokens:
        """No columns at all: what an empty cache holds."""
        return Tokens.of(torch.ones(batch, 0, dtype=torch.bool, device=device))

    @property
    def next_position(self) -> Int[Tensor, " B"]:
        """[B], the position that would follow the last valid token; 0 for a row that has none."""
        after = torch.where(self.valid, self.position + 1, 0)
        if not after.shape[1]:
            return after.sum(1)
        column = torch.where(self.valid, torch.arange(after.shape[1], device=after.device), 0).amax(1, keepdim=True)
        return after.gather(1, column)[:, 0]

    def cut(self, columns: slice | Tensor, rows: slice = slice(None)) -> Tokens:
        """The same columns of these rows, by default of all."""
        return type(self)(*(field[rows, columns] for field in self))

    def take(self, columns: Int[Tensor, "B n"]) -> Tokens:
        """Each row its own columns."""
        return Tokens(*(field.gather(1, columns) for field in self))

    def then(self, later: Tokens) -> Tokens:
        """These columns, followed by later ones."""
        return Tokens(*(torch.cat([a, b], 1) for a, b in zip(self, later)))


class Held(Tokens):
    """Tokens in memory that nobody outside of this package writes to. Made by `hold` and `unshared`."""

    __slots__ = ()

    def _replace(self, **fields: Any) -> Tokens:  # type: ignore[override]
        return Tokens(*self)._replace(**fields)  # what comes in is somebody's


def unshared(tokens: Tokens) -> Tokens:
    """These tokens, of tensors that are fresh: nobody else has them."""
    return Held(*tokens)


def hold(*many: Tokens, kept: bool = False) -> tuple[Tokens, ...]:
    """Copies where gradients are on, of what is not held yet: masks may be filled again before backward reads them.

    The boundary of every call: behind it tokens may be kept by reference, for backward and for states. What they share
    stays shared. `kept`: by a state: copy without gradients, too. In `torch.compile` the operator inside does this.
    """
    if not (kept or torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return many
    copies: dict[int, Tensor] = {}

    def copy(field: Tensor) -> Tensor:
        if id(field) not in copies:
            copies[id(field)] = field.clone()
        return copies[id(field)]

    return tuple(tokens if isinstance(tokens, Held) else Held._make(map(copy, tokens)) for tokens in many)


def keep(mask: Bool[Tensor, "B S"], tokens: Tokens, *tensors: Tensor) -> tuple[Any, ...]:
    """Forget all columns but the masked ones: the one forgetting function of every cache and memory.

    Order is preserved, rows are pushed to the right and fillers (valid False) stand on the left.

    Args:
        mask: bool [B, S].
        tokens: of the S columns.
        tensors: each [B, ..., S, D].

    Returns:
        tokens and tensors with as many columns as the fullest row keeps.
    """
    if bool(mask.all()):
        return tokens, *tensors
    order = torch.argsort(mask.long(), dim=1, stable=True)
    count = int(mask.sum(1).max())
    columns = order[:, order.shape[1] - count :]
    kept = mask.gather(1, columns)
    chosen = tokens.take(columns)
    chosen = chosen._replace(valid=chosen.valid & kept, is_global=chosen.is_global & kept)

    def rows(x: Tensor) -> Tensor:
        index = columns.view(columns.shape[0], *[1] * (x.ndim - 3), count, 1)
        return x.gather(-2, index.expand(*x.shape[:-2], count, x.shape[-1]))

    return chosen, *(rows(x) for x in tensors)


class Source(NamedTuple):
    """The encoder side of cross-attention."""

    hidden: Float[Tensor, "B S E"]
    tokens: Tokens


class Output(NamedTuple):
    """What every layer returns.

    Fields:
        hidden: [B, L, E], finite at padding.
        state: None in, None out.
        losses: auxiliary losses by name, weighted already; depth sums them.
        choices: discrete decisions (LSH buckets), to be handed back to replay them.
    """

    hidden: Float[Tensor, "B L E"]
    state: Any = None
    losses: Mapping[str, Tensor] = {}
    choices: Any = None


def add_losses(*many: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum auxiliary losses by name, as depth does."""
    total: dict[str, Tensor] = {}
    for losses in many:
        for name, value in losses.items():
            total[name] = total[name] + value if name in total else value
    return total


@dataclass(frozen=True)
class Abilities:
    """What a mechanism can do and what it costs. The README's table is printed from it, the suite proves it.

    Fields:
        causality: "strict": the past is bitwise blind to the future; "values": a future token may move a chunk border
            but its value never leaks (LSH); "none": cannot be causal.
        carry: what a call with a state equals. "prefix": the last rows of the whole prefix, at any cut; "segment":
            only when cut at segment borders; "none": no state.
        two_sided: whether causal=False can be built.
        global_tokens: "any" call may bring some, only the "first_call", or "none".
        cross: whether cross-attention can be built.
        compute, activations, state: growth with length, forward and backward.
        positions: names of the attention-level position schemes that can be built ("none" among them).
        grouped_heads: whether kv_heads may be smaller than heads.
        adjustable: options that may be changed on a built layer, as attributes.
        truncated: gradients stop at borders of `segment_length` tokens (an attribute), whatever the length of the call.
    """

    causality: Literal["none", "values", "strict"]
    carry: Literal["none", "segment", "prefix"]
    two_sided: bool
    global_tokens: Literal["none", "first_call", "any"]
    cross: bool
    compute: Growth
    activations: Growth
    state: Growth
    positions: tuple[str, ...] = ("none",)
    grouped_heads: bool = False
    adjustable: tuple[str, ...] = ()
    truncated: bool = False


class Layer(nn.Module):
    """Whatever answers the one call: an attention, a block, a stack, a wrapper."""

    @property
    def abilities(self) -> Abilities:
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> Any:
        """An empty state for `batch_size` rows, on the layer's device and in its dtype."""
        raise NotImplementedError

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


class Attention(Layer):
    """Base of all attention mechanisms: the shared options and the checks that are the same for each.

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
        name: of the backend.
        declared: its abilities at the default options.
        tiny: options at which a few dozen tokens already straddle every border of the mechanism; the contract suite
            tests under them (window 3, chunk 4, ...). Whole numbers among them are taken for lengths in tokens.
        companions: layers that models of this backend mix in and that are no backends: part -> class, as dotted names.
            They are built as "backend.part".

    Raises:
        Unsupported: for what the mechanism does not declare in `declared`.
        ValueError: for widths that do not fit.
    """

    name: ClassVar[str]
    declared: ClassVar[Abilities]
    tiny: ClassVar[Mapping[str, Any]] = {}
    companions: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool | str = True,
        scale: float | None = None,
        causal: bool = True,
        cross: bool = False,
        positions: str | Mapping[str, Any] = "none",
        seed: int = 0,
    ):
        super().__init__()
        self._enlist()
        at_least(1, dim=dim, heads=heads)
        if head_width is None and dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} for dim={dim} (or give head_width)")
        kv_heads = heads if kv_heads is None else kv_heads
        at_least(1, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} for heads={heads}")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_width = dim // heads if head_width is None else head_width
        at_least(1, head_width=self.head_width)
        self.scale = self.head_width**-0.5 if scale is None else scale
        check_scale(self.scale)
        positions, self.position_options = named("positions", positions)
        self.causal, self.cross, self.positions, self.seed = causal, cross, positions, seed
        if bias not in (True, False, "into", "out"):
            raise ValueError(f"bias must be true, false, into or out, got {bias!r}")
        self.bias_into, self.bias_out = bias in (True, "into"), bias in (True, "out")
        can = self.declared
        if cross and not can.cross:
            raise Unsupported(self.name, "cross=True", "it attends to its own tokens only", "attention=full")
        if cross and causal:
            raise ValueError("cross=True needs causal=False: the source is complete before the first query")
        if not causal and not can.two_sided:
            raise Unsupported(self.name, "causal=False", "the mechanism only looks back", "longformer or bigbird")
        if causal and can.causality == "none":
            raise Unsupported(self.name, "causal=True", "the mechanism has no causal form", "longformer or full")
        if positions not in can.positions:
            raise Unsupported(
                self.name, f"positions={positions}", "its scores do not take that scheme", " or ".join(can.positions)
            )
        if self.position_options and positions in ("none", "relative"):
            raise ValueError(f"positions={positions} has no options, got {self.position_options!r}")
        if kv_heads != heads and not can.grouped_heads:
            raise Unsupported(self.name, f"kv_heads={kv_heads}", "keys are not grouped", "kv_heads=null")

    def _enlist(self) -> None:
        self.number = next(_numbers)
        _layers[self.number] = self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._enlist()  # a copy is another layer

    @property
    def abilities(self) -> Abilities:
        return self.declared

    def choices_shape(self, batch: int, length: int) -> tuple[int, ...] | None:
        """Shape of `Output.choices`, int32, where the mechanism makes some."""
        return None

    def pairs(self, length: int) -> float | None:
        """How many query-key pairs one forward call over `length` tokens scores per head, for the FLOP count.

        A pair costs 4·D: a dot product and a weighted value. A mechanism that spends more (relative positions: another
        dot product) counts that in. None: no formula; a pattern's pairs are then counted from its definition.
        """
        return None

    def remember(self, x: Float[Tensor, "B L E"], tokens: Tokens, *, state: Any) -> Any:
        """The state after a call, without the call's output: a step at a long context can be had without attending."""
        return self(x, tokens, state=state).state

    def enter(self, x: Tensor, tokens: Tokens | None, state: Any, source: Source | None) -> tuple[Tensor, Tokens]:
        """Check one call and zero the padding, so that not even NaN spreads from it."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [batch, length, {self.dim}], got shape {tuple(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError("x must hold at least one token, got length 0")
        if source is not None and not self.cross:
            raise Unsupported(self.name, "source", "it was built with cross=False", "cross=True at build")
        if self.cross and source is None and state is None:
            raise ValueError("cross-attention needs source=, or a state that holds one")
        if tokens is None:
            if state is not None and not self.cross:
                raise ValueError("tokens must be given with a state: they say which positions these tokens have")
            return x, Tokens.all_valid(x.shape[0], x.shape[1], x.device)
        check_tokens(tokens, x.shape[:2])
        if self.declared.global_tokens == "none" and bool((tokens.is_global & tokens.valid).any()):
            raise Unsupported(self.name, "global tokens", "no token can see everything", "longformer, bigbird or full")
        (tokens,) = hold(tokens)
        return x.masked_fill(~tokens.valid[..., None], 0), tokens


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weights: of the first floating-point tensor that it holds.

    A projection need not have a `weight` that is a tensor: adapters wrap it, pruning and flat parameters of a sharded
    model leave a plain attribute, and what torch quantises holds packed weights alone, which live on the CPU and take
    and give float32.
    """
    held = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    for tensor in chain(module.parameters(), module.buffers(), held):
        if tensor.dtype.is_floating_point:
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def check_tokens(tokens: Any, shape: torch.Size) -> None:
    """Raise a ValueError unless these are `Tokens` of that [batch, length]."""
    if not isinstance(tokens, Tokens):
        given = f"a tensor of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be made by Tokens.of(valid) from a bool mask [batch, length], got {given}")
    if tokens.valid.shape != shape:
        raise ValueError(f"tokens must be of shape {tuple(shape)} like the input, got {tuple(tokens.valid.shape)}")


def at_least(least: int, **options: int) -> None:
    """Raise a ValueError that names the option, the rule and the value."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


LARGEST_SCALE = 10_000.0
"""Of scores; beyond, float32 could not tell the scores of ordinary vectors apart."""


def check_scale(scale: float) -> None:
    """Raise a ValueError unless this is a factor on q·k that softmax can work with, of either sign."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(scale) <= LARGEST_SCALE:
        raise ValueError(f"scale must be a number from {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}, got {scale!r}")


def one_of(allowed: tuple[str, ...], **options: str) -> None:
    """Raise a ValueError that names the option, what is allowed and the value."""
    for name, value in options.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def named(option: str, value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a component that is given by one word, or as a mapping `{"name": ..., <options>}`.

    Raises:
        ValueError: for a mapping without a name, or anything else.
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return value["name"], {key: option for key, option in value.items() if key != "name"}
    raise ValueError(f"{option} must be a word, or a mapping with a name and options, got {value!r}")


def known_options(option: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise a ValueError that names an option which the component does not have, and those that it has."""
    for key in given:
        if key not in known:
            raise ValueError(f"{option} has no option {key}; it has {', '.join(sorted(known)) or 'none'}")
