"""What a check is: a plain function of a `Case` that raises AssertionError, and when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attention_zoo.testing.case import Case

CHECKS: list[Check] = []
"""Every check of the suite, in the order of definition."""


@dataclass(frozen=True)
class Check:
    """Fields:
    function: raises AssertionError with a sentence that names what was built and what differs.
    applies: whether the mechanism declares what is checked. What it does not declare must be refused, see refusals.py.
    slow: takes more than about ten seconds.
    """

    function: Callable[[Case], None]
    applies: Callable[[Case], bool]
    slow: bool

    @property
    def name(self) -> str:
        return self.function.__name__

    def __call__(self, case: Case) -> None:
        self.function(case)


def check(
    applies: Callable[[Case], bool] = lambda case: True, *, slow: bool = False
) -> Callable[[Callable[[Case], None]], Check]:
    """Put a function into the suite."""

    def register(function: Callable[[Case], None]) -> Check:
        CHECKS.append(Check(function, applies, slow))
        return CHECKS[-1]

    return register
