"""The few global keys of a band, for all of its tiles together."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_zoo.layout.reach import Band
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.first import without_first
from attention_zoo.ops.pattern.globals import everyone_bias, global_columns
from attention_zoo.ops.softmax.common import Common

MOST = 8
"""Global keys of a row."""
WIDTH = 8
"""Numbers of a head for each of them, at least: the scores of all rows are then little beside queries."""


def with_common_keys(call: PatternCall) -> tuple[PatternCall, Common | None]:
    """The call without its global keys, and those for all tiles together, where they are few.

    Tiles then show what the band shows, whether it is global or not, and common keys what no tile shows: each counts
    once, and all tiles are alike. None: there are none, or many.
    """
    reach = call.pattern.reach
    if not call.any_global_key or call.learned or not isinstance(reach, Band) or reach.weights != "uniform":
        return call, None
    columns, keys = global_columns(call.keys)
    if columns.shape[1] > min(MOST, call.q.shape[3] // WIDTH):
        return call, None
    bias = everyone_bias(call, call.queries, keys)
    in_band = without_first(call).pattern.bias(call.queries, keys) > -torch.inf
    return replace(call, tiled=True), Common(columns, bias.masked_fill(in_band, -torch.inf))
