"""How well a model knows a text: perplexity and bits per byte, or how well it fills in masked tokens.

A causal model reads windows that overlap, and each token is scored once, after at least `seq_len - stride` others where
there are so many: shorter contexts make any model look worse. Bits per byte compare models with other tokenisers.

A masked one reads disjoint pieces between its first and last special token, in which a fixed random choice of tokens is
replaced by the mask (Devlin et al. 2019, §3.1, but the mask alone: neither random nor unchanged tokens).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_zoo.contract import Tokens, at_least
from attention_zoo.integrations.weights.tokeniser import encode
from attention_zoo.model.transformer import Transformer
from attention_zoo.place import place_of
from attention_zoo.tasks.task import IGNORED, generator
from attention_zoo.training.objective import token_losses

REPLACEMENT = "\ufffd"
"""What decoding puts in place of bytes that are no character."""


class Row(NamedTuple):
    """Ids of one window, and what is asked at each: a token, or `IGNORED`."""

    ids: list[int]
    targets: list[int]


@torch.no_grad()
def score(
    model: Transformer,
    texts: Sequence[bytes],
    tokeniser: Any = None,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    mask_probability: float = 0.15,
    seed: int = 0,
) -> dict[str, float]:
    """Score a language model on texts; windows never cross from one to the next.

    Args:
        model: with head=lm. A causal one predicts the next token, another one masked tokens.
        texts: UTF-8.
        tokeniser: of transformers; None: a byte is a token.
        seq_len: tokens of a window; default what its positions hold, at most 1,024.
        stride: tokens from one window to the next, of causal models; default half of a window.
        batch: windows of a call.
        mask_probability: share of tokens that are masked.
        seed: of which.

    Returns:
        loss in nats a token, perplexity, accuracy, tokens scored; of causal models also bits_per_byte and bytes.

    Raises:
        ValueError: for an option outside its rule, a model without such a head, or texts too short to score.
    """
    if not isinstance(model, Transformer) or model.head_name != "lm":
        raise ValueError("scoring needs a Transformer with head=lm")
    seq_len = min(model.config["max_length"], 1024) if seq_len is None else seq_len
    at_least(4, seq_len=seq_len)
    at_least(1, batch=batch)
    counted = 0
    if model.causal:
        stride = seq_len // 2 if stride is None else stride
        if not 1 <= stride < seq_len:
            raise ValueError(f"stride must be at least 1 and below seq_len={seq_len}, got {stride}")
        rows = []
        for raw in texts:
            ids, unscored = _with_start(tokeniser, raw)
            if len(ids) > 1:
                rows += list(windows(ids, seq_len, stride))
                counted += len(raw) - unscored
    else:
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must lie between 0 and 1, got {mask_probability}")
        rows = [
            row for n, raw in enumerate(texts) for row in masked(tokeniser, raw, seq_len, mask_probability, seed + n)
        ]
    losses, hits = _run(model, [row for row in rows if any(target != IGNORED for target in row.targets)], batch)
    loss = float(losses.mean())
    found = {"loss": loss, "perplexity": math.exp(loss), "accuracy": float(hits.mean()), "tokens": len(losses)}
    if model.causal:
        found |= {"bits_per_byte": float(losses.sum()) / math.log(2) / counted, "bytes": counted}
    return found


def windows(ids: list[int], seq_len: int, stride: int) -> Iterator[Row]:
    """Overlapping windows of a text in which every token but the first is asked for once."""
    start, done = 0, 1
    while done < len(ids):
        stop = min(start + seq_len, len(ids))
        targets = [ids[at] if at >= done else IGNORED for at in range(start + 1, stop)] + [IGNORED]
        yield Row(ids[start:stop], targets)
        start, done = start + stride, stop


def masked(tokeniser: Any, raw: bytes, seq_len: int, probability: float, seed: int) -> Iterator[Row]:
    """Disjoint pieces of a text between the tokeniser's special tokens, with some tokens masked."""
    mask = getattr(tokeniser, "mask_token_id", None)
    if mask is None:
        raise ValueError("a masked language model is scored with a tokeniser that has a mask token; there is none")
    before = [] if tokeniser.cls_token_id is None else [tokeniser.cls_token_id]
    after = [] if tokeniser.sep_token_id is None else [tokeniser.sep_token_id]
    ids, room = encode(tokeniser, raw), seq_len - len(before) - len(after)
    for start in range(0, len(ids), room):
        piece = ids[start : start + room]
        chosen = generator("mask", seed, start).random(len(piece)) < probability
        yield Row(
            [*before, *(mask if hidden else token for token, hidden in zip(piece, chosen)), *after],
            [*[IGNORED] * len(before), *(token if hidden else IGNORED for token, hidden in zip(piece, chosen)),
             *[IGNORED] * len(after)],
        )  # fmt: skip


def _with_start(tokeniser: Any, raw: bytes) -> tuple[list[int], int]:
    """Ids behind the token that starts a text, if there is one; and how many bytes no token of ours is asked for."""
    ids = encode(tokeniser, raw)
    start = getattr(tokeniser, "bos_token_id", None)
    if start is not None:
        return [start, *ids], 0
    return ids, 1 if tokeniser is None or not ids else _bytes_of(tokeniser, ids[0])


def _bytes_of(tokeniser: Any, token: int) -> int:
    """How many bytes of text a token stands for, a part of a character too.

    Raises:
        ValueError: where that cannot be told.
    """
    text, word = tokeniser.decode([token]), str(tokeniser.convert_ids_to_tokens(token))
    if REPLACEMENT not in text or REPLACEMENT in word:
        return len(text.encode())
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word):  # SentencePiece's byte fallback
        return 1
    from tokenizers.pre_tokenizers import ByteLevel

    if set(word) <= set(ByteLevel.alphabet()):  # a character for each byte (GPT-2)
        return len(word)
    raise ValueError(
        f"the tokeniser begins a text with {word!r}, a part of a character of unknown size, so that its bytes cannot "
        "be counted: use one with a bos token"
    )


def _run(model: Transformer, rows: Sequence[Row], batch: int) -> tuple[Tensor, Tensor]:
    if not rows:
        raise ValueError("the texts are too short: no token of theirs can be scored")
    device, losses, hits = place_of(model)[0], [], []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(len(row.ids) for row in part)
            ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in part], device=device)
            targets = torch.tensor([row.targets + [IGNORED] * (width - len(row.ids)) for row in part], device=device)
            lengths = torch.tensor([len(row.ids) for row in part], device=device)
            tokens = Tokens.of(torch.arange(width, device=device) < lengths[:, None])
            logits = model(ids, tokens).logits
            losses.append(token_losses(logits, targets).double().cpu())
            hits.append((logits.argmax(-1) == targets)[targets != IGNORED].double().cpu())
    finally:
        model.train(training)
    return torch.cat(losses), torch.cat(hits)
