"""torch.compile: one graph for a whole model, equal to eager mode, any length, nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import shutil

import pytest
import torch
from recorded import RECORDED
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attention_zoo as zoo
from attention_zoo.attention.operator import TAPES
from attention_zoo.contract import layer_of
from attention_zoo.integrations.multihead import MultiheadAttention
from attention_zoo.model.short_conv import Convolution, GatedConvolution, ShortConvolution

# torch's own compiler warns of its own code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def small(name: str, **options) -> zoo.Transformer:
    own = {"resample": False} if name == "reformer" else {}
    mechanism = {"name": name, **own, **options}
    return zoo.Transformer(attention=mechanism, vocab=30, dim=16, depth=1, heads=2)


def step(model, ids, tokens=None):
    """Logits and gradients of one training step; a parameter without a gradient has zeros."""
    logits = model(ids, tokens).logits
    loss = logits.square().mean() if tokens is None else logits[tokens.valid].square().mean()
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [logits, *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found))]


def same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("full", "longformer") else pytest.mark.slow) for name in RECORDED]
)
def test_one_graph_serves_every_length(name: str) -> None:
    """fullgraph=True raises at any graph break; the counter counts compilations."""
    model = small(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length in (33, 65, 40, 129):
        ids = torch.randint(0, 30, (2, length))
        same(step(compiled, ids), step(model, ids))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, f"{name} was compiled again for another length: {counts}"
    gc.collect()
    assert not TAPES, "a finished step leaves nothing behind"


@pytest.mark.parametrize("name", ["longformer", "reformer"])
def test_padding_documents_and_global_tokens_do_not_break_the_graph(name: str) -> None:
    model = small(name)
    valid = torch.arange(37) < torch.tensor([[37], [21]])
    document = (torch.arange(37) // 20).expand(2, -1)
    flags = None if name == "reformer" else torch.zeros_like(valid).index_fill(1, torch.tensor([3]), True)
    tokens = zoo.Tokens.of(valid, flags, document)
    ids = torch.randint(0, 30, (2, 37))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = step(compiled, ids, tokens), step(model, ids, tokens)
    same([got[0][valid], *got[1:]], [want[0][valid], *want[1:]])


def test_mixed_precision_is_that_of_eager_mode() -> None:
    model = small("longformer")
    ids = torch.randint(0, 30, (2, 37))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = step(compiled, ids), step(model, ids)
    assert got[0].dtype == want[0].dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=2e-2)


def test_frozen_parameters_inference_and_abandoned_calls_leave_no_tape() -> None:
    model = small("transformer_xl")
    attention = model.stack.attentions[0]
    attention.to_k.weight.requires_grad_(False)
    ids = torch.randint(0, 30, (1, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(ids).logits
    assert len(TAPES) == 1
    out.sum().backward()
    assert not TAPES
    assert attention.to_k.weight.grad is None
    assert attention.to_v.weight.grad is not None
    out = compiled(ids).logits
    del out
    gc.collect()
    assert not TAPES, "a call whose output nobody kept"
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert not TAPES


def test_choices_and_cross_attention_pass_through_the_operator() -> None:
    torch.manual_seed(0)
    reformer = zoo.build("reformer", dim=16, heads=2, chunk=4)  # draws rotations at each call
    x = torch.randn(2, 13, 16)
    compiled = torch.compile(reformer, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(reformer(x, choices=out.choices).hidden, out.hidden)
    torch.testing.assert_close(compiled(x, choices=out.choices).hidden, out.hidden)
    cross = zoo.build("full", dim=16, heads=2, causal=False, cross=True)
    source = zoo.Source(torch.randn(2, 5, 16, requires_grad=True), zoo.Tokens.all_valid(2, 5))
    results = []
    for layer in (cross, torch.compile(cross, backend="aot_eager", fullgraph=True)):
        hidden = layer(x, source=source).hidden
        results.append((hidden, *torch.autograd.grad(hidden.square().sum(), source.hidden)))
    same(*results)


def test_a_call_with_a_state_runs_eagerly_behind_a_graph_break() -> None:
    model = small("longformer", window=3).eval()
    ids = torch.randint(0, 30, (1, 12))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        first = compiled(ids[:, :8], state=model.initial_state(1))
        rest = compiled(ids[:, 8:], state=first.state)
        torch.testing.assert_close(rest.logits, model(ids).logits[:, 8:], atol=1e-5, rtol=1e-5)


def test_copies_are_other_layers() -> None:
    layer = zoo.build("full", dim=8, heads=1)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(layer), copy.copy(layer), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert twin.number != layer.number
        assert layer_of(twin.number) is twin
    assert layer_of(layer.number) is layer


def test_going_back_twice_is_refused_aloud() -> None:
    model = small("full")
    loss = torch.compile(model, backend="aot_eager")(torch.randint(0, 30, (1, 5))).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        loss.backward()


class Around(nn.Module):
    """A model of somebody's own around a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = zoo.build("longformer", dim=16, heads=2)

    def forward(self, q: Tensor) -> Tensor:
        return self.layer.attend(q, q, q)


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused_by_name(strict: bool) -> None:
    """A saved program would hold the number of a layer, which is another layer's in another process."""
    x, ids, heads = torch.randn(1, 9, 16), torch.zeros(1, 9, dtype=torch.long), torch.randn(1, 2, 9, 8)
    cases = [(small(name), ids, name) for name in RECORDED]
    cases += [(zoo.build("longformer", dim=16, heads=2), x, "longformer"), (Around(), heads, "longformer")]
    for model, given, name in cases:
        with pytest.raises(zoo.Unsupported, match=rf"^{name}: torch.export is not supported: .*use torch.compile"):
            torch.export.export(model, (given,), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_torchs_drop_in_is_refused_by_name(strict: bool) -> None:
    attention = MultiheadAttention(16, 2, batch_first=True, attention="bigbird")
    x = torch.randn(1, 9, 16)
    with pytest.raises(zoo.Unsupported, match=r"^bigbird: torch.export is not supported"):
        torch.export.export(attention, (x, x, x), {"need_weights": False}, strict=strict)


def test_traces_are_refused_by_name() -> None:
    x, ids, heads = torch.randn(1, 9, 16), torch.zeros(1, 9, dtype=torch.long), torch.randn(1, 9, 16)
    drop_in = MultiheadAttention(16, 2, batch_first=True, attention="bigbird")
    cases = [(zoo.build(name, dim=16, heads=2), (x,), name) for name in zoo.available()]
    cases += [(small(name), (ids,), "this model") for name in zoo.available()]
    cases += [(drop_in, (heads, heads, heads), "bigbird")]
    for model, given, name in cases:
        with pytest.raises(zoo.Unsupported, match=rf"^{name}: torch.jit.trace is not supported: .*use torch.compile"):
            torch.jit.trace(model, given)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["aot_compile", "inductor"])
