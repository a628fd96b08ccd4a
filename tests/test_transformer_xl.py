"""Transformer-XL against the loop over segments, its state, its memory and its speed paths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from count_reads import Count
from references.transformer_xl import reference
from torch import Tensor

import attention_zoo as zoo
from attention_zoo.attention import transformer_xl
from attention_zoo.attention.transformer_xl import TransformerXL
from attention_zoo.contract import Tokens, Unsupported, keep
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns
from attention_zoo.measure.memory import peak_memory
from attention_zoo.ops.relative import chunks
from attention_zoo.ops.relative.call import KERNELS, RelativeCall
from attention_zoo.ops.softmax.dense import dense

DIM, HEADS = 12, 3


def build(segment: int = 5, memory: int = 4, dtype: torch.dtype = torch.float64, **options) -> TransformerXL:
    """Weights large enough to make sharp distributions; u and v far from zero."""
    generator = torch.Generator().manual_seed(1)
    options = {"dim": DIM, "heads": HEADS, **options}
    layer = TransformerXL(segment_length=segment, memory_length=memory, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    return layer.to(dtype)


def data(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layouts(length: int) -> Iterator[tuple[str, Tokens]]:
    """Rows of tokens as they may lie in a batch."""
    column = torch.arange(length)[None]
    count = torch.tensor([[length], [-(-2 * length // 3)], [-(-length // 4)]])
    yield "whole", Tokens.all_valid(2, length)
    yield "padded right", Tokens.of(column < count)
    yield "padded left", Tokens.of(column >= length - count)
    holes = torch.ones(3, length, dtype=torch.bool)
    holes[0, 1::3] = False
    holes[1, length // 2 :: 2] = False
    yield "holes", Tokens.of(holes)
    document = column // torch.tensor([[max(1, length // 2)], [3], [length]])
    yield "documents, padded left", Tokens.of(column >= length - count, document=document)
    yield "documents with holes", Tokens.of(holes, document=document)


def gradients(layer: TransformerXL, x: Tensor, out: Tensor, valid: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    return dict(zip(names, torch.autograd.grad((out * weight)[valid].sum(), [x, *layer.parameters()])))


def assert_close(actual: Tensor, expected: Tensor, where: str, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")


def feed(layer: TransformerXL, x: Tensor, tokens: Tokens, cuts: list[int]):
    """Call by call; the state goes from one to the next."""
    state, hidden = layer.initial_state(len(x)), []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        out = layer(x[:, start:stop], tokens.cut(slice(start, stop)), state=state)
        hidden.append(out.hidden)
        state = out.state
    return torch.cat(hidden, 1), state


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries and one head at a time, so that short lengths cross every border of the kernel."""
    monkeypatch.setattr(chunks, "ROWS", 3)
    monkeypatch.setattr(chunks, "TILE", {"cpu": 1})


def compare(layer: TransformerXL, tokens: Tokens, where: str) -> None:
    """Outputs and all gradients against the loop."""
    x = data(*tokens.valid.shape).requires_grad_()
    fast, slow = layer(x, tokens).hidden, reference(layer, x, tokens)
    assert_close(fast[tokens.valid], slow[tokens.valid], where)
    expected = gradients(layer, x, slow, tokens.valid)
    for name, gradient in gradients(layer, x, fast, tokens.valid).items():
        assert_close(gradient, expected[name], f"{where}: gradient of {name}")


# --- one call equals the loop over segments --------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize(("segment", "memory"), [(5, 0), (5, 3), (5, 5), (4, 9), (1, 6), (9, 2)])
def test_one_call_equals_the_loop_over_segments(segment: int, memory: int, same_length: bool) -> None:
    layer = build(segment, memory, same_length=same_length)
    for length in sorted({1, max(1, segment - 1), segment, segment + 1}):
        compare(layer, Tokens.all_valid(1, length), f"length {length}")
    for layout, tokens in layouts(2 * segment + 3):
        compare(layer, tokens, f"length {2 * segment + 3}, {layout}")


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("memory", [0, 3, 9])
def test_gathered_distances_equal_the_loop_too(memory: int) -> None:
    layer = build(5, memory, kernel="gather")
    for layout, tokens in layouts(13):
        compare(layer, tokens, layout)


