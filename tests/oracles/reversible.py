"""The reversible stack against ReversibleSequence of reformer-pytorch, around torch's own attention and layers.

Theirs keeps its two streams side by side, as ours does inside; ours ends in their mean. Its backward runs outside of
`functional_call`, so that its modules hold copies of our parameters and their gradients are collected there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.model.block import Block
from attention_zoo.model.reversible import ReversibleStack

from .case import DEEP, Case, Errors, Leaves, generator, gradients, measure, padding, randomise, vectors
from .torch_modules import attention_weights, future


class Attend(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.norm(x)
        mask = future(x.shape[1]) if self.causal else None
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]


def their_names(leaves: Leaves, depth: int) -> Leaves:
    """Our leaves, by the names that they have in ReversibleSequence."""
    found: Leaves = {}
    for index in range(depth):
        ours, theirs = f"layers.{index}.layers", f"blocks.{index}"
        found.update(attention_weights(leaves, f"{ours}.0.body.layers.0.", f"{theirs}.f.net.attention."))
        for name, mine in (
            ("f.net.norm", "0.norm"),
            ("g.net.0", "1.norm"),
            ("g.net.1", "1.body.layers.0.into"),
            ("g.net.3", "1.body.layers.0.out"),
        ):
            found.update({f"{theirs}.{name}.{kind}": leaves[f"{ours}.{mine}.{kind}"] for kind in ("weight", "bias")})
    return found


def run(seed: int, causal: bool, dtype: torch.dtype) -> Errors:
    """Random depth, length and padding."""
    from reformer_pytorch.reversible import ReversibleSequence

    rng = random.Random(seed)
    heads, width, depth, batch, length = rng.choice([1, 2]), 8, rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 30)
    dim = heads * width
    valid = padding(rng, batch, length, "right" if causal else rng.choice(["none", "right", "left", "holes"]))
    ours = ReversibleStack(
        [Block(zoo.build("full", dim=dim, heads=heads, causal=causal), dim=dim) for _ in range(depth)]
    )
    randomise(ours.to(dtype), seed)
    parameters = dict(ours.named_parameters())
    wide = 4 * dim
    theirs = ReversibleSequence(
        nn.ModuleList(
            nn.ModuleList(
                [
                    Attend(dim, heads, causal),
                    nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim)),
                ]
            )
            for _ in range(depth)
        )
    ).to(dtype)
    copies = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in their_names(parameters, depth).items():
            copies[name].copy_(value)

    x = vectors(seed, batch, length, dim, dtype=dtype)
    out = ours(x, Tokens.of(valid)).hidden
    weight = torch.randn(out.shape, generator=generator(7), dtype=torch.float64).to(dtype) * valid[..., None]
    found = gradients((out * weight).sum(), {"input 0": x, **parameters})

    copy = x.detach().clone().requires_grad_()
    expected = theirs(torch.cat([copy, copy], -1), padding=~valid).unflatten(-1, (2, dim)).mean(-2)
    (expected * weight).sum().backward()
    wanted = {f"theirs.{name}": parameter.grad for name, parameter in copies.items() if name.startswith("blocks")}
    renamed = {f"theirs.{name}": gradient for name, gradient in their_names(found, depth).items()}
    return measure(
        out, expected, {"input 0": found["input 0"], **renamed}, {"input 0": copy.grad, **wanted}, valid
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for seed in range(6):
        for causal in (False, True):
            name = f"seed {seed}, {'causal' if causal else 'two-sided'}"
            yield Case(
                "the skeleton", "reformer-pytorch ReversibleSequence", name, partial(run, seed, causal), DEEP
            )  # fmt: skip
