"""The contract suite over every registered backend: a new one is under it with no edit here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import attention_zoo as zoo
from attention_zoo.testing import ContractCheck, Reference, contract_checks

REFERENCES = Path(__file__).parent / "references"


def reference_of(name: str) -> Reference | None:
    """The token-by-token loop in tests/references/, for mechanisms that are no pattern."""
    path = REFERENCES / f"{name}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference


def every_check() -> Iterator[object]:
    for name in zoo.available():
        for check in contract_checks(name, reference=reference_of(name)):
            yield pytest.param(check, id=str(check), marks=[pytest.mark.slow] if check.slow else [])


@pytest.mark.parametrize("check", list(every_check()))
def test_contract(check: ContractCheck) -> None:
    check()


def test_the_five_mechanisms_are_there() -> None:
    assert {"bigbird", "full", "longformer", "reformer", "transformer_xl"} <= set(zoo.available())
