"""Which kernel runs a call, and every reason why another cannot: one dispatcher for all mechanisms.

A mechanism lists its kernels, fastest first, and each kernel the facts that it needs. `auto` takes the first whose
facts all hold; a named one that cannot raises with its reasons and those of all others. Nothing is substituted
silently.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from attention_zoo.rules import Unsupported

Call = TypeVar("Call")
Fact = Callable[[Any], str | None]
"""Of a call, or of a mechanism: None where it holds, else one sentence."""


@dataclass(frozen=True)
class Kernel(Generic[Call]):
    """One way to run a mechanism.

    Fields:
        name: what `kernel=` takes.
        run: the call -> its output.
        needs: facts about the call, without which it is not exact.
        about: one line for people.
        fits: facts about the mechanism, known when it is built: one that they exclude does not have this kernel.
        whole: whether heads that reach differently far cost what they see in one call, so that none need run apart.
        along: whether it runs rows of global queries along, where these have a second projection.
        leads: a fact about the call: where it holds, the kernel is faster than those before it; None: it never is.
    """

    name: str
    run: Callable[[Call], Any]
    needs: tuple[Fact, ...]
    about: str
    fits: tuple[Fact, ...] = ()
    whole: bool = False
    along: bool = False
    leads: Fact | None = None

    def refuse(self, call: Call) -> str | None:
        """Every reason why it cannot run the call exactly, in one line, or None."""
        return "; ".join(unmet(self.needs, call)) or None


def unmet(facts: Iterable[Fact], of: Any) -> list[str]:
    """What is said of the facts that do not hold; a reason for two of them is said once."""
    return list(dict.fromkeys(reason for fact in facts if (reason := fact(of)) is not None))


def kernels_of(kernels: Sequence[Kernel[Any]], mechanism: Any) -> tuple[Kernel[Any], ...]:
    """Those that the mechanism has."""
    return tuple(kernel for kernel in kernels if not any(fact(mechanism) for fact in kernel.fits))


def check_name(backend: str, kernels: Sequence[Kernel[Any]], wanted: str) -> None:
    """Refuse at build a kernel that the mechanism does not have."""
    names = ["auto", *(kernel.name for kernel in kernels)]
    if wanted not in names:
        raise Unsupported(backend, f"kernel={wanted}", "it has no such kernel", " or ".join(names))


def choose(backend: str, kernels: Sequence[Kernel[Call]], wanted: str, call: Call) -> Kernel[Call]:
    """The kernel that runs this call."""
    for kernel in _in_order(kernels, call):
        # not `refuse`: the first fact that does not hold is enough, and later ones may cost more
        if wanted in ("auto", kernel.name) and all(fact(call) is None for fact in kernel.needs):
            return kernel
    reasons = "; ".join(f"{name}: {reason or 'would run'}" for name, reason in explain(kernels, call))
    raise Unsupported(backend, f"kernel={wanted}", reasons, "kernel=auto")


def explain(kernels: Sequence[Kernel[Call]], call: Call) -> list[tuple[str, str | None]]:
    """Every kernel, fastest first, with all reasons why it cannot run this call, or None."""
    return [(kernel.name, kernel.refuse(call)) for kernel in _in_order(kernels, call)]


def _in_order(kernels: Sequence[Kernel[Call]], call: Call) -> Sequence[Kernel[Call]]:
    """Fastest first for this call."""
    leading = [kernel for kernel in kernels if kernel.leads is not None and kernel.leads(call) is None]
    return [*leading, *(kernel for kernel in kernels if kernel not in leading)] if leading else kernels


TRITON_DEVICES = ("cuda",)
"""Where our Triton kernels may run; tests add "cpu", where Triton's interpreter runs them."""


@cache
def _is_installed(package: str) -> bool:
    """Asked once: it looks through all folders that packages come from."""
    return importlib.util.find_spec(package) is not None


def triton_reason(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run there, or None."""
    if device.type not in TRITON_DEVICES:
        return f"it runs on CUDA, not on {device.type}"
    return None if _is_installed("triton") else "triton is not installed"
