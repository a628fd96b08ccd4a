"""Adaptive span: the paper's formula by loops, spans that are learned, and costs that fall with them head by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from count_reads import Count
from torch import Tensor
from turns import assert_within

import attention_zoo as zoo
from attention_zoo import Tokens
from attention_zoo.attention.adaptive_span import AdaptiveSpan
from attention_zoo.layout.by_heads import ByHeads
from attention_zoo.ops.pattern.heads import groups_of, merge, split
from attention_zoo.ops.softmax import partial
from attention_zoo.testing.case import Case, close, feed, gradients
from attention_zoo.testing.numerics import with_kernel
from attention_zoo.testing.states import any_cut_equals_one_call, layouts


def layer_of(spans: list[float], *, limit: int = 40, ramp: int = 3, tile: int = 4, **options: Any) -> AdaptiveSpan:
    torch.manual_seed(3)
    layer = zoo.build("adaptive_span", dim=16, heads=len(spans), limit=limit, ramp=ramp, **options).double()
    assert isinstance(layer, AdaptiveSpan)
    with torch.no_grad():
        layer.span.copy_(torch.tensor(spans, dtype=torch.float64) / limit)
        layer.to_q.weight.mul_(2)
    layer.tile = tile
    return layer.eval()


def by_the_paper(layer: AdaptiveSpan, x: Tensor, tokens: Tokens) -> Tensor:
    """Weights times exponentials over their sum (§3, eqs. 4 and 5), one query and head at a time."""
    D, group = layer.head_width, layer.heads // layer.kv_heads
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for i in tokens.valid[b].nonzero()[:, 0].tolist():
            mine = tokens.valid[b] & (tokens.document[b] == tokens.document[b, i])
            heads = []
            for h in range(layer.heads):
                z, numerator, denominator = layer.limit * layer.span[h].clamp(0, 1), torch.zeros(D).double(), 0.0
                rows, some = slice(h * D, h * D + D), slice(h // group * D, h // group * D + D)
                q = layer.to_q.weight[rows] @ x[b, i] + layer.to_q.bias[rows]
                for j in mine.nonzero()[:, 0].tolist():
                    away = int(tokens.position[b, i] - tokens.position[b, j])
                    if (layer.causal and away < 0) or (not layer.own_token and away == 0):
                        continue
                    distance = abs(away) if layer.own_token else abs(away) - 1
                    m = ((layer.ramp + z - distance) / layer.ramp).clamp(0, 1)
                    if float(m.detach()) == 0:
                        continue
                    k = layer.to_k.weight[some] @ x[b, j] + layer.to_k.bias[some]
                    v = layer.to_v.weight[some] @ x[b, j] + layer.to_v.bias[some]
                    weight = m * torch.exp(q @ k * layer.scale)
                    numerator, denominator = numerator + weight * v, denominator + weight
                heads.append(numerator / denominator if isinstance(denominator, Tensor) else numerator)
            out = out.index_put((torch.tensor(b), torch.tensor(i)), layer.to_out(torch.cat(heads)))
    return out


@pytest.mark.parametrize("own_token", [True, False], ids=["own", "paper"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two_sided"])
def test_it_is_the_papers_formula(causal: bool, own_token: bool) -> None:
    layer = layer_of([0.0, 14.4, 1.3, 2.2], causal=causal, own_token=own_token, kv_heads=2)
    assert groups_of(layer.reach.back, 2, layer.tile) == ((0,), (1,)), "heads should run apart"  # type: ignore[arg-type]
    document = torch.tensor([[0] * 19, [0] * 7 + [1] * 12])
    valid = torch.ones(2, 19, dtype=torch.bool)
    valid[0, 4::3], valid[1, :2] = False, False
    for tokens in (Tokens.all_valid(1, 19), Tokens.of(valid, document=document)):
        x = torch.randn(len(tokens.valid), 19, 16, dtype=torch.float64).requires_grad_()
        want = by_the_paper(layer, x, tokens)
        wanted = gradients(layer, x, want, tokens.valid)
        assert int((wanted["span"].abs() > 1e-3).sum()) >= 3, "spans should learn here"
        for kernel in ("auto", "tiles", "dense"):
            found = with_kernel(layer, kernel)(x, tokens).hidden
            close(found[tokens.valid], want[tokens.valid], f"{kernel} hidden")
            for name, grad in gradients(layer, x, found, tokens.valid).items():
                close(grad, wanted[name], f"{kernel} gradient of {name}", 1e-11)


def test_a_token_that_sees_nothing_gets_zeros() -> None:
    """The paper's convention, in which the first token of a document has nothing to attend to: whole and by steps."""
    layer = layer_of([2.0, 30.0], own_token=False)
    x, tokens = torch.randn(2, 40, 16, dtype=torch.float64), Tokens.all_valid(2, 40)
    with torch.no_grad():
        hidden = layer(x).hidden
        close(hidden[:, 0], layer.to_out.bias.expand(2, -1), "the first token")
        close(feed(layer, x, tokens, list(range(1, 40)))[0], hidden, "steps")
    any_cut_equals_one_call.function(Case.of("adaptive_span", own_token=False))  # type: ignore[attr-defined]
    low = layer.bfloat16()(x.bfloat16().requires_grad_()).hidden
    low.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_groups_of_heads_carry_on_as_one(kv_heads: int) -> None:
    """Any cut, with gradients and without, over every layout: equal to one call by the definition."""
    layer = layer_of([1.0, 0.5, 30.0, 14.0], kv_heads=kv_heads, positions="rotary")
    for where, tokens in layouts(Case.of("adaptive_span"), 5):
        x = torch.randn(3, 29, 16, dtype=torch.float64).requires_grad_()
        want = with_kernel(layer, "dense")(x, tokens).hidden
        for cuts in ([5, 13, 14, 20], list(range(1, 29))):
            with torch.no_grad():
                hidden, state = feed(layer, x, tokens, cuts)
            assert isinstance(state, ByHeads)
            assert len(state.parts) == 2
            close(hidden[tokens.valid], want[tokens.valid], f"{where} cut at {cuts}")
        wanted = gradients(layer, x, want, tokens.valid)
        for name, grad in gradients(layer, x, feed(layer, x, tokens, [5, 13, 20])[0], tokens.valid).items():
            close(grad, wanted[name], f"{where}: gradient of {name} through a state", 1e-11)


