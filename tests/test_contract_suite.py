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
        for name in zoo.available()
        for check in contract_checks(name, reference=reference_of(name))
    ]


@pytest.mark.parametrize("check", every_check())
def test_contract(check: ContractCheck) -> None:
    check()


def test_the_five_mechanisms_are_there() -> None:
    assert {"bigbird", "full", "longformer", "reformer", "transformer_xl"} <= set(zoo.available())


def test_a_mechanism_without_a_slow_truth_fails() -> None:
    """Having neither a definition nor a reference loop is a failure, not a skipped check."""
    (check,) = (check for check in contract_checks("transformer_xl") if check.name == "fast_equals_slow")
    with pytest.raises(AssertionError, match="nothing slow to compare with"):
        check()
