"""Every kernel of the shared pattern base equals the definition, whatever the layout of the batch."""

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens, Unsupported
from attention_zoo.attention.full import Full
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.reach import Band, Blocks, Either
from attention_zoo.ops.pattern import facts, short_band

B = 3


def ragged(L, side):
    lengths = torch.tensor([L, max(1, L // 2), 1])[:, None]
    column = torch.arange(L)[None]
    return column < lengths if side == "right" else column >= L - lengths


def layout(kind, L, some_global):
    g = torch.Generator().manual_seed(L)
    if kind in ("right", "left"):
        valid = ragged(L, kind)
    else:
        valid = torch.rand(B, L, generator=g) < {"holes": 0.6, "packed": 0.9, "plain": 2.0}[kind]
    flags = valid & (torch.rand(B, L, generator=g) < 0.1) if some_global else None
    document = torch.randint(0, 2, (B, L), generator=g).cumsum(1) // 4 if kind == "packed" else None
    return Tokens.of(valid, flags, document)


def build(name, **options):
    torch.manual_seed(0)
    tiny = {"longformer": {"window": 5, "dilation": (1, 2)}, "full": {}}[name]
    layer = zoo.build(name, dim=16, heads=2, **tiny, **options).double()
    layer.tile = 8
    return layer


def run(layer, kernel, x, tokens):
    layer.kernel = kernel
    out = layer(x, tokens).hidden
    assert torch.isfinite(out).all()
    out = out[tokens.valid]
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], allow_unused=True)
    return out, grads


KINDS = ["plain", "right", "left", "holes", "packed"]
POSITIONS = ["none", "rotary", "alibi"]


@pytest.mark.parametrize(
    ("causal", "kind", "positions"),
    # every pair of two, not every triple
    [((i + j) % 2 == 0, kind, scheme) for i, kind in enumerate(KINDS) for j, scheme in enumerate(POSITIONS)],
)
@pytest.mark.parametrize("name", ["full", "longformer"])
def test_every_kernel_is_the_definition(name, causal, kind, positions):
    layer = build(name, causal=causal, positions=positions, kv_heads=1)
    for L in (1, 7, 8, 17, 50):
        for some_global in (False, True):
            tokens = layout(kind, L, some_global)
            x = torch.randn(B, L, 16, dtype=torch.float64, requires_grad=True)
            want, want_grads = run(layer, "dense", x, tokens)
            for kernel in ("auto", "tiles"):
                got, grads = run(layer, kernel, x, tokens)
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
                for a, b in zip(grads, want_grads):
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def chosen(layer, tokens, L=20, S=20):
    q, k = torch.randn(B, 2, L, 8), torch.randn(B, 2, S, 8)
    keys = tokens
    queries = keys.cut(slice(S - L, None))
    return next(name for name, reason in layer.explain(q, k, k, queries, keys) if reason is None)


def test_auto_picks_the_fastest_exact_kernel(monkeypatch):
    full, window = build("full").float(), build("longformer").float()
    for kind in ("plain", "right", "left", "packed"):
        assert chosen(full, layout(kind, 20, False)) == "sdpa"
    monkeypatch.setattr(facts, "MASK", B * 20 * 20 - 1)  # the mask that left padding and documents need is too large
    assert chosen(full, layout("plain", 20, False)) == "sdpa"
    assert chosen(full, layout("right", 20, False)) == "sdpa"
    assert chosen(full, layout("left", 20, False)) == "tiles"
    assert chosen(full, layout("packed", 20, False)) == "tiles"
    for kind in ("plain", "right", "left", "packed", "holes"):
        assert chosen(window, layout(kind, 20, True)) == "short"
    monkeypatch.setattr(short_band, "KEYS", 19)
    for kind in ("plain", "right", "left", "packed"):
        tokens = layout(kind, 20, True)
        contiguous = kind != "packed" or bool(tokens.valid.all())
        assert chosen(window, tokens) == ("banded" if contiguous else "tiles")
    assert chosen(window, layout("holes", 20, False)) == "tiles"


def test_a_named_kernel_runs_or_says_why_not(monkeypatch):
    layer = build("full", kernel="sdpa")
    monkeypatch.setattr(facts, "MASK", 0)
    tokens = layout("left", 20, False)
    with pytest.raises(Unsupported, match=r"full: kernel=sdpa.*cannot hide padding on the left.*kernel=auto"):
        layer(torch.randn(B, 20, 16, dtype=torch.float64), tokens)
    with pytest.raises(
        Unsupported, match=r"longformer: kernel=flash is not supported.*banded or xformers or tiles or dense"
    ):
        zoo.build("longformer", dim=16, heads=2, kernel="flash")


def test_fused_full_attention_never_materialises_its_mask():
    layer = zoo.build("full", dim=16, heads=2, causal=False)
    L = 2048
    tokens = Tokens.of(torch.arange(L)[None] < torch.tensor([[L], [L - 300]]))
    x = torch.randn(2, L, 16)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        layer(x, tokens)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest < L * L, f"one operator allocated {largest} bytes, as much as a boolean L x L"


def test_separate_global_projections_start_as_copies_and_are_used():
    layer, shared = (build("longformer", global_projections=kind) for kind in ("separate", "shared"))
    shared.load_state_dict(layer.state_dict(), strict=False)
    tokens, x = layout("right", 17, True), torch.randn(B, 17, 16, dtype=torch.float64)
    before = layer(x, tokens).hidden
    torch.testing.assert_close(before, shared(x, tokens).hidden)
    with torch.no_grad():
        layer.to_v_global.weight.add_(1.0)
    moved = (layer(x, tokens).hidden - before).abs().amax(-1) > 1e-9
    assert torch.equal(moved, tokens.is_global & tokens.valid)


def test_a_mask_in_place_of_tokens_is_one_clear_error():
    layer, x = build("full"), torch.randn(2, 5, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Tokens.of\(valid\) from a bool mask .* got a tensor of shape \(2, 5, 5\)"):
        layer(x, torch.ones(2, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tokens must be of shape \(2, 5\) like the input, got \(2, 4\)"):
        layer(x, Tokens.all_valid(2, 4))


@pytest.mark.parametrize(
    "name", ["near", "strides", "shift_invariant", "unweighted", "counts_keys", "kernels", "links_blocks"]
)
def test_what_patterns_said_before_there_was_reach_is_refused_with_the_new_form(name: str) -> None:
    with pytest.raises(Unsupported, match=rf"the class attribute {name} .*; use reach.* instead"):
        type("Old", (Full,), {"name": "old", name: None})


def test_a_reach_that_is_a_number_is_refused_with_the_new_form() -> None:
    class Old(Full):
        name = "old"
        reach = 7  # type: ignore[assignment]

    with pytest.raises(Unsupported, match=r"reach=7 is not supported: .*; use reach = Band\(7\)"):
        Old(dim=16, heads=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Band(None), "Band: back must be a whole number from 0 to"),
        (lambda: Band(3, stride=None), "Band: stride must be a whole number from 1 to"),
        (lambda: Blocks(4, lambda row, blocks: (row, row), 1, whole=3), "Blocks: whole must be a function"),
        (lambda: Band(()), "Band: back must be a whole number from 0 to"),
        (lambda: Band(4, first=(1, 2)), "Band: first must be a whole number"),  # type: ignore[arg-type]
        (lambda: Band(4, in_cache=True), "Band: in_cache needs first tokens"),
        (lambda: Band(4, weights="unifrom"), "weights must be one of uniform, counts, distance, any, got 'unifrom'"),
        (lambda: Band(2) | 3, "a reach can be joined with another one, got 3"),
        (lambda: Blocks(0, lambda row, blocks: (row, row), 2), "Blocks: size must be a whole number from 1 to"),
        (lambda: Blocks(8, None, 2), "Blocks: links must be a function"),  # type: ignore[arg-type]
        (lambda: Band(10**30), "Band: back must be a whole number from 0 to 2147483647"),
        (lambda: Band(4, first=1, weights="uniform", in_cache=1), "Band: in_cache must be true or false, got 1"),
        (lambda: Blocks(4, lambda row, blocks: (row, row), 10**30), "Blocks: most must be a whole number from 1 to"),
        (
            lambda: Blocks(4, lambda row, blocks: (row, row), 1, knows_length="x"),
            "Blocks: knows_length must be true or false, got 'x'",
        ),
        (lambda: Either(()), "Either: parts must be one or more reaches"),
        (lambda: Either((3,)), "Either: parts must be one or more reaches"),
        (lambda: Band((1, 2)) | Band((1, 2, 3)), "Either: its bands must be of the same heads, got \\[2, 3\\] of them"),
    ],
)
def test_a_reach_that_cannot_be_is_refused_when_it_is_made(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_band_of_other_heads_is_refused_when_the_layer_is_built() -> None:
    class Three(Full):
        name = "three"
        reach = Band((1, 2, 3))

    with pytest.raises(ValueError, match="reach must say one number, or one for each of 4 heads"):
        Three(dim=16, heads=4)


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_every_reason_can_be_asked_of_more_queries_than_keys(name: str) -> None:
    layer = zoo.build(name, dim=16, heads=2, causal=False)
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 3, 8)
    reasons = dict(layer.explain(q, k, k, Tokens.all_valid(2, 9), Tokens.all_valid(2, 3)))
    assert reasons["dense"] is None
    assert "sdpa" in reasons or "there are no queries, or more than keys" in str(reasons["short"])


def test_the_definition_marks_whatever_tokens_it_is_given() -> None:
    layer = zoo.build("bigbird", dim=16, heads=2, block=4, random=0)
    tokens = Tokens.all_valid(2, 30)
    described = Layout.of(tokens)
    assert torch.equal(layer.full_bias(described, described), layer.full_bias(tokens, tokens))
    assert (layer.full_bias(tokens, tokens)[:, :, 29, 1] == 0).all(), "the first block is seen by all"


def test_tokens_of_another_length_are_refused_also_where_a_model_made_them() -> None:
    """A wrapper of somebody's that hands on fewer vectors must hand on fewer tokens."""
    with pytest.raises(ValueError, match=r"tokens must be of shape \(2, 4\) like the input, got \(2, 8\)"):
        zoo.build("full", dim=16, heads=2)(torch.randn(2, 4, 16), Layout.plain(2, 8))
