"""Reformer against the token-by-token reference, dense attention and itself: hashing, layout, state, memory."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator

import pytest
import torch
from count_reads import Count
from references.reformer import factors, hash_document, reference, visible
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention_zoo.attention.reformer import Reformer
from attention_zoo.contract import Tokens, Unsupported
from attention_zoo.layout.kernel import choose
from attention_zoo.layout.layout import Layout
from attention_zoo.measure.memory import peak_memory
from attention_zoo.ops.lsh import call, chunks, hashing, kept, short
from attention_zoo.ops.softmax.dense import dense

DIM, HEADS = 12, 3


def build(dtype: torch.dtype = torch.float64, **options) -> Reformer:
    """An evaluating layer with weights large enough to make sharp distributions."""
    generator = torch.Generator().manual_seed(1)
    layer = Reformer(**{"dim": DIM, "heads": HEADS, "chunk": 4, "rounds": 2, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    return layer.to(dtype).eval()


def data(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layouts(length: int) -> Iterator[tuple[str, Tokens]]:
    """Rows of tokens as they may lie in a batch."""
    column = torch.arange(length)[None]
    count = torch.tensor([[length], [-(-2 * length // 3)], [-(-length // 4)]])
    yield "whole", Tokens.all_valid(2, length)
    yield "padded right", Tokens.of(column < count)
    yield "padded left", Tokens.of(column >= length - count)
    if length > 6:
        holes = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.7
        yield "holes", Tokens.of(holes)
        columns = torch.arange(length).expand(2, length)
        yield "counted by columns", Tokens.of(holes)._replace(position=columns, length=columns * 0 + length)
        document = torch.stack([column[0] // 5, (column[0] > 0).long() + (column[0] > length - 3)])
        yield "documents", Tokens.of(torch.ones(2, length, dtype=torch.bool), document=document)
        yield "documents and holes", Tokens.of(holes, document=document)


def gradients(layer: Reformer, x: Tensor, hidden: Tensor, valid: Tensor) -> list[Tensor]:
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = (hidden * weight.to(hidden.dtype))[valid].sum()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()], materialize_grads=True))


def assert_equals_reference(layer: Reformer, length: int, *others: Reformer, but: Container[str] = ()) -> None:
    """Of this layer, and of others with the same options and weights."""
    for name, tokens in layouts(length):
        if name in but:
            continue
        x = data(len(tokens.valid), length).requires_grad_()
        slow = reference(layer, x, tokens)
        slow_gradients = gradients(layer, x, slow, tokens.valid)
        for each in (layer, *others):
            out, where = each(x, tokens), f"{name}, kernel={each.kernel}"
            assert bool((out.hidden[~tokens.valid] == 0).all()), where
            torch.testing.assert_close(out.hidden, slow, atol=1e-12, rtol=0, msg=lambda m, n=where: f"{n}: {m}")
            for fast, expected in zip(gradients(each, x, out.hidden, tokens.valid), slow_gradients):
                torch.testing.assert_close(fast, expected, atol=1e-11, rtol=0, msg=lambda m, n=where: f"{n}: {m}")


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 11, 29])
def test_equals_reference(length: int, causal: bool):
    assert_equals_reference(build(causal=causal), length)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"look_back": 0},
        {"look_back": 2, "look_ahead": 1},
        {"look_ahead": 1},
        {"attend_across_buckets": False},
        {"correct_duplicates": True},
        {"correct_duplicates": True, "attend_across_buckets": False},
        {"wrap": "reference"},
        {"wrap": "reference", "correct_duplicates": True, "look_ahead": 1},
        {"wrap": "reference", "attend_across_buckets": False, "correct_duplicates": True},
        {"fill": 12, "wrap": "reference"},
        {"fill": 12, "correct_duplicates": True},
        {"fill": 4, "wrap": "reference", "look_back": 3, "look_ahead": 2, "rounds": 1},
        {"fill": 4, "look_back": 5, "look_ahead": 6},
        {"fill": 4, "look_back": 2, "kernel": "dense"},
        {"kernel": "dense"},
        {"kernel": "dense", "correct_duplicates": True, "wrap": "reference"},
    ],
    ids=str,
)
def test_options_equal_reference(options: dict, causal: bool):
    """Those that say which keys are seen."""
    # so short a call does not go through chunks by itself
    others = [] if "kernel" in options else [build(causal=causal, kernel="chunks", **options)]
    assert_equals_reference(build(causal=causal, **options), 14, *others, but=["documents"])


@pytest.mark.parametrize(
    ("options", "causal"),
    [
        ({"rounds": 1}, True),
        ({"rounds": 3, "chunk": 1}, False),
        ({"buckets": 6}, True),
        ({"buckets": [4, 2]}, False),
        ({"split_above": 2}, True),
        ({"key_norm_epsilon": 0.1}, True),
        ({"scale": 1.0}, False),
        ({"seed": 5}, True),
        ({"bias": False}, False),
        ({"head_width": 3}, True),
    ],
    ids=str,
)
def test_other_options_equal_reference(options: dict, causal: bool):
    """Of hashes and scores, which know neither layout nor side: of these the telling ones."""
    others = [build(causal=causal, kernel="chunks", **options)]
    but = ["whole", "padded right", "holes", "documents"]
    assert_equals_reference(build(causal=causal, **options), 14, *others, but=but)


def test_many_steps_and_blocks_of_heads(monkeypatch: pytest.MonkeyPatch):
    """Lengths that a test can afford fit into one step; this forces many, and one head at a time."""
    monkeypatch.setitem(chunks._SCORES, "cpu", 64)
    monkeypatch.setitem(chunks._SLOTS, "cpu", 1)
    monkeypatch.setattr(call, "SLOT", 10_000)
    monkeypatch.setattr(kept, "CELLS", 0)
    assert_equals_reference(build(kernel="short"), 29, build(kernel="chunks"))
    options = {"causal": False, "wrap": "reference"}
    assert_equals_reference(build(kernel="short", **options), 19, build(kernel="chunks", **options))


@pytest.mark.parametrize("options", [{}, {"correct_duplicates": True}, {"fill": 12, "look_back": 2}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cells", [0, kept.CELLS], ids=["again", "kept"])
def test_short_documents_equal_their_chunks(monkeypatch: pytest.MonkeyPatch, cells: int, causal: bool, options: dict):
    """Several lots of rows of each document; also behind a state, where a few tokens alone are asked for."""
    for module in (short, kept):
        monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(kept, "CELLS", cells)
    monkeypatch.setattr(call, "SLOT", 10_000)
    ours, theirs = (build(causal=causal, rounds=8, kernel=kernel, **options) for kernel in ("short", "chunks"))
    for name, tokens in layouts(23):
        x = data(len(tokens.valid), 23).requires_grad_()
        outs = [layer(x, tokens).hidden for layer in (ours, theirs)]
        torch.testing.assert_close(*outs, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        for pair in zip(*(gradients(layer, x, out, tokens.valid) for layer, out in zip((ours, theirs), outs))):
            torch.testing.assert_close(*pair, atol=1e-11, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        if causal:
            parts = []
            for layer in (ours, theirs):
                state = layer(x[:, :16], tokens.cut(slice(0, 16)), state=layer.initial_state(len(x))).state
                parts.append(layer(x[:, 16:], tokens.cut(slice(16, 23)), state=state).hidden)
            torch.testing.assert_close(*parts, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}, state: {m}")


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_kept_weights_equal_the_definition(monkeypatch: pytest.MonkeyPatch, size: float):
    """Also where scores are beyond 100, and where tokens see nobody else."""
    monkeypatch.setattr(call, "SLOT", 10_000)
    for length, more in ((9, {}), (61, {}), (131, {"correct_duplicates": True}), (150, {"causal": False})):
        layer = build(chunk=8, rounds=2, **more)
        q, v = (torch.randn(2, layer.heads, length, layer.head_width, dtype=torch.float64) for _ in range(2))
        given = [(size * q).requires_grad_(), v.requires_grad_()]
        found = []
        for name in ("short", "dense"):
            layer.kernel = name
            out = layer.attend(*given)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            found.append([out, *torch.autograd.grad(out, given, weight)])
        for pair in zip(*found):
            torch.testing.assert_close(*pair, atol=1e-11, rtol=1e-10)


def test_operators_of_kept_weights():
    """Of short rows they are what costs: counted at the length at which documents no longer fit into one window."""
    layer = build(torch.float32, chunk=64, rounds=4)
    q, v = (torch.randn(1, layer.heads, 150, layer.head_width, requires_grad=True) for _ in range(2))
    layer.attend(q, v)  # plans are kept
    with Count() as count:
        layer.attend(q, v).sum().backward()
    assert count.operators <= 240, count.operators


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (1, 2, 3, 7, 8)),
        ({"correct_duplicates": True}, (7,)),
        ({"look_back": 0, "look_ahead": 2, "rounds": 3}, (11, 12)),
        ({"fill": 4, "look_back": 2}, (3, 4)),
        ({"wrap": "reference"}, (3, 4)),
        ({"scale": 30.0, "key_norm_epsilon": 1e-2}, (8,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_what_every_window_holds_whole_is_one_fused_call(causal: bool, options: dict, lengths: tuple[int, ...]):
    layer, chunked = (build(causal=causal, kernel=kernel, **options) for kernel in ("whole", "chunks"))
    for length in lengths:
        assert choose("", call.KERNELS, "auto", described(layer, length)) is call.WHOLE
        assert_equals_reference(layer, length, chunked)


def test_what_not_every_window_holds_whole_is_not_taken_for_it():
    """Longer documents, a few tokens of a document behind a state, buckets that are told apart, large masks."""
    layer = build(chunk=64, look_back=1)
    said = [dict(layer.explain_kernels(length, torch.device("cpu"), torch.float32))["whole"] for length in (128, 129)]
    assert said[0] is None
    assert "not every window" in str(said[1])
    inside = build(chunk=64, attend_across_buckets=False)
    assert "tells no buckets apart" in str(described_reason(inside, 8))
    wide = build(chunk=1024, look_back=1)
    assert described_reason(wide, 1024) is None
    assert "too long for a mask" in str(described_reason(wide, 1025))
    few = build()
    x = data(2, 7)
    state = few(x[:, :5], Tokens.all_valid(2, 5), state=few.initial_state(2)).state
    behind = few(x[:, 5:], Tokens.of(torch.ones(2, 2, dtype=torch.bool), start=5), state=state).hidden
    torch.testing.assert_close(behind, build(kernel="chunks")(x).hidden[:, 5:], atol=1e-12, rtol=0)


def test_a_core_that_hashes_nothing_is_the_same_and_draws_nothing():
    """Buckets matter to nobody there: none are made. NaN at padding, scores above 100, half precision."""
    tokens = Tokens.of(torch.arange(8)[None] < torch.tensor([[8], [3], [1]]))
    generator = torch.Generator().manual_seed(2)
    qk, v = (torch.randn(3, HEADS, 8, DIM // HEADS, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, chunked = (build(kernel=kernel, scale=60.0).train() for kernel in ("auto", "chunks"))
    before = torch.get_rng_state()
    found = whole.attend(qk, v, tokens)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, chunked.attend(qk, v, tokens), atol=1e-12, rtol=0)
    hidden = ~tokens.valid[:, None, :, None]
    poisoned = whole.attend(qk.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan), tokens)
    torch.testing.assert_close(poisoned, found, atol=0, rtol=0)
    assert (qk.norm(dim=-1) * 60).max() > 100
    mild = build()
    half = mild.bfloat16().attend(qk.bfloat16(), v.bfloat16(), tokens)
    exact = build(kernel="chunks").attend(qk.bfloat16().double(), v.bfloat16().double(), tokens)
    torch.testing.assert_close(half.double(), exact, atol=2e-2, rtol=0)
    qk, v = (x.requires_grad_() for x in (qk, v))
    assert torch.autograd.gradcheck(lambda a, b: mild.double().attend(a, b, tokens), (qk, v))


def described(layer: Reformer, length: int) -> call.HashedCall:
    documents = layer._documents(Layout.plain(1, length))
    return layer._described(documents, length, torch.device("cpu"), torch.float64)


def described_reason(layer: Reformer, length: int) -> str | None:
    return call.WHOLE.refuse(described(layer, length))


def test_what_is_short_is_said():
    """By pairs: a short document in a batch with a long one is none."""
    layer = build(dim=192, chunk=64, rounds=4)
    for length, expected in ((32, None), (512, None), (4096, "documents are too long")):
        reason = dict(layer.explain_kernels(length, torch.device("cpu"), torch.float32))["short"]
        assert reason is None if expected is None else expected in reason
    inside = {"chunk": 64, "attend_across_buckets": False}
    repeats = {"fill": 128, "look_ahead": 1}
    for more, expected in (({}, None), ({"wrap": "reference"}, None), (repeats, "it tells no buckets apart")):
        reason = dict(build(**inside, **more).explain_kernels(32, torch.device("cpu"), torch.float32))["short"]
        assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rounds", "wrap"), [(1, "row"), (1, "reference"), (4, "row")])
def test_two_chunks_see_everything(rounds: int, wrap: str, causal: bool):
    """With as many chunks as a window holds, no hash matters: dense attention with shared queries and keys."""
    layer, x = build(rounds=rounds, wrap=wrap, causal=causal), data(2, 8)
    q, v = (layer_(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer_ in (layer.to_qk, layer.to_v))
    hidden = torch.ones(8, 8).triu().bool() if causal else torch.eye(8).bool()
    bias = torch.zeros(8, 8, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    out = dense(q, torch.nn.functional.normalize(q, dim=-1), v, bias[None, None], scale=layer.scale)
    if causal:
        out[:, :, 0] = v[:, :, 0]
    expected = layer.to_out(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x).hidden, expected, atol=1e-12, rtol=0)


def test_reference_wrap_looks_into_the_round_before():
    """Which shows some keys of the first chunk twice and others never: not what wrapping in the row computes."""
    x = data(1, 8)
    row, ring = (build(rounds=4, wrap=wrap)(x).hidden for wrap in ("row", "reference"))
    assert not torch.allclose(row, ring, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"wrap": "reference"}, {"attend_across_buckets": False}], ids=str)
def test_corrected_duplicates_count_once(options: dict):
    """Then all rounds together are one softmax over the set of keys that any of them shows."""
    layer, x = build(correct_duplicates=True, rounds=3, **options), data(1, 31)
    q, v = (layer_(x)[0].unflatten(-1, (HEADS, -1)) for layer_ in (layer.to_qk, layer.to_v))
    out = torch.empty_like(v)
    repeated = 0
    for head in range(HEADS):
        shown = visible(layer, hash_document(layer, q[:, head], head))
        for i in range(31):
            every = [j for one in shown for j in one[i]]
            keys = sorted(set(every))
            repeated += len(every) - len(keys)
            k = torch.nn.functional.normalize(q[keys, head], dim=-1)
            out[i, head] = ((k @ q[i, head]) * layer.scale).softmax(0) @ v[keys, head] if keys else v[i, head]
    assert repeated > 20
    torch.testing.assert_close(layer(x).hidden[0], layer.to_out(out.flatten(1)), atol=1e-12, rtol=0)


def test_a_token_that_sees_nothing_else_is_its_value():
    """Exactly, also in float32: no large number is ever added to a score."""
    layer = build(dtype=torch.float32)
    x = data(1, 33).float()
    value = layer.to_out(layer.to_v(x))
    assert torch.equal(layer(x).hidden[:, 0], value[:, 0])
    alone = build(dtype=torch.float32, chunk=1, look_back=0)
    torch.testing.assert_close(alone(x).hidden, alone.to_out(alone.to_v(x)), atol=1e-6, rtol=0)


def test_a_zero_query_has_a_zero_key():
    layer = build(bias=False)
    x = data(1, 9)
    x[0, 4] = 0
    x.requires_grad_()
    hidden = layer(x).hidden
    (grad,) = torch.autograd.grad(hidden.square().sum(), x)
    assert bool(hidden.isfinite().all())
    assert bool(grad.isfinite().all())


# --- hashing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, (2,)), (7, (2,)), (8, (4,)), (15, (4,)), (128, (64,)), (256, (8, 16)), (1024, (16, 32)), (16384, (64, 128))],
)
def test_bucket_count_follows_the_length(length: int, expected: tuple[int, ...]):
    assert hashing.bucket_factors(length, 4) == expected
    assert factors(build(), length) == list(expected)


@pytest.mark.parametrize("buckets", [None, 2, 10, (4, 6)], ids=str)
def test_buckets_are_those_of_the_definition(buckets):
    layer, x = build(buckets=buckets), data(2, 41)
    choices = layer(x).choices
    assert choices.shape == (2, HEADS, 2, 41, 1)
    q = layer.to_qk(x).unflatten(-1, (HEADS, -1))
    for row in range(2):
        for head in range(HEADS):
            assert choices[row, head, ..., 0].tolist() == hash_document(layer, q[row, :, head], head)


def test_factorised_buckets_of_a_long_row():
    layer = build(chunk=2, dtype=torch.float64)
    x = data(1, 150)
    q = layer.to_qk(x).unflatten(-1, (HEADS, -1))
    choices = layer(x).choices
    assert layer.factors_for(150) == (8, 16)
    assert int(choices.max()) > 64
    assert choices[0, 1, ..., 0].tolist() == hash_document(layer, q[0, :, 1], 1)


def test_rotations_of_fewer_are_the_first_of_more():
    more = hashing.seeded_rotations(3, HEADS, 4, 5, (16, 32))
    fewer = hashing.seeded_rotations(3, HEADS, 2, 5, (8,))
    assert torch.equal(more[0][:, :, :2, :4], fewer[0])
    assert not torch.equal(more[0], hashing.seeded_rotations(4, HEADS, 4, 5, (16, 32))[0])
    assert not torch.equal(more[0], more[1][..., :8])


def test_near_tokens_share_buckets_more_often():
    """What makes it locality-sensitive: a small angle rarely changes the bucket, a random pair rarely agrees."""
    q = torch.randn(500, 1, 16, dtype=torch.float64)
    rotations = hashing.seeded_rotations(0, 1, 4, 16, (16,))
    mine = hashing.hash_tokens(q, rotations, (16,))
    near = hashing.hash_tokens(q + 0.1 * torch.randn_like(q), rotations, (16,))
    far = hashing.hash_tokens(q.roll(1, 0), rotations, (16,))
    assert float((mine == near).double().mean()) > 0.8
    assert float((mine == far).double().mean()) < 0.15
    assert torch.equal(mine, hashing.hash_tokens(7 * q, rotations, (16,)))


def test_more_rounds_come_nearer_to_dense_attention():
    x = data(1, 200)
    whole = build(chunk=256)(x).hidden
    errors = []
    for rounds in (1, 4, 16):
        hidden = build(rounds=rounds, chunk=8, correct_duplicates=True)(x).hidden
        errors.append(float((hidden - whole).norm().detach()))
    assert errors[0] > 1.2 * errors[1] > 1.4 * errors[2]


# --- causality, padding, documents -----------------------------------------------------------------------------------


def test_no_gradient_from_the_future():
    for options in ({}, {"wrap": "reference"}, {"look_ahead": 1}, {"correct_duplicates": True}):
        x = data(1, 37).requires_grad_()
        hidden = build(**options)(x).hidden
        (grad,) = torch.autograd.grad(hidden[:, :20].square().sum(), x)
        assert bool((grad[:, 20:] == 0).all())
        assert bool((grad[:, :20] != 0).any(-1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_future_values_never_leak(dtype: torch.dtype):
    """With the buckets replayed, the past is bitwise blind, to enormous values too."""
    layer, x = build(dtype), data(2, 37).to(dtype)
    out = layer(x)
    other = x.clone()
    other[:, 20:] = 1e3 * torch.randn_like(x[:, 20:])
    assert torch.equal(layer(other, choices=out.choices).hidden[:, :20], out.hidden[:, :20])
    assert not torch.equal(layer(other, choices=out.choices).hidden[:, 20:], out.hidden[:, 20:])


@pytest.mark.parametrize("causal", [True, False])
def test_padding_never_matters(causal: bool):
    layer = build(causal=causal)
    for _, tokens in layouts(23):
        x = data(len(tokens.valid), 23)
        clean = layer(x, tokens)
        dirty = layer(torch.where(tokens.valid[..., None], x, torch.nan).requires_grad_(), tokens)
        assert torch.equal(clean.hidden, dirty.hidden)
        assert torch.equal(clean.choices, dirty.choices)
        for row, valid in enumerate(tokens.valid):
            alone = Tokens.of(valid[None, valid], document=tokens.document[row : row + 1, valid])
            expected = layer(x[row : row + 1, valid], alone).hidden
            torch.testing.assert_close(clean.hidden[row : row + 1, valid], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"wrap": "reference"}, {"causal": False}, {"correct_duplicates": True}], ids=str
)
def test_documents_in_a_row_equal_documents_apart(options: dict):
    """Of 1, 30 and 9 tokens: each with chunks, a bucket count and a wrap of its own."""
    layer, x = build(**options), data(1, 40)
    document = torch.tensor([0] + [1] * 30 + [4] * 9)[None]
    together = layer(x, Tokens.of(torch.ones(1, 40, dtype=torch.bool), document=document))
    for part in (slice(0, 1), slice(1, 31), slice(31, 40)):
        apart = layer(x[:, part])
        assert torch.equal(together.choices[..., part, :], apart.choices)
        torch.testing.assert_close(together.hidden[:, part], apart.hidden, atol=1e-12, rtol=0)


def test_nothing_but_padding():
    tokens = Tokens.of(torch.zeros(2, 5, dtype=torch.bool))
    layer, x = build(), data(2, 5).requires_grad_()
    out = layer(x, tokens, state=layer.initial_state(2))
    assert bool((out.hidden == 0).all())
    assert out.state.columns.filled == 0
    gradient = torch.autograd.grad(out.hidden.sum(), [x, *layer.parameters()], materialize_grads=True)
    assert all(bool((part == 0).all()) for part in gradient)


# --- choices and randomness ------------------------------------------------------------------------------------------


def test_choices_replay():
    layer, x = build(), data(2, 29)
    layer.train()
    first = layer(x)
    assert torch.equal(layer(x, choices=first.choices).hidden, first.hidden)
    assert not torch.equal(layer(x).hidden, first.hidden)
    torch.testing.assert_close(
        first.hidden, reference(layer, x, Tokens.all_valid(2, 29), first.choices), atol=1e-12, rtol=0
    )


def test_evaluation_is_a_function_of_the_seed():
    x = data(1, 29)
    one, other = build(seed=1), build(seed=2)
    torch.manual_seed(0)
    first = one(x).hidden
    torch.manual_seed(1)
    assert torch.equal(one(x).hidden, first)
    assert not torch.equal(other(x).hidden, first)


def test_training_draws_from_the_default_generator():
    layer, x = build().train(), data(1, 29)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(layer(x).hidden)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    fixed = build(resample=False)
    assert torch.equal(fixed(x).hidden, fixed.train()(x).hidden)


def test_checkpointing_replays_the_rotations():
    layer, x = build().train(), data(1, 29).requires_grad_()
    found = []
    for run in (lambda x: layer(x).hidden, lambda x: checkpoint(lambda y: layer(y).hidden, x, use_reentrant=False)):
        torch.manual_seed(4)
        found.append(gradients(layer, x, run(x), torch.ones(1, 29, dtype=torch.bool)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"wrap": "reference"}, {"buckets": 4}, {"correct_duplicates": True}], ids=str)
@pytest.mark.parametrize("cuts", [list(range(1, 35)), [7, 8, 20]], ids=["single steps", "pieces"])
def test_every_call_is_the_tail_of_the_prefix(cuts: list[int], options: dict):
    layer, x = build(**options), data(2, 35)
    tokens = Tokens.all_valid(2, 35)
    state = layer.initial_state(2)
    for start, stop in zip([0, *cuts], [*cuts, 35]):
        out = layer(x[:, start:stop], tokens.cut(slice(start, stop)), state=state)
        state = out.state
        whole = layer(x[:, :stop])
        assert torch.equal(out.choices, whole.choices[..., start:stop, :])
        torch.testing.assert_close(out.hidden, whole.hidden[:, start:], atol=1e-12, rtol=0)


def test_gradients_through_a_state():
    layer, x = build(), data(2, 23).requires_grad_()
    tokens = Tokens.all_valid(2, 23)
    state = layer(x[:, :16], tokens.cut(slice(0, 16)), state=layer.initial_state(2)).state
    hidden = layer(x[:, 16:], tokens.cut(slice(16, 23)), state=state).hidden
    everything = torch.ones(2, 7, dtype=torch.bool)
    stepwise = gradients(layer, x, hidden, everything)
    whole = gradients(layer, x, layer(x).hidden[:, 16:], everything)
    assert bool((stepwise[0][:, :16] != 0).any())
    for a, b in zip(stepwise, whole):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_large_scores_of_earlier_tokens_do_not_overflow():
    """Their rows are computed beside those of the call, in backward without a log-sum-exp of their own."""
    layer, x = build(torch.float32), 1e4 * data(1, 16).float()
    tokens = Tokens.all_valid(1, 16)
    state = layer(x[:, :12], tokens.cut(slice(0, 12)), state=layer.initial_state(1)).state
    layer(x[:, 12:], tokens.cut(slice(12, 16)), state=state).hidden.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


def test_a_prefix_is_hashed_again_only_when_it_has_doubled(monkeypatch: pytest.MonkeyPatch):
    hashed = []
    original = hashing.hash_tokens

    def counting(q, rotations, factors):
        hashed.append((len(q), factors))
        return original(q, rotations, factors)

    monkeypatch.setattr(hashing, "hash_tokens", counting)
    layer, x = build(), data(1, 34)
    state = layer.initial_state(1)
    for step in range(34):
        state = layer(x[:, step : step + 1], Tokens.of(torch.ones(1, 1).bool(), start=step), state=state).state
    again = {8: (4,), 16: (8,), 32: (16,)}
    assert hashed == [(n if n in again else 1, hashing.bucket_factors(n, 4)) for n in range(1, 35)]


def test_a_state_keeps_the_current_document_alone():
    layer, x = build(), data(2, 20)
    document = torch.tensor([[0] * 6 + [1] * 14, [0] * 20])
    tokens = Tokens.of(torch.ones(2, 20, dtype=torch.bool), document=document)
    whole = layer(x, tokens).hidden
    first = layer(x[:, :12], tokens.cut(slice(0, 12)), state=layer.initial_state(2))
    assert first.state.columns.tokens.valid.sum(1).tolist() == [6, 12]
    second = layer(x[:, 12:], tokens.cut(slice(12, 20)), state=first.state)
    torch.testing.assert_close(second.hidden, whole[:, 12:], atol=1e-12, rtol=0)
    assert second.state.columns.tokens.valid.sum(1).tolist() == [14, 20]


def test_a_state_does_not_carry_drawn_or_replayed_buckets():
    """They are functions of one call; the next one hashes the whole prefix alike."""
    layer, x = build(), data(1, 24)
    tokens = Tokens.all_valid(1, 24)
    assert layer.factors_for(17) == layer.factors_for(24)
    begin, end = tokens.cut(slice(0, 17)), tokens.cut(slice(17, 24))
    expected = layer(x).hidden[:, 17:]
    drawn = layer.train()(x[:, :17], begin, state=layer.initial_state(1))
    assert drawn.state.columns.buffers[2].shape[2] == 0
    replayed = layer.eval()(x[:, :17], begin, state=layer.initial_state(1), choices=drawn.choices)
    for state in (drawn.state, replayed.state):
        torch.testing.assert_close(layer(x[:, 17:], end, state=state).hidden, expected, atol=1e-12, rtol=0)
    seeded = layer(x[:, :17], begin, state=layer.initial_state(1)).state
    layer.train()
    torch.manual_seed(6)
    trained = layer(x[:, 17:], end, state=seeded).hidden
    torch.manual_seed(6)
    torch.testing.assert_close(trained, layer(x).hidden[:, 17:], atol=1e-12, rtol=0)


def test_replay_with_a_state():
    layer, x = build(), data(1, 24)
    tokens = Tokens.all_valid(1, 24)
    whole = layer(x)
    state = layer(x[:, :15], tokens.cut(slice(0, 15)), state=layer.initial_state(1)).state
    out = layer(x[:, 15:], tokens.cut(slice(15, 24)), state=state, choices=whole.choices[..., 15:, :])
    torch.testing.assert_close(out.hidden, whole.hidden[:, 15:], atol=1e-12, rtol=0)


def test_rounds_are_adjustable():
    layer, x = build(rounds=1), data(1, 24)
    tokens = Tokens.all_valid(1, 24)
    state = layer(x[:, :15], tokens.cut(slice(0, 15)), state=layer.initial_state(1)).state
    layer.rounds = 5
    expected = build(rounds=5)(x).hidden
    assert torch.equal(layer(x).hidden, expected)
    torch.testing.assert_close(
        layer(x[:, 15:], tokens.cut(slice(15, 24)), state=state).hidden, expected[:, 15:], atol=1e-12, rtol=0
    )
    layer.rounds = 0
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        layer(x)


# --- numerics, memory, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": False, "correct_duplicates": True}], ids=str)
def test_gradcheck_with_fixed_buckets(options: dict):
    layer, x = build(**options), data(1, 11).requires_grad_()
    choices = layer(x).choices
    assert torch.autograd.gradcheck(lambda x: layer(x, choices=choices).hidden, x, fast_mode=True)


def test_second_derivatives_need_the_dense_kernel():
    layer, x = build(), data(1, 11).requires_grad_()
    choices = layer(x).choices
    (grad,) = torch.autograd.grad(layer(x).hidden.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; kernel=dense"):
        torch.autograd.grad(grad.sum(), x)
    layer.kernel = "dense"
    assert torch.autograd.gradgradcheck(lambda x: layer(x, choices=choices).hidden, x, fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_with_replayed_buckets(causal: bool):
    """Its inputs and weights are rounded; the error stays that of the projections."""
    layer = build(causal=causal)
    small = copy.deepcopy(layer).to(torch.bfloat16)
    rounded = copy.deepcopy(small).to(torch.float64)
    x = data(2, 101).to(torch.bfloat16)
    exact = rounded(x.double())
    out = small(x, choices=exact.choices)
    assert out.hidden.dtype == torch.bfloat16
    error = (out.hidden.double() - exact.hidden).norm() / exact.hidden.norm()
    assert bool(error < 0.01)


def test_autocast_computes_the_core_in_float32():
    layer, x = build(torch.float32), data(1, 50).float().requires_grad_()
    choices = layer(x).choices
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x, choices=choices).hidden
        hidden.float().square().sum().backward()
    expected = layer(x, choices=choices).hidden
    assert hidden.dtype == torch.bfloat16
    assert bool((hidden - expected).norm() / expected.norm() < 0.02)
    assert bool(x.grad.isfinite().all())


def test_memory_grows_linearly():
    """Above lengths at which blocks of heads have their full size. Nothing as large as tokens x window is kept."""
    layer = Reformer(dim=32, heads=2, chunk=16)
    peaks = []
    for length in (16384, 32768):
        x = torch.randn(1, length, 32, requires_grad=True)
        peaks.append(peak_memory(lambda x=x: layer(x).hidden.sum().backward()).peak_bytes)
    assert peaks[1] < 2.1 * peaks[0]
    assert peaks[1] < 32768 * 4 * 32 * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"chunk": -4}, "chunk must be an integer of at least 1, got -4"),
        ({"look_back": -1}, "look_back must be an integer of at least 0, got -1"),
        ({"look_ahead": 0.5}, "look_ahead must be an integer of at least 0, got 0.5"),
        ({"buckets": 7}, "buckets must be an even number of at least 2, or two of them, got 7"),
        ({"buckets": [4, 4, 4]}, "buckets must be an even number of at least 2, or two of them"),
        ({"buckets": True}, "buckets must be an even number of at least 2, or two of them, got True"),
        ({"wrap": "ring"}, "wrap must be one of row, reference, got 'ring'"),
        ({"kernel": "flash"}, "kernel=flash is not supported: it has no such kernel"),
        ({"key_norm_epsilon": -1.0}, "key_norm_epsilon must be at least 0, got -1.0"),
        ({"cross": True, "causal": False}, "cross=True is not supported"),
        ({"kv_heads": 1}, "kv_heads=1 is not supported"),
        ({"positions": "rotary"}, "positions=rotary is not supported"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build(**options)


def test_wrong_calls_are_refused():
    layer, x = build(), data(1, 6)
    with pytest.raises(
        ValueError,
        match=r"choices must be buckets of shape \(1, 3, 2, 6, 1\), got torch.int32 of shape \(1, 3, 2, 5, 1\)",
    ):
        layer(x, choices=layer(x[:, :5]).choices)
    two_sided = build(causal=False)
    with pytest.raises(Unsupported, match="two-sided attention needs all tokens in one call"):
        two_sided(x, Tokens.all_valid(1, 6), state=two_sided.initial_state(1))


def test_given_queries_and_values_make_the_layer_without_its_projections():
    layer, x = build(), data(2, 21)
    valid = torch.arange(21) < torch.tensor([[21], [13]])
    tokens = Tokens.of(valid)
    want = layer(x, tokens)
    qk, v = (project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for project in (layer.to_qk, layer.to_v))
    for choices in (None, want.choices):
        got = layer.to_out(layer.attend(qk, v, tokens, choices=choices).transpose(1, 2).flatten(2))
        assert torch.allclose(got[valid], want.hidden[valid], atol=1e-12)
    assert not layer.attend(qk, v, tokens).transpose(1, 2)[~valid].any()
    with pytest.raises(ValueError, match="qk and v must both be"):
        layer.attend(qk, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"tokens must have shape \(2, 21\), got \(2, 20\)"):
        layer.attend(qk, v, tokens.cut(slice(0, 20)))


def test_tokens_with_rotations_of_their_own_hash_as_each_kind_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(40, 2, 8, generator=generator, dtype=torch.float64)
    counts, kind = (4, 10), torch.randint(0, 2, (40,), generator=generator)
    kinds = [[torch.randn(2, 8, 3, count // 2, generator=generator, dtype=torch.float64)] for count in counts]
    found = hashing.hash_kinds(q, kinds, kind)
    for number, (rotations, count) in enumerate(zip(kinds, counts)):
        some = kind == number
        assert torch.equal(found[:, :, some], hashing.hash_tokens(q[some], rotations, (count,)))
