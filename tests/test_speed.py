"""No setting at which cost falls apart: operators and bytes of a call beside small changes of it, where seconds mean
nothing. Seconds: `python -m tests.speed`.
"""

from __future__ import annotations

import pytest
from speed.predict import counted
from speed.setting import PHASES, Phase, Setting, build, neighbours, work

import attention_zoo as zoo


@pytest.mark.parametrize("name", zoo.available())
@pytest.mark.parametrize(("batch", "length"), [(8, 17), (3, 65)])
def test_a_small_change_costs_little(name: str, batch: int, length: int) -> None:
    """One token more or less, one padded token, a row more, two documents: at most three times the operators and bytes.

    A call of few operators may add a few, such as those that lay tokens out and back.
    """
    setting = Setting(name, batch=batch, length=length, heads=2, width=16)
    base, problems = counted(setting), []
    for what, other in neighbours(setting):
        found = counted(other)
        share = other.tokens / setting.tokens
        if found.operators > 3 * base.operators + 60:
            problems.append(f"{what}: {found.operators:,} operators beside {base.operators:,}")
        if found.bytes > 3 * share * base.bytes:
            problems.append(f"{what}: {found.bytes:,} bytes beside {base.bytes:,}")
    assert not problems


@pytest.mark.parametrize("name", zoo.available())
@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_drawn_and_runs(name: str, phase: Phase) -> None:
    """Whatever is refused is drawn again, so that a phase that always fails would never be timed."""
    setting = Setting(name, phase=phase, batch=2, length=9, heads=2, width=16, documents=2)
    call = work(setting, build(setting))
    call()
    call()
    assert counted(setting).operators > 0
