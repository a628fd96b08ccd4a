"""Brackets: each plain bracket is labelled with the colour of its partner, however far away.

    row      . (a . ( (b . ) . )c )        "(a" has the colour a, "(" and ")" are plain, "." is a filler
    label    -  - - c  - - - -  - a        the plain bracket beside its partner "(b" is not scored

Rules: brackets are balanced and nested at most `depth` deep, every such sequence as likely; of each pair one end, at
random, has a random colour and the other is plain. Plain ends are scored, unless the partner is the bracket next to
them. Fillers stand at random places among the brackets. Rows have a random number of tokens, from `shortest` to the
row's length, and are padded on the right. The partner may stand on either side, and what lies between must be read to
know it: the nearest bracket of a colour belongs to another pair.

Source: our own; nesting of bounded depth over k kinds of brackets is Dyck-(k, m) (Hewitt et al. 2020, §3; Yao et al.
2021, §2: a soft-attention network of two layers can do it). There the kind of the next closing bracket is asked; here
one of the two ends, so that both directions count. Chance 1 / colours. Trivial baselines, at 4 colours and depth 4:
"nearest" (the colour nearest to the plain end) and "inward" (the nearest on the partner's side) 25 %, "commonest" (the
row's most frequent colour, which may be the asked one) 38 % at 64 tokens, 34 % at 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attention_zoo.options import Positive, Share, checked
from attention_zoo.tasks.generated import Generated, of
from attention_zoo.tasks.task import IGNORED, Batch

PAD, FILLER, OPEN, CLOSE = range(4)
"""Ids; an opening bracket of colour c has CLOSE + 1 + c, a closing one CLOSE + 1 + colours + c."""


class Brackets(Generated):
    """The colour of each plain bracket's partner.

    Args:
        colours: number of colours.
        depth: greatest number of nested pairs.
        fillers: about which share of a row's tokens are no brackets.
        shortest: tokens of the shortest rows.
        test: lengths of further evaluation sets.
        test_examples: rows of each evaluation set.
    """

    name = "brackets"
    objective = "label"
    metric, better = "accuracy", "higher"

    @checked
    def __init__(
        self,
        *,
        colours: Annotated[int, Field(ge=2, le=2**16)] = 4,
        depth: Annotated[int, Field(ge=2, le=2**10)] = 4,
        fillers: Share = 0.25,
        shortest: Annotated[int, Field(ge=4, le=2**24)] = 32,
        test: Sequence[Positive] = (),
        test_examples: Positive = 1000,
    ):
        self.colours, self.depth, self.fillers, self.shortest = colours, depth, fillers, shortest
        self.test, self.test_examples = test, test_examples
        self.classes, self.vocab = colours, CLOSE + 1 + 2 * colours

    def check(self, seq_len: int) -> None:
        self.need(seq_len, self.shortest, "task.shortest")

    def draw(self, random: np.random.Generator, rows: int, length: int, **changes: Any) -> Batch:
        sizes = random.integers(self.shortest, length + 1, (rows, 1))
        number = np.maximum(4, sizes - np.floor(sizes * self.fillers).astype(np.int64)) // 2 * 2  # of brackets
        step = _nested(random, number, length, self.depth)  # [B, length]: 1 opens, -1 closes, 0 after the last bracket
        partner = _partners(step)
        opens, places = step > 0, np.arange(length)
        first = np.minimum(places, partner)  # names the pair
        coloured = np.take_along_axis(random.random((rows, length)) < 0.5, first, 1) == opens
        colour = np.take_along_axis(random.integers(0, self.colours, (rows, length)), first, 1)
        plain = np.where(opens, OPEN, CLOSE)
        tokens = np.where(coloured, CLOSE + 1 + colour + self.colours * ~opens, plain)
        asked = (step != 0) & ~coloured & (abs(partner - places) > 1)
        # where the brackets stand among the fillers
        keys = np.where(places < sizes, random.random((rows, length)), 2.0)
        rank = keys.argsort(1).argsort(1)
        chosen = np.where(rank < number, places, length)
        at = np.sort(chosen, 1)  # the place of each bracket; past the end for none
        ids = np.full((rows, length + 1), FILLER)
        targets, distance = np.full_like(ids, IGNORED), np.full_like(ids, -1)
        np.put_along_axis(ids, at, tokens, 1)
        np.put_along_axis(targets, at, np.where(asked, colour, IGNORED), 1)
        gap = abs(np.take_along_axis(at, partner, 1) - at)
        np.put_along_axis(distance, at, np.where(asked, gap, -1), 1)
        valid = places < sizes
        return of(
            np.where(valid, ids[:, :-1], PAD), targets[:, :-1], valid=valid, groups={"distance": distance[:, :-1]}
        )  # fmt: skip

    def guesses(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.ids
        colour = torch.where(ids > CLOSE, (ids - CLOSE - 1) % self.colours, -1)
        places = torch.arange(ids.shape[1])
        has = torch.where(colour >= 0, places, -1)
        before = has.cummax(1).values
        after = torch.where(colour >= 0, places, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        near = torch.where(places - before <= after - places, before, after)
        near = torch.where(before < 0, after, near)
        inward = torch.where(ids == OPEN, after, before)
        counts = torch.stack([(colour == each).sum(1) for each in range(self.colours)], 1)
        rules = {"nearest": near, "inward": inward}
        found = {name: colour.gather(1, at.clamp(0, ids.shape[1] - 1)) for name, at in rules.items()}
        return found | {"commonest": counts.argmax(1)[:, None].expand_as(ids)}

    def chance(self, seq_len: int) -> float:
        return 1 / self.colours


def _nested(random: np.random.Generator, number: np.ndarray, length: int, depth: int) -> np.ndarray:
    """[B, length] of 1 and -1: balanced steps of height at most `depth`, all as likely; 0 from `number` [B, 1] on."""
    # opens[r, h]: among the ways from height h down to 0 in r steps, the share whose next step opens
    ways: np.ndarray = np.zeros(depth + 2)
    opens = np.zeros((length + 1, depth + 1))
    ways[0] = 1.0  # the last place is height -1 and depth + 1 alike: none
    for left in range(1, length + 1):
        up, down = ways[1:], np.concatenate([[0.0], ways[:depth]])
        total = up + down
        opens[left] = np.divide(up, total, out=np.zeros_like(total), where=total > 0)
        ways[:-1] = total / total.max()
    step: np.ndarray = np.zeros((len(number), length), np.int64)
    height: np.ndarray = np.zeros(len(number), np.int64)
    draws = random.random((len(number), length))
    for place in range(length):
        still = number[:, 0] - place
        chance = opens[np.maximum(still, 0), height]
        step[:, place] = np.where(still > 0, np.where(draws[:, place] < chance, 1, -1), 0)
        height += step[:, place]
    return step


def _partners(step: np.ndarray) -> np.ndarray:
    """[B, length]: the place of each bracket's partner; its own where there is no bracket.

    Those at one level open and close by turns, so that sorting by level puts partners side by side.
    """
    places = np.tile(np.arange(step.shape[1]), (len(step), 1))
    height = step.cumsum(1)
    level = np.where(step == 0, step.shape[1], height - (step > 0))
    order = level.argsort(1, kind="stable")
    ahead = np.arange(step.shape[1]) ^ 1
    ahead = np.minimum(ahead, step.shape[1] - 1)
    partner = np.empty_like(places)
    np.put_along_axis(partner, order, order[:, ahead], 1)
    return np.where(step == 0, places, partner)
