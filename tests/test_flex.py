"""FlexAttention for patterns: lists of blocks, layouts and gradients against the definition.

On a CPU torch runs it uncompiled, L x S, and refuses to go back: the refusal is lifted here, so that masks, position
biases and the merge of global keys are proven in both directions; its compiled kernels are for tests/test_cuda.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

import attention_zoo as zoo
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Abilities
from attention_zoo.layout.kernel import unmet
from attention_zoo.ops.pattern import facts, flex, flex_lists
from attention_zoo.ops.pattern.flex_joined import Joined, filled, joined, taken
from attention_zoo.ops.pattern.near import needed_pairs

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_cuda.py runs it compiled"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of torch, that this way is slow
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()


class Weighted(PatternAttention):
    """Sees neighbours, and counts those at even distances twice."""

    name = "weighted"
    declared = Abilities(
        causality="strict", carry="prefix", two_sided=True, global_tokens="any", cross=False,
        compute="quadratic", activations="linear", state="linear", positions=("none", "alibi"),
    )  # fmt: skip

    def bias(self, queries, keys):
        gap = (queries.position[:, :, None] - keys.position[:, None, :])[:, None].abs()
        return torch.where(gap % 2 == 0, math.log(2), 0.0).masked_fill(gap > 9, -torch.inf)


def tokens_of(layout: str, length: int) -> zoo.Tokens:
    valid = torch.ones(2, length, dtype=torch.bool)
    flags = document = None
    if layout == "many global, in one row":
        valid[0, :7], flags = False, torch.zeros_like(valid)
        flags[0, 9:40:2] = True  # more than a block of them
    if layout == "left":
        valid[1, : length // 3] = False
    if layout == "holes, documents, global":
        valid[0, 3::7] = False
        document = torch.arange(length)[None] // torch.tensor([[length // 2 + 1], [length]])
        flags = torch.zeros_like(valid)
        flags[:, 5] = flags[:, length - 4] = True
    return zoo.Tokens.of(valid, flags, document)


LAYOUTS = "all", "left", "holes, documents, global", "many global, in one row"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("longformer", {"window": 20, "kv_heads": 1}),
        ("longformer", {"window": 5, "dilation": 3, "causal": False, "positions": "alibi"}),
        ("longformer", {"window": 5, "dilation": [1, 3], "sink_logit": True}),
        ("longformer", {"window": 5, "dilation": [2, 1], "causal": False, "positions": "alibi"}),
        ("longformer", {"window": 5, "sinks": 3, "positions": "alibi", "sink_logit": True}),
        ("longformer", {"window": 5, "causal": False, "sink_logit": True, "global_projections": "shared"}),
        ("full", {"positions": "alibi"}),
        ("full", {"causal": False}),
        ("full", {"sink_logit": True, "kv_heads": 1}),
        ("weighted", {"causal": False, "positions": "alibi"}),
    ],
    ids=lambda value: str(value),
)
def test_equals_the_definition(name: str, options: dict, layout: str) -> None:
    shared = {"dim": 32, "heads": 2, **options}
    layer = Weighted(**shared) if name == "weighted" else zoo.build(name, **shared)
    length = 61
    tokens = tokens_of(layout, length)
    if layer.sink is not None:
        layer.sink.data = torch.tensor([0.7, -0.3])
    x = torch.randn(2, length, 32, requires_grad=True)
    call, own = call_of(layer, x, tokens)
    inside = tokens.valid[:, None, :, None]
    weight = torch.randn_like(call.q) * inside
    want = layer.attend(call.q, call.k, call.v, tokens, tokens, kernel="dense", **own)
    got = flex.FLEX.run(call)
    torch.testing.assert_close(got * inside, want * inside, atol=2e-5, rtol=2e-5)
    inputs = [x] if layer.sink is None else [x, layer.sink]
    for mine, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (got, want))
    ):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=5e-5)


def call_of(layer: PatternAttention, x: torch.Tensor, tokens: zoo.Tokens) -> tuple:
    """The call of a layer on hidden states, and what `attend` takes for global rows beside it."""
    q, k, v = (layer._heads(project(x)) for project in (layer.to_q, layer.to_k, layer.to_v))
    call = layer._call(q, k, v, tokens, tokens, None)
    if not layer.computes_apart:
        return call, {}
    projections = layer.to_q_global, layer.to_k_global, layer.to_v_global
    call.apart, second = True, tuple(layer._heads(project(x)) for project in projections)
    call.second = second if call.queries.any_global else None
    return call, {"global_qkv": second}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "three global"])
@pytest.mark.parametrize("options", [{"global_projections": "shared"}, {}], ids=str)
def test_lists_hold_what_rows_of_global_queries_see(options: dict, layout: str, causal: bool, monkeypatch) -> None:
    """Against the mask of each pair, which torch asks on a CPU without any lists."""
    layer = zoo.build("longformer", dim=32, heads=2, window=7, causal=causal, **options)
    x, given, attend = torch.randn(2, 200, 32), [], flex.attend
    if layout == "three global":  # blocks without any, before, between and behind what one block of rows holds
        flags = torch.zeros(2, 200, dtype=torch.bool)
        flags[:, [50, 100, 150]] = True
        tokens = zoo.Tokens.of(torch.ones_like(flags), flags)
    else:
        tokens = tokens_of(layout, 200)
    monkeypatch.setattr(flex, "attend", lambda *args: given.append(args) or attend(*args))
    flex.FLEX.run(call_of(layer, x, tokens)[0])
    ((q, k, _, lists, (mask, _), _),) = given
    seen = torch_flex.create_mask(mask, 2, 1, q.shape[2], k.shape[2], device="cpu")
    seen = seen[:, 0].unflatten(2, (-1, 16)).unflatten(1, (-1, 16))  # [B, n, 16, m, 16]
    needed, entirely = seen.any(4).any(2).any(0), seen.all(4).all(2).all(0)
    part, back, whole, whole_back = (listed(one, needed.shape[1 - n % 2]) for n, one in enumerate(lists))
    assert torch.equal(part, back.T)
    assert torch.equal(whole, whole_back.T)
    assert not (part & whole).any(), "a block is visited once"
    assert (part | whole | ~needed).all(), "a block with a visible pair is missing"
    rows = flex.bucket(200) // 16
    assert (entirely | ~whole)[:rows].all(), "a block that is not seen whole needs its mask"
    # fillers behind rows of global queries see nothing by the mask, and what they see otherwise is thrown away
    idle = ~seen.any(4).any(3)  # [B, n, 16]
    entirely = (seen | idle[..., None, None]).all(4).all(2).all(0)
    assert (entirely | ~whole)[rows:].all(), "of rows of global queries, too"
    assert not call_of(layer, x, tokens)[0].queries.any_global or len(needed) > rows


def test_fillers_of_global_rows_meet_no_padding() -> None:
    """What they give is thrown away, but NaN times zero is NaN in the gradients of what they met."""
    layer = zoo.build("full", dim=32, heads=2, causal=False)
    valid, flags = torch.ones(2, 61, dtype=torch.bool), torch.zeros(2, 61, dtype=torch.bool)
    valid[:, :16], flags[0, 20] = False, True
    tokens = zoo.Tokens.of(valid, flags)
    call, _ = call_of(layer, torch.randn(2, 61, 32), tokens)
    plan, queries, keys = flex._places(call, call.keys)
    lists = flex.both_sides(call, 16, plan.rows // 16, plan.columns // 16, 1, flex_lists.Asking(1, 0))
    whole = listed(lists.whole_forth, lists.whole_back.number.shape[-1])
    assert not whole[plan.rows // 16 :].any(), "the second row of the batch has fillers alone"
    assert queries.position.shape[1] == plan.rows + 16
    assert keys.position.shape[1] == plan.columns + 16


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_a_sinks_share_has_the_gradients_of_its_formula(size: float, with_rows: bool) -> None:
    """In float64; of rows that see nothing, too, and of sinks that take all or nothing."""
    out, lse = torch.randn(2, 3, 20, 4).double(), torch.randn(2, 3, 20).double() * size
    lse[0, :, 4] = -torch.inf
    out[0, :, 4] = 0
    sink = torch.randn(3).double() * size
    back = torch.arange(15).expand(2, 15).clone()
    back[0, 7] = 18
    index = back[:, None, :, None].expand(-1, 3, -1, 4) if with_rows else None
    plan, inputs, found = Joined(20, None, 20, None, 0, index), [out, lse, sink], []
    for run in (taken, lambda out, lse, sink, plan, length: by_formula(out, lse, sink, index, length)):
        leaves = [each.clone().requires_grad_() for each in inputs]
        given = run(*leaves, plan, 15)
        found.append([given, *torch.autograd.grad(given.sin().sum(), leaves)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        assert a.isfinite().all()


def by_formula(out, lse, sink, index, length: int) -> torch.Tensor:
    shared = out * (lse.clamp(min=-1e30) - sink[:, None]).sigmoid()[..., None]
    return shared[:, :, :length] if index is None else shared.gather(2, index)


@pytest.mark.parametrize("second", [False, True])
def test_joined_operands_have_the_gradients_of_their_copies(second: bool) -> None:
    """In float64: rows behind others, and where they were taken from."""
    q, k, v, q2, k2, v2 = (torch.randn(2, heads, 5, 4).double() for heads in (2, 1, 1, 2, 1, 1))
    asking, marked = (torch.tensor([[4, 0], [1, 3]])[:, None, :, None].expand(-1, heads, -1, 4) for heads in (2, 1))
    plan = Joined(8, asking, 6, marked, 7 if second else 0, None)

    def copies(q, k, v, q2, k2, v2):
        queries = torch.cat([filled(q, 8), (q2 if second else q).gather(2, asking)], 2)
        pairs = ((k, k2), (v, v2))
        behind = [[filled(b, 7)] if second else [] for _, b in pairs]
        keys = [torch.cat([filled(a, 6), a.gather(2, marked), *rest], 2) for (a, _), rest in zip(pairs, behind)]
        return queries, *keys

    found = []
    for run in (lambda *x: joined(*x[:3], plan, x[3:] if second else None), copies):
        leaves = [each.clone().requires_grad_() for each in (q, k, v, q2, k2, v2)]
        given = run(*leaves)
        used = leaves if second else leaves[:3]
        found.append([*given, *torch.autograd.grad(sum(each.sin().sum() for each in given), used)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def listed(lists: flex_lists.BlockLists, columns: int) -> torch.Tensor:
    """Which blocks are in lists that are those of all heads."""
    found = torch.zeros(lists.number.shape[-1], columns, dtype=torch.bool)
    for row, count in enumerate(lists.number[0, 0].tolist()):
        found[row, lists.blocks[0, 0, row, :count].long()] = True
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["all", "left"])
def test_spans_that_heads_learn_are_one_call(layout: str, causal: bool) -> None:
    layer = zoo.build("adaptive_span", dim=32, heads=2, causal=causal, limit=100, ramp=8)
    layer.span.data = torch.tensor([0.02, 0.3])
    tokens = tokens_of(layout, 61)
    q, k, v = (torch.randn(2, 2, 61, 16, requires_grad=True) for _ in range(3))
    call = layer._call(q, k, v, tokens, tokens, None)
    inside = tokens.valid[:, None, :, None]
    weight, inputs = torch.randn_like(q) * inside, (q, k, v, layer.span)
    want = layer.attend(q, k, v, tokens, tokens, kernel="dense")
    got = flex.FLEX.run(call)
    torch.testing.assert_close(got * inside, want * inside, atol=2e-5, rtol=2e-5)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("L", "S"), [(1, 1), (16, 16), (61, 61), (17, 90), (130, 130)])
def test_lists_hold_every_pair_that_is_seen_and_are_no_wider_than_needed(L: int, S: int, causal: bool) -> None:
    layer = zoo.build("longformer", dim=16, heads=1, window=20, causal=causal)
    q, k = torch.zeros(1, 1, L, 16), torch.zeros(1, 1, S, 16)
    call = layer._call(q, k, k, None, None, None)
    rows, columns = flex.bucket(L) // 16, flex.bucket(S) // 16
    seen = layer.full_bias(call.queries, call.keys)[0, 0] > -torch.inf
    needed = torch.zeros(rows, columns, dtype=torch.bool)
    for i, j in seen.nonzero().tolist():
        needed[i // 16, j // 16] = True
    assert facts.is_band(layer) is None
    assert call.aligned, "or both ways would be one"
    row, column = needed_pairs(call, 16)
    mine = flex_lists._pairs(call, 16, rows, columns)
    assert {*zip(*map(list, mine))} <= {*zip(row.tolist(), column.tolist())}
    part, part_back, whole, whole_back = flex.both_sides(call, 16, rows, columns)
    everything = torch.zeros(rows * 16, columns * 16, dtype=torch.bool)
    everything[:L, :S] = seen
    entirely = everything.view(rows, 16, columns, 16).all(3).all(1)
    for some, all_, want, every in ((part, whole, needed, entirely), (part_back, whole_back, needed.T, entirely.T)):
        listed, full = (torch.zeros_like(want, dtype=torch.int) for _ in range(2))
        for lists, into in ((some, listed), (all_, full)):
            for n, count in enumerate(lists.number[0, 0].tolist()):
                into[n].index_add_(0, lists.blocks[0, 0, n, :count], torch.ones(count, dtype=torch.int))
            assert lists.blocks.shape[-1] <= 8, "lists are as wide as the longest, whatever the length"
        assert int((listed + full).max()) <= 1, "a block is visited once"
        assert ((listed + full).bool() | ~want).all(), "a block with a visible pair is missing"
        assert torch.equal(full.bool(), every), "blocks that are seen whole, and no others, need no mask"
        assert int(((listed + full).bool() & ~want).sum()) <= 2 * len(want), "blocks in vain"


def test_lengths_fall_into_few_buckets(monkeypatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 128)
    sizes = {flex.bucket(length) for length in range(1, 65537)}
    assert len(sizes) <= 4 * 10
    for length in (1, 127, 128, 129, 1000, 12289, 40000, 65536):
        found = flex.bucket(length)
        assert found % 128 == 0
        assert length <= found <= max(128, 1.25 * length + 128)


def test_the_table_of_blocks_grows_with_the_length_and_not_with_its_square() -> None:
    layer = zoo.build("longformer", dim=16, heads=1, window=20)
    sizes = []
    for length in (512, 1024, 2048):
        q = torch.zeros(1, 1, length, 16)
        lists = flex.both_sides(layer._call(q, q, q, None, None, None), 16, length // 16, length // 16)
        sizes.append(sum(one.blocks.numel() for one in lists))
    assert sizes[1] == 2 * sizes[0]
    assert sizes[2] == 4 * sizes[0]


def test_it_refuses_with_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 128)
    layer = zoo.build("longformer", dim=32, heads=2, kernel="flex")
    with pytest.raises(
        zoo.Unsupported, match=r"kernel=flex is not.*flex: it runs on CUDA, not on cpu: there it has no backward"
    ):
        layer(torch.zeros(1, 200, 32))
    q = torch.zeros(1, 2, 200, 16)

    def reason(name, q, **options):
        layer = zoo.build(name, dim=32, heads=q.shape[1], **options)
        return "; ".join(unmet(flex.FITS, layer._call(q, q, q, None, None, None)))

    assert not reason("longformer", q)
    assert not reason("full", q, causal=False)
    assert "float64" in reason("longformer", q.double())
    assert not reason("longformer", q, dilation=[1, 2])
    assert not reason("longformer", q, dilation=[1, 2], sinks=2)
    assert not reason("longformer", q[..., :8])
    assert not reason("longformer", q[:, :, :2])
    assert "fewer than 2" in reason("longformer", q[:, :, :1])
