"""Calls that nobody listed; `python tests/random_calls.py --seed N` looks further."""

from __future__ import annotations

import random

import pytest
from random_calls import MECHANISMS, differences, draw

from attention_zoo import Unsupported

CALLS = 40


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_random_call_gives_what_it_means(name: str) -> None:
    rng, made = random.Random(name), 0
    for _ in range(3 * CALLS):
        call = draw(rng, name)
        try:
            found = list(differences(call))
        except (Unsupported, ValueError):  # options that do not go together, or tokens that it does not take
            continue
        assert not found, f"{found}: {call}"
        made += 1
        if made == CALLS:
            return
    pytest.fail(f"only {made} of {3 * CALLS} calls were taken")
