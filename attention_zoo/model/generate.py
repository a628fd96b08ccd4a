"""Write on from a prompt: greedily, or by sampling with temperature, top-k (Fan et al. 2018) and top-p (Holtzman 2020).

The prompt is read in chunks (prefill), then one token at a time (decoding). The cache is the model's own state, hence
as small as its mechanisms allow; caches that grow are made for the whole text at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import Tokens, at_least, is_integers, of_tensor, shown
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.state import reserve
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import callable_part, inner
from attention_zoo.model.wrapper import abilities_of

COLDEST = 1e-30
"""Of temperatures: logits that are divided by less leave the range of their type."""
CHUNK = 4096
"""Tokens of a prompt that are read at once."""


def generate(model: Transformer | EncoderDecoder, ids: Int[Tensor, "B L"], **options: Any) -> Int[Tensor, "B n"]:
    """New tokens, without the prompt. See `stream` for the arguments.

    Returns:
        [B, n]; n is steps, or less once all rows have ended.
    """
    return torch.stack(list(stream(model, ids, **options)), 1)


@torch.no_grad()
def stream(
    model: Transformer | EncoderDecoder,
    ids: Int[Tensor, "B L"],
    *,
    steps: int,
    valid: Bool[Tensor, "B L"] | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | None = None,
    seed: int = 0,
    source: Any = None,
    cached: bool = True,
    prefill_chunk: int | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """New tokens one after the other, as they are made.

    Args:
        model: with an lm head, or what torch wrapped around one; it is in evaluation mode meanwhile.
        ids: the prompts.
        steps: number of tokens to write.
        valid: where the prompts are padded, on either side; default nowhere.
        greedy: take the most likely token. Otherwise draw.
        temperature: logits are divided by it.
        top_k: draw among the k most likely tokens; 0: all.
        top_p: draw among the fewest most likely tokens that together reach this probability.
        eos: a row ends with this token; further columns repeat it.
        seed: of the draws.
        source: for cross-attention, as the model takes it.
        cached: False reads the whole prefix again at each step, which any model can: slow, and nothing is kept.
        prefill_chunk: tokens of the prompt that are read at once: fewer need less memory. Default `CHUNK`, or the whole
            prompt where a layer is not strictly causal (LSH), whose chunks would hash by their own lengths.

    Yields:
        [B], a token for each row.

    Raises:
        ValueError: for an option outside its rule, or a row without a valid token.
        Unsupported: if the model keeps no state and cached is True.
    """
    at_least(1, steps=steps)
    at_least(-(2**63), seed=seed)
    _check(model, greedy, temperature, top_k, top_p)
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
    for name, value, most in (("steps", steps, 2**31), ("seed", seed, 2**64 - 1), ("eos", eos or 0, 2**31)):
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")
    if not bool(valid.any(1).all()):
        raise ValueError("valid must keep at least one token of every prompt")
    generator = torch.Generator(ids.device).manual_seed(seed)
    model = callable_part(model, "generate")
    training = model.training
    model.eval()
    try:
        sizes = (steps, prefill_chunk)
        reader = _cached(model, ids, valid, source, *sizes) if cached else _again(model, ids, valid, source)
        logits = next(reader)
        _check_logits(logits)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(steps):
            token = logits.argmax(-1) if greedy else draw(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                token = torch.where(ended, eos, token)
                ended = ended | (token == eos)
            yield token
            if step == steps - 1 or (eos is not None and bool(ended.all())):
                break
            logits = reader.send(token)
            if logits.is_cpu:  # elsewhere reading a number back would make every step wait
                _check_logits(logits)
    finally:
        model.train(training)


def _cached(
    model: Any, ids: Tensor, valid: Tensor, source: Any, steps: int, chunk: int | None
) -> Generator[Tensor, Tensor, None]:
    """Logits [B, V] of the next token; is sent the one that was chosen."""
    lm = _writer(model)
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
        token = yield logits
        out = model(token[:, None], state=state, last_only=True)
        logits, state = out.logits[:, 0], out.state


def _again(model: Any, ids: Tensor, valid: Tensor, source: Any) -> Generator[Tensor, Tensor, None]:
    """The same by reading all tokens anew each time."""
    while True:
        token = yield model(ids, Tokens.of(valid), source=source, last_only=True).logits[:, 0]
        ids = torch.cat([ids, token[:, None]], 1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)


def draw(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Int[Tensor, " B"]:
    """One token a row, from what `narrow` leaves."""
    return torch.multinomial(narrow(logits, temperature, top_k, top_p).softmax(-1), 1, generator=generator)[:, 0]


def narrow(logits: Float[Tensor, "B V"], temperature: float, top_k: int, top_p: float) -> Float[Tensor, "B V"]:
    """Logits over temperature, -inf outside of top-k and then outside of top-p. The likeliest token always stays."""
    logits = logits / temperature
    order = logits.argsort(stable=True, dim=-1, descending=True)
    ranked = logits.gather(-1, order)
    if 0 < top_k < logits.shape[-1]:
        ranked[:, top_k:] = -torch.inf
    probability = ranked.softmax(-1)
    # a token is dropped once those before it reach top_p: the one that crosses the line stays
    dropped = probability.cumsum(-1) - probability >= top_p
    dropped[:, 0] = False
    ranked = ranked.masked_fill(dropped & (top_p < 1), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def _writer(model: Any) -> Transformer:
    found = inner(model, "generate")
    return found.decoder if isinstance(found, EncoderDecoder) else found


def _check_logits(logits: Tensor) -> None:
    if bool(logits.isnan().any()):
        raise ValueError("logits must be numbers, got NaN: the model's weights hold some, or its training diverged")


def _check(model: Any, greedy: bool, temperature: Any, top_k: Any, top_p: Any) -> None:
    lm = _writer(model)
    if lm.head_name != "lm" or not lm.causal:
        raise ValueError("generate needs a causal model with head=lm")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:  # nor NaN
        raise ValueError(
            f"temperature must be above 0, got {shown(temperature)}; greedy=True takes the likeliest token"
        )
    if not COLDEST <= temperature < 1e300:
        raise ValueError(
            f"temperature must be from {COLDEST:g} to 1e+300, got {shown(temperature)}; "
            "greedy=True takes the likeliest token"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be a number of tokens, 0 for all, got {top_k!r}")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a probability above 0, got {top_p!r}")
    if greedy and (temperature != 1 or top_k or top_p != 1):
        raise ValueError("greedy=True takes no temperature, top_k or top_p")
