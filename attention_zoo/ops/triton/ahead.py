"""Compile our Triton kernels for cards that are not here, and note what they need: the rows of `compiled.csv`.

    python -m attention_zoo.ops.triton.ahead                     the whole matrix: an hour of one processor
    python -m attention_zoo.ops.triton.ahead --arch 90 --block 64 --width 64 --out /tmp/rows.csv

The launching code itself runs, on CPU tensors, with a driver of Triton that knows an architecture and nothing else, and
with launches replaced by "compile and note": so constants, hints and warps are those of real launches. What does not
fit its architecture's cards with two stages, or spills, is compiled with one stage, too. Rows that the file has are
left out, so that a run that was stopped goes on; those of other device code (`digest`) or another release of Triton are
made again, and stand until then. `card.py` says what a row holds.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from attention_zoo.ops.relative import triton as relative
from attention_zoo.ops.relative.operands import RelativeOperands
from attention_zoo.ops.softmax import triton as blocks
from attention_zoo.ops.triton.card import SPILLED, Compiled, digest, read

CARDS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared bytes that a program may ask for on the cards of each architecture (CUDA programming guide, table 30)."""
ORDER = (90, 80, 100, 120, 89, 86)
FAMILIES = {blocks.kernels.__name__: "block", relative.kernels.__name__: "relative"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = Path(__file__).with_name("compiled.csv")


class Elsewhere:
    """What Triton asks of a driver before it compiles."""

    arch = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Notes:
    """The rows of a file, to which each launch adds its own."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]):
        self.path, self.wanted = path, wanted
        self.elsewhere, self.size = Elsewhere(), (0, 0, 0, 0, 0)
        self.rows: dict[tuple[Any, ...], Compiled] = {}
        if path.exists():
            with path.open() as lines:
                self.rows = {row.what: row for row in read(lines)}

    def launched(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: Any = None, **constants: Any) -> None:
        """In the place of a launch."""
        name = f"{FAMILIES[kernel.__module__]}_{kernel.__name__}"
        if not (constants.get("FOR_K", True) and constants.get("FOR_V", True)):
            name = name.replace("_kv", "_k" if constants["FOR_K"] else "_v")
        if not self.wanted(name):
            return
        for stages in (2, 1):
            row = self._row(name, kernel, args, constants | {"num_stages": stages})
            if row.shared <= CARDS[row.arch] and row.stack < SPILLED:
                return

    def _row(self, name: str, kernel: JITFunction[Any], args: Any, constants: dict[str, Any]) -> Compiled:
        block, width, itemsize, causal, gathered = self.size
        what = (
            self.elsewhere.arch, name, constants.get("N", block), width, itemsize, causal, gathered,
            constants["num_warps"], constants["num_stages"],
        )  # fmt: skip
        made = triton.__version__, digest(kernel)
        known = self.rows.get(what)
        if known is not None and known[-2:] == made:
            return known
        before = sum(os.times()[:4])
        compiled: Any = _LAUNCH(kernel, *args, grid=None, warmup=True, **constants)
        needs = compiled.metadata.shared, *_used(compiled.asm["cubin"])
        row = Compiled(*what, *needs, round(sum(os.times()[:4]) - before, 1), *made)
        # with other numbers of warps or stages it was the same other kernel
        self.rows = {key: old for key, old in self.rows.items() if old.launch != row.launch or old[-2:] == made}
        self.rows[what] = row
        self._write()
        print(*row, flush=True)
        return row

    def _write(self) -> None:
        """All rows, in their order, at once: who stops a run finds a whole table."""
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Compiled._fields, *sorted(self.rows.values())])
        unfinished.replace(self.path)

    def run(self, arch: int, block: int, width: int, dtype: torch.dtype, causal: bool, gathered: bool | None) -> None:
        """Forward and backward of one size; gathered None: of relative attention."""
        self.elsewhere.arch = arch
        self.size = (block, width, dtype.itemsize, int(causal), int(bool(gathered)))
        if gathered is None:
            _relative(width, dtype)
        else:
            _blocks(block, width, dtype, causal, gathered)


_LAUNCH = JITFunction.run


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = [(int(registers), int(stack)) for registers, stack in re.findall(r"REG:(\d+).*?STACK:(\d+)", told)]
    return max(found)


# --- calls as mechanisms make them -----------------------------------------------------------------------------------


def _heads(batch: int, heads: int, length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(batch, length, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()


def _blocks(C: int, D: int, dtype: torch.dtype, causal: bool, gathered: bool) -> None:
    """As BigBird's, or, gathered, as sorted chunks of LSH attention."""
    B, H, N = (2, 1, 4) if gathered else (1, 2, 4)
    slot = torch.arange(N * C, dtype=torch.int32).expand(B, -1)
    links = torch.arange(N, dtype=torch.int32).view(1, 1, N, 1).expand(B, H, N, 2)
    count = torch.full((B, H, N), 2, dtype=torch.int32)
    same = torch.zeros_like(slot)
    more = {"q_rows": slot, "k_rows": slot} if gathered else {"whole": count}
    lists = blocks.Lists(links, count, slot, same, slot, same, C, causal, strict=gathered, **more)  # type: ignore[arg-type]
    q, k, v = (_heads(B, H, N * C, D, dtype) for _ in range(3))
    if not gathered:
        blocks.block_attention(q, k, v, lists, scale=0.1).sum().backward()
        return
    out, grads = torch.zeros(B, H, N * C, D), torch.zeros(3, B, H, N * C, D)
    with torch.no_grad():
        lse = blocks.forward(q, k, v, lists, scale=0.1, out=out)
        delta = torch.zeros_like(lse)
        blocks.backward(q, q, k, v, delta, lse, lists, scale=0.1, dq=grads[0], dk=grads[1], dv=grads[2])


def _relative(D: int, dtype: torch.dtype) -> None:
    L = S = 256
    q, k, v, k_own, v_own = (_heads(1, 2, length, D, dtype) for length in (L, S, S, S, S))
    r, u, w = (torch.zeros(*shape, 2, D, dtype=dtype, requires_grad=True) for shape in ((S,), (), ()))
    first = torch.zeros(1, L, dtype=torch.int32)
    starts = relative.Starts(first, first, S)
    given = RelativeOperands(q, k, v, k_own, v_own, r, u, w)
    relative.relative_attention(given, starts, scale=0.1).sum().backward()


def sizes(arguments: argparse.Namespace) -> Iterator[tuple[int, int, int, torch.dtype, bool, bool | None]]:
    """What `Notes.run` is to be called with, the most used first."""
    dtype = getattr(torch, arguments.dtype)
    for causal, width, arch in product(map(bool, arguments.causal), arguments.width, arguments.arch):
        for gathered, block in product((False, True), arguments.block):
            yield arch, block, width, dtype, causal, gathered
        if causal and width <= relative.WIDEST_HEAD:
            yield arch, 0, width, dtype, True, None


def main(words: Sequence[str] | None = None) -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as ever; unset, Triton warns that this will change
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 compiles nothing")
    parser = argparse.ArgumentParser(
        prog="python -m attention_zoo.ops.triton.ahead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ORDER, choices=sorted(CARDS), metavar="N")
    parser.add_argument("--block", type=int, nargs="+", default=(64, 128), metavar="N")
    parser.add_argument("--width", type=int, nargs="+", default=(64, 128, 32, 256), metavar="N")
    parser.add_argument("--causal", type=int, nargs="+", default=(1, 0), choices=(0, 1), metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose names begin so")
    parser.add_argument("--out", type=Path, default=TABLE, metavar="FILE")
    given = parser.parse_args(words)
    notes = Notes(given.out, lambda name: name.startswith(given.only))
    driver.set_active(notes.elsewhere)
    JITFunction.run = lambda kernel, *args, **more: notes.launched(kernel, *args, **more)
    with tempfile.TemporaryDirectory() as cache:  # what was compiled before would cost no time
        os.environ["TRITON_CACHE_DIR"] = cache
        for size in sizes(given):
            notes.run(*size)


if __name__ == "__main__":
    main()
