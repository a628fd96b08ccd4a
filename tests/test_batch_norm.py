"""Batch norm: torch's over the valid tokens, blind to padding, counted once, refused where it would see ahead."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCAB, entry, far, ragged, small, some_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention_zoo import EncoderDecoder, Tokens, Unsupported, load, save
from attention_zoo.model.block import Block
from attention_zoo.model.norm import NORMS, BatchNorm, build_norm, normed
from attention_zoo.registry import build

VALID = ragged(7, [7, 4, 0, 1], "left")


def pair(**options) -> tuple[BatchNorm, nn.BatchNorm1d]:
    """Ours and torch's, with the same weights, in float64."""
    torch.manual_seed(1)
    ours, torchs = BatchNorm(5, **options).double(), nn.BatchNorm1d(5, **options).double()
    with torch.no_grad():
        for one, other in zip(ours.parameters(), torchs.parameters()):
            one.copy_(other.normal_())
    return ours, torchs


def some(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def model(*names: str, **options):
    return small(*(names or ("full",)), causal=False, norm="batch", **options)


def statistics(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in of.named_buffers() if "running" in name}


def gradients(of: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in of.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "eps": 0.3}, {"momentum": 1.0}], ids=str)
@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
def test_it_is_torchs_over_the_valid_tokens(valid, options):
    ours, torchs = pair(**options)
    kept = torch.ones(4, 7, dtype=torch.bool) if valid is None else valid
    for step in range(3):
        weight = some(9 + step)
        found, expected = [], []
        for norm, gathered in ((ours, found), (torchs, expected)):
            x = some(step).requires_grad_()
            out = norm(x, valid)[kept] if norm is ours else norm(x[kept])
            (out.sin() * weight[kept]).sum().backward()
            gathered += [out, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        assert max(map(far, found, expected)) < 1e-12
    assert far(ours.running_var, torch.ones(5)) > 0.1
    ours.eval(), torchs.eval()
    x, y = some(5).requires_grad_(), some(5).requires_grad_()
    one, other = ours(x, valid)[kept], torchs(y[kept])
    one.sin().sum().backward(), other.sin().sum().backward()
    assert far(one, other) < 1e-12
    assert far(x.grad, y.grad) < 1e-12


def test_gradients_of_gradients():
    ours, _ = pair()
    x = some()[:2, :3].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ours(x, VALID[:2, 3:6]), x)


@pytest.mark.parametrize("training", [True, False])
def test_what_stands_in_padding_is_neither_read_nor_handed_on(training):
    results = []
    for filler in (0.0, 1e30, float("nan"), float("inf")):
        ours, _ = pair()
        ours.train(training)
        x = some().masked_fill(~VALID[..., None], filler).requires_grad_()
        out = ours(x, VALID)
        out.square().sum().backward()
        assert out.isfinite().all()
        assert torch.equal(out[~VALID], ours.bias.expand_as(out[~VALID]))
        assert not x.grad[~VALID].any()
        results.append([out, x.grad, ours.weight.grad, ours.running_mean, ours.running_var])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_valid_tokens_the_running_averages_stay(count):
    ours, _ = pair()
    ours(some(), VALID)
    before = statistics(ours)
    valid = torch.zeros_like(VALID)
    valid[1, :count] = True
    assert torch.equal(ours(some(1), valid), ours.bias.expand(4, 7, 5))
    assert all(map(torch.equal, before.values(), statistics(ours).values()))
    assert ours(some()[:0], VALID[:0]).shape == (0, 7, 5)
    assert all(map(torch.equal, before.values(), statistics(ours).values()))


def test_half_precision_counts_in_float32():
    ours = BatchNorm(5)
    x = some().bfloat16() + 100
    out = ours(x)
    assert out.dtype == torch.bfloat16
    assert far(ours.running_mean, x.double().mean((0, 1)).float() * 0.1) < 1e-4
    assert abs(out.float().std() - 1) < 0.1


def test_the_others_are_called_as_before():
    x = some()
    for name in ("layer", "rms"):
        norm = build_norm(name, 5).double()
        assert type(norm) in (nn.LayerNorm, nn.RMSNorm)
        assert torch.equal(normed(norm, x, VALID), norm(x))
    assert set(NORMS) == {"layer", "rms", "batch"}


# --- in a model -------------------------------------------------------------------------------------------------------

SHAPES = [
    {"pre_norm": True}, {"pre_norm": False}, {"last_norm": False}, {"embedding": {"normed": True, "types": 2}},
    {"head": {"name": "lm", "transform": "gelu"}}, {"reversible": True}, {"reversible": "both", "tied": False},
    {"around": ["global_tokens"]}, {"head": "classify", "classes": 3}, {"short_conv": 3},
]  # fmt: skip


