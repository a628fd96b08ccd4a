"""What a call asks of the device does not grow with depth, and a decoding step runs few operators."""

from __future__ import annotations

import pytest
from count_reads import calls, step
from recorded import RECORDED

OPERATORS = {"full": 90, "longformer": 90, "bigbird": 110, "transformer_xl": 130, "reformer": 180}
"""Of a decoding step, a layer, at most: all that runs over four layers."""


@pytest.mark.parametrize("name", RECORDED)
def test_reads_of_the_device_do_not_grow_with_depth(name: str) -> None:
    """`Tokens.of`, the check of ids and the description of the tokens: one read each."""
    shallow = dict(calls(name, depth=2, length=300))
    deep = dict(calls(name, depth=6, length=300))
    assert deep.keys() == shallow.keys()
    for layout, count in deep.items():
        assert count.total == shallow[layout].total, f"{layout}: {count.reads}"
        most = 2 if layout == "plain" else 5
        assert count.total <= most, f"{layout}: {count.reads}"


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "alibi"])
def test_positions_are_not_read_back(positions: str) -> None:
    for layout, count in calls("longformer", depth=2, length=150, positions=positions):
        assert count.total <= (2 if layout == "plain" else 5), f"{layout}: {count.reads}"


@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_asks_little_and_runs_few_operators(name: str, batch: int) -> None:
    count = step(name, batch=batch, prompt=150)
    assert count.total <= 1, f"{count.reads}"
    assert count.operators / 4 <= OPERATORS[name]


def test_what_is_read_is_counted() -> None:
    """The counter sees what it is there for."""
    import torch
    from count_reads import Count

    x = torch.arange(4)
    with Count() as count:
        x.sum().item()
        bool((x > 1).any())
        x[x > 1]
        torch.nonzero(x)
        x.tolist()
    assert count.total == 5
