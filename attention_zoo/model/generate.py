"""Write on from a prompt: greedily, or by sampling with temperature, top-k (Fan et al. 2018) and top-p (Holtzman 2020).

The cache is the model's own state, hence as small as its mechanisms allow.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import Tokens, at_least
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.transformer import Transformer


@torch.no_grad()
def generate(
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
) -> Int[Tensor, "B n"]:
    """New tokens, without the prompt.

    Args:
        model: with an lm head; it is in evaluation mode meanwhile.
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

    Returns:
        [B, n]; n is steps, or less once all rows have ended.

    Raises:
        ValueError: for an option outside its rule, or a row without a valid token.
        Unsupported: if the model keeps no state and cached is True.
    """
    at_least(1, steps=steps)
    _check(model, greedy, temperature, top_k, top_p)
    if valid is None:
        valid = torch.ones_like(ids, dtype=torch.bool)
    if not bool(valid.any(1).all()):
        raise ValueError("valid must keep at least one token of every prompt")
    generator = torch.Generator(ids.device).manual_seed(seed)
    training = model.training
    model.eval()
    try:
        return _write(model, ids, valid, steps, eos, source, cached, lambda logits: (
            logits.argmax(-1) if greedy else draw(logits, temperature, top_k, top_p, generator)
        ))  # fmt: skip
    finally:
        model.train(training)


def _write(model, ids, valid, steps, eos, source, cached, choose) -> Tensor:
    B, device = len(ids), ids.device
    rows = torch.arange(B, device=device)
    state = model.initial_state(B) if cached else None
    written: list[Tensor] = []
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for _ in range(steps):
        out = model(ids, Tokens.of(valid), state=state, source=source)
        last = torch.where(valid, torch.arange(valid.shape[1], device=device), -1).amax(1)
        token = choose(out.logits[rows, last])
        if eos is not None:
            token = torch.where(ended, eos, token)
            ended = ended | (token == eos)
        written.append(token)
        if eos is not None and bool(ended.all()):
            break
        fed = token[:, None]
        if cached:
            ids, valid, state, source = fed, torch.ones_like(fed, dtype=torch.bool), out.state, None
        else:
            ids, valid = torch.cat([ids, fed], 1), torch.cat([valid, torch.ones_like(fed, dtype=torch.bool)], 1)
    return torch.stack(written, 1)


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


def _check(model, greedy, temperature, top_k, top_p) -> None:
    lm = model.decoder if isinstance(model, EncoderDecoder) else model
    if lm.head_name != "lm" or not lm.causal:
        raise ValueError("generate needs a causal model with head=lm")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; greedy=True takes the most likely token")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be a number of tokens, 0 for all, got {top_k!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a probability above 0, got {top_p}")
    if greedy and (temperature != 1 or top_k or top_p != 1):
        raise ValueError("greedy=True takes no temperature, top_k or top_p")
