"""What there is, in tables: abilities of every backend, and which kernel would run here and why.

python -m attention_zoo                  # abilities
python -m attention_zoo kernels          # kernels on this machine, at 4096 tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Tokens
from attention_zoo.registry import available, recipe

COLUMNS = (
    "backend", "causal", "two-sided", "carries state", "global tokens", "cross", "compute", "memory", "state",
    "positions", "grouped heads",
)  # fmt: skip


def abilities_rows(names: Iterable[str] | None = None) -> list[tuple[str, ...]]:
    """One row of text per backend, in the order of `COLUMNS`, read from what each class declares."""
    rows: list[tuple[str, ...]] = []
    for name in names or available():
        can = recipe(name)[0].declared
        rows.append((
            name, _causality[can.causality], _yes(can.two_sided), _no(can.carry), _no(can.global_tokens),
            _yes(can.cross), can.compute, can.activations, can.state, ", ".join(can.positions), _yes(can.grouped_heads),
        ))  # fmt: skip
    return rows


_causality = {"strict": "yes", "values": "values never leak", "none": "no"}


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _no(word: str) -> str:
    return "no" if word == "none" else word.replace("_", " ")


def kernel_rows(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str]]:
    """Backend, kernel and verdict ("runs", or why it cannot) for plain causal self-attention over `length` tokens."""
    rows = []
    for name in available():
        cls, defaults = recipe(name)
        if not issubclass(cls, PatternAttention):
            rows.append((name, "own", "runs"))
            continue
        layer = cls(dim=64, heads=1, causal=cls.declared.causality != "none", **defaults)
        q = torch.empty(1, 1, length, 64, device=device, dtype=dtype)
        first = True
        for kernel, reason in layer.explain(q, q, q, *[Tokens.all_valid(1, length, device)] * 2):
            rows.append((name, kernel, reason or ("runs, chosen by auto" if first else "runs")))
            first = first and reason is not None
    return rows


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, as the README prints it."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)
