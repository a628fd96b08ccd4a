"""Every case of every oracle, in float32 and float64, within its bounds."""

from __future__ import annotations

import pytest
import torch

from .case import Case
from .table import all_cases

CASES = [
    pytest.param(case, dtype, id=f"{case.backend}-{case.oracle}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in all_cases()
    for dtype in case.bounds
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_equals_foreign_code(case: Case, dtype: torch.dtype) -> None:
    found, bound = case.run(dtype), case.bounds[dtype]
    assert found.output <= bound.output
    assert found.gradient <= bound.gradient, f"in the gradient of {found.worst}"
