"""Beam search: keep the best few continuations of each prompt, and lengthen them all by one token at a time.

    score(y) = Σ log p(y_t | y_<t, prompt) / n^length_penalty           n: tokens of y, its eos among them

Each step takes the `beams` best of all continuations by one token. A hypothesis that has ended stays among them with
its score for as long as no `beams` others are better. So one beam is greedy decoding, and as many beams as there are
texts are an exhaustive search. Sutskever et al. 2014, §3.2; division by the length: Graves 2012, §2.5 (there to the
power of 1), with a power: Wu et al. 2016, §7, whose ((5 + n) / 6)^α differs by its offset.

Unlike most released code no pool of finished hypotheses is kept beside the beams, and nothing stops early: the search
goes on until all beams have ended or `steps` are written, since with a penalty above 0 a longer text may still win.

The prompts, and a source, are read once for all beams: the first step hands each row's state to its beams (`reorder`),
and every step the states of those that go on. A deep Reformer's hashes depend on how a text is cut into calls: what is
searched there are the texts of the model as it decodes, whose probabilities are not those of one call over a text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attention_zoo.contract import at_least, shown
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.reader import check_logits, check_prompts, evaluating, reader, writer
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapped import callable_part

LENGTH_PENALTY = 1.0
STEEPEST = 4.0
"""Of length penalties: lengths to a higher power leave the range of float32."""


class Beams(NamedTuple):
    """What a search found, the best of each row first.

    Fields:
        tokens: [B, beams, n], without the prompt; after a hypothesis's eos more of it. n is steps, or less once all
            have ended.
        scores: [B, beams]; -inf where there are fewer texts than beams.
        lengths: [B, beams], tokens of each, its eos among them.
    """

    tokens: Int[Tensor, "B beams n"]
    scores: Float[Tensor, "B beams"]
    lengths: Int[Tensor, "B beams"]


@torch.no_grad()
def beam_search(
    model: Transformer | EncoderDecoder,
    ids: Int[Tensor, "B L"],
    *,
    steps: int,
    beams: int,
    eos: int | None = None,
    length_penalty: float = LENGTH_PENALTY,
    valid: Bool[Tensor, "B L"] | None = None,
    source: Any = None,
    cached: bool = True,
    prefill_chunk: int | None = None,
) -> Beams:
    """The likeliest continuations that the search meets.

    Args:
        beams: number of hypotheses that are kept for each row.
        eos: a hypothesis ends with this token; without one all are as long, and length_penalty changes nothing.
        length_penalty: above 0 favours long texts: 0 is the sum of log-probabilities, 1 their mean.
        model, ids, steps, valid, source, cached, prefill_chunk: see `stream`.

    Raises:
        ValueError: for an option outside its rule, a row without a valid token, or logits that are NaN.
        Unsupported: if the model keeps no state and cached is True.
    """
    valid = check_prompts(ids, valid, steps=steps, eos=eos, prefill_chunk=prefill_chunk)
    check_beams(beams, length_penalty)
    vocab = writer(model).vocab
    if eos is not None and eos >= vocab:
        raise ValueError(f"eos must lie in [0, {vocab}), got {eos}")
    model = callable_part(model, "generate")
    with evaluating(model):
        read = reader(model, ids, valid, source, steps=steps, cached=cached, chunk=prefill_chunk)
        logits = next(read)
        B, device = len(ids), ids.device
        first = torch.arange(B, device=device)[:, None]
        # all beams begin as the same text: it is counted once
        start = torch.where(torch.arange(beams, device=device) > 0, -torch.inf, 0.0).expand(B, beams)
        found = Beams(ids.new_empty(B, beams, 0), start, ids.new_zeros(B, beams))
        total, ended, logits = start, torch.zeros_like(start, dtype=torch.bool), logits.repeat_interleave(beams, 0)
        states = first.expand(B, beams)  # where each beam's state stands among those that there are
        for step in range(steps):
            if logits.is_cpu or step == 0:  # elsewhere reading a number back would make every step wait
                check_logits(logits)
            found, total, ended, parent = _lengthened(found, total, ended, logits, eos, length_penalty)
            if step == steps - 1 or (eos is not None and bool(ended.all())):
                break
            rows = states.gather(1, parent).flatten()
            logits = read.send((found.tokens[:, :, -1].flatten(), rows))
            states = first * beams + torch.arange(beams, device=device)
    return found


def _lengthened(
    found: Beams, total: Tensor, ended: Tensor, logits: Tensor, eos: int | None, length_penalty: float
) -> tuple[Beams, Tensor, Tensor, Tensor]:
    """The best of all hypotheses with one token more: they, their sums, whether each has ended, whom each goes on."""
    B, beams = total.shape
    said = (logits if logits.element_size() == 8 else logits.float()).log_softmax(-1).view(B, beams, logits.shape[-1])
    if eos is not None:
        # what has ended is itself again: one more eos for free
        stays = torch.full_like(said[0, 0], -torch.inf).index_fill(0, torch.tensor(eos, device=said.device), 0.0)
        said = torch.where(ended[..., None], stays, said)
    lengths = found.lengths + (~ended).long()
    sums = total[..., None] + said
    scores, best = (sums / (lengths.to(said.dtype) ** length_penalty)[..., None]).flatten(1).topk(beams)
    parent, token = best // said.shape[-1], best % said.shape[-1]
    tokens = torch.cat([_rows(found.tokens, parent), token[..., None]], -1)
    ended = ended.gather(1, parent)
    if eos is not None:
        ended = ended | (token == eos)
    return Beams(tokens, scores, lengths.gather(1, parent)), sums.flatten(1).gather(1, best), ended, parent


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(*index.shape, tokens.shape[-1]))


def check_beams(beams: Any, length_penalty: Any) -> None:
    """Raise a ValueError that names the option, the rule and the value."""
    at_least(1, beams=beams)
    if beams > 2**16:
        raise ValueError(f"beams must be at most {2**16}, got {beams}")
    number = isinstance(length_penalty, int | float) and not isinstance(length_penalty, bool)
    if not number or not abs(length_penalty) <= STEEPEST:
        allowed = f"from {-STEEPEST:g} to {STEEPEST:g}"
        raise ValueError(f"length_penalty must be a number {allowed}, got {shown(length_penalty)}")