@pytest.mark.parametrize(("segment", "memory", "length"), [(150, 40, 307), (6, 20, 149)])
def test_one_call_equals_the_loop_at_real_chunk_sizes(segment: int, memory: int, length: int) -> None:
    column = torch.arange(length)[None]
    tokens = Tokens.of(torch.ones_like(column, dtype=torch.bool), document=column // 211)
    compare(build(segment, memory), tokens, f"segment {segment}, length {length}")


def test_without_bias_with_another_scale_and_head_width() -> None:
    layer = build(bias=False, scale=0.4, head_width=6, positions="relative")
    assert {name.rpartition(".")[2] for name, _ in layer.named_parameters()} == {"weight", "u", "v"}
    compare(layer, Tokens.all_valid(2, 13), "options")


@pytest.mark.parametrize("length", [1, 7, 1009, 4096])
def test_default_options_at_any_length(length: int) -> None:
    layer = zoo.build("transformer_xl", dim=64, heads=8)
    x = torch.randn(1, length, 64, requires_grad=True)
    out = layer(x).hidden
    out.sum().backward()
    assert out.shape == x.shape
    assert bool(out.isfinite().all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_shift_equals_gather_at_length_and_refuses_gaps() -> None:
    x = data(2, 1500)
    tokens = Tokens.of(torch.arange(1500)[None] >= torch.tensor([[0], [333]]))
    shift, gather = (build(300, 200, kernel=kernel)(x, tokens).hidden for kernel in ("shift", "gather"))
    assert_close(shift[tokens.valid], gather[tokens.valid], "shift against gather", 1e-12)
    gaps = Tokens.all_valid(1, 3)._replace(position=torch.tensor([[0, 2, 3]]))
    with pytest.raises(Unsupported, match=r"kernel=shift is not supported: .*; shift: columns are not positions here"):
        build(kernel="shift")(data(1, 3), gaps)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_absorbed_projections_equal_the_loop(bias: bool, same_length: bool) -> None:
    layer = build(5, 4, same_length=same_length, bias=bias, kernel="absorbed")
    for layout, tokens in layouts(13):
        x = data(len(tokens.valid), 13)
        with torch.no_grad():
            for length, out in ((13, layer(x, tokens).hidden), (1, feed(layer, x, tokens, list(range(1, 13)))[0])):
                assert bool(out.isfinite().all())
                expected = reference(layer, x, tokens)
                assert_close(out[tokens.valid], expected[tokens.valid], f"{layout}, {length} at once", 1e-12)
    with pytest.raises(Unsupported, match="kernel=absorbed is not supported: absorbed: it gives no gradients;"):
        layer(x, tokens)


def test_queries_are_few_beside_their_keys() -> None:
    """A short call without a state projects its keys, with gradients or without; a step never does."""
    layer, device = build(512, 512, head_width=64), torch.device("cpu")
    for queries, keys, few in ((1, 1, True), (8, 8, False), (16, 16, False), (8, 1024, True), (64, 1024, False)):
        reason = KERNELS[0].needs[0](RelativeCall(queries, keys, layer.head_width, device, torch.float32))
        assert (reason is None) is few, (queries, keys)


def test_a_step_copies_no_states_for_heads_and_no_matrix_for_rows() -> None:
    """What the largest result of a step is, for more rows and heads than one."""
    layer = build(16, 16, torch.float32, heads=2, head_width=8)
    rows, held = 5, 24
    x, tokens = torch.randn(rows, held + 1, layer.dim), Tokens.all_valid(rows, held + 1)
    with torch.no_grad():
        state = layer(x[:, :-1], tokens.cut(slice(0, held)), state=layer.initial_state(rows)).state
        with torch.profiler.profile(record_shapes=True) as profile:
            layer(x[:, -1:], tokens.cut(slice(held, held + 1)), state=state)
    copied = [e for e in profile.events() if e.name == "aten::bmm" and e.input_shapes[0][0] == rows * layer.heads]
    assert not copied, "heads and rows are batches of one product: either was broadcast"


def test_decoding_does_not_project_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And agrees with a layer that does, in float32 and under autocast."""
    x, tokens, steps = data(2, 11).float(), Tokens.all_valid(2, 11), list(range(1, 11))
    with torch.no_grad():
        expected = build(5, 4, torch.float32, head_width=8, kernel="shift")(x, tokens).hidden
        monkeypatch.delattr(transformer_xl, "streams")
        layer = build(5, 4, torch.float32, head_width=8)
        assert_close(feed(layer, x, tokens, steps)[0], expected, "steps", 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = feed(layer, x, tokens, steps)[0]
    assert float((mixed.float() - expected).norm() / expected.norm()) < 0.02


def test_no_chunk_reads_a_key_in_vain() -> None:
    """Wherever a call begins in a segment, and whatever divides it."""
    for segment, memory in ((512, 512), (300, 100), (16, 40)):
        for start in (0, 7, 511):
            position = start + np.arange(2000)
            border = position - position % segment
            first, own = ((at - start).clip(min=0)[None] for at in (border - memory, border))
            borders = chunks.chunk_borders(2000, segment, start)
            plan = chunks.plan_chunks(first, own, borders, 2000)
            assert [chunk.start for chunk in plan.chunks] + [2000] == borders
            for chunk in plan.chunks:
                assert chunk.stop - chunk.start <= chunks.ROWS
                assert chunk.high - chunk.low <= memory + max(segment, chunks.ROWS)
                if segment >= chunks.ROWS:
                    assert chunk.own == chunk.all_own


def test_derivatives_match_finite_differences() -> None:
    """Of every parameter through memory; of x too where there is none, since a stopped gradient is no derivative."""
    x, valid = data(2, 9), torch.ones(2, 9, dtype=torch.bool)
    valid[1, 3] = False
    tokens = Tokens.of(valid)

    def function(layer: TransformerXL, x: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip((name for name, _ in layer.named_parameters()), values))
        return torch.func.functional_call(layer, parameters, (x, tokens)).hidden[valid]

    layer = build(4, 3)
    assert torch.autograd.gradcheck(lambda *p: function(layer, x, *p), tuple(layer.parameters()), fast_mode=True)
    layer = build(16, 3)
    inputs = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda *p: function(layer, *p), inputs, fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    x = data(1, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(build()(x).hidden.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


# --- what no token may learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["shift", "gather"])
def test_the_past_is_blind_to_the_future(kernel: str) -> None:
    layer, x = build(kernel=kernel), data(2, 23)
    before = layer(x).hidden
    for cut in (1, 5, 12, 22):
        changed = x.clone()
        changed[:, cut:] = 1e3 * data(2, 23 - cut, seed=1)
        assert torch.equal(layer(changed).hidden[:, :cut], before[:, :cut])
        assert not torch.equal(layer(changed).hidden[:, cut:], before[:, cut:])


def test_padding_contents_never_matter() -> None:
    layer = build()
    for layout, tokens in layouts(17):
        x = data(len(tokens.valid), 17)
        outs = []
        for filler in (0.0, 1e6, float("nan")):
            filled = x.masked_fill(~tokens.valid[..., None], filler).requires_grad_()
            out = layer(filled, tokens).hidden
            assert bool(out.isfinite().all()), layout
            outs.append((out[tokens.valid], *gradients(layer, filled, out, tokens.valid).values()))
        for other in outs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outs[0], other)), layout


def test_documents_in_one_row_equal_documents_apart() -> None:
    layer, x = build(), data(1, 20)
    packed = layer(x, Tokens.of(torch.ones(1, 20, dtype=torch.bool), document=(torch.arange(20) // 7)[None])).hidden
    apart = torch.cat([layer(part).hidden for part in x.split(7, 1)], 1)
    assert_close(packed, apart, "documents", 1e-12)


def test_earlier_segments_get_no_gradient_but_their_projections_do() -> None:
    layer, x = build(5, 5), data(1, 10).requires_grad_()
    layer(x).hidden[:, 5:].square().sum().backward()
    assert x.grad is not None
    assert not bool(x.grad[:, :5].any())
    assert bool(x.grad[:, 5:].all())
    blind = build(5, 0)
    blind(x).hidden[:, 5:].square().sum().backward()
    assert layer.to_k.weight.grad is not None
    assert not torch.allclose(layer.to_k.weight.grad, blind.to_k.weight.grad)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("cuts", [[5, 13, 14], [10], list(range(1, 23))], ids=["uneven", "border", "single steps"])
def test_calls_with_a_state_equal_one_call(cuts: list[int], same_length: bool) -> None:
    layer = build(5, 4, same_length=same_length)
    for layout, tokens in layouts(23):
        x = data(len(tokens.valid), 23)
        whole, (pieces, _) = layer(x, tokens).hidden, feed(layer, x, tokens, cuts)
        assert_close(pieces[tokens.valid], whole[tokens.valid], f"{layout} cut at {cuts}", 1e-12)


def test_gradients_of_calls_cut_at_segment_borders_equal_one_call() -> None:
    layer, tokens = build(5, 7), Tokens.all_valid(2, 23)
    x = data(2, 23).requires_grad_()
    whole = gradients(layer, x, layer(x, tokens).hidden, tokens.valid)
    pieces = gradients(layer, x, feed(layer, x, tokens, [5, 10, 20])[0], tokens.valid)
    for name, gradient in pieces.items():
        assert_close(gradient, whole[name], f"gradient of {name}")


@pytest.mark.parametrize(("same_length", "most"), [(False, 5 + 4 - 1), (True, 4)])
def test_the_state_holds_what_the_next_token_sees(same_length: bool, most: int) -> None:
    layer, x = build(5, 4, same_length=same_length), data(1, 40).requires_grad_()
    state = layer.initial_state(1)
    for position in range(40):
        token = Tokens.of(torch.ones(1, 1, dtype=torch.bool), start=position)
        state = layer(x[:, position : position + 1], token, state=state).state
        following = position + 1
        oldest = max(0, following - 4 if same_length else following // 5 * 5 - 4)
        assert state.tokens.position.tolist() == [list(range(oldest, following))]
        assert torch.equal(state.held[0], x[:, oldest:following])
        assert not state.held[0].requires_grad
        assert state.held[0].shape[1] <= most
    assert layer(x).state is None


def test_the_state_forgets_finished_documents() -> None:
    layer, x = build(5, 4), data(2, 12)
    document = torch.tensor([[0] * 9 + [1] * 3, [0] * 12])
    state = layer(
        x, Tokens.of(torch.ones(2, 12, dtype=torch.bool), document=document), state=layer.initial_state(2)
    ).state
    assert state.tokens.valid.tolist() == [[False] * 3 + [True] * 3, [True] * 6]
    assert state.tokens.position[0, 3:].tolist() == [0, 1, 2]


def test_tokens_dropped_from_the_state_are_as_if_masked() -> None:
    layer, x, tokens = build(5, 9), data(1, 19), Tokens.all_valid(1, 19)
    _, state = feed(layer, x[:, :13], tokens.cut(slice(0, 13)), [])
    remaining = torch.rand(state.tokens.valid.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    kept, hidden = keep(remaining, state.tokens, *state.held)
    out = layer(x[:, 13:], tokens.cut(slice(13, None)), state=Columns.of(Layout.of(kept), hidden)).hidden
    valid = torch.ones(1, 19, dtype=torch.bool)
    valid[:, state.tokens.position[~remaining]] = False
    expected = reference(layer, x, tokens._replace(valid=valid))[:, 13:]
    assert 0 < int(remaining.sum()) < remaining.numel()
    assert_close(out, expected, "dropped tokens")


# --- options ---------------------------------------------------------------------------------------------------------


def test_lengths_can_be_changed_after_build() -> None:
    layer, tokens = build(5, 2), Tokens.all_valid(1, 17)
    layer.memory_length = 11
    compare(layer, tokens, "longer memory")
    layer.segment_length, layer.same_length = 3, True
    compare(layer, tokens, "shorter segments, same length")
    layer.memory_length = -1
    with pytest.raises(ValueError, match="memory_length must be an integer of at least 0, got -1"):
        layer(data(1, 17))


def test_u_and_v_are_tied_over_depth_unless_told_otherwise() -> None:
    assert build().shared_over_depth == ("u", "v")
    assert build(untie_r=True).shared_over_depth == ()


def test_pairs_are_counted() -> None:
    # segments of 4, memory 3: positions 0..9 see 1 2 3 4, 4 5 6 7, 4 5 keys
    assert build(4, 3).pairs(10) == 1.5 * 41
    assert build(4, 3, same_length=True).pairs(10) == 1.5 * (1 + 2 + 3 + 4 * 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment_length must be an integer of at least 1, got 0"),
        ({"memory": -1}, "memory_length must be an integer of at least 0, got -1"),
        ({"kernel": "fast"}, "kernel must be one of auto, absorbed, triton, shift, gather, got 'fast'"),
        ({"dim": 9}, "dim must be even"),
        ({"causal": False}, "causal=False is not supported"),
        ({"cross": True, "causal": False}, "cross=True is not supported"),
        ({"kv_heads": 1}, "kv_heads=1 is not supported"),
        ({"positions": "rotary"}, "positions=rotary is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused_at_build(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_calls_are_refused() -> None:
    layer, x = build(), data(1, 4)
    with pytest.raises(Unsupported, match="choices is not supported"):
        layer(x, choices=1)
    with pytest.raises(ValueError, match="tokens must be given with a state"):
        layer(x, state=layer.initial_state(1))
    tokens = Tokens.all_valid(1, 4)
    with pytest.raises(ValueError, match=r"tokens\.position must strictly increase"):
        layer(x, tokens._replace(position=tokens.position.flip(1)))
    with pytest.raises(Unsupported, match="global tokens"):
        layer(x, tokens._replace(is_global=tokens.valid))


def test_copies_and_state_dicts_carry_everything() -> None:
    layer, x = build(), data(1, 13)
    clone = copy.deepcopy(layer)
    other = build(dim=DIM)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(x).hidden, layer(x).hidden)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(clone(x).hidden, layer(x).hidden)
    assert torch.equal(other(x).hidden, layer(x).hidden)


# --- precision and memory --------------------------------------------------------------------------------------------


def materialised(layer: TransformerXL, x: Tensor) -> Tensor:
    """The definition with L x L scores in the layer's own precision; one segment, so that nothing is detached."""
    length = x.shape[1]
    q, k, v = (to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
    r = layer.to_r(layer._waves(length)).unflatten(-1, (layer.heads, -1)).transpose(0, 1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    products = (q + layer.v[:, None]) @ r.transpose(-1, -2)
    bias = products.gather(-1, distance.clamp(min=0).expand_as(products)) * layer.scale
    bias = bias.masked_fill(distance < 0, -torch.inf)
    return layer.to_out(dense(q + layer.u[:, None], k, v, bias, scale=layer.scale).transpose(1, 2).flatten(2))


def test_bfloat16_is_no_worse_than_twice_the_dense_computation() -> None:
    exact = build(300)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    exact = copy.deepcopy(rounded).to(torch.float64)
    x = data(2, 300).to(torch.bfloat16)
    valid = torch.ones(2, 300, dtype=torch.bool)

    def run(layer: TransformerXL, compute) -> dict[str, Tensor]:
        inputs = x.to(layer.u.dtype).requires_grad_()
        out = compute(layer, inputs)
        found = {"hidden": out, **gradients(layer, inputs, out, valid)}
        return {name: value.detach().double() for name, value in found.items()}

    def fast(layer: TransformerXL, x: Tensor) -> Tensor:
        return layer(x).hidden

    truth = run(exact, fast)
    for name, value in run(exact, materialised).items():
        assert_close(value, truth[name], name)
    errors, bounds = run(rounded, fast), run(rounded, materialised)
    del truth["to_k.bias"]  # zero by the softmax: what remains of it is noise
    for name, expected in truth.items():
        error, bound = (float((found[name] - expected).norm()) for found in (errors, bounds))
        assert error <= 2 * bound, f"{name}: error {error:.2e}, dense has {bound:.2e}"


def test_mixed_precision_trains_in_float32() -> None:
    layer = build(dtype=torch.float32)
    x = data(2, 23).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x).hidden
    mixed.float().square().sum().backward()
    gradient = layer.to_k.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    layer.zero_grad()
    layer(x).hidden.square().sum().backward()
    assert float((gradient - layer.to_k.weight.grad).norm() / gradient.norm()) < 0.05


def test_memory_is_linear() -> None:
    layer = build(64, 64, dtype=torch.float32)
    peaks = []
    for length in (2048, 4096, 8192):
        x = data(1, length).float().requires_grad_()
        peaks.append(peak_memory(lambda x=x: layer(x).hidden.sum().backward()))
    for small, large in pairwise(peaks):
        assert large.peak_bytes < 2.3 * small.peak_bytes
    # the largest tensor is one of [L, E] or a chunk's scores, whichever is larger
    assert peaks[-1].largest_bytes is not None
    assert peaks[-1].largest_bytes <= max(8192 * DIM * 4, HEADS * 128 * (128 + 64 + 64) * 4)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("more", [0, 3])
def test_given_queries_keys_and_values_make_the_layer_without_its_projections(same_length: bool, more: int):
    """The first query begins a segment; what stands before the queries is memory, and gets gradients, too."""
    layer, x = build(same_length=same_length), data(2, 17 + more).requires_grad_()
    q, k, v = (layer._heads(project(x)) for project in (layer.to_q, layer.to_k, layer.to_v))
    r = layer.to_r(layer._waves(5 + 4)).unflatten(-1, (HEADS, -1))
    got = layer.to_out(layer.attend(q[:, :, more:], k, v, r).transpose(1, 2).flatten(2))
    before = Tokens.of(torch.ones(2, 17 + more, dtype=torch.bool), start=5 - more if more else 0)
    state = Columns.of(Layout.of(before.cut(slice(0, more))), x[:, :more])
    want = layer(x[:, more:], before.cut(slice(more, None)), state=state).hidden
    assert torch.allclose(got, want, atol=1e-12)
    (gradient,) = torch.autograd.grad(layer.attend(q[:, :, more:], k, v, r)[:, :, 0].sum(), k)
    assert bool(gradient[:, :, :more].any()) == bool(more)


def test_attend_refuses_shapes_that_do_not_fit():
    layer = build()
    q = torch.zeros(1, HEADS, 20, DIM // HEADS)
    r = torch.zeros(9, HEADS, DIM // HEADS)
    with pytest.raises(ValueError, match="with as many keys as queries or more"):
        layer.attend(q, q[:, :, 1:], q[:, :, 1:], r)
    with pytest.raises(ValueError, match=r"r must be \[at least 9, 3, 4\], got \(8, 3, 4\)"):
        layer.attend(q, q, q, r[1:])
    with pytest.raises(ValueError, match=r"keys must have shape \(1, 20\), got \(1, 19\)"):
        layer.attend(q, q, q, r, Tokens.all_valid(1, 19))


@pytest.mark.parametrize(("batch", "length"), [(1, 64), (3, 41), (2, 200), (1, 131), (1, 385)])
def test_short_segments_equal_gathered_distances(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = zoo.build("transformer_xl", dim=48, heads=4, head_width=32).double()
    x, taken = torch.randn(batch, length, 48, dtype=torch.float64), []
    fits = transformer_xl.is_short
    monkeypatch.setattr(transformer_xl, "is_short", lambda *given: taken.append(fits(*given)) or taken[-1])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    found = []
    for layer.kernel in ("auto", "gather"):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        out = layer(given).hidden
        out.pow(2).sum().backward()
        found.append([out.detach(), given.grad, *(parameter.grad for parameter in layer.parameters())])
    assert taken == [True, False]
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("length", "parts"), [(64, 1), (128, 1), (256, 2), (512, 4)])
def test_operators_of_short_segments(length: int, parts: int) -> None:
    """Beside the 90 of `full`. Chunks compute weights again in backward: 306, and 180 for each part more."""
    layer, tokens = zoo.build("transformer_xl", dim=32, heads=4), Layout.plain(1, length)
    x = torch.randn(1, length, 32, requires_grad=True)
    layer(x, tokens).hidden.sum().backward()  # plans are made
    with Count() as count:
        layer(x, tokens).hidden.sum().backward()
    assert count.operators <= 125 + 75 * parts, count.operators
