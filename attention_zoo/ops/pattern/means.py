"""Keys and values of all tokens, and of their groups of all levels, behind each other: for one kernel over all of them.

The sums of up to `AT_ONCE` levels are one operator, and so is their gradient, so that a call takes as many operators at
300 tokens as at 4,096, and a few more for each 128 times as many. For GPUs, where launches cost: it reads each token
once a level.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_zoo.layout.host import Array
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.levels import Level
from attention_zoo.ops.pattern.bags import Bags, bags_both_ways
from attention_zoo.ops.softmax.function import differentiable_once, without_autocast

AT_ONCE = 7
"""Levels that are summed from the same rows: a group of the last has 2^7, which one program walks."""


class Stage(NamedTuple):
    """Some levels, made of the last of those before them.

    Fields:
        columns: of each batch row.
        up, down: from the rows of the stage before (the first: of all tokens) to its own, and back.
    """

    columns: int
    up: Bags
    down: Bags


def with_means(
    k: Float[Tensor, "B K L D"], v: Float[Tensor, "B K L D"], stages: tuple[Stage, ...]
) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
    """Tokens, then the groups of level 1, of level 2, ...: means; then zeros. Zeros, too, at padding."""
    return _Means.apply(k, v, stages)


class _Means(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, k: Tensor, v: Tensor, stages: tuple[Stage, ...]) -> tuple[Tensor, Tensor]:
        x = torch.stack([k.transpose(1, 2), v.transpose(1, 2)], 2)
        ctx.stages, ctx.shape = stages, x.shape
        made, rows = [], x.view(len(x) * x.shape[1], -1)
        for stage in stages:
            rows = stage.up.sums(rows)
            made.append(rows)
        if len(made) > 1:
            made = [torch.cat([each.unflatten(0, (len(x), -1)) for each in made], 1)]
        keys, values = made[0].view(len(x), -1, *x.shape[2:]).unbind(2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        grad, stages = torch.stack([dk.transpose(1, 2), dv.transpose(1, 2)], 2), ctx.stages
        whole = grad.view(len(grad), grad.shape[1], -1)
        parts = whole.split([stage.columns for stage in stages], 1) if len(stages) > 1 else (whole,)
        down = None
        for stage, part in zip(stages[::-1], parts[::-1]):
            rows = part.reshape(-1, part.shape[2])
            down = stage.down.sums(rows if down is None else rows + down)
        assert down is not None
        dk, dv = down.view(ctx.shape).unbind(2)
        return dk.transpose(1, 2), dv.transpose(1, 2), None


def stages_of(layout: Layout, levels: list[Level], columns: int, like: Tensor) -> tuple[Stage, ...]:
    """What makes the levels of a layout's tokens; the same object for the same of all.

    Args:
        columns: how many there are at last, fillers included.
        like: of the dtype and on the device of keys and values.
    """
    key = ("stages", len(levels), columns, like.dtype)
    return layout.plan(key, lambda: tuple(_stages(layout, levels, columns, like)))


def _stages(layout: Layout, levels: list[Level], columns: int, like: Tensor) -> list[Stage]:
    host = layout.host
    # of each unit that is summed: its row, number in that row, document, number in the document, and tokens
    row, column = host.valid.nonzero()
    document, number = host.document[row, column], host.position[row, column]
    units, B = _Units(row, column, document, number, np.ones(len(row), np.int64)), len(host.valid)
    made, base, left = [], host.valid.shape[1], columns
    for start in range(0, max(1, len(levels)), AT_ONCE):
        some = levels[start : start + AT_ONCE]
        sets = (
            [(units.row, units.column, units.row * base + units.column, np.ones(len(units.row)))] if not start else []
        )
        at = 0 if start else base
        summed = units
        for level in range(len(some)):
            summed, owner = units.groups(level + 1)
            share = units.tokens / summed.tokens[owner]
            sets.append((units.row, at + summed.column[owner], units.row * base + units.column, share))
            last, at = at, at + some[level].groups.valid.shape[1]
        wide = left if start + AT_ONCE >= len(levels) else at
        target, source, weight = (
            np.concatenate(x) for x in zip(*((row * wide + column, source, w) for row, column, source, w in sets))
        )
        made.append(Stage(wide, *bags_both_ways(target, source, weight, targets=B * wide, sources=B * base, like=like)))
        left, base = left - wide, wide
        if some:
            units = summed._replace(column=summed.column + last)
    return made


class _Units(NamedTuple):
    """What is summed: in the order of rows, and in each of columns. `number` counts them in their document."""

    row: Int[np.ndarray, " n"]
    column: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    number: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]

    def groups(self, level: int) -> tuple[_Units, Array]:
        """Of up to 2^level of them, columns counted from 0; and the group of each."""
        number = self.number >> level
        begins = np.ones(len(self.row), bool)
        for field in (self.row, self.document, number):
            begins[1:] &= np.diff(field) == 0
        begins = ~begins
        begins[:1] = True
        owner = begins.cumsum() - 1
        row = self.row[begins]
        column = np.arange(len(row)) - np.searchsorted(row, row)
        tokens = np.bincount(owner, self.tokens, minlength=len(row)).astype(np.int64)
        return _Units(row, column, self.document[begins], number[begins], tokens), owner
