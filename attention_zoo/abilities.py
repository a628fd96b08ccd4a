"""What a mechanism says of itself, and who is able to do what another cannot: the words of every refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Growth = Literal["constant", "linear", "loglinear", "quadratic"]


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


catalogues: list[Callable[[], Mapping[str, Abilities]]] = []
"""Who knows mechanisms by name: the registry, which stands above, enters itself here."""


def able(**wanted: Any) -> str:
    """Names of the mechanisms that declare what a message asks for, joined by "or": `able(cross=True)`.

    Args:
        wanted: field of `Abilities` -> the value that is needed, or a tuple of those that will do.
    """
    known = {name: can for catalogue in catalogues for name, can in catalogue().items()}
    values = {field: value if isinstance(value, tuple) else (value,) for field, value in wanted.items()}
    found = [name for name, can in known.items() if all(getattr(can, field) in values[field] for field in values)]
    return " or ".join(found) or "a mechanism that declares " + ", ".join(values)
