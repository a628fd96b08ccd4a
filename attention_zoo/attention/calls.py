"""What a call of a mechanism may not come with: graphs that go into a file, and vectors that its weights cannot take.

torch's own errors would name a matrix product somewhere inside, or an operator of a saved graph.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo.contract import Source, Unsupported, is_integers
from attention_zoo.ops.relative.projections import is_plain
from attention_zoo.place import place_of


def no_file(name: str, way: str) -> Unsupported:
    """Why a mechanism goes into no saved graph: what that could hold of it is the number of a layer of this process.

    Args:
        name: of the mechanism.
        way: in which the graph would be made.
    """
    return Unsupported(
        name, way, "which tiles a call has is decided at run time, which no saved graph can hold",
        "torch.compile, and attention_zoo.save for files",
    )  # fmt: skip


def refuse_trace(name: str) -> None:
    """Raise where `torch.jit.trace` traces."""
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise no_file(name, "torch.jit.trace")


def is_for_a_file() -> bool:
    """Whether what torch compiles now is to be saved as a program (AOTInductor, `aot_compile`), not run here.

    Its modules are looked at where they are loaded already: a process that does not compile shall not load them.
    """
    inductor: Any = sys.modules.get("torch._inductor.virtualized")
    functorch: Any = sys.modules.get("torch._functorch.config")
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    if inductor is not None and inductor.V.aot_compilation is True:
        return True
    # a cache of compiled code has the same switch; guards on the layers' numbers let it be used where they are the same
    return getattr(functorch, "bundled_autograd_cache", False) and not getattr(dynamo, "caching_precompile", False)


def check_call(layer: nn.Module, x: Any, source: Any) -> None:
    """Refuse what `Attention.enter` cannot: traced calls, and vectors of another dtype or device than the weights."""
    refuse_trace(layer.name)  # type: ignore[arg-type]
    place = place_of(layer)
    fits(layer, x, "x", place)
    if isinstance(source, Source):
        fits(layer, source.hidden, "source.hidden", place)


def fits(layer: nn.Module, x: Any, name: str, place: tuple[torch.device, torch.dtype] | None = None) -> None:
    """Raise a ValueError where every plain projection of a layer would refuse this tensor. Compiled code checks itself.

    Whatever else stands in a projection's place may convert what it gets: adapters, offloaded or quantised layers.

    Args:
        name: of the tensor, for the message.
        place: `place_of` the layer, where it is known.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_floating_point():
        return
    device, dtype = place or place_of(layer)
    if (x.device, x.dtype) == (device, dtype):
        return
    found = [part.weight for part in layer.modules() if isinstance(part, nn.Linear) and is_plain(part)]
    if not found:
        return
    if not any(weight.device == x.device for weight in found):
        raise ValueError(f"{name} must be where the layer's weights are, on {found[0].device}, got {x.device}")
    if not any(_multiply(x, weight) for weight in found):
        raise ValueError(f"{name} must be of the dtype of the layer's weights, {found[0].dtype}, got {x.dtype}")


def check_ids(embedding: nn.Module, ids: Tensor, types: Any = None) -> None:
    """Refuse ids that an embedding cannot look up, by their dtype or since they hold no numbers, and traced calls."""
    refuse_trace("this model")
    for name, given in (("ids", ids), ("types", types)):
        if not isinstance(given, Tensor):
            continue
        if given.dtype not in (torch.int64, torch.int32) and is_integers(given):
            raise ValueError(f"{name} must be int64 or int32, as an embedding takes them, got {given.dtype}")
        if given.device.type == "meta" and (here := place_of(embedding)[0]).type != "meta":
            raise ValueError(f"{name} must be where the model's weights are, on {here}, got meta")


def _multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies the two: autocast converts all but float64."""
    if torch.is_autocast_enabled(x.device.type):
        return (x.dtype == torch.float64) == (weight.dtype == torch.float64)
    return x.dtype == weight.dtype
