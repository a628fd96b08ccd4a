"""Several processes with bfloat16 and with compiled blocks: as near to one process as that is to itself.

By autocast products of matrices are rounded to 8 bits. What another order of sums makes of that is told from a fault by
what the rounding itself does to one process: losses of either are no further from each other than two of one process's
could be, each as far from float32's as its own are.
"""

from __future__ import annotations

from typing import Any

import pytest
from parallel_processes import outcomes

STEPS = 20
ROWS = ["task=copy", "seq_len=11", "batch=8"]
"""The task itself is given from Python."""
MECHANISMS = {
    "full": ["attention=full", "trainer.accumulate=2"],
    "longformer": ["attention=longformer", "attention.window=3"],
    "transformer_xl": ["attention=transformer_xl", "attention.segment_length=5", "attention.memory_length=7"],
    "adaptive_span": ["attention=adaptive_span", "attention.limit=9", "attention.ramp=3"],
    "bigbird": ["attention=bigbird", "attention.block=3", "parallel.checkpoint=true"],
}
MARKED = ("full", "longformer", "bigbird")
"""Mechanisms that take global tokens."""
SEVERAL = ("ddp", "fsdp")


def asked(name: str, data: str, processes: int, *words: str, kind: str, count: int = STEPS) -> dict[str, Any]:
    words = (*ROWS, *MECHANISMS[name], f"parallel.data={data}", *words)
    given = {"processes": processes, "dtype": "float32", "count": count, "ragged": {"marked": name in MARKED}}
    return {"name": f"{name}-{kind}-{data}-{processes}", "words": words, **given}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = []
    for name in MECHANISMS:
        cases += [asked(name, data, 2, "trainer.precision=bfloat16", kind="bfloat16") for data in SEVERAL]
        cases += [asked(name, "ddp", 1, f"trainer.precision={kind}", kind=kind) for kind in ("bfloat16", "float32")]
    return outcomes(cases, tmp_path_factory.mktemp("rounded"))


@pytest.mark.parametrize("data", SEVERAL)
@pytest.mark.parametrize("name", MECHANISMS)
def test_bfloat16_of_two_processes_is_that_of_one(name: str, data: str, rounded: dict[str, Any]) -> None:
    first, second = rounded[f"{name}-bfloat16-{data}-2"]
    (one,), (exact,) = (rounded[f"{name}-{kind}-ddp-1"] for kind in ("bfloat16", "float32"))
    assert first == second
    own = max(abs(a - b) for a, b in zip(one["loss"], exact["loss"]))
    assert 0 < own < 0.02, "it is rounded"
    assert max(abs(a - b) for a, b in zip(first["loss"], one["loss"])) <= 2 * own
    assert first["tokens"] == one["tokens"]
    # in the first step weights are the same: no error has grown yet
    assert first["loss"][0] == pytest.approx(one["loss"][0], rel=2e-4)
    assert first["norm"][0] == pytest.approx(one["norm"][0], rel=1e-2)


COMPILED = ("full", "longformer", "transformer_xl")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, monkeymodule: None) -> dict[str, Any]:
    cases = []
    for name in COMPILED:
        words = ("parallel.compile=true", "trainer.carry_state=false")
        cases += [asked(name, data, 2, *words, kind="compiled", count=5) for data in SEVERAL]
        cases += [asked(name, "ddp", 1, *words, kind="compiled", count=5)]
        cases += [asked(name, "ddp", 1, "trainer.carry_state=false", kind="plain", count=5)]
    return outcomes(cases, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def monkeymodule() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes beside each
        yield


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("data", SEVERAL)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_of_two_processes_are_those_of_one(name: str, data: str, compiled: dict[str, Any]) -> None:
    first, second = compiled[f"{name}-compiled-{data}-2"]
    (one,), (plain,) = (compiled[f"{name}-{kind}-ddp-1"] for kind in ("compiled", "plain"))
    assert first == second
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert first["norm"] == pytest.approx(one["norm"], rel=3e-4)
    assert one["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
