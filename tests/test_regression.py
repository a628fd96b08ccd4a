"""FLOPs to the last one, and peak bytes within 3 %, as they were recorded: what grows must be meant to."""

from __future__ import annotations

import pytest
from recorded import FIGURES, NEWER, RECORDED

from attention_zoo.measure import regression

GRID = regression.grid([*RECORDED, *NEWER])


@pytest.mark.parametrize("name", FIGURES["cells"])
def test_nothing_grew_or_shrank_unnoticed(name):
    said = regression.complaint(name, regression.observe(GRID[name]), FIGURES)
    assert said is None, said


def test_what_is_recorded_is_recorded_whole():
    assert FIGURES["cells"].keys() == GRID.keys()
    assert regression.grid().keys() >= GRID.keys(), "nothing is recorded that is no more"


def test_bytes_are_compared_under_the_torch_they_were_recorded_with():
    if FIGURES["torch"] != regression.torch_release():
        pytest.skip(f"recorded with torch {FIGURES['torch']}, this is {regression.torch_release()}: FLOPs alone")


def test_what_moved_is_said_in_one_line(monkeypatch):
    recorded = {"torch": regression.torch_release(), "cells": {"a": {"flops": 100, "peak_bytes": 1000}}}
    assert regression.complaint("a", {"flops": 100, "peak_bytes": 1029}, recorded) is None
    assert regression.complaint("a", {"flops": 100, "peak_bytes": 971}, recorded) is None
    assert regression.complaint("a", {"flops": 100, "peak_bytes": 1031}, recorded).startswith(
        "a: +3.1% peak bytes (1031)"
    )
    assert regression.complaint("a", {"flops": 100, "peak_bytes": 969}, recorded).startswith("a: -3.1% peak bytes")
    assert regression.complaint("a", {"flops": 101, "peak_bytes": 1000}, recorded).startswith(
        "a: 101 FLOPs, recorded 100"
    )
    assert regression.complaint("b", {"flops": 1, "peak_bytes": 1}, recorded).startswith("b is not recorded")
    other = {**recorded, "torch": "1.0.0"}
    assert regression.complaint("a", {"flops": 100, "peak_bytes": 2000}, other) is None
    assert "FLOPs" in regression.complaint("a", {"flops": 99, "peak_bytes": 1000}, other)
