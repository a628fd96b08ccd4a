"""Compressive memory against SelfAttention of compressive-transformer-pytorch, in a loop over segments.

It has no u and v (ours are zeros there) and no bias but that of its output; its keys of distances are our W_r R. Whole
segments of one document with memories as long: there its loss is about exactly what is evicted. It detaches the weight
of keys and values in place, for ever; here only for the loss, as it means to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attention_zoo as zoo

from .case import FLOAT64, Bounds, Case, Errors, Leaves, gradients, measure, randomise, vectors

BOUNDS = Bounds(
    {torch.float32: Errors(4e-6, 4e-6), torch.float64: FLOAT64}, "Sums over a group become keys and values in turn."
)


class KeysAndValues(nn.Module):
    """Its one projection, by copies of our two; `weight.detach_()` counts for the next call alone."""

    def __init__(self, copies: Leaves):
        super().__init__()
        self.copies, self.frozen = copies, False

    @property
    def weight(self) -> KeysAndValues:
        return self

    def detach_(self) -> None:
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.copies["to_k.weight"], self.copies["to_v.weight"]])
        weight, self.frozen = (weight.detach() if self.frozen else weight), False
        return nn.functional.linear(x, weight)


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def run(seed: int, dtype: torch.dtype) -> Errors:
    """Random sizes; outputs, the loss, and the gradients of both together."""
    from compressive_transformer_pytorch.compressive_transformer_pytorch import SelfAttention

    rng = random.Random(seed)
    heads, width, ratio, segments = rng.choice([1, 2]), 8, rng.choice([1, 2, 4]), rng.randint(2, 6)
    dim, S, batch = heads * width, ratio * rng.randint(1, 3), rng.randint(1, 3)
    C = S // ratio * rng.randint(1, 3)
    ours = zoo.build(
        "compressive", dim=dim, heads=heads, bias="out", segment_length=S, memory_length=S, compressed_length=C,
        ratio=ratio,
    ).to(dtype)  # fmt: skip
    randomise(ours, seed)
    with torch.no_grad():
        ours.u.zero_()
        ours.v.zero_()
    parameters = {name: value for name, value in ours.named_parameters() if name not in ("u", "v")}
    x = vectors(seed, batch, S * segments, dim, dtype=dtype)
    out = ours(x)
    weight = vectors(7, *out.hidden.shape, dtype=dtype).detach()
    loss = out.losses.get("reconstruction", x.new_zeros(()))
    found = gradients((out.hidden * weight).sum() + 10 * loss, {"input 0": x, **parameters})

    copies = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    y = x.detach().clone().requires_grad_()
    theirs = SelfAttention(dim, S, S, C, ratio, heads).to(dtype).train()
    theirs.to_q = Called(lambda x: nn.functional.linear(x, copies["to_q.weight"]))
    theirs.to_out = Called(lambda x: nn.functional.linear(x, copies["to_out.weight"], copies["to_out.bias"]))
    theirs.to_kv = KeysAndValues(copies)
    conv = copies["compress.conv.weight"], copies["compress.conv.bias"]
    theirs.compress_mem_fn = Called(lambda x: nn.functional.conv1d(x.mT, *conv, stride=ratio).mT)
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(2 * S + C - 1, -1, -1)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
    table = (waves @ copies["to_r.weight"].T).unflatten(-1, (heads, width)).transpose(0, 1)
    memory, hidden, losses = (None, None), [], []
    for part in y.split(S, 1):
        made, held, lost = theirs(part, memory, table)
        losses += [lost] if memory[0] is not None and memory[0].shape[1] else [y.new_zeros(())]
        memory = tuple(each.detach() for each in held)
        hidden.append(made)
    expected = torch.cat(hidden, 1)
    total = torch.stack(losses).mean()
    wanted = gradients((expected * weight).sum() + 10 * total, {"input 0": y, **copies})
    assert float((loss - total).detach().abs()) <= BOUNDS.errors[dtype].output * max(1.0, total.item())
    return measure(out.hidden, expected, found, wanted, torch.ones(x.shape[:2], dtype=torch.bool))


def cases() -> Iterator[Case]:
    for seed in range(8):
        yield Case(
            "compressive", "compressive-transformer-pytorch SelfAttention", f"seed {seed}", partial(run, seed), BOUNDS
        )
