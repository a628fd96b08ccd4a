"""Buckets of few rotations, and the order of hashed tokens: what is quick on a CPU equals what says what it means."""

import pytest
import torch

from attention_zoo.ops.lsh.hashing import hash_tokens
from attention_zoo.ops.lsh.layout import sort_tokens


@pytest.mark.parametrize("buckets", [3, 1 << 26], ids=["numbers of 32 bits", "of 64"])
@pytest.mark.parametrize("sizes", [[1], [5, 1, 7], [2] * 40, [131]], ids=str)
def test_order_is_by_document_bucket_and_place(sizes, buckets):
    torch.manual_seed(0)
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    found = torch.randint(0, buckets, (2, 3, len(document)), dtype=torch.int32)
    found[..., : len(document) // 2] %= 2  # several in one bucket
    order = sort_tokens(found, document)
    for row, got in zip(found.flatten(0, 1).tolist(), order.flatten(0, 1).tolist(), strict=True):
        want = sorted(range(len(row)), key=lambda at: (int(document[at]), row[at], at))
        assert got == want


@pytest.mark.parametrize("tokens", [40, 70])
@pytest.mark.parametrize("count", [2, 4, 6, 32, 600])
def test_bucket_is_the_largest_of_a_vector_turned_and_its_opposite(count, tokens):
    torch.manual_seed(0)
    vectors, turn = torch.randn(tokens, 2, 8), torch.randn(2, 8, 3, count // 2)
    vectors[5] = 0  # all are as large: the first
    y = torch.einsum("mhd,hdrb->hrmb", vectors, turn)
    want = torch.cat([y, -y], -1).argmax(-1)
    got = hash_tokens(vectors, (turn,), (count,))
    assert torch.equal(got.long(), want)
    assert (got[:, :, 5] == 0).all()