@pytest.mark.parametrize("name", ["full", "longformer", "bigbird", "reformer"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_never_leaks_through_a_model(name, training):
    options = {"embedding": {"normed": True}, "head": {"name": "lm", "transform": "gelu"}}
    valid, ids = ragged(15, [15, 6, 1], "right"), some_ids(length=15)
    results = []
    for filler in (ids, torch.full_like(ids, 3), torch.full_like(ids, -7)):
        net = model(name, **options).train(training)
        out = net(torch.where(valid, ids, filler), Tokens.of(valid))
        out.logits[valid].square().mean().backward()
        assert out.hidden.isfinite().all()
        results.append([out.logits[valid], *gradients(net), *statistics(net).values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_wider_padding_changes_nothing_wherever_the_norm_stands(options):
    narrow, wide = (model(**options).train() for _ in range(2))
    ids, valid = some_ids(length=9), ragged(9, [9, 6, 2], "right")
    one = narrow(ids, Tokens.of(valid))
    more = nn.functional.pad(valid, (0, 5))
    other = wide(nn.functional.pad(ids, (0, 5), value=4), Tokens.of(more))
    found = (other.hidden[more], one.hidden[valid])
    assert far(*found) < 1e-12
    before, after = statistics(narrow), statistics(wide)
    assert before.keys() == after.keys()
    assert len(before) >= 2 * 4
    assert max(far(before[name], after[name]) for name in before) < 1e-12
    assert all(far(before[name], model(**options).get_buffer(name)) > 0 for name in before)


def test_in_evaluation_rows_are_alone():
    net = model().train()
    ids = some_ids()
    net(ids)
    assert far(net(ids).logits[1:2], net(ids[1:2]).logits) > 1e-3
    net.eval()
    assert far(net(ids).logits[1:2], net(ids[1:2]).logits) < 1e-12


@pytest.mark.parametrize("depth", [1, 2])
def test_a_reversible_stack_counts_once(depth):
    ids, tokens = some_ids(length=9), Tokens.of(ragged(9, [9, 6, 2], "right"))
    found = []
    for recompute in (True, False):
        net = model(reversible=True, depth=depth).train()
        net.stack.recompute = recompute
        for _ in range(2):
            net(ids, tokens).logits.square().mean().backward()
        found.append([*statistics(net).values(), *[p.grad for p in net.parameters()]])
    assert max(map(far, *found)) < 1e-10


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant):
    found = []
    for again in (True, False):
        ours, _ = pair()
        x = some().requires_grad_()
        out = checkpoint(ours, x, VALID, use_reentrant=reentrant) if again else ours(x, VALID)
        out.sin().sum().backward()
        found.append([x.grad, ours.weight.grad, ours.running_mean, ours.running_var])
    assert max(map(far, *found)) < 1e-12


def test_accumulated_parts_have_statistics_of_their_own():
    ids, net = some_ids(), model().train()
    together = net(ids).logits
    assert far(torch.cat([net(part).logits for part in ids.split(1)]), together) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_graph_break(training):
    eager, net = (model(depth=1).float().train(training) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    ids, tokens = some_ids(length=9), Tokens.of(ragged(9, [9, 6, 2], "right"))
    for _ in range(2):
        one, other = eager(ids, tokens).logits, compiled(ids, tokens).logits
        one.square().mean().backward(), other.square().mean().backward()
    assert far(one, other) < 1e-4
    assert all(far(x, y) < 1e-5 for x, y in zip(statistics(eager).values(), statistics(net).values()))
    assert all(far(x.grad, y.grad) < 1e-4 for x, y in zip(eager.parameters(), net.parameters()))


def test_saved_and_loaded(tmp_path):
    net = model(embedding={"normed": True}).train()
    net(some_ids())
    net.eval()
    again = load(save(net, tmp_path / "model.safetensors"))
    assert all(map(torch.equal, statistics(net).values(), statistics(again).values()))
    assert torch.equal(net(some_ids(seed=2)).logits, again(some_ids(seed=2)).logits)


def test_an_encoder_may_have_it():
    net = EncoderDecoder(encoder=model(head="hidden"), decoder=small("full", cross=True)).train()
    before = statistics(net)
    net(some_ids(length=5), source=some_ids()).logits.sum().backward()
    assert all(far(now, before[name]) > 0 for name, now in statistics(net).items())


def test_it_is_refused_where_it_would_see_ahead():
    for options, said in (({"causal": True}, "causal=True"), ({"cross": True}, "cross=True")):
        with pytest.raises(Unsupported, match=f"norm=batch: {said} is not supported: its statistics are of all tokens"):
            small("full", **{"norm": {"name": "batch", "eps": 0.1}, "causal": False, **options})
    with pytest.raises(Unsupported, match="norm=batch: causal=True is not supported"):
        Block(build("full", dim=16, heads=2, causal=True), dim=16, norm="batch")
    with pytest.raises(ValueError, match=r"last_only needs model.eval\(\) with norm=batch"):
        model().train()(some_ids(), last_only=True)
    assert model()(some_ids(), last_only=True).logits.shape == (3, 1, VOCAB)


def test_several_processes_are_refused(monkeypatch):
    net = model(entry("full")["name"])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    net(some_ids())  # running averages are everybody's to use
    with pytest.raises(Unsupported, match="norm=batch: training in several processes is not supported"):
        net.train()(some_ids())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    net(some_ids())


@pytest.mark.parametrize(("norm", "message"), [
    ({"name": "batch", "momentum": 0}, "norm.momentum must be a share above 0, got 0"),
    ({"name": "batch", "momentum": 1.5}, "norm.momentum must be at most 1, got 1.5"),
    ({"name": "batch", "eps": 0}, "norm.eps must be a number above 0, got 0"),
    ({"name": "batch", "affine": False}, "norm=batch has no option affine; it has eps, momentum"),
    ({"name": "layer", "momentum": 0.1}, "norm=layer has no option momentum; it has eps"),
], ids=str)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(norm, message):
    with pytest.raises(ValueError, match=message):
        small("full", causal=False, norm=norm)
