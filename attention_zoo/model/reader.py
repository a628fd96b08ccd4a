"""How a model is read while it writes: logits of the next token of each row, again and again.

    read = reader(model, ids, valid, source, steps=steps)
    logits = next(read)                         # after the prompts, [B, V]
    logits = read.send((token, None))           # after one token more
    logits = read.send((token, rows))           # the same where row i goes on from what was row rows[i]

With a state the prompt is read in chunks (prefill), then one token at a time (decoding). The cache is the model's own
state, hence as small as its mechanisms allow; caches that grow are made for the whole text at once. Without one all
tokens are read anew each time. A source goes through the encoder once in either case.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import Source, Tokens, at_least, is_integers, of_tensor
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.state import reorder, reserve
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import inner, is_sharded
from attention_zoo.model.wrapper import abilities_of

CHUNK = 4096
"""Tokens of a prompt that are read at once."""
Reader: TypeAlias = Generator[Float[Tensor, "B V"], tuple[Int[Tensor, " N"], Int[Tensor, " N"] | None], None]


def reader(
    model: Any,
    ids: Int[Tensor, "B L"],
    valid: Bool[Tensor, "B L"],
    source: Any,
    *,
    steps: int,
    cached: bool = True,
    chunk: int | None = None,
) -> Reader:
    """Logits of the next token.

    Args:
        model: in evaluation mode; itself, or as torch wrapped it.
        ids, valid: the prompts.
        source: for cross-attention, as the model takes it.
        steps: number of tokens that will be written.
        cached: whether to keep a state.
        chunk: tokens of the prompts that are read at once; see `stream`.
    """
    return _cached(model, ids, valid, source, steps, chunk) if cached else _again(model, ids, valid, source)


def _cached(model: Any, ids: Tensor, valid: Tensor, source: Any, steps: int, chunk: int | None) -> Reader:
    lm = writer(model)
    if chunk is None:
        strict = abilities_of(lm.stack).causality == "strict"
        chunk = CHUNK if strict else ids.shape[1]
    start = int(valid.any(0).long().argmax())  # a column that is padding in all rows says nothing
    state = reserve(lm.initial_state(len(ids)), ids.shape[1] - start + steps)
    logits = None
    for at in range(start, ids.shape[1], chunk):
        here = valid[:, at : at + chunk]
        out = model(ids[:, at : at + chunk], Tokens.of(here), state=state, source=source, last_only=True)
        state, source = out.state, None
        found = out.logits[:, 0]
        logits = found if logits is None else torch.where(here.any(1, keepdim=True), found, logits)
        del out
    while True:
        assert logits is not None
        token, rows = yield logits
        if rows is not None:
            state = reorder(state, rows)
        out = model(token[:, None], state=state, last_only=True)
        logits, state = out.logits[:, 0], out.state


def _again(model: Any, ids: Tensor, valid: Tensor, source: Any) -> Reader:
    found = inner(model, "generate")
    # the parts of a sharded model cannot be called by themselves
    if isinstance(found, EncoderDecoder) and not isinstance(source, Source | None) and not is_sharded(model):
        source, _ = found.encode(*source) if isinstance(source, tuple) else found.encode(source)
    while True:
        token, rows = yield model(ids, Tokens.of(valid), source=source, last_only=True).logits[:, 0]
        if rows is not None:
            ids, valid, source = reorder((ids, valid, source), rows)
        ids = torch.cat([ids, token[:, None]], 1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)


def writer(model: Any) -> Transformer:
    """The part of the model that writes.

    Raises:
        ValueError: if it does not.
    """
    found = inner(model, "generate")
    lm = found.decoder if isinstance(found, EncoderDecoder) else found
    if lm.head_name != "lm" or not lm.causal:
        raise ValueError("generate needs a causal model with head=lm")
    return lm


def check_prompts(ids: Any, valid: Any, *, steps: int, eos: int | None, prefill_chunk: int | None) -> Tensor:
    """Where the prompts are valid.

    Raises:
        ValueError: for what cannot be written on from.
    """
    at_least(1, steps=steps)
    if prefill_chunk is not None:
        at_least(1, prefill_chunk=prefill_chunk)
    if not is_integers(ids) or ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be integers [batch, length >= 1], got {of_tensor(ids)}")
    if valid is None:
        valid = torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.shape != ids.shape:
        raise ValueError(f"valid must be bool of shape {tuple(ids.shape)}, got {of_tensor(valid)}")
    if eos is not None:
        at_least(0, eos=eos)
    for name, value in (("steps", steps), ("eos", eos or 0)):
        if value > 2**31:
            raise ValueError(f"{name} must be at most {2**31}, got {value}")
    if not bool(valid.any(1).all()):
        raise ValueError("valid must keep at least one token of every prompt")
    return valid


def check_logits(logits: Tensor) -> None:
    """Raise a ValueError for NaN."""
    if bool(logits.isnan().any()):
        raise ValueError("logits must be numbers, got NaN: the model's weights hold some, or its training diverged")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
