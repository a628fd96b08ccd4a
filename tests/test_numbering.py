"""Numbering on the host says what `Tokens.of` says on a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_zoo import Tokens
from attention_zoo.layout.number import numbered


@pytest.mark.parametrize("length", [0, 1, 7, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_numbers_tokens_as_a_device_does(length: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    for _ in range(50):
        valid = torch.rand(4, length, generator=generator) < 0.7
        valid[3] = False
        flags = torch.rand(4, length, generator=generator) < 0.2
        document = (torch.rand(4, length, generator=generator) < 0.2).cumsum(1) + torch.tensor([[0], [3], [2**40], [1]])
        start = torch.randint(0, 100, (4,), generator=generator)
        want = Tokens.of(valid, flags, document if packed else None, start)
        got = numbered(valid.numpy(), flags.numpy(), document.numpy() if packed else None, start.numpy())
        for name, mine, theirs in zip(Tokens._fields, got, want, strict=True):
            assert np.array_equal(mine, theirs.numpy()), name
