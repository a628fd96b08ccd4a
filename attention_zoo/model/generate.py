"""Write on from a prompt: greedily, by sampling with temperature, top-k (Fan et al. 2018) and top-p (Holtzman 2020), or
by beam search (`model.beam`). How the model is read meanwhile: `model.reader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import at_least, shown
from attention_zoo.model.beam import LENGTH_PENALTY, beam_search, check_beams
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.reader import check_logits, check_prompts, evaluating, reader, writer
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import callable_part

COLDEST = 1e-30
"""Of temperatures: logits that are divided by less leave the range of their type."""
DRAWN = {"greedy", "temperature", "top_k", "top_p", "seed"}
"""Options that beam search has none of."""


def generate(
    model: Transformer | EncoderDecoder,
    ids: Int[Tensor, "B L"],
    *,
    beams: int = 1,
    length_penalty: float = LENGTH_PENALTY,
    **options: Any,
) -> Int[Tensor, "B n"]:
    """New tokens, without the prompt.

    Args:
        beams: above 1 the best text of a search over so many, which takes no options of draws; see `beam_search`.
        length_penalty: of that search.
        model, ids, options: see `stream`.

    Returns:
        [B, n]; n is steps, or less once all rows have ended.

    Raises:
        ValueError: for an option outside its rule, or without use.
    """
    check_beams(beams, length_penalty)
    if beams == 1:
        if length_penalty != LENGTH_PENALTY:
            raise ValueError(f"length_penalty needs beams above 1, got {shown(length_penalty)} with beams=1")
        return torch.stack(list(stream(model, ids, **options)), 1)
    if useless := sorted(DRAWN & options.keys()):
        raise ValueError(f"beams above 1 takes no {', '.join(useless)}: it draws nothing")
    found = beam_search(model, ids, beams=beams, length_penalty=length_penalty, **options)
    longest = max(found.lengths[:, 0].tolist(), default=found.tokens.shape[-1])
    return found.tokens[:, 0, :longest]


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
    at_least(-(2**63), seed=seed)
    if seed >= 2**64:
        raise ValueError(f"seed must be at most {2**64 - 1}, got {seed}")
    valid = check_prompts(ids, valid, steps=steps, eos=eos, prefill_chunk=prefill_chunk)
    writer(model)
    _check(greedy, temperature, top_k, top_p)
    generator = torch.Generator(ids.device).manual_seed(seed)
    model = callable_part(model, "generate")
    with evaluating(model):
        read = reader(model, ids, valid, source, steps=steps, cached=cached, chunk=prefill_chunk)
        logits = next(read)
        check_logits(logits)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for step in range(steps):
            token = logits.argmax(-1) if greedy else draw(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                token = torch.where(ended, eos, token)
                ended = ended | (token == eos)
            yield token
            if step == steps - 1 or (eos is not None and bool(ended.all())):
                break
            logits = read.send((token, None))
            if logits.is_cpu:  # elsewhere reading a number back would make every step wait
                check_logits(logits)


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


def _check(greedy: bool, temperature: Any, top_k: Any, top_p: Any) -> None:
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
