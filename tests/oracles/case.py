"""One case: our layer and a foreign one on the same random weights and inputs, and how far apart they may be.

The foreign module runs on *copies of our parameters, in our layout*: `functional_call` is handed a function of them.
So every gradient arrives under our own parameter's name, through the foreign module's own forward and backward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo import Tokens

Leaves = dict[str, Tensor]


class Errors(NamedTuple):
    """How far ours is from the oracle.

    Fields:
        output: largest difference at a valid token: absolute, and relative where the output is above 1.
        gradient: ‖ours - theirs‖ / ‖theirs‖, the largest over the input and all modules. Weight and bias of a module
            count together, since the gradient of a bias of keys is zero but for rounding; for the same reason no norm
            counts as less than a tenth of the largest.
        worst: the module that has it.
    """

    output: float
    gradient: float
    worst: str = ""


FLOAT32, FLOAT64 = Errors(1e-6, 2e-6), Errors(1e-13, 1e-12)


class Bounds(NamedTuple):
    """The largest errors allowed.

    Fields:
        errors: for each dtype that a case runs in.
        why: where they are not the usual ones, the reason, for the table.
    """

    errors: Mapping[torch.dtype, Errors]
    why: str = ""


USUAL = Bounds({torch.float32: FLOAT32, torch.float64: FLOAT64})
DEEP = Bounds(
    {torch.float32: Errors(4e-6, 4e-6), torch.float64: FLOAT64}, "Rounding adds up over the layers of a stack."
)


@dataclass(frozen=True)
class Case:
    """What to compare.

    Fields:
        backend, oracle: row of the table.
        name: of the configuration.
        run: the errors in a dtype.
        bounds: the largest errors allowed, in the dtypes that the case runs in.
    """

    backend: str
    oracle: str
    name: str
    run: Callable[[torch.dtype], Errors]
    bounds: Bounds = USUAL


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, seed: int) -> None:
    """Weights that keep everything at unit scale, the scores too; the same in every dtype, but for rounding."""
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=g, dtype=torch.float64))


def vectors(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).requires_grad_()


def padding(rng: random.Random, batch: int, length: int, kind: str, most: int | None = None) -> Tensor:
    """bool [B, L]: none | right | left | holes; at most `most` tokens of a row are padding, never all."""
    most = length - 1 if most is None else min(most, length - 1)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for row in valid if kind != "none" else ():
        count = rng.randint(0, most)
        if kind == "holes":
            row[rng.sample(range(length), count)] = False
        elif count:
            row[-count:] = False
        if kind == "left":
            row.copy_(row.flip(0))
    return valid


def at_columns(tokens: Tokens) -> Tokens:
    """Foreign code counts columns, also those of padding; ours counts tokens unless it is told their places."""
    B, L = tokens.valid.shape
    return tokens._replace(position=torch.arange(L).expand(B, L), length=torch.full((B, L), L))


def compare(
    ours: nn.Module,
    run_ours: Callable[..., Tensor],
    run_theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    valid: Tensor,
) -> Errors:
    """Run both and measure.

    Args:
        ours: whose parameters are compared.
        run_ours: inputs -> output [B, L, ...].
        run_theirs: (copies of our parameters by name, inputs) -> output.
        inputs: leaves; gradients reach each.
        valid: bool [B, L] or more of the output's axes: what counts.
    """
    parameters = dict(ours.named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    copies = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = run_ours(*inputs)
    expected = run_theirs(leaves, *copies)
    weight = torch.randn(out.shape, generator=generator(7), dtype=torch.float64).to(out.dtype)
    loss, wanted_loss = ((y * weight)[valid].sum() for y in (out, expected))
    return measure(
        out,
        expected,
        gradients(loss, {**_named(inputs), **parameters}),
        gradients(wanted_loss, {**_named(copies), **leaves}),
        valid,
    )


def _named(inputs: tuple[Tensor, ...]) -> Leaves:
    return {f"input {i}": x for i, x in enumerate(inputs)}


def gradients(loss: Tensor, leaves: Leaves) -> Leaves:
    """By name; zeros where a leaf has no part."""
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)))


def measure(out: Tensor, expected: Tensor, found: Leaves, wanted: Leaves, valid: Tensor) -> Errors:
    """How far outputs and gradients (by the name of the input or parameter) are from what is expected."""
    assert out.dtype == expected.dtype
    assert out.shape == expected.shape
    assert found.keys() == wanted.keys()
    difference = (out - expected).detach() / expected.detach().abs().clamp(min=1)
    assert all(bool(gradient.isfinite().all()) for gradient in wanted.values()), "the oracle's gradient is not finite"
    ours, theirs = _modules(found), _modules(wanted)
    norms = {name: float(gradient.norm()) for name, gradient in theirs.items()}
    least = 0.1 * max(norms.values())
    relative = {name: float((ours[name] - theirs[name]).norm()) / max(norm, least) for name, norm in norms.items()}
    worst = max(relative, key=lambda name: relative[name])
    return Errors(float(difference[valid].abs().max()), relative[worst], worst)


def _modules(gradients: Leaves) -> Leaves:
    """One vector for each input and module."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        module, _, last = name.rpartition(".")
        groups.setdefault(module if last in ("weight", "bias") and module else name, []).append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}