def test_a_group_holds_what_its_farthest_head_sees() -> None:
    layer = layer_of([0.0, 2.0, 300.0, 1.0], limit=512, ramp=4, tile=64).float()
    x, tokens = torch.randn(1, 2000, 16), Tokens.all_valid(1, 2000)
    with torch.no_grad():
        state = feed(layer, x, tokens, list(range(500, 2000, 500)))[1]
    assert state.heads == ((2,), (0, 1, 3))
    for part, span in zip(state.parts, (300, 2)):
        live = span + 4 - 1
        assert part.ledger.host.valid.shape[1] == live, "just what the next token may see, after a long call"
        assert part.buffers[0].shape[2] <= live + max(32, live // 4)
    alike = layer_of([300.0] * 4, limit=512, ramp=4, tile=64).float()
    with torch.no_grad():
        many = feed(alike, x, tokens, list(range(500, 2000, 500)))[1]
    assert sum(part.buffers[0].numel() for part in state.parts) < 0.4 * many.buffers[0].numel()


def test_work_falls_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scores that are computed, forward and backward, at 2,048 tokens."""
    counted = []

    def exponents(q: Tensor, k: Tensor, *more: Any, **options: Any) -> Tensor:
        counted.append(q.shape[0] * q.shape[1] * k.shape[1])
        return compute(q, k, *more, **options)

    compute = partial.exponents
    monkeypatch.setattr(partial, "exponents", exponents)

    def scores(spans: list[float]) -> int:
        layer = layer_of(spans, limit=1024, ramp=32, tile=64).float()
        q, k, v = (torch.randn(1, 4, 2048, 4).requires_grad_() for _ in range(3))
        counted.clear()
        layer.attend(q, k, v).sum().backward()
        return sum(counted)

    short, one, all_far = scores([32.0] * 4), scores([32.0, 1000.0, 32.0, 32.0]), scores([1000.0] * 4)
    assert one < 1.05 * (0.75 * short + 0.25 * all_far)
    assert all_far > 4 * short
    assert scores([32.0, 48.0, 64.0, 40.0]) <= 1.6 * short


def test_the_reach_follows_the_spans_and_is_read_once_a_step() -> None:
    model = zoo.Transformer(vocab=16, dim=16, depth=3, heads=4, attention="adaptive_span", positions="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for wanted in (0, 1, 1):  # before the first they were read where the layers were built
        with Count() as count:
            for _ in range(2):
                model(torch.arange(16)[None]).hidden.sum().backward()
        assert sum(n for place, n in count.reads.items() if "adaptive_span.py" in place) == wanted, count.reads
        optimizer.step()
    layer = layer_of([4.0, 20.0, 1.5, 3.0])
    before = layer.reach
    with torch.no_grad():
        layer.span.add_(10 / layer.limit)
    assert layer.reach != before
    assert max(layer.reach.back) == 32
    layer.load_state_dict(layer_of([0.0, 0.0, 0.0, 0.0]).state_dict())
    assert layer.reach.back == 2, "a distance of 3 has no weight at a ramp of 3"
    assert layer.spans == [0.0] * 4


def test_spans_may_change_while_a_stream_goes_on() -> None:
    """What a grown span no longer finds is not seen; a shrunk one forgets. The groups stay those of the state."""
    layer = layer_of([1.0, 25.0, 2.0, 1.0])
    x, tokens = torch.randn(1, 80, 16, dtype=torch.float64), Tokens.all_valid(1, 80)
    with torch.no_grad():
        state = feed(layer, x[:, :40], tokens.cut(slice(0, 40)), [20])[1]
        layer.span.copy_(torch.tensor([30.0, 2.0, 2.0, 40.0]) / 40)
        state = layer(x[:, 40:70], tokens.cut(slice(40, 70)), state=state).state
        hidden = layer(x[:, 70:], tokens.cut(slice(70, 80)), state=state).hidden
        assert state.heads == ((1,), (0, 2, 3))
        far, whole = state.parts[0].holds, layer(x).hidden[:, 70:]
    assert bool(hidden.isfinite().all())
    assert far == (1, 1, 4)
    near = layer_of([30.0, 2.0, 2.0, 30.0])
    with torch.no_grad():  # 30 tokens came since: all that spans of 30 less the ramp see is there again
        near.load_state_dict(layer.state_dict())
        near.span.copy_(torch.tensor([20.0, 2.0, 2.0, 20.0]) / 40)
        layer.span.copy_(near.span)
        close(layer(x[:, 70:], tokens.cut(slice(70, 80)), state=state).hidden, near(x).hidden[:, 70:], "again in reach")
    assert whole.shape == hidden.shape


def test_the_span_loss_pulls_and_after_step_clamps() -> None:
    layer = layer_of([0.0, 10.0, 40.0, 20.0], span_loss=0.5)
    loss = layer(torch.randn(1, 5, 16, dtype=torch.float64)).losses["span"]
    torch.testing.assert_close(loss, torch.tensor(0.5 * 17.5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, layer.span)
    torch.testing.assert_close(gradient, torch.full((4,), 0.5 * 40 / 4, dtype=torch.float64))
    with torch.no_grad():
        layer.span.add_(torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    layer.after_step()
    torch.testing.assert_close(layer.span.detach().float(), torch.tensor([0.0, 0.25, 1.0, 0.5]))
    assert layer.readings()["span"] == pytest.approx([0.0, 10.0, 40.0, 20.0])
    assert not layer_of([1.0], span_loss=0.0)(torch.randn(1, 2, 16, dtype=torch.float64)).losses


def test_a_compiled_span_learns_alike() -> None:
    layer = layer_of([1.0, 14.0])
    valid = torch.ones(2, 29, dtype=torch.bool)
    valid[0, ::3] = False
    tokens, x = Tokens.of(valid), torch.randn(2, 29, 16, dtype=torch.float64)
    layer(x, tokens).hidden[valid].square().sum().backward()
    want = layer.span.grad
    layer.span.grad = None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x, tokens).hidden[valid].square().sum().backward()
    assert want is not None
    assert layer.span.grad is not None
    close(layer.span.grad, want, "gradient of the spans")


def test_heads_are_split_and_merged_in_order() -> None:
    groups = ((3, 1), (0,), (2,))
    x = torch.randn(2, 4, 5, 3)
    assert torch.equal(merge(split(x, groups), groups), x)
    assert torch.equal(split(x, groups)[0], x[:, [3, 1]])
    assert groups_of([100, 3, 99, 7], 1, 4) == ((0, 2), (1, 3))
    assert groups_of([100, 3, 9, 7], 2, 4) == ((0,), (1,))
    assert groups_of([100, 60, 50], 1, 64) == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 41.0}, "start must be at most limit, got start=41 for limit=40"),
        ({"ramp": 0}, "ramp"),
        ({"limit": 0}, "limit"),
        ({"span_loss": -1.0}, "span_loss"),
        ({"start": float("nan")}, "start"),
        ({"kernel": "sdpa"}, "kernel"),
    ],
)
def test_wrong_options_are_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=said):
        zoo.build("adaptive_span", **{"dim": 16, "heads": 2, "limit": 40, **options})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("spans", [[64.0] * 8, [32.0, 36, 41, 45, 50, 55, 60, 64], [64.0, 32, 55, 36, 60, 41, 50, 45]])
def test_time_is_that_of_the_spans_not_of_their_limit(spans: list[float]) -> None:
    """At 16,384 tokens, 8 heads x 64, limit 4,096, forward and backward: within 1.5 times the time of a window as wide
    as span and ramp together.
    """
    layer = zoo.build("adaptive_span", dim=512, heads=8, limit=4096)
    with torch.no_grad():
        layer.span.copy_(torch.tensor(spans) / 4096)
    window = zoo.build("longformer", dim=512, heads=8, window=64 + layer.ramp)
    given = [torch.randn(1, 8, 16384, 64).requires_grad_() for _ in range(3)]

    def ours() -> None:
        layer.attend(*given).sum().backward()

    def alone() -> None:
        window.attend(*given).sum().backward()

    assert_within(1.5, ours, alone)
