"""Norms over channels: of each token by itself (layer, rms), or over the tokens of a batch (batch).

    layer    w · (x - mean(x)) / √(var(x) + eps) + b         over a token's channels      Ba et al. 2016
    rms      w · x / √(mean(x²) + eps)                       over a token's channels      Zhang & Sennrich 2019
    batch    w · (x - m) / √(v + eps) + b                    m, v of each channel         Ioffe & Szegedy 2015

In training m and v are mean and variance over the valid tokens of the call, of all rows together, and running averages
of them are kept; in evaluation those are m and v. So what a token becomes depends on other rows, and on what follows
it: `batch` is for two-sided models alone.

- Equal to torch.nn.BatchNorm1d over the valid tokens: the running variance is the unbiased one. Padding is not read,
  whatever it holds, and comes out as b. Global tokens that a wrapper puts in count like any other.
- A call of less than two valid tokens has no variance: it leaves the running averages alone.
- Statistics are those of one call: with accumulated gradients, of each part of the batch by itself. Several processes
  would each keep their own, and are refused. A forward that backward runs again (checkpointing, reversible stacks) is
  counted once.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from attention_zoo.options import AboveZero, Named, check_values
from attention_zoo.rules import Unsupported, known_options, named, one_of

PER_TOKEN = "norm=layer or norm=rms"
Momentum = Annotated[float, Field(gt=0, le=1, description="a share above 0")]


class BatchNorm(nn.Module):
    """Each channel by its mean and variance over the valid tokens.

    Args:
        dim: number of channels E.
        eps: what is added to the variance.
        momentum: weight of a call's statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L E"]:
        wide = x.float() if x.element_size() < 4 else x
        if not self.training:
            centred, variance = _blanked(wide - self.running_mean, valid), self.running_var
        else:
            _check_alone()
            count = wide.new_tensor(wide.shape[0] * wide.shape[1]) if valid is None else valid.sum().to(wide.dtype)
            mean = _blanked(wide, valid).sum((0, 1)) / count.clamp(min=1)
            centred = _blanked(wide - mean, valid)
            variance = centred.square().sum((0, 1)) / count.clamp(min=1)
            if torch.compiler.is_compiling() or not _in_backward():
                self._count(mean.detach(), variance.detach(), count)
        return (centred * ((variance + self.eps).rsqrt() * self.weight) + self.bias).to(x.dtype)

    def _count(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        unbiased = variance * (count / (count - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), (count > 1).to(running.dtype) * self.momentum)


NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": BatchNorm}


def build_norm(norm: Named, dim: int) -> nn.Module:
    """One of `NORMS` over the last axis. Options: eps, what is added to the variance; of batch also momentum."""
    name, options = named("norm", norm)
    one_of(tuple(NORMS), norm=name)
    known_options(f"norm={name}", options, ("eps", "momentum") if name == "batch" else ("eps",))
    rules: dict[str, Any] = {"eps": AboveZero | None if name == "rms" else AboveZero, "momentum": Momentum}
    check_values(rules, options, "norm.")
    return NORMS[name](dim, **options)


def normed(norm: nn.Module, x: Float[Tensor, "B L E"], valid: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B L E"]:
    """x through a norm; which tokens are valid (None: all) is told to one over the batch alone."""
    return norm(x, valid) if isinstance(norm, BatchNorm) else norm(x)


def check_last_only(model: nn.Module) -> None:
    """Raise a ValueError where statistics would be of last tokens alone."""
    if model.training and any(isinstance(each, BatchNorm) for each in model.modules()):
        raise ValueError("last_only needs model.eval() with norm=batch: in training statistics are of all tokens")


def refuse_over_batch(norm: Named, option: str) -> None:
    """Raise Unsupported where a norm over the batch would see what `option` must not."""
    if named("norm", norm)[0] == "batch":
        raise Unsupported(
            "norm=batch", option, "its statistics are of all tokens, those that are still to be told too", PER_TOKEN
        )


def _blanked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[..., None], 0)


def _check_alone() -> None:
    there = torch.distributed
    if there.is_available() and there.is_initialized() and there.get_world_size() > 1:
        raise Unsupported(
            "norm=batch", "training in several processes", "each would keep statistics of its own rows", PER_TOKEN
        )


def _in_backward() -> bool:
    """Whether autograd is at work: then this forward was counted already (torch's checkpoint asks the same way)."""
    running: int = torch._C._current_graph_task_id()
    return running != -1
