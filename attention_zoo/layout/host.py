"""The fields of `Tokens` on the host, in numpy: what calls are planned with, so that no plan waits for a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from attention_zoo.tokens import Tokens

Array = NDArray[Any]


class Host(NamedTuple):
    """As `Tokens`, every field [B, L]; never written to once it is made."""

    position: Int[np.ndarray, "B L"]
    valid: Bool[np.ndarray, "B L"]
    is_global: Bool[np.ndarray, "B L"]
    document: Int[np.ndarray, "B L"]
    length: Int[np.ndarray, "B L"]

    @staticmethod
    def plain(batch: int, length: int, start: int = 0) -> Host:
        """One document of valid tokens in each row."""
        shape = batch, length
        position = np.broadcast_to(np.arange(start, start + length, dtype=np.int64), shape)
        yes, no = np.broadcast_to(np.True_, shape), np.broadcast_to(np.False_, shape)
        zero, whole = np.broadcast_to(np.int64(0), shape), np.broadcast_to(np.int64(start + length), shape)
        return Host(position, yes, no, zero, whole)

    def cut(self, columns: slice) -> Host:
        """The same columns of all rows, views."""
        return Host(*(field[:, columns] for field in self))

    def take_all(self, columns: Int[np.ndarray, " n"]) -> Host:
        """The same columns of all rows, in any order."""
        return Host(*(field[:, columns] for field in self))

    def take(self, columns: Int[np.ndarray, "B n"]) -> Host:
        """Each row its own columns."""
        row = np.arange(len(columns))[:, None]  # what take_along_axis makes, for each field again
        return Host(*(field[row, columns] for field in self))

    def then(self, later: Host) -> Host:
        """These columns, followed by later ones."""
        return Host(*(np.concatenate(pair, 1) for pair in zip(self, later)))

    def only(self, mask: Bool[np.ndarray, "B L"]) -> Host:
        """Padding wherever the mask is False."""
        return self._replace(valid=self.valid & mask, is_global=self.is_global & mask)

    @property
    def next_position(self) -> Int[np.ndarray, " B"]:
        """[B], the position that would follow the last valid token; 0 for a row that has none."""
        last = last_valid(self.valid)
        if not self.valid.shape[1]:
            return np.zeros(len(last), np.int64)
        after = np.take_along_axis(self.position, last.clip(min=0)[:, None], 1)[:, 0] + 1
        return np.where(last < 0, 0, after)

    @property
    def last_document(self) -> Int[np.ndarray, "B 1"]:
        """The highest number of a document that has tokens; -1 for a row without any."""
        return np.where(self.valid, self.document, -1).max(1, keepdims=True, initial=-1)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The same fields as tensors there; on the CPU they share memory."""
        return tuple(tensor_of(field, device) for field in self)


def last_valid(valid: Bool[np.ndarray, "B L"]) -> Int[np.ndarray, " B"]:
    """The column of each row's last valid token, -1 where there is none."""
    return np.where(valid, np.arange(valid.shape[1]), -1).max(1, initial=-1)


def before(valid: Bool[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
    """For each column, the one of the valid token before it in its row; -1: there is none."""
    column = np.where(valid, np.arange(valid.shape[1]), -1)
    newest = np.maximum.accumulate(column, 1) if column.shape[1] else column
    return np.concatenate([np.full((len(newest), 1), -1), newest[:, :-1]], 1)[:, : newest.shape[1]]


def tensor_of(array: Array, device: torch.device | str = "cpu") -> Tensor:
    """The array as a tensor there, which nobody writes to; on the CPU without a copy where torch can do without."""
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = np.array(array)  # torch takes no broadcast, and no read-only, array without a warning
    if not torch.is_inference_mode_enabled():
        return torch.from_numpy(array).to(device)
    with torch.inference_mode(False):  # it may outlive the call
        return torch.from_numpy(array).to(device)


def on_host(device: torch.device) -> bool:
    """Whether numpy reads and makes tensors there without waiting, and another operator costs less than more memory."""
    return device.type == "cpu"


def array_of(tensor: Tensor) -> Array:
    """A tensor of the host as an array, without a copy. For plans alone: what is on a device is read by `Layout`."""
    assert tensor.device.type == "cpu", "a plan is made on the host"
    return np.from_dlpack(tensor.detach())


def host_tokens(host: Host) -> Tokens:
    """As `Tokens` on the CPU: what a pattern's own functions are called with in a plan."""
    return Tokens(*host.on(torch.device("cpu")))
