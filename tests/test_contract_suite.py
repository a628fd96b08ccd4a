"""The contract suite over every registered backend: a new one is under it with no edit here."""

from __future__ import annotations

from typing import Any

import pytest
from references import reference_of

import attention_zoo as zoo
from attention_zoo.testing import ContractCheck, contract_checks


def every_check() -> list[Any]:
    return [
        pytest.param(check, id=str(check), marks=[pytest.mark.slow] if check.slow else [])
        for name in (*zoo.available(), *zoo.wrappers())
        for check in contract_checks(name, reference=reference_of(name))
    ]


@pytest.mark.parametrize("check", every_check())
def test_contract(check: ContractCheck) -> None:
    check()


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


def test_the_five_mechanisms_are_there() -> None:
    assert {"bigbird", "full", "longformer", "reformer", "transformer_xl"} <= set(zoo.available())


def test_a_mechanism_without_a_slow_truth_fails() -> None:
    """Having neither a definition nor a reference loop is a failure, not a skipped check."""
    (check,) = (check for check in contract_checks("transformer_xl") if check.name == "fast_equals_slow")
    with pytest.raises(AssertionError, match="nothing slow to compare with"):
        check()
