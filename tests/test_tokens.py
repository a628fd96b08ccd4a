"""Tokens: numbering, clocks and forgetting against loops that a reader can check by eye."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_zoo.contract import Tokens, keep

ROWS = st.integers(1, 4)
LENGTHS = st.integers(1, 12)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any validity, flags, non-falling documents, and starts."""
    rows, length = draw(ROWS), draw(LENGTHS)

    def bools() -> Tensor:
        return torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(rows)])

    valid, flags = bools(), bools()
    steps = torch.tensor([[draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in range(length)] for _ in range(rows)])
    start = torch.tensor([draw(st.integers(0, 9)) for _ in range(rows)])
    return valid, flags, steps.cumsum(1), start


@settings(max_examples=60, deadline=None)
@given(batches())
def test_positions_count_the_valid_tokens_of_each_document(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    valid, flags, document, start = batch
    tokens = Tokens.of(valid, flags, document, start)
    for row in range(len(valid)):
        columns = [column for column in range(valid.shape[1]) if valid[row, column]]
        numbers = [int(document[row, column]) for column in columns]
        seen: dict[int, list[int]] = {}
        for column, number in zip(columns, numbers):
            # only the row's first document continues what earlier calls have consumed
            begin = int(start[row]) if number == numbers[0] else 0
            seen.setdefault(number, []).append(column)
            assert tokens.position[row, column] == begin + len(seen[number]) - 1
            assert tokens.document[row, column] == number
            assert tokens.is_global[row, column] == flags[row, column]
        for number, members in seen.items():
            begin = int(start[row]) if number == numbers[0] else 0
            assert all(tokens.length[row, column] == begin + len(members) for column in members)
    assert torch.equal(tokens.valid, valid)
    assert not bool((tokens.is_global & ~valid).any()), "padding is never global"
    assert all(field.shape == valid.shape for field in tokens)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_the_clock_shows_what_follows_the_last_valid_token(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    valid, flags, document, start = batch
    tokens = Tokens.of(valid, flags, document, start)
    for row in range(len(valid)):
        columns = valid[row].nonzero().flatten().tolist()
        expected = int(tokens.position[row, columns[-1]]) + 1 if columns else 0
        assert int(tokens.next_position[row]) == expected


@settings(max_examples=40, deadline=None)
@given(batches())
def test_one_document_needs_no_numbers(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    valid, flags, _, start = batch
    plain, numbered = (
        Tokens.of(valid, flags, None, start),
        Tokens.of(valid, flags, torch.zeros_like(start)[:, None].expand_as(valid), start),
    )
    for name in ("position", "document", "length"):
        a, b = getattr(plain, name), getattr(numbered, name)
        assert torch.equal(a[valid], b[valid]), name
    assert torch.equal(plain.next_position, numbered.next_position)


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(0, 12))
def test_calls_continue_the_numbering(batch: tuple[Tensor, Tensor, Tensor, Tensor], cut: int) -> None:
    valid, flags, _, start = batch
    whole = Tokens.of(valid, flags, None, start)
    first = Tokens.of(valid[:, :cut], flags[:, :cut], None, start)
    # a row that had no valid token yet has not moved its clock
    clock = torch.where(valid[:, :cut].any(1), first.next_position, start)
    later = Tokens.of(valid[:, cut:], flags[:, cut:], None, clock)
    assert torch.equal(first.then(later).position[valid], whole.position[valid])


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_keep_forgets_all_but_the_masked_columns(batch: tuple[Tensor, Tensor, Tensor, Tensor], random: object) -> None:
    valid, flags, document, start = batch
    tokens = Tokens.of(valid, flags, document, start)
    generator = torch.Generator().manual_seed(random.randint(0, 10**6))  # type: ignore[attr-defined]
    mask = torch.rand(valid.shape, generator=generator) < 0.5
    vectors = torch.randn(*valid.shape, 3, generator=generator)
    heads = torch.randn(valid.shape[0], 2, valid.shape[1], 5, generator=generator)
    kept, some, more = keep(mask, tokens, vectors, heads)
    assert kept.valid.shape[1] == int(mask.sum(1).max())
    for row in range(len(valid)):
        columns = mask[row].nonzero().flatten()
        count = len(columns)
        tail = slice(kept.valid.shape[1] - count, None)
        assert torch.equal(some[row, tail], vectors[row, columns])
        assert torch.equal(more[row, :, tail], heads[row][:, columns])
        assert torch.equal(kept.valid[row, tail], valid[row, columns])
        assert torch.equal(kept.position[row, tail], tokens.position[row, columns])
        assert torch.equal(kept.is_global[row, tail], tokens.is_global[row, columns])
        fillers = slice(0, kept.valid.shape[1] - count)
        assert not bool(kept.valid[row, fillers].any() | kept.is_global[row, fillers].any())


def test_keep_passes_gradients_to_what_it_keeps() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.randn(2, 3, 4, requires_grad=True)
    tokens, kept = keep(mask, Tokens.all_valid(2, 3), x)
    (kept * tokens.valid[..., None]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[..., 0] != 0, mask)


def test_nothing_at_all() -> None:
    none = Tokens.none(3)
    assert none.valid.shape == (3, 0)
    assert none.next_position.tolist() == [0, 0, 0]
    later = none.then(Tokens.all_valid(3, 2))
    assert later.position.tolist() == [[0, 1]] * 3
    kept, x = keep(torch.zeros(3, 2, dtype=torch.bool), later, torch.randn(3, 2, 4))
    assert kept.valid.shape == (3, 0)
    assert x.shape == (3, 0, 4)


def test_columns_of_one_row_or_of_each() -> None:
    tokens = Tokens.of(torch.tensor([[True, True, False, True], [False, True, True, True]]))
    assert torch.equal(tokens.cut(slice(1, 3)).position, tokens.position[:, 1:3])
    taken = tokens.take(torch.tensor([[3, 0], [1, 1]]))
    assert taken.position.tolist() == [[2, 0], [0, 0]]


VALID = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3),), r"valid must be a bool tensor \[batch, length\].*float32"),
        ((torch.ones(2, 1, 3, dtype=torch.bool),), r"valid must be a bool tensor \[batch, length\].*\(2, 1, 3\)"),
        ((VALID, VALID[:, :2]), r"is_global must have the shape of valid, \(2, 3\), got \(2, 2\)"),
        ((VALID, VALID.long()), "is_global must be bool, got torch.int64"),
        ((VALID, None, VALID[:1].long()), r"document must have the shape of valid"),
        ((VALID, None, VALID.float()), "document must be integer, got torch.float32"),
        ((VALID, None, torch.tensor([[0, 1, 0], [0, 0, 0]])), "document must be non-negative and never fall"),
        ((VALID, None, torch.tensor([[0, 0, 0], [-1, 0, 0]])), "document must be non-negative and never fall"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens.of(*arguments)


def test_documents_may_fall_at_padding() -> None:
    """Numbers at padding mean nothing."""
    valid = torch.tensor([[True, False, True]])
    assert Tokens.of(valid, document=torch.tensor([[3, -7, 3]])).position[valid].tolist() == [0, 1]
