"""Mixed precision: weights stay float32, matrix products run in fewer bits where that is safe."""

from __future__ import annotations

import torch

from attention_zoo.contract import one_of

PRECISIONS = ("float32", "bfloat16", "float16")


def check_precision(precision: str, device: str) -> None:
    """Raise a ValueError for an unknown precision, or one that the device cannot train in."""
    one_of(PRECISIONS, precision=precision)
    if precision == "float16" and torch.device(device).type != "cuda":
        raise ValueError(f"precision=float16 needs a CUDA device, got device={device}; use bfloat16 or float32")


class Precision:
    """How one run computes.

    Args:
        precision: "float32", "bfloat16" (autocast) or "float16" (autocast and loss scaling, CUDA only).
        device: where it runs.
    """

    def __init__(self, precision: str, device: str):
        check_precision(precision, device)
        self.kind = torch.device(device).type
        self.dtype = getattr(torch, precision)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=precision == "float16")

    def autocast(self) -> torch.autocast:
        """Context of every forward pass."""
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype != torch.float32)
