"""Models over one sequence in several processes, beside the same models in one: cases, and what differs.

Runs in each of several processes. Every process computes the whole in one, too: what it compares with is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from attention_zoo import registry
from attention_zoo.contract import Unsupported
from attention_zoo.layout.placement import Placement
from attention_zoo.model.placed import called
from attention_zoo.model.transformer import Transformer
from attention_zoo.parallel.sequence.batch import sharded
from attention_zoo.parallel.sequence.gradients import sum_gradients, summed
from attention_zoo.tasks.task import IGNORED, Batch
from attention_zoo.tokens import Tokens
from attention_zoo.training.objective import counts, losses

VOCAB, ROWS = 11, 3
SHARED: dict[str, Any] = {"vocab": VOCAB, "dim": 8, "depth": 2, "heads": 2}
PADDINGS = ("none", "right", "left", "documents")


class Found(NamedTuple):
    """Of one case.

    Fields:
        error: the largest difference of loss and gradients, relative to the largest gradient of the model.
        refused: why there is none.
        sent: bytes that all processes sent, forward and backward, by what they were.
        tokens: columns of the whole sequence, of all rows.
    """

    error: float | None
    refused: str | None
    sent: dict[str, int]
    tokens: int


def tokens_of(padding: str, length: int) -> Tokens | None:
    """Rows of different lengths, or several documents a row with holes among them."""
    if padding == "none":
        return None
    valid, document = torch.ones(ROWS, length, dtype=torch.bool), None
    if padding == "documents":
        drawn = torch.Generator().manual_seed(length)
        document = (torch.rand(ROWS, length, generator=drawn) < 0.15).long().cumsum(1)
        valid = torch.rand(ROWS, length, generator=drawn) < 0.85
    for row in range(ROWS if padding in ("right", "left") else 0):
        gone = row * length // ROWS
        valid[row, length - gone :] = padding == "left"
        valid[row, :gone] &= padding == "right"
    return Tokens.of(valid, document=document)


def batch_of(padding: str, length: int) -> Batch:
    """Ids at padding are none of the vocabulary."""
    drawn = torch.Generator().manual_seed(length + 1)
    ids, targets = (torch.randint(0, VOCAB, (ROWS, length), generator=drawn) for _ in range(2))
    tokens = tokens_of(padding, length)
    if tokens is not None:
        ids, targets = ids.masked_fill(~tokens.valid, -7), targets.masked_fill(~tokens.valid, IGNORED)
    return Batch(ids, targets, tokens, torch.ones(ROWS, dtype=torch.bool))


def compared(options: dict[str, Any], padding: str, length: int, dtype: str = "float64") -> Found:
    """A model on some tokens, in all processes together and in this one alone."""
    torch.manual_seed(0)
    model = Transformer(**SHARED | options).to(getattr(torch, dtype))
    batch = batch_of(padding, length)
    if "classes" in options:
        batch = batch._replace(targets=torch.zeros(ROWS, dtype=torch.int64))
    scored = counts(batch)

    def ran(part: Batch) -> float:
        model.zero_grad()
        output = model(part.ids, part.tokens)
        loss = sum([*losses(output, part, scored).values(), *output.losses.values()], torch.zeros(()))
        loss.backward()
        return float(loss.detach())

    loss = ran(batch)
    wanted = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    try:
        part = sharded(batch, None, model)
        (got,) = summed([ran(part)], None)
    except Unsupported as refusal:
        return Found(None, str(refusal), {}, 0)
    sum_gradients(model.parameters(), None)
    largest = max(float(each.abs().max()) for each in wanted.values() if each is not None)
    errors = [abs(got - loss) / max(abs(loss), 1e-9)]
    for name, parameter in model.named_parameters():
        one, other = (torch.zeros(()) if x is None else x for x in (wanted[name], parameter.grad))
        errors.append(float((one - other).abs().max()) / largest)
    sent = {" ".join(key): count for key, count in part.tokens.placement.traffic.sent.items()}  # type: ignore[union-attr]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sent)
    sent = {key: sum(each.get(key, 0) for each in every) for key in sorted({key for each in every for key in each})}
    return Found(max(errors), None, sent, ROWS * length)


def all_compared(cases: Sequence[tuple[dict[str, Any], str, int, str]]) -> list[Found]:
    """In each of several processes."""
    found = []
    for case in cases:
        found.append(compared(*case))
        # each process measures its own error; none may differ
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, found[-1].error)
        assert len({each is None for each in errors}) == 1, f"some processes refuse, others do not: {case}"
        if found[-1].error is not None:
            found[-1] = found[-1]._replace(error=max(errors))  # type: ignore[type-var]
    return found


def layers(names: Sequence[str]) -> dict[str, list[float]]:
    """Of single layers by name: how far they are from one process; from themselves with NaN in the padding; and, in
    columns before, from themselves with another future. The largest of all processes."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        cls, _ = registry.recipe(name)
        layer = registry.build(name, dim=8, heads=2, causal=True, **cls.tiny).double()
        tokens = tokens_of("documents", 29)
        assert tokens is not None
        x, border = torch.randn(ROWS, 29, 8, dtype=torch.float64), 20
        placement = Placement.of(tokens)
        own, past = placement.own, torch.from_numpy(placement.columns[placement.rank] < border)
        later = torch.cat([x[:, :border], torch.randn_like(x[:, border:])], 1)
        with torch.no_grad():
            whole = placement.take(layer(x, tokens).hidden).masked_fill(~own.valid[..., None], 0)
            out, blank, other = (
                called(layer, placement.take(each), own, state=None, source=None, choices=None).hidden
                for each in (x, x.masked_fill(~tokens.valid[..., None], torch.nan), later)
            )
        gaps = [each.masked_fill(~own.valid[..., None], 0) for each in (out - whole, blank - out, other - out)]
        gaps[2] = gaps[2][:, past]
        errors = torch.tensor([float(gap.abs().max()) if gap.numel() else 0.0 for gap in gaps], dtype=torch.float64)
        dist.all_reduce(errors, dist.ReduceOp.MAX)
        found[name] = errors.tolist()
    return found
