"""What is known of a call's tokens, each fact against a slow definition over random layouts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.layout import grid as grid_module
from attention_zoo.layout.grid import Grid
from attention_zoo.layout.layout import Layout, ends
from attention_zoo.layout.ledger import Columns, Horizon, none
from attention_zoo.layout.ragged import put, ragged, take
from attention_zoo.layout.reach import Anywhere, Band, Reach, Tiles
from attention_zoo.layout.visible import first_columns, runs_of, visible

KINDS = ("plain", "right", "left", "holes", "packed", "forgotten", "in place", "empty row", "no columns", "no rows")
SEEDS = range(6)


def tokens_of(kind: str, seed: int) -> Tokens:
    """Random tokens, of which some are global."""
    g = torch.Generator().manual_seed(seed)
    B, L = 0 if kind == "no rows" else 1 + seed % 3, 0 if kind == "no columns" else 13 + seed
    kept = torch.randint(1, max(1, L) + 1, (B, 1), generator=g)
    column = torch.arange(L).expand(B, L)
    valid = torch.ones(B, L, dtype=torch.bool)
    if kind == "right":
        valid = column < kept
    elif kind == "left":
        valid = column >= L - kept
    elif kind in ("holes", "packed"):
        valid = torch.rand(B, L, generator=g) < 0.7
    elif kind == "empty row":
        valid[0] = False
    flags = torch.rand(B, L, generator=g) < 0.1 * (seed % 2)
    # numbers of documents may be any
    document = torch.randint(0, 2, (B, L), generator=g).cumsum(1) + 2**62 * (seed % 2) if kind == "packed" else None
    tokens = Tokens.of(valid, flags, document, start=0 if seed % 3 else 4)
    if kind == "forgotten":
        return tokens.cut(torch.rand(L, generator=g) < 0.6)
    if kind == "in place":  # holes whose neighbours do not move up
        hidden = torch.rand(B, L, generator=g) < 0.3
        return tokens._replace(valid=valid & ~hidden, is_global=tokens.is_global & ~hidden)
    return tokens


every_layout = pytest.mark.parametrize("tokens", [tokens_of(k, s) for k in KINDS for s in SEEDS])
with_tokens = pytest.mark.parametrize("tokens", [tokens_of(k, s) for k in KINDS[:-2] for s in SEEDS])


def rows_of(tokens: Tokens) -> list[list[tuple[int, int, int, bool]]]:
    """(column, position, document, global) of the valid tokens of each row."""
    return [
        [(c, *map(int, at[:2]), bool(at[2])) for c, at in enumerate(zip(p, d, g)) if v[c]]
        for p, v, g, d, _ in zip(*(field.tolist() for field in tokens))
    ]


def seen_pairs(queries: Tokens, keys: Tokens, reach: Reach, *, causal: bool) -> Tensor:
    """Bool [B, L, S]: what some head sees, by document, padding, causality and reach."""
    q, k = queries.position[:, :, None], keys.position[:, None, :]
    seen = queries.valid[:, :, None] & keys.valid[:, None, :] & (queries.document[:, :, None] == keys.document[:, None])
    return (seen & (k <= q) if causal else seen) & inside(reach, q, k)


def inside(reach: Reach, query: Tensor, key: Tensor) -> Tensor:
    """Whether some head has the key within its reach."""
    return torch.stack([part.inside(query, key).any(0) for part in getattr(reach, "parts", (reach,))]).any(0)


def facts(layout: Layout) -> list[bool]:
    names = "dense", "any_global", "one_document", "aligned", "rows_alike", "globals_alike", "starts_at_zero"
    return [getattr(layout, name) for name in names]


def alike(*fields: Tensor) -> bool:
    return all(torch.equal(row, field[0]) for field in fields for row in field)


@every_layout
def test_every_fact_is_its_slow_definition(tokens: Tokens) -> None:
    layout, rows = Layout.of(tokens), rows_of(tokens)
    documents = [{d for _, _, d, _ in row} for row in rows]
    gaps = [c1 - c2 == p1 - p2 for row in rows for c1, p1, d1, _ in row for c2, p2, d2, _ in row if d1 == d2]
    first = [[c for c, *_ in row] == list(range(len(row))) for row in rows]
    assert layout.dense == bool(tokens.valid.all())
    assert layout.any_global == any(at[3] for row in rows for at in row)
    assert layout.one_document == all(len(found) <= 1 for found in documents)
    assert layout.rows_alike == alike(tokens.position, tokens.valid, tokens.document)
    assert layout.globals_alike == alike(tokens.is_global)
    assert layout.aligned == all(gaps)
    in_place = all(c == p for row in rows for c, p, *_ in row)
    assert layout.starts_at_zero == (all(first) and in_place and layout.one_document)
    for number, found in zip(layout.documents[:, 0].tolist(), documents):
        assert number == (-1 if len(found) > 1 else next(iter(found), number))
    for mine, theirs in zip(layout.host, tokens):
        assert torch.equal(torch.from_numpy(np.array(mine)), theirs)
    assert torch.equal(layout.blanked(torch.ones(*tokens.valid.shape, 1)), tokens.valid[..., None].float())
    steps = [pair for row in rows for pair in pairwise(row)]
    assert runs_of(layout).consecutive == all(b[2] != a[2] or b[:2] == (a[0] + 1, a[1] + 1) for a, b in steps)


@pytest.mark.parametrize(("batch", "length", "start"), [(2, 5, 0), (2, 5, 3), (1, 0, 0), (1, 0, 3), (0, 4, 0)])
def test_what_is_said_of_plain_tokens_would_be_found(batch: int, length: int, start: int) -> None:
    said = Layout.plain(batch, length, start=start)
    found = Layout.of(Tokens.of(torch.ones(batch, length, dtype=torch.bool), start=start))
    assert facts(said) == facts(found)
    assert all(torch.equal(a, b) for a, b in zip(said, found))


@every_layout
def test_queries_that_are_the_last_keys(tokens: Tokens) -> None:
    keys, S = Layout.of(tokens), tokens.valid.shape[1]
    for L in {0, min(1, S), S // 2, S}:
        mine = tokens.cut(slice(S - L, S))
        assert ends(keys, Layout.of(mine))
        assert ends(keys, keys.columns(slice(S - L, S)))
        assert keys.columns(slice(S - L, S)) is keys.columns(slice(S - L, S))
        if mine.valid.numel():
            others = [mine._replace(**{name: getattr(mine, name) + 1}) for name in ("position", "document")]
            for other in (*others, mine._replace(valid=~mine.valid)):
                assert not ends(keys, Layout.of(other))
    longer = Tokens(*(torch.cat([field[:, :1], field], 1) for field in tokens))
    assert ends(keys, Layout.of(longer)) is (not S)


@every_layout
def test_marked_tokens_are_one_layout_for_each_answer(tokens: Tokens) -> None:
    def mark(tokens: Tokens) -> Tokens:
        return tokens._replace(is_global=tokens.is_global | (tokens.valid & (tokens.position % 5 == 0)))

    layout = Layout.of(tokens)
    assert layout.marked(lambda tokens: tokens) is layout
    facts(layout)
    marked, want = layout.marked(mark), mark(tokens)
    assert all(torch.equal(a, b) for a, b in zip(marked, want))
    assert layout.marked(mark) is marked
    assert marked.marked(mark) is marked
    assert facts(marked) == facts(Layout.of(want))


@every_layout
def test_valid_tokens_are_taken_and_put_back(tokens: Tokens) -> None:
    layout, x = Layout.of(tokens), torch.randn(*tokens.valid.shape, 2)
    assert torch.equal(take(x, layout), x[tokens.valid])
    assert torch.equal(put(take(x, layout), layout), x * tokens.valid[..., None])
    sizes = [[d for _, _, d, _ in row].count(d) for row in rows_of(tokens) for d in sorted({at[2] for at in row})]
    assert ragged(layout)[1].tolist() == sizes


@with_tokens
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_grid_holds_every_token_in_a_block_of_its_document(tokens: Tokens, size: int) -> None:
    layout, x = Layout.of(tokens), torch.randn(*tokens.valid.shape, 3)[:, None].expand(-1, 2, -1, -1)
    for grid in [Grid.of(layout, size)] + [Grid.filled(layout, size)] * layout.starts_at_zero:
        packed, keys = grid.pack(x), grid.keys
        assert packed.shape[2] == grid.columns == keys.valid.shape[1]
        assert not grid.columns % size
        assert int(keys.valid.sum()) == int(tokens.valid.sum())
        for b, row in enumerate(rows_of(tokens)):
            blocks = {}
            for column, position, document, is_global in row:
                at = int(grid.place[b, column])
                assert torch.equal(packed[b, :, at], x[b, :, column])
                found = [int(field[b, at]) for field in keys]
                assert found == [position, 1, is_global, document, int(tokens.length[b, column])]
                assert at % size == position % size
                assert blocks.setdefault(at // size, (document, position // size)) == (document, position // size)
            for block, (document, number) in blocks.items():
                assert (int(grid.document[b, block]), int(grid.row[b, block])) == (document, number)


# --- what is seen ----------------------------------------------------------------------------------------------------

EXACT = [Band(0), Band(3), Band(2, ahead=1), Band((1, 4)), Band(3, ahead=0, weights="uniform"), Anywhere()]
WIDER = [Band(2, stride=3), Band(2, stride=(1, 2)), Band(2, first=2), Band(1) | Band(2, first=1)]


@with_tokens
@pytest.mark.parametrize("causal", [True, False])
def test_ranges_hold_what_is_seen_and_bands_without_gaps_nothing_else(tokens: Tokens, causal: bool) -> None:
    S = tokens.valid.shape[1]
    queries, whole = Layout.of(tokens.cut(slice(S // 3, S))), Layout.of(tokens)
    halves = Layout.of(tokens.cut(slice(0, S // 2))), Layout.of(tokens.cut(slice(S // 2, S)))
    for reach in (*EXACT, *WIDER):
        seen = [visible(queries, *keys, reach=reach, causal=causal) for keys in ((whole,), halves)]
        for part in (*seen[0], *seen[1]):
            column = torch.arange(part.keys.valid.shape[1])
            first, stop = (torch.from_numpy(each)[..., None] for each in (part.first, part.stop))
            ranges = (column >= first) & (column < stop) & part.keys.valid[:, None]
            want = seen_pairs(queries, part.keys, reach, causal=causal)
            assert not bool((want & ~ranges).any())
            if reach in EXACT:
                assert torch.equal(ranges, want)
                assert torch.equal((stop > first)[..., 0], want.any(-1))


LENGTH = 61


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_with_a_pair_that_is_seen_are_near(causal: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # two tiles in three span few positions
    starts = torch.randint(0, LENGTH, (2, 40), generator=g)
    spans = torch.randint(0, LENGTH, (2, 40), generator=g) // torch.tensor([1, 8, 30]).repeat(14)[:40]
    lows, highs = starts.numpy(), (starts + spans).clamp(max=LENGTH - 1).numpy()
    length = np.full((1, 1, 40), LENGTH)
    tiles = Tiles(lows[0][None, :, None], highs[0][None, :, None], lows[1][None, None], highs[1][None, None], length, 8)
    tokens, at = Tokens.all_valid(1, LENGTH), torch.arange(LENGTH)

    def links(**options: object) -> tuple[Reach, Tensor]:
        layer = zoo.build("bigbird", dim=8, heads=2, block=4, random=1, causal=causal, seed=seed, **options)
        return layer.reach, (layer.bias(tokens, tokens)[0] > -torch.inf).any(0)

    blocks, linked = links()
    cases = [(blocks, linked), (blocks | Band(7, first=1), linked | inside(Band(7, first=1), at[:, None], at))]
    cases += [(reach, inside(reach, at[:, None], at)) for reach in (*EXACT, *WIDER)]
    cases += [] if causal else [links(plan="reference")]
    for reach, seen in cases:
        seen = seen.tril() if causal else seen
        near = np.broadcast_to(reach.near(tiles), (1, 40, 40))[0]
        for i, j in np.argwhere(~near):
            assert not bool(seen[lows[0, i] : highs[0, i] + 1, lows[1, j] : highs[1, j] + 1].any()), (reach, i, j)
        farthest = LENGTH if reach.farthest is None else reach.farthest
        late = (at[:, None] - at > farthest) & (at >= reach.first)
        assert not bool((seen & late).any()), "a cache would forget what is seen"


@every_layout
def test_a_horizon_keeps_what_a_loop_would(tokens: Tokens) -> None:
    for span in (None, 0, 3):
        for segment, first in ((1, 0), (4, 0), (1, 2)):
            found = Horizon(span, segment, first).live(Layout.of(tokens).host)
            want = torch.zeros_like(tokens.valid)
            for b, row in enumerate(rows_of(tokens)):
                for column, position, document, is_global in row:
                    following = row[-1][1] + 1
                    near = span is None or position >= following - following % segment - span
                    want[b, column] = document == row[-1][2] and (near or is_global or position < first)
            assert torch.equal(torch.from_numpy(found), want)


HORIZONS = [Horizon(), Horizon(3, most=3), Horizon(5, segment=4, most=8), Horizon(2, first=2, most=4)]


def contents(state: Columns) -> list[dict[tuple[int, int], list[float]]]:
    """By document and position what each row holds."""
    held = state.held[0]
    return [{(d, p): held[b, c].tolist() for c, p, d, _ in row} for b, row in enumerate(rows_of(state.tokens))]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("horizon", HORIZONS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "left", "holes", "packed", "empty row"])
def test_layers_share_a_ledger_and_older_states_go_on(kind: str, horizon: Horizon, gradients: bool) -> None:
    B, steps = 3, [7, 1, 1, 3, 40, 1, 1, 20, 2, 1]
    L = sum(steps)
    g = torch.Generator().manual_seed(0)
    valid = {"left": torch.arange(L) >= torch.tensor([[0], [5], [60]]), "holes": torch.rand(B, L, generator=g) < 0.7}
    mask = valid.get(kind, torch.ones(B, L, dtype=torch.bool)).clone()
    mask[0] &= kind != "empty row"
    document = torch.arange(L).expand(B, L) // 23 if kind == "packed" else None
    tokens, x = Tokens.of(mask, None, document), torch.randn(B, L, 2, generator=g)

    def go_on(state: Columns, layout: Layout, start: int, sign: int) -> Columns:
        new = sign * x[:, start : start + layout.valid.shape[1]]
        state = state.append(layout, new, horizon=horizon)
        held = contents(state)
        for b, row in enumerate(rows_of(layout)):
            assert all(held[b][d, p] == new[b, c].tolist() for c, p, d, _ in row)
        return state.settle(layout, horizon=horizon)[0]

    with torch.set_grad_enabled(gradients):
        mine, other = (Columns.of(none(B, "cpu"), torch.zeros(B, 0, 2)) for _ in range(2))
        start, older = 0, []
        for count in steps:
            layout = Layout.of(tokens.cut(slice(start, start + count)))
            older.append((start, layout, mine, contents(mine)))
            mine, other = go_on(mine, layout, start, 1), go_on(other, layout, start, -1)
            start += count
            assert mine.ledger is other.ledger
            so_far = Layout.of(tokens.cut(slice(0, start)))
            live, held = torch.from_numpy(horizon.live(so_far.host)), contents(mine)
            for b, row in enumerate(rows_of(so_far)):
                assert all(held[b][d, p] == x[b, c].tolist() for c, p, d, _ in row if live[b, c])
        last = contents(mine)
        for start, layout, state, before in older:
            news = Layout.of(Tokens.of(layout.valid, None, layout.document + 1))
            for again in (layout, news):  # the ledger of the first is known already
                go_on(state, again, start, 5)
                assert contents(state) == before
                assert contents(mine) == last


@pytest.mark.parametrize("start", [-3, 0, 5])
@pytest.mark.parametrize("length", [1, 7])
def test_tokens_that_a_shape_implies_are_found_as_any_others_are(start: int, length: int) -> None:
    plain, said = Layout.plain(2, length, start=start), Layout.fresh(Tokens(*Layout.plain(2, length, start=start)))
    assert plain.implied
    assert not said.implied
    for mine, want in zip(runs_of(plain, -3), runs_of(said, -3), strict=True):
        np.testing.assert_array_equal(mine, want)
    oldest = np.arange(start - 5, start + length + 3)[None].repeat(2, 0)
    for first in range(8):
        some = oldest[:, first : first + length]
        np.testing.assert_array_equal(first_columns(plain, some, -3), first_columns(said, some, -3))


@pytest.mark.parametrize("causal", [True, False])
def test_columns_that_are_copied_are_those_that_are_gathered(causal, monkeypatch):
    """Packed, with padding on both sides and in holes: outputs and gradients."""
    torch.manual_seed(0)
    layer = zoo.build("bigbird", dim=16, heads=2, block=4, causal=causal, kernel="blocks").double()
    valid = torch.ones(3, 61, dtype=torch.bool)
    valid[0, :5], valid[0, 55:], valid[1, 7:40:6] = False, False, False
    tokens = Tokens.of(valid, document=(torch.arange(61) // 19).expand(3, -1))
    x, found = torch.randn(3, 61, 16, dtype=torch.float64), []
    for copies in (True, False):
        monkeypatch.setattr(grid_module, "copies_rows", lambda x, copies=copies: copies)
        given = x.clone().requires_grad_()
        out = layer(given, tokens).hidden
        found.append([out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)
