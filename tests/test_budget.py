"""The longest trainable length: the fit, the runs on both sides of it, and what cannot be tried."""

from __future__ import annotations

import pytest

from attention_zoo.measure.budget import Fit, fit, longest_trainable, parse_bytes
from attention_zoo.measure.cell import SpeedCell, blank_row

CELL = SpeedCell("longformer", 64, heads=2, head_width=8, threads=1, variant="core")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 2**33), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("1000", 1000), (".5kib", 512), ("2 gib", 2**31)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8 apples", "", "GiB", "-1GiB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="budget must be a size such as 8GiB"):
        parse_bytes(text)


def test_the_law_is_a_line_or_a_parabola():
    line = fit({1000: 5e6 + 1000 * 300, 2000: 5e6 + 2000 * 300, 4000: 5e6 + 4000 * 300})
    assert line == Fit(pytest.approx(5e6), pytest.approx(300), 1)
    assert line.longest(5e6 + 300 * 70_000) == pytest.approx(70_000, abs=1)
    square = fit({1000: 8e6, 2000: 32e6, 4000: 128e6})
    assert (square.power, square.longest(8 * 20_000**2)) == (2, pytest.approx(20_000, abs=1))
    assert line.longest(100) == 0
    assert fit({1000: 1e6}) is None
    assert fit({1000: 1e6, 2000: 1e6}) is None


def row(length: int, status: str = "ok", peak: int | None = None, seconds: float = 1e-3, **more):
    cell = SpeedCell(**{**vars(CELL), "length": length})
    return {**blank_row(cell, status, None if status == "ok" else "why"), "peak_bytes": peak, "held_bytes": 0,
            "seconds": seconds, **more}  # fmt: skip


def machine(limit: int, tried: list[int]):
    """Lengths up to `limit` fit."""

    def attempt(cell):
        tried.append(cell.length)
        return row(cell.length, "ok" if cell.length <= limit else "oom")

    return attempt


MEASURED = [row(1024, peak=1024 * 1000), row(2048, peak=2048 * 1000)]


@pytest.mark.parametrize("limit", [1000, 9000, 9700, 10_000, 10_500, 12_000, 30_000])
def test_the_answer_is_between_a_run_that_fits_and_one_that_does_not(limit):
    tried: list[int] = []
    found = longest_trainable(CELL, MEASURED, 10_000_000, machine(limit, tried))
    assert tried[0] == pytest.approx(9_700, abs=64)  # just below what the fit says
    assert found["verified"]
    assert found["fits"]["length"] <= limit < found["fails"]["length"]
    assert found["fails"]["length"] <= 1.1 * found["fits"]["length"] + 64
    assert found["length"] == found["fits"]["length"]
    assert (found["kind"], found["status"], found["bytes_per_token"]) == ("budget", "ok", pytest.approx(1000))
    assert len(tried) <= 10
    if limit == 10_000:
        assert len(tried) == 2


def test_a_fit_that_is_right_takes_two_runs_and_inputs_count():
    tried: list[int] = []
    held = [{**each, "held_bytes": each["length"] * 1000} for each in MEASURED]
    found = longest_trainable(CELL, held, 10_000_000, machine(5000, tried))
    assert len(tried) == 2
    assert found["points"] == [[1024, 2048e3], [2048, 4096e3]]


def test_what_would_take_too_long_is_predicted_and_said_not_to_be_tried():
    slow = [row(1024, peak=1024 * 1000, seconds=1.0), row(2048, peak=2048 * 1000, seconds=4.0)]
    tried: list[int] = []
    found = longest_trainable(CELL, slow, 100_000_000, machine(1, tried), timeout_s=60)
    assert tried == []
    assert (found["length"], found["verified"]) == (100_000, False)
    # 4 s at 2,048 tokens, in proportion to length, as longformer declares, and twice: to warm up and to time
    assert found["not_verified"] == "not tried: a run would take about 391 s, over timeout_s=60"


def test_where_nothing_can_be_fitted_or_tried_the_row_says_why():
    def broken(cell):
        return row(cell.length, "failed")

    found = longest_trainable(CELL, MEASURED, 10_000_000, broken)
    assert (found["verified"], found["length"]) == (False, 10_000)
    assert "failed: why" in found["not_verified"]
    refused = longest_trainable(CELL, [row(1024, "unsupported")], 10_000_000, broken)
    assert (refused["status"], refused["error"]) == ("failed", "nothing to fit: why")
    small = longest_trainable(CELL, MEASURED, 1000, broken)
    assert small["error"] == "the budget ends at 1 tokens"
    never = longest_trainable(CELL, MEASURED, 10_000_000, machine(10**9, []))
    assert not never["verified"]
    assert "no length that fits and none that does not" in never["not_verified"]
