"""The list of everything that a mechanism must pass, and how to run it over your own.

    from attention_zoo.testing import contract_checks

    @pytest.mark.parametrize("check", contract_checks(MyAttention), ids=str)
    def test_contract(check):
        check()

pytest is not needed: a check raises AssertionError with a sentence. What the mechanism does not declare is not asked of
it, except that it refuses it aloud.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Imported for the checks that they define, in the order in which a newcomer wants to see them fail: what names a cause
# comes before what only differs because of it.
from attention_zoo.testing import refusals, describing, patterns, numerics, causality, padding  # noqa: F401  isort: skip
from attention_zoo.testing import states, decoding, cross, large_scores, persistence  # noqa: F401  isort: skip
from attention_zoo.testing import costs, measuring, compiling  # noqa: F401  isort: skip
from attention_zoo.contract import Attention
from attention_zoo.testing.case import Case, Reference
from attention_zoo.testing.check import CHECKS, Check


@dataclass(frozen=True)
class ContractCheck:
    """One check of one mechanism; call it to run it."""

    case: Case
    check: Check

    @property
    def name(self) -> str:
        return self.check.name

    @property
    def slow(self) -> bool:
        """Whether it takes more than about ten seconds."""
        return self.check.slow

    def __call__(self) -> None:
        self.check(self.case)

    def __str__(self) -> str:
        return f"{self.case.name}-{self.name}"


def contract_checks(
    backend: str | type[Attention], *, reference: Reference | None = None, **options: Any
) -> list[ContractCheck]:
    """Every check of what one mechanism declares.

    Args:
        backend: a name in `attention_zoo.available()`, or an Attention class.
        reference: the slow truth `(layer, x, tokens) -> hidden` of a mechanism that is no PatternAttention.
        options: tested under, on top of the class attribute `tiny`.
    """
    case = Case.of(backend, reference=reference, **options)
    return [ContractCheck(case, check) for check in CHECKS if check.applies(case)]
