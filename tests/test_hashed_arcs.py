"""How often windows show tokens to each other, counted by comparing, against the windows of the definition."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from references.reformer import reference, windows

from attention_zoo.attention.reformer import Reformer
from attention_zoo.contract import Tokens
from attention_zoo.ops.lsh import arcs, call, kept, short, shown
from attention_zoo.ops.lsh.layout import lay_out
from attention_zoo.ops.lsh.plan import HashedPlan


def counted(layer: Reformer, buckets: list[list[int]]) -> np.ndarray:
    """[n, n] by the definition, before causality; a token may see itself."""
    n = len(buckets[0])
    found = np.zeros((n, n), int)
    for r, tokens in enumerate(windows(layer, buckets, n)):
        for i, pairs in enumerate(tokens):
            for s, j in pairs:
                if layer.attend_across_buckets or buckets[s][j] == buckets[r][i]:
                    found[i, j] += 1
    return found


@pytest.mark.parametrize("inside", [False, True], ids=["across", "inside"])
@pytest.mark.parametrize(("back", "ahead"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 1), (1, 3), (1024, 0)])
def test_arcs_are_the_windows_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, back: int, ahead: int, inside: bool
) -> None:
    """Two documents, in few buckets and many: of one bucket alone, and with windows that go round inside a bucket."""
    rng, rounds = np.random.default_rng(0), 5
    layer = Reformer(dim=4, heads=1, chunk=3, rounds=rounds, look_back=back, look_ahead=ahead,
                     attend_across_buckets=not inside)  # fmt: skip
    for sizes, count, most in product(([1], [7], [5, 22], [31, 2]), (1, 2, 9, 300), (2, 255)):
        monkeypatch.setattr(arcs, "ROUNDS", most)
        buckets = rng.integers(0, count, (1, rounds, sum(sizes)))
        buckets[0, 0] = 0
        layout = lay_out(np.array(sizes), rounds=rounds, chunk=3, look_back=back, look_ahead=ahead, across_rounds=False)
        plan = HashedPlan(layout, torch.from_numpy(buckets), inside, None, False, 1.0, 0.0, False).sorted()
        cell, seen = arcs.arcs_of(plan)
        stop = 0
        for size in sizes:
            start, stop = stop, stop + size
            here = slice(start, stop)
            got = arcs.times_met(cell[..., here], arcs.each(seen, lambda x, here=here: x[..., here]))
            assert np.array_equal(got[0], counted(layer, buckets[0, :, here].tolist())), (sizes, count)


@pytest.mark.parametrize("options", [
    {"wrap": "reference"}, {"wrap": "reference", "look_back": 2, "look_ahead": 3}, {"wrap": "reference", "rounds": 1},
    {"fill": 4}, {"fill": 60}, {"fill": 12, "wrap": "reference"}, {"fill": 4, "look_ahead": 1, "wrap": "reference"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_inside_buckets_of_one_ring_or_of_filled_rings(monkeypatch: pytest.MonkeyPatch, options: dict, causal: bool):
    """Short rows by arcs, where windows show such, against the definition, token by token."""
    monkeypatch.setattr(call, "SLOT", 10_000)
    for length in (1, 4, 7, 14, 29):
        layer = Reformer(dim=12, heads=3, **{"chunk": 4, "rounds": 3, "causal": causal, **options},
                         attend_across_buckets=False, correct_duplicates=length == 14).double().eval()  # fmt: skip
        x, tokens = torch.randn(2, length, 12, dtype=torch.float64), Tokens.all_valid(2, length)
        torch.testing.assert_close(layer(x).hidden, reference(layer, x, tokens), atol=1e-12, rtol=0)
        chosen = dict(layer.explain_kernels(length, torch.device("cpu"), torch.float64))["short"]
        assert chosen is None or "repeat" in chosen or ("look_back" in options and length < 9)


def test_a_window_that_goes_round_inside_a_bucket_shows_two_arcs() -> None:
    layout = lay_out(np.array([7]), rounds=1, chunk=2, look_back=2, look_ahead=0, across_rounds=False)
    bucket = torch.tensor([[[0, 1, 1, 1, 1, 1, 1]]])
    found = arcs.arcs_of(HashedPlan(layout, bucket, True, None, False, 1.0, 0.0, False).sorted())
    assert len(found.seen) == 2
    # token 1 stands in the first chunk and looks at the last two, not at the second
    assert arcs.times_met(*found)[0, 1].tolist() == [0, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("heads", [1, 40], ids=["long rows in memory", "many heads"])
@pytest.mark.parametrize("at_once", [64, arcs.AT_ONCE])
def test_counts_do_not_depend_on_how_they_are_made(monkeypatch: pytest.MonkeyPatch, heads: int, at_once: int) -> None:
    monkeypatch.setattr(arcs, "AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    cell, first = (rng.integers(0, 9, (400, heads, n)).astype(np.uint8) for n in (23, 11))
    span, stops = rng.integers(245, 256, first.shape).astype(np.uint8), np.arange(11) * 2
    keys = cell[:, :, None, :].astype(int) - first[..., None].astype(int)
    want = (keys % 256 <= span[..., None]).sum(0)
    assert want.max() > 255  # more rounds than a byte counts
    assert np.array_equal(arcs.times_met(cell, [(first, span)]), want)
    got = arcs.times_met(cell, [(first, span)], stops)
    for row, stop in enumerate(stops):
        assert np.array_equal(got[:, row, :stop], want[:, row, :stop])
        assert not got[:, row, stop:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inside", [False, True], ids=["across", "inside"])
@pytest.mark.parametrize("limits", [{}, {"CELLS": 0}, {"CELLS": 0, "COUNTED": 0, "MASKED": 0}], ids=str)
def test_short_documents_by_arcs_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, limits: dict, inside: bool, causal: bool
) -> None:
    """Weights that are kept, counts that are kept, and neither; scores above 100."""
    monkeypatch.setattr(call, "SLOT", 10_000)
    monkeypatch.setattr(shown, "few_columns", lambda *_: False)
    for name, limit in limits.items():
        monkeypatch.setattr(kept if name == "CELLS" else shown, name, limit)
    for module in (short, kept):
        monkeypatch.setattr(module, "ROWS", 8)
    for length, size, more in ((1, 1, {}), (9, 40, {}), (23, 1, {"correct_duplicates": True}), (31, 40, {"rounds": 7})):
        layer = Reformer(dim=12, heads=3, chunk=4, causal=causal, attend_across_buckets=not inside, **more).eval()
        q, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(2))
        given, found = [(size * q).requires_grad_(), v.requires_grad_()], []
        for name in ("short", "dense" if not inside else "chunks"):
            layer.kernel = name
            out = layer.attend(*given)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            found.append([out, *torch.autograd.grad(out, given, weight)])
        for pair in zip(*found, strict=True):
            torch.testing.assert_close(*pair, atol=1e-11, rtol=1e-10)
