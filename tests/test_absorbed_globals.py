"""Global rows of longformer's second projections, absorbed into few queries: the definition, at a small share of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention_zoo as zoo
from attention_zoo import Tokens

OPTIONS = [
    {"causal": True},
    {"causal": False, "bias": False},
    {"causal": True, "kv_heads": 2, "sink_logit": True, "positions": "alibi"},
    {"causal": False, "kv_heads": 2, "sink_logit": True},
    {"causal": True, "positions": "rotary"},
    {"causal": False, "kv_heads": 2, "sink_logit": True, "positions": "rotary"},
    {"causal": True, "window": 40},  # it hides nothing
]


def layer(**options):
    torch.manual_seed(0)
    made = zoo.build("longformer", dim=48, heads=4, head_width=32, **{"window": 5, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)  # the second projections begin as copies of the first
    return made


def tokens(kind, L):
    valid, flags = torch.ones(3, L, dtype=torch.bool), torch.zeros(3, L, dtype=torch.bool)
    if kind == "left, holes":
        valid[0, :7], valid[1, 3::4] = False, False
    document = torch.arange(L).div(9, rounding_mode="floor").expand(3, L) if kind == "packed" else None
    flags[0, 8], flags[1, :3], flags[2, L - 1] = True, True, kind != "plain"
    return Tokens.of(valid, flags & valid, document)


def found(mine, kernel, x, some, state=None):
    mine.kernel = kernel
    mine.zero_grad()
    given = x.clone().requires_grad_()
    out = mine(given, some, state=state).hidden
    out.pow(2).sum().backward()
    return [out.detach(), given.grad, *(parameter.grad for parameter in mine.parameters())]


@pytest.mark.parametrize("kind", ["plain", "left, holes", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_definition(options, kind):
    mine, x = layer(**options), torch.randn(3, 40, 48, dtype=torch.float64)
    for a, b in zip(*(found(mine, kernel, x, tokens(kind, 40)) for kernel in ("auto", "dense")), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_behind_documents_that_a_state_holds():
    mine, x = layer(causal=True), torch.randn(1, 40, 48, dtype=torch.float64)
    valid, flags = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.bool)
    flags[0, 26] = True
    both = Tokens.of(valid, flags, (torch.arange(40) >= 25).long()[None])
    mine.kernel = "dense"
    want = mine(x, both).hidden[:, 25:]
    mine.kernel = "auto"
    state = mine(x[:, :25], both.cut(slice(0, 25)), state=mine.initial_state(1)).state
    torch.testing.assert_close(mine(x[:, 25:], both.cut(slice(25, 40)), state=state).hidden, want)


class Products(TorchDispatchMode):
    """Counts the products of a matrix of at least so many rows or columns."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.found = rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm"):
            self.found += (
                max(size for each in args if isinstance(each, torch.Tensor) for size in each.shape) >= self.rows
            )
        return function(*args, **(kwargs or {}))


def test_no_more_than_the_global_tokens_are_projected_again():
    mine, x, found = layer(causal=False), torch.randn(1, 300, 48, dtype=torch.float64), []
    flags = torch.zeros(1, 300, dtype=torch.bool)
    for columns in (slice(0, 0), slice(7, 9)):
        flags[:, columns] = True
        with Products(300) as products:
            mine(x, Tokens.of(torch.ones_like(flags), flags)).hidden.sum().backward()
        found.append(products.found)
    assert found[0] == found[1] > 0


def test_a_projection_that_is_no_plain_one_is_called():
    mine, x, some = layer(causal=False), torch.randn(3, 40, 48, dtype=torch.float64), tokens("plain", 40)
    plain = mine(x, some).hidden
    mine.to_v_global.register_forward_hook(lambda module, given, out: out + 1)
    assert not torch.allclose(mine(x, some).hidden, plain)


def test_who_keeps_a_gradient_keeps_it_as_it_was():
    """It is taken out of the gradient of the output in place, only where nobody else has that."""
    mine, x, some, kept = layer(causal=False), torch.randn(3, 40, 48, dtype=torch.float64), tokens("plain", 40), []
    mine.to_out.register_full_backward_hook(lambda module, given, got: kept.append((given[0], given[0].clone())))
    mine(x.requires_grad_(), some).hidden.sum().backward()
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("window", [5, 40])
def test_backward_twice_gives_the_same(window):
    mine, x = layer(causal=False, window=window), torch.randn(3, 40, 48, dtype=torch.float64, requires_grad=True)
    loss = mine(x, tokens("left, holes", 40)).hidden.pow(2).sum()
    wanted = [x, *mine.parameters()]
    first, second = torch.autograd.grad(loss, wanted, retain_graph=True), torch.autograd.grad(loss, wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
