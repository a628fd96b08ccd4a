"""What torch wraps around a model: compiled, parallel, sharded or averaged, there is one of ours inside."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.transformer import Transformer

_REPLACED = (DataParallel, DistributedDataParallel, AveragedModel)
"""Wrappers that only training needs: what they hold is whole and is called in their place."""


def inner(model: Any, verb: str) -> Transformer | EncoderDecoder:
    """The model of ours inside of whatever torch has wrapped around it.

    Args:
        verb: who asks, for the message.

    Raises:
        ValueError: if there is none.
    """
    found = model
    while not isinstance(found, Transformer | EncoderDecoder):
        found = _within(found)
        if found is None:
            raise ValueError(
                f"{verb} needs a Transformer or an EncoderDecoder, itself or wrapped by torch (compile, DataParallel, "
                f"DistributedDataParallel, FullyShardedDataParallel, AveragedModel), got {type(model).__name__}"
            )
    return found


def callable_part(model: Any, verb: str) -> Any:
    """The same to be called: a compiled or sharded model stays so, where nothing stands between.

    Raises:
        ValueError: as `inner`.
    """
    found, part = inner(model, verb), model
    while part is not found:
        if isinstance(part, _REPLACED):
            return found
        part = _within(part)
    return model


def _within(model: Any) -> Any:
    if isinstance(model, _REPLACED) or is_sharded(model):
        return model.module
    # a compiled module's class is not looked up: that would load the compiler
    return model._orig_mod if isinstance(model, nn.Module) and "_orig_mod" in model._modules else None


def is_sharded(model: Any) -> bool:
    """Whether this module holds a part of its weights alone, flattened (the class is not looked up: it is slow)."""
    return type(model).__name__ == "FullyShardedDataParallel"
