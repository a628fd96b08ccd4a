"""What is accepted of factors, norms, biases and widths is computed rightly; what is no query yields zeros."""

from __future__ import annotations

import pytest
import torch

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Source
from attention_zoo.ops.pattern import globals as globals_
from attention_zoo.ops.pattern import local
from attention_zoo.rules import LARGEST_SCALE
from attention_zoo.testing.case import gradients

TINY = {
    "full": {},
    "longformer": {"window": 5},
    "bigbird": {"block": 4, "random": 1},
    "reformer.local": {"chunk": 4},
    "transformer_xl": {"segment_length": 6, "memory_length": 6},
    "reformer": {"chunk": 4, "rounds": 2},
}
PATTERNS = ("full", "longformer", "bigbird", "reformer.local")
L = 48


def layer(name, *, dim=16, heads=2, **more):
    torch.manual_seed(1)
    return zoo.build(name, dim=dim, heads=heads, **{**TINY[name], **more})


def layouts():
    valid, document = torch.ones(2, L, dtype=torch.bool), torch.zeros(2, L, dtype=torch.long)
    left, holes = valid.clone(), valid.clone()
    left[0, :13], holes[0, 5:9], holes[1, 30:33] = False, False, False
    document[:, 11:], document[:, 30:] = 1, 2
    return {
        "plain": Tokens.of(valid),
        "right": Tokens.of(left.flip(1)),
        "left": Tokens.of(left),
        "holes": Tokens.of(holes),
        "packed": Tokens.of(holes, None, document),
    }