def test_programs_compiled_for_a_file_are_refused_by_name(way: str) -> None:
    model, ids = small("longformer").eval(), torch.zeros(1, 9, dtype=torch.long)
    graphs: list[tuple[torch.fx.GraphModule, list[Tensor]]] = []

    def keep(graph: torch.fx.GraphModule, given: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append((graph, given))
        return graph

    def compile_for_a_file() -> Any:
        if way == "aot_compile":
            compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
            return compiled.forward.aot_compile(((ids,), {}))
        torch.compile(model, fullgraph=True, backend=keep)(ids)
        ((graph, given),) = graphs
        return torch._inductor.aot_compile(graph, tuple(torch.zeros(each.shape, dtype=each.dtype) for each in given))

    with torch.no_grad(), pytest.raises(Exception, match=r"longformer: ahead-of-time compilation is not supported"):
        compile_for_a_file()


def test_a_graph_whose_layer_is_not_here_says_so() -> None:
    layer = zoo.build("full", dim=8, heads=1)
    number = layer.number
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match=f"asks for attention layer {number}, which this process does not have"):
        layer_of(number)


def test_a_batch_without_rows() -> None:
    model = small("bigbird")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    got, want = (step(each, torch.zeros(0, 9, dtype=torch.long)) for each in (compiled, model))
    assert [each.shape for each in got] == [each.shape for each in want]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_builds_the_whole_model() -> None:
    model = small("longformer")
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(0, 30, (2, 37))
    for a, b in zip(step(compiled, ids), step(model, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [ShortConvolution, GatedConvolution])
@torch.no_grad()
def test_a_short_convolution_that_hands_on_a_state_of_padded_rows(form: type[Convolution]) -> None:
    torch.manual_seed(0)
    layer = form(dim=4, width=3).eval()
    compiled = torch.compile(copy.deepcopy(layer), backend="eager")
    valid = torch.tensor([[True] * 7, [False] * 5 + [True] * 2, [True, False] * 3 + [True], [False] * 7])
    x = torch.randn(4, 7, 4)
    found, state = [], []
    for each in (layer, compiled):
        first = each(x, zoo.Tokens.of(valid), state=layer.initial_state(4))
        after = zoo.Tokens.of(valid, start=valid.sum(1))
        found.append(each(x, after, state=first.state).hidden)
        state.append(first.state.tokens)
    torch.testing.assert_close(found[1][valid], found[0][valid])
    assert torch.equal(state[1].valid, state[0].valid)
