"""Where our Triton kernels are tested: on a GPU where there is one, else on the CPU by Triton's interpreter.

The interpreter takes a second for a few hundred products, hence the tiny sizes; it multiplies no bfloat16
(triton#11584).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_zoo.layout import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest value."""


def _interprets() -> bool:
    """Whether a loop to a bound that is read from memory runs: with some pairs of versions none does."""
    import interpreter_probe

    return interpreter_probe.works()


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; on a CPU our kernels are allowed to run there."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu" and not _interprets():
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with this numpy (triton#9171)")
    monkeypatch.setattr(kernel, "TRITON_DEVICES", ("cuda", "cpu"))
    return DEVICE


def close(got: Tensor, want: Tensor, where: str) -> None:
    """Demand equality up to the rounding of the type of `got`."""
    assert got.shape == want.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.detach(), want.detach()
    error = float((got.double().cpu() - want.double().cpu()).abs().max()) if got.numel() else 0.0
    largest = max(1.0, float(want.abs().max())) if got.numel() else 1.0
    # `not <=` also refuses NaN
    assert error <= TOLERANCE[got.dtype] * largest, f"{where}: off by {error:.1e} of {largest:.1e}"
