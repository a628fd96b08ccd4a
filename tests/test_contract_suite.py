"""The contract suite over every registered backend: a new one is under it with no edit here."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from recorded import RECORDED
from references import reference_of
from torch import Tensor

import attention_zoo as zoo
from attention_zoo.attention.longformer import Longformer
from attention_zoo.layout.reach import Band
from attention_zoo.testing import ContractCheck, contract_checks

BUDGET_S = 40.0
"""Seconds of the processor that the checks of one mechanism may take, the slow ones aside."""
SPENT: Counter[str] = Counter()


def marks_of(check: ContractCheck) -> list[Any]:
    """The slow checks of mechanisms whose figures are not recorded yet would take CI past its twenty minutes."""
    if not check.slow:
        return []
    return (
        [pytest.mark.slow] if check.case.name in (*RECORDED, "global_tokens") else [pytest.mark.slow, pytest.mark.long]
    )


def every_check() -> list[Any]:
    return [
        pytest.param(check, id=str(check), marks=marks_of(check))
        for name in (*zoo.available(), *zoo.wrappers())
        for check in contract_checks(name, reference=reference_of(name))
    ]


@pytest.mark.parametrize("check", every_check())
def test_contract(check: ContractCheck) -> None:
    start = time.process_time()
    check()
    if not check.slow:
        SPENT[check.case.name] += time.process_time() - start


@pytest.mark.parametrize("name", zoo.available())
def test_the_suite_stays_within_its_budget(name: str) -> None:
    """Of what this process ran of it: with several processes each sees a part."""
    assert SPENT[name] <= BUDGET_S, f"the checks of {name} took {SPENT[name]:.0f} s of the processor: mark some slow"


OTHER_OPTIONS = [
    ("full", {"kernel": "tiles"}),
    ("longformer", {"dilation": [1, 3], "global_projections": "shared"}),
    ("longformer", {"kernel": "tiles"}),
    ("bigbird", {"block": 3, "random": 1, "window_blocks": 5}),
    ("transformer_xl", {"same_length": True}),
    ("transformer_xl", {"segment_length": 5, "memory_length": 9, "kernel": "gather"}),
    ("transformer_xl", {"memory_length": 0}),
    ("reformer", {"correct_duplicates": True, "attend_across_buckets": False}),
    ("reformer", {"look_ahead": 1, "look_back": 2, "rounds": 3, "wrap": "reference", "buckets": 4}),
]
"""Options that change what is computed, not only how large it is."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OTHER_OPTIONS, ids=lambda value: str(value).replace("'", ""))
def test_contract_under_other_options(name: str, options: dict[str, Any]) -> None:
    """All but what costs: the same contract where a mechanism computes something else."""
    for check in contract_checks(name, reference=reference_of(name), **options):
        if not check.slow and check.name != "activations_grow_as_declared":
            check()


def test_the_recorded_mechanisms_are_there() -> None:
    assert RECORDED == ["bigbird", "full", "longformer", "reformer", "transformer_xl"]
    assert set(RECORDED) <= set(zoo.available())


def test_a_mechanism_without_a_slow_truth_fails() -> None:
    """Having neither a definition nor a reference loop is a failure, not a skipped check."""
    (check,) = (check for check in contract_checks("transformer_xl") if check.name == "fast_equals_slow")
    with pytest.raises(AssertionError, match=r"nothing slow to compare with: .*reference\(layer, x, tokens\)"):
        check()


def first_failure(cls: type[Any], **given: Any) -> AssertionError:
    """What the author of a mechanism reads first."""
    for check in contract_checks(cls, **given):
        if not check.slow:
            try:
                check()
            except AssertionError as error:
                return error
    raise AssertionError(f"{cls.__name__} passes")


def test_the_cause_is_named_first() -> None:
    """A pattern that says to reach less far than it sees: not that outputs differ, but that `reach` is wrong."""

    class Short(Longformer):
        def __init__(self, *, window: int = 3, **options: Any):
            super().__init__(window=window, **options)
            self.reach = Band(window - 1, weights="uniform")

    assert "hides keys: one 3 positions back is seen, farther than 2" in str(first_failure(Short))


def test_a_reference_stands_in_the_class() -> None:
    class Wrong(Longformer):
        @staticmethod
        def reference(layer: Any, x: Tensor, tokens: zoo.Tokens) -> Tensor:
            return layer(x, tokens).hidden + 1

    assert "against its reference loop: differs by" in str(first_failure(Wrong))
    assert "nothing slow" not in str(first_failure(Wrong, reference=lambda layer, x, tokens: x))
