"""The valid tokens of all rows, one after the other without padding, and where their documents end."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from attention_zoo.layout.host import Array, tensor_of
from attention_zoo.layout.layout import Layout


def ragged(layout: Layout) -> tuple[Int[Tensor, " n"], Int[np.ndarray, " K"]]:
    """Flat columns of the n valid tokens, row after row; how many tokens each of the K documents has."""
    return layout.plan("ragged", lambda: _ragged(layout))


def _ragged(layout: Layout) -> tuple[Tensor, Array]:
    host = layout.host
    if layout.implied and layout.valid.numel():
        rows, length = layout.valid.shape
        return torch.arange(rows * length, device=layout.valid.device), np.full(rows, length)
    flat = host.valid.reshape(-1).nonzero()[0]
    row = flat // max(1, host.valid.shape[1])
    document = host.document.reshape(-1)[flat]
    starts = np.ones(len(flat), bool)
    starts[1:] = (np.diff(row) != 0) | (np.diff(document) != 0)
    sizes = np.diff(np.append(starts.nonzero()[0], len(flat)))
    return tensor_of(flat, layout.valid.device), sizes


def take(y: Tensor, layout: Layout) -> Tensor:
    """[B, S, ...] -> [n, ...]: the valid tokens, row after row."""
    flat = y.flatten(0, 1)
    return flat if layout.dense else flat.index_select(0, ragged(layout)[0])


def put(y: Tensor, layout: Layout) -> Tensor:
    """[n, ...] -> [B, S, ...] with zeros at padding."""
    shape = layout.valid.shape
    if not layout.dense:
        whole = y.new_zeros(shape.numel(), *y.shape[1:])
        y = whole.index_copy(0, ragged(layout)[0], y)
    return y.unflatten(0, shape)
