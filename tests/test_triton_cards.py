"""Which launches fit which card: the committed table against what refuses by it, and against a compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attention_zoo.ops.triton import card
from attention_zoo.ops.triton.card import SPILLED, Card, Compiled

triton = pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("attention_zoo.ops.softmax.triton")  # they say where the device code is
pytest.importorskip("attention_zoo.ops.relative.triton")

H100, A100, CONSUMER = (
    Card(f"sm_{arch}", arch, shared) for arch, shared in ((90, 232_448), (80, 166_912), (89, 101_376))
)


def needs() -> dict[tuple[str, int, int, int, int], dict[int, int]]:
    """Shared bytes by kernel, architecture, size and type, for each number of stages."""
    found: dict[tuple[str, int, int, int, int], dict[int, int]] = defaultdict(dict)
    for row in card.table():
        mine = found[row.kernel, row.arch, row.block, row.width, row.itemsize]
        mine[row.stages] = max(row.shared, mine.get(row.stages, 0))
    return found


def test_a_card_with_as_much_as_the_table_says_is_taken_and_one_with_a_byte_less_refused() -> None:
    for (kernel, arch, block, width, itemsize), by_stages in needs().items():
        least = min(by_stages.values())
        if not least:
            continue  # it needs none
        for shared, refused in ((least, False), (least - 1, True)):
            reason = card.refuse([kernel], block, width, itemsize, Card("a card", arch, shared))
            assert (reason is not None) == refused, (kernel, arch, block, width, shared, reason)
            if reason:
                assert f"{kernel} needs {least:,} bytes of shared memory" in reason
                assert f"a card has {shared:,}" in reason


def test_stages_that_are_chosen_fit() -> None:
    for (kernel, arch, block, width, itemsize), by_stages in needs().items():
        for shared in sorted({*by_stages.values(), 101_376, 166_912, 232_448}):
            stages = card.stages_for(kernel, block, width, itemsize, Card("a card", arch, shared))
            assert stages is None or by_stages[stages] <= shared


@pytest.mark.parametrize(
    ("where", "block", "width", "fits"),
    [
        (H100, 16, 16, True), (H100, 32, 128, True), (H100, 16, 256, True), (H100, 48, 96, True),
        (H100, 64, 64, True), (H100, 128, 128, True), (H100, 128, 256, False), (A100, 128, 128, True),
        (A100, 128, 256, False), (CONSUMER, 64, 64, True), (CONSUMER, 128, 128, False),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_of_blocks_refuse_by_the_card(monkeypatch, where: Card, block: int, width: int, fits: bool) -> None:
    from attention_zoo.ops.softmax import triton as blocks

    monkeypatch.setattr(blocks, "card_of", lambda device: where)
    reason = blocks.refuse(block, width, torch.bfloat16, torch.device("cuda"))
    assert (reason is None) == fits, reason


def test_relative_attention_refuses_by_the_card(monkeypatch) -> None:
    from attention_zoo.ops.relative import triton as relative

    for where, width, fits in ((H100, 64, True), (H100, 128, True), (Card("small", 90, 50_000), 64, False)):
        monkeypatch.setattr(relative, "card_of", lambda device, where=where: where)
        reason = relative.refuse(width, torch.bfloat16, torch.device("cuda"))
        assert (reason is None) == fits, reason


def test_sizes_and_cards_that_were_not_compiled_are_judged_by_the_next() -> None:
    assert card.stages_for("block_forward", 16, 16, 2, H100) == card.stages_for("block_forward", 64, 32, 2, H100)
    assert card.refuse(["block_forward"], 64, 64, 2, Card("newer", 91, 232_448)) is None
    assert card.refuse(["block_forward"], 64, 64, 2, Card("older", 75, 65_536)) is None
    assert "too long to compile in float32" in str(card.refuse(["block_forward"], 128, 256, 4, H100))


def test_rows_of_other_device_code_decide_nothing(monkeypatch) -> None:
    newer = Card("newer", 91, 232_448)
    _known(monkeypatch, [row._replace(source="older") if row.arch > 80 else row for row in card.table()])
    # judged by what was compiled for sm_80, as where there are no rows of its own
    assert card.stages_for("block_forward", 64, 64, 2, newer) == card.stages_for("block_forward", 64, 64, 2, A100)
    assert card.refuse(["block_forward"], 64, 64, 2, newer) is None
    _known(monkeypatch, [row._replace(source="older") for row in card.table()])
    for name in ("block_forward", "block_backward_k", "relative_backward_q"):
        assert card.stages_for(name, 64, 64, 2, newer) is None
        assert "compiled.csv is stale" in str(card.refuse([name], 64, 64, 2, newer))
    monkeypatch.undo()
    _known(monkeypatch, card.table())


def _known(monkeypatch, rows: Sequence[Compiled]) -> None:
    """As if these were the table."""
    card._needs.cache_clear()
    card.stages_for.cache_clear()
    monkeypatch.setattr(card, "table", lambda: tuple(rows))


def test_every_row_is_of_the_device_code_at_hand() -> None:
    """Else `python -m attention_zoo.ops.triton.ahead` is to be run."""
    stale = {(row.arch, row.kernel) for row in card.table() if row.source != card._source(row.kernel)}
    assert not stale


def test_what_an_h100_takes_keeps_its_registers() -> None:
    """Less than 200 bytes of stack, at every size that fits."""
    rows: dict[tuple[str, int, int, int], list[Compiled]] = defaultdict(list)
    for row in card.table():
        if row.arch == 90 and row.itemsize == 2:
            rows[row.kernel, row.block, row.width, row.itemsize].append(row)
    assert rows
    for (kernel, block, width, itemsize), mine in rows.items():
        stages = card.stages_for(kernel, block, width, itemsize, H100)
        worst = max((row.stack for row in mine if row.stages == stages), default=0)
        if width <= 128:
            assert worst < SPILLED, f"{kernel} {block} x {width}: {worst} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("only", ["block", "relative"])
def test_the_default_size_compiles_as_the_table_says(tmp_path: Path, only: str) -> None:
    out = tmp_path / "rows.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "attention_zoo.ops.triton.ahead", "--arch", "90", "--block", "64", "--width", "64"]
    command += ["--causal", "1"]
    done = subprocess.run(
        [*command, "--only", only, "--out", str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with out.open() as lines:
        fresh = card.read(lines)
    assert fresh
    known = {row.what: row for row in card.table()}
    for row in fresh:
        assert row.shared <= H100.shared
        assert row.stack < SPILLED
        if row.triton == known[row.what].triton:
            assert (row.shared, row.registers, row.stack) == known[row.what][9:12]


PAIRS = """
import sys, torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from attention_zoo.ops.triton import ahead, pairs

where, launch, rows = ahead.Elsewhere(), JITFunction.run, []
driver.set_active(where)

def compiled(kernel, *args, grid, warmup=None, **constants):
    made = launch(kernel, *args, grid=None, warmup=True, **constants)
    print(where.arch, made.metadata.shared, *ahead._used(made.asm["cubin"]))

JITFunction.run = compiled
for where.arch in ahead.CARDS:
    for width, dtype in ((64, torch.bfloat16), (96, torch.float32), (256, torch.float16)):
        x, angle = torch.zeros(2, 4, 300, width, dtype=dtype), torch.zeros(1, 1, 300, width, dtype=dtype)
        pairs.turned(x, angle, angle, 1, torch.empty_like(x))
"""


@pytest.mark.slow
def test_the_kernel_of_rotary_positions_compiles_for_every_card_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PAIRS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert {arch for arch, *_ in rows} == {80, 86, 89, 90, 100, 120}
    assert len(rows) == 18
    assert {(shared, stack) for _, shared, _, stack in rows} == {(0, 0)}
