"""How often the host reads a tensor's values, and how many operators run: `python -m tests.count_reads [backend ...]`.

A read is whatever would make the host wait for a GPU: `.item()`, `bool(x)`, `int(x)`, `.tolist()`, `.numpy()`,
`.cpu()`, and operators whose result's shape depends on values (nonzero, a mask as an index, unique, repeat_interleave
by a tensor). On a CPU the first kind is patched, since `.tolist()` dispatches nothing; the second is seen by dispatch.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as zoo

BY_VALUE = {
    "nonzero.default", "masked_select.default", "_unique2.default", "unique_consecutive.default", "equal.default",
    "repeat_interleave.Tensor", "repeat_interleave.self_Tensor", "bincount.default", "_local_scalar_dense.default",
    "is_nonzero.default",
}  # fmt: skip
PATCHED = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "cpu",
    "__array__",
    "__contains__",
)
Given = tuple[Tensor | None, ...] | None


class Count(TorchDispatchMode):
    """Within it, `reads` counts by the project's line that asked, `operators` what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: collections.Counter[str] = collections.Counter()
        self.operators = 0
        self._restored = contextlib.ExitStack()
        self._inside = False

    def _note(self, what: str) -> None:
        if self._inside:
            return
        frames = [frame for frame in traceback.extract_stack() if "attention_zoo/" in frame.filename]
        if frames and frames[-1].name == "drawn_number":
            return  # of the host's own generator: no device has it
        where = f"{frames[-1].filename.split('attention_zoo/')[-1]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.reads[f"{where} {what}"] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = str(function).removeprefix("aten.")
        by_mask = name.startswith(("index.", "index_put")) and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in BY_VALUE or by_mask:
            self._note(f"{name} by a mask" if by_mask else name)
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Count:
        for name in PATCHED:
            old = getattr(Tensor, name)
            setattr(Tensor, name, self._patched(name, old))
            self._restored.callback(setattr, Tensor, name, old)
        super().__enter__()
        return self

    def _patched(self, name: str, old: Callable[..., Any]) -> Callable[..., Any]:
        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(name)
            before, self._inside = self._inside, True  # what it runs below is the same read
            try:
                return old(x, *args, **kwargs)
            finally:
                self._inside = before

        return read

    def __exit__(self, *error: Any) -> Any:
        self._restored.close()
        return super().__exit__(*error)

    @property
    def total(self) -> int:
        """All reads."""
        return sum(self.reads.values())


def layouts(batch: int, length: int) -> Iterator[tuple[str, Given]]:
    """The ways in which tokens can stand, as `Tokens.of` takes them; None: nothing is said."""
    valid, column = torch.ones(batch, length, dtype=torch.bool), torch.arange(length)
    lengths = torch.linspace(length, length // 2, batch).long()[:, None]
    document = ((column >= length // 3).long() + (column >= length * 4 // 5).long()).expand(batch, length)
    first = torch.zeros_like(valid)
    first[:, 0] = True
    holes = valid.clone()
    holes[0, 1::3] = False
    yield "plain", None
    yield "right padding", (column < lengths, None, None)
    yield "left padding", (column >= length - lengths, None, None)
    yield "holes", (holes, None, None)
    yield "packed", (valid, None, document)
    yield "global", (valid, first, None)
    yield "packed, left padding, global", (column >= length - lengths, first, document)


def model(backend: str, depth: int, **options: Any) -> zoo.Transformer:
    """A small one, without positions unless they are the mechanism's own."""
    positions = "relative" if backend == "transformer_xl" else "none"
    return zoo.Transformer(
        **{"attention": backend, "vocab": 256, "dim": 64, "depth": depth, "heads": 4, "positions": positions, **options}
    )


def calls(
    backend: str, depth: int = 12, batch: int = 2, length: int = 773, **options: Any
) -> Iterator[tuple[str, Count]]:
    """Forward and backward in every layout that the mechanism takes, `Tokens.of` and the checks of ids included."""
    for what, given in layouts(batch, length):
        net, ids = model(backend, depth, **options), torch.randint(0, 256, (batch, length))

        def run(net: Any = net, ids: Tensor = ids, given: Given = given) -> None:
            net(ids, None if given is None else zoo.Tokens.of(*given)).logits.sum().backward()  # type: ignore[arg-type]

        try:
            run()  # plans may be made once for a length
            with Count() as count:
                run()
        except zoo.Unsupported:
            continue
        yield what, count


def step(backend: str, depth: int = 4, batch: int = 1, prompt: int = 773, **options: Any) -> Count:
    """A decoding step after a prompt, without tokens given."""
    net, ids = model(backend, depth, **options).eval(), torch.randint(0, 256, (batch, prompt))
    with torch.no_grad():
        state = net(ids, state=net.initial_state(batch)).state
        for _ in range(3):
            state = net(ids[:, :1], state=state).state
        with Count() as count:
            net(ids[:, :1], state=state)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.count_reads", description=__doc__.partition(":")[0])
    parser.add_argument("backends", nargs="*", default=zoo.available())
    warnings.filterwarnings("ignore")
    for backend in parser.parse_args().backends:
        for what, count in calls(backend):
            print(f"{backend:15} {what:30} reads {count.total:3}  operators {count.operators:6}  {dict(count.reads)}")
        count = step(backend)
        print(f"{backend:15} {'decoding step':30} reads {count.total:3}  operators a layer {count.operators / 4:.0f}")


if __name__ == "__main__":
    main()