def operands(size=1.0, width=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return [(size * torch.randn(2, 2, L, width, generator=g)).to(dtype).requires_grad_() for _ in range(3)]


def softmax(q, k, v, scale, seen):
    """An own definition."""
    scores = (q.double() @ k.double().transpose(-1, -2)) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()


def near(got, want, tolerance=1e-9):
    got, want = got.detach().double(), want.detach().double()
    assert bool(got.isfinite().all())
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


# --- the factor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_negative_or_zero_scale_is_right_by_every_kernel(name, causal):
    """That of the layer and that of a call, with gradients."""
    for tokens in (layouts()[layout] for layout in ("plain", "left", "packed")):
        for size, scale in ((1.0, -0.35), (10.0, -0.35), (1.0, 0.0)):
            inputs, asked = operands(size), tokens.valid[:, None, :, None]
            seen = layer(name, causal=causal).double().full_bias(tokens, tokens) > -torch.inf
            weight = layer(name, causal=causal).double().full_bias(tokens, tokens).clamp(min=-1e9)
            q, k, v = inputs
            scores = (q @ k.transpose(-1, -2)) * scale + weight
            want = scores.masked_fill(~seen, -torch.inf).softmax(-1).where(seen, 0) @ v
            expected = torch.autograd.grad((want * asked).square().sum(), inputs)
            built = layer(name, causal=causal, scale=scale)
            other = layer(name, causal=causal)
            for kernel, reason in built.explain(*inputs, tokens, tokens):
                if reason is not None:
                    continue
                for out in (
                    built.attend(*inputs, tokens, tokens, kernel=kernel),
                    other.attend(*inputs, tokens, tokens, scale=scale, kernel=kernel),
                ):
                    near(out * asked, want.nan_to_num() * asked)
                    for mine, right in zip(torch.autograd.grad((out * asked).square().sum(), inputs), expected):
                        near(mine, right, 1e-7)


@pytest.mark.parametrize("name", TINY)
def test_a_negative_scale_is_that_of_negated_queries(name):
    """Every mechanism, whole layers: all see the scale in the same way, so that with keys of the other sign it is
    gone. (A shared projection has none of another sign: there large scores are finite.)"""
    x, tokens = torch.randn(2, L, 16, dtype=torch.float64).mul(3).requires_grad_(), layouts()["holes"]
    minus, plus = layer(name, scale=-0.35).double(), layer(name, scale=0.35).double()
    if name != "reformer":
        with torch.no_grad():
            names = ["to_k.weight", "to_k.bias"]
            if name == "transformer_xl":
                names += ["to_r.weight"]
            for at in names:
                parameter = dict(plus.named_parameters()).get(at)
                if parameter is not None:
                    parameter.neg_()
        near(minus(x, tokens).hidden, plus(x, tokens).hidden)
    out = minus(x, tokens).hidden
    for grad in gradients(minus, x, out, tokens.valid).values():
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("scale", [1e9, -1e9, float("inf"), float("nan"), True, "1"])
def test_a_scale_beyond_what_softmax_can_work_with_is_refused(scale):
    for name in TINY:
        with pytest.raises(ValueError, match="scale must be a number from -10000 to 10000, got"):
            layer(name, scale=scale)
    with pytest.raises(ValueError, match="scale must be a number"):
        layer("full").attend(*operands(), scale=scale)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scale", [LARGEST_SCALE, -LARGEST_SCALE])
def test_the_largest_scale_is_finite(name, scale):
    for layout, tokens in layouts().items():
        built, x = layer(name, scale=scale), torch.randn(2, L, 16).requires_grad_()
        out = built(x, tokens).hidden
        assert bool(out.isfinite().all()), layout
        for grad in gradients(built, x, out, tokens.valid).values():
            assert bool(grad.isfinite().all()), layout


# --- norms, biases, widths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e4, 5e5, 2e6, 1e7, 1e12])
@pytest.mark.parametrize("name", ["full", "longformer", "bigbird"])
def test_long_keys_in_packed_rows(name, size):
    """Scores of 400 by keys of any norm, which the bound of one document must not take for another's."""
    count = torch.arange(20)
    tokens = Tokens.of(torch.ones(1, 20, dtype=torch.bool), None, count[None] // 10)
    seen = (count <= count[:, None]) & (count[:, None] // 10 == count // 10)
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=g), dim=0)
    q = (direction * 400 / size).expand(1, 2, 20, 8).contiguous()
    k, v = (torch.randn(1, 2, 20, 8, generator=g) for _ in range(2))
    k[:, :, ::10] = direction * size
    more = {"window": 30} if name == "longformer" else {}
    built = layer(name, causal=True, **more)
    for kernel in ("auto", "tiles"):
        near(built.attend(q, k, v, tokens, tokens, kernel=kernel), softmax(q, k, v, 8**-0.5, seen), 1e-3)


@pytest.mark.parametrize("weight", [300.0, -300.0])
def test_a_bias_of_any_size(weight):
    """Of a pattern of one's own: small queries and keys bound no score."""

    class Heavy(PatternAttention):
        name = "heavy"
        declared = zoo.build("full", dim=16, heads=2).declared

        def bias(self, queries, keys):
            gap = queries.position[:, None, :, None] - keys.position[:, None, None, :]
            return weight * (gap % 3 == 1).float() + weight

    built = Heavy(dim=16, heads=2)
    built.tile = 4
    inputs = operands(dtype=torch.float32)
    got = built.attend(*inputs, kernel="tiles")
    want = built.attend(*(x.detach().double() for x in inputs), kernel="dense")
    near(got, want, 1e-3)
    for grad in torch.autograd.grad(got.square().sum(), inputs):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_narrow_heads(name, width):
    """Strides of dimensions of one element are nobody's promise, and rotary positions leave odd ones."""
    schemes = ["none", "rotary"] if width == 2 and name != "reformer.local" else ["none"]
    for scheme in schemes:
        for block in (2, 8) if name == "bigbird" else (None,):
            more = {} if block is None else {"block": block}
            built = layer(name, dim=12, heads=12 // width, head_width=width, positions=scheme, **more)
            for length in (40, 100):
                x, tokens = torch.randn(1, length, 12).requires_grad_(), Tokens.all_valid(1, length)
                definition = layer(name, dim=12, heads=12 // width, head_width=width, positions=scheme, **more)
                definition.kernel = "dense"
                want, whole = definition(x, tokens).hidden, built(x, tokens).hidden
                near(whole, want, 1e-5)
                near(torch.autograd.grad(whole.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0], 1e-4)
                for cut in (length // 2, length - 1):
                    first = built(x[:, :cut], tokens.cut(slice(0, cut)), state=built.initial_state(1))
                    rest = built(x[:, cut:], tokens.cut(slice(cut, length)), state=first.state)
                    near(torch.cat([first.hidden, rest.hidden], 1), want, 1e-5)


def test_heads_of_width_one_whose_channel_has_a_stride():
    """`contiguous` leaves it: a width of one element may have any."""
    odd = torch.randn(1, 2, L, 3).to(torch.float64)[..., :1]
    inputs = [odd.clone().as_strided((1, 2, L, 1), (2 * L, L, 1, 7)).requires_grad_() for _ in range(3)]
    built = layer("bigbird", head_width=1, causal=True)
    for kernel in ("blocks", "tiles", "short"):
        got, want = (built.attend(*inputs, kernel=name) for name in (kernel, "dense"))
        near(got, want)
        for mine, right in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs)):
            near(mine, right)


# --- what is no query ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
def test_padding_yields_zeros_from_the_executor_itself(monkeypatch, name, dtype):
    """Before anything outside could mend it: fillers of a kernel too."""
    found = []
    run = local.run_tiles

    def spy(*given, asked=None, **more):
        out = run(*given, asked=asked, **more)
        found.append((out.detach(), asked))
        return out

    for module in (local, globals_):
        monkeypatch.setattr(module, "run_tiles", spy)
    for causal in (True, False):
        for layout, tokens in layouts().items():
            for kernel in ("auto", "tiles"):
                layer(name, causal=causal, kernel=kernel).attend(*operands(30.0, dtype=dtype), tokens, tokens)
            for out, asked in found:
                rows = torch.ones(()).bool() if asked is None else asked
                assert bool(out.isfinite().all()), layout
                assert not bool(out.masked_fill(rows, 0).any()), layout
            found.clear()


def test_a_step_at_padding_yields_zeros():
    for name in PATTERNS:
        built = layer(name, causal=True)
        valid = torch.ones(2, 9, dtype=torch.bool)
        tokens = Tokens.of(valid)
        with torch.no_grad():
            state = built(torch.randn(2, 9, 16), tokens, state=built.initial_state(2)).state
            step = Tokens.of(torch.tensor([[True], [False]]), start=9)
            out = built(torch.randn(2, 1, 16), step, state=state).hidden
        assert torch.equal(out[1, 0], built.to_out.bias.detach()), name
        assert not torch.equal(out[0, 0], built.to_out.bias.detach()), name


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "tiles", "dense"])
def test_a_query_whose_source_is_empty_yields_zeros(kernel):
    """Before the output projection, whatever stands in the padding of the source, for many queries and for one."""
    built = layer("full", causal=False, cross=True, kernel=kernel)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1] = False
    source = Source(torch.randn(2, 5, 16), Tokens.of(valid))
    for count in (3, 1):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = built(torch.randn(2, count, 16), source=source).hidden
            torch.testing.assert_close(out[1], built.to_out.bias.expand(count, 16), rtol=0, atol=1e-7)
