"""A state that is packed as JSON can hold it, with its tensors beside; and the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

REFERENCE = "tensor"


def lifted(tree: Any, name: str, found: dict[str, Tensor]) -> Any:
    """What `checkpoint.pack` gave as JSON can hold it; its tensors are put into `found` by names that begin so.

    A file holds rows one after another, so a tensor goes there in the order in which it lies in memory: kernels, and
    with them the last bits of what they give, may depend on it.
    """
    if isinstance(tree, Tensor):
        key = f"{name}.{len(found)}"
        order = sorted(range(tree.ndim), key=lambda axis: -tree.stride()[axis])
        found[key] = tree.permute(order).contiguous()
        return {REFERENCE: key, "order": order}
    if isinstance(tree, list):
        return [lifted(each, name, found) for each in tree]
    if isinstance(tree, dict):
        return {key: lifted(each, name, found) for key, each in tree.items()}
    return tree


def referred(tree: Any) -> Iterator[str]:
    """Names of the tensors that stand in a lifted tree."""
    if isinstance(tree, list):
        for each in tree:
            yield from referred(each)
    elif isinstance(tree, dict):
        if REFERENCE in tree:
            yield tree[REFERENCE]
        else:
            for each in tree.values():
                yield from referred(each)


def lowered(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The other way round."""
    if isinstance(tree, list):
        return [lowered(each, tensors) for each in tree]
    if isinstance(tree, dict):
        if REFERENCE in tree:
            order = tree["order"]
            return tensors[tree[REFERENCE]].permute([order.index(axis) for axis in range(len(order))])
        return {key: lowered(each, tensors) for key, each in tree.items()}
    return tree
