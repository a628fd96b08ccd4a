"""The commonest id of a row, against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo.tasks.guessing import commonest
from attention_zoo.tasks.induction import Induction


@pytest.mark.parametrize("length", [1, 2, 7, 31])
def test_the_commonest_id_is_that_of_counts(length: int) -> None:
    ids = torch.from_numpy(np.random.default_rng(length).integers(0, 9, (200, length)))
    for row, (found,) in zip(ids.tolist(), commonest(ids, 2, 6).tolist(), strict=True):
        assert found == max(range(2, 6), key=row.count), "the lowest of equals, and of those that are not there"


def test_rules_take_no_memory_for_ids_that_no_row_holds() -> None:
    found = Induction(vocab=2**24, test_examples=50).baselines(64)
    assert found["commonest id"] < 0.5
