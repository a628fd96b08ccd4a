"""What a call asks of the device does not grow with depth, and a decoding step runs few operators."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from count_reads import Count, calls, step
from recorded import RECORDED

import attention_zoo as zoo

OPERATORS = {"full": 90, "longformer": 90, "bigbird": 110, "transformer_xl": 130, "reformer": 180}
"""Of a decoding step, a layer, at most: all that runs over four layers."""


@pytest.mark.parametrize("name", RECORDED)
def test_reads_of_the_device_do_not_grow_with_depth(name: str) -> None:
    """`Tokens.of`, the check of ids and the description of the tokens: one read each."""
    shallow = dict(calls(name, depth=1, length=200))
    deep = dict(calls(name, depth=4, length=200))
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

    x = torch.arange(4)
    with Count() as count:
        x.sum().item()
        bool((x > 1).any())
        x[x > 1]
        torch.nonzero(x)
        x.tolist()
    assert count.total == 5


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_few_files_lie_between_a_models_call_and_its_first_projection(name: str) -> None:
    """Embedding and default positions included: model, layout, positions, embedding, block, mechanism."""
    model = zoo.Transformer(vocab=50, dim=16, heads=2, depth=1, attention=name)
    ids = torch.randint(0, 50, (2, 40))
    model(ids)
    first = next(module for path, module in model.named_modules() if path.endswith(("to_q", "to_qk")))
    package, files = str(Path(zoo.__file__).parent), set()

    def visited(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_filename.startswith(package):
            files.add(frame.f_code.co_filename.removeprefix(package))

    before = sys.getprofile()
    hook = first.register_forward_pre_hook(lambda *_: sys.setprofile(before))
    sys.setprofile(visited)
    model(ids)
    hook.remove()
    assert len(files) <= 6, sorted(files)
