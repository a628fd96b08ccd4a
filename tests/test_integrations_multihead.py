"""The drop-in for torch.nn.MultiheadAttention: the same numbers, masks and weights where torch has them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_zoo import Unsupported
from attention_zoo.integrations.multihead import MultiheadAttention

E, H, L, B = 24, 4, 17, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {}, "longformer": {"window": 4}, "bigbird": {"block": 3, "random": 1, "seed": 2},
}  # fmt: skip
FUTURE = torch.ones(L, L, dtype=torch.bool).triu(1)


def pair(attention: str = "full", options: dict[str, Any] | None = None, **shared: Any) -> tuple[Any, Any]:
    """torch's module and ours with its weights."""
    theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **shared)
    for bias in (theirs.out_proj.bias, theirs.in_proj_bias):
        if bias is not None:
            nn.init.normal_(bias)
    options = OPTIONS[attention] if options is None else options
    ours = MultiheadAttention(E, H, dtype=torch.float64, attention=attention, **shared, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padding(side: str = "right") -> Tensor:
    """True = ignore, as torch has it."""
    counts, column = torch.tensor([[0], [5], [2]]), torch.arange(L)[None]
    return column >= L - counts if side == "right" else column < counts


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def grads(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()]))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "rows"])
@pytest.mark.parametrize("shared", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}])
def test_full_is_torch(shared: dict[str, Any], mask: str, side: str) -> None:
    theirs, ours = pair("full", **shared)
    x = data(B, L, E)
    given = x if shared.get("batch_first") else x.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    masks = {"none": None, "bool": FUTURE, "float": causal, "rows": FUTURE.expand(B * H, L, L)}
    rest = {"attn_mask": masks[mask], "key_padding_mask": None if side == "none" else padding(side)}
    if side == "left" and mask != "none":
        rest["key_padding_mask"] = None  # torch has NaN where a row sees nothing; see below
    if mask == "float" and rest["key_padding_mask"] is not None:
        rest["key_padding_mask"] = torch.zeros(B, L, dtype=torch.float64).masked_fill(padding(side), -torch.inf)
    want, _ = theirs(given, given, given, need_weights=False, **rest)
    got, weights = ours(given, given, given, need_weights=False, **rest)
    assert weights is None
    close(got, want)
    for one, other in zip(grads(ours, got, x), grads(theirs, want, x)):
        close(one, other)


def test_is_causal_needs_no_mask() -> None:
    theirs, ours = pair("full", batch_first=True)
    x = data(B, L, E)
    close(ours(x, x, x, is_causal=True)[0], theirs(x, x, x, attn_mask=FUTURE, need_weights=False)[0])
    close(ours(x, x, x, is_causal=True, attn_mask=FUTURE)[0], ours(x, x, x, attn_mask=FUTURE)[0])
    close(ours(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.bool))[0], ours(x, x, x)[0])


def test_a_row_that_sees_nothing_is_finite() -> None:
    _, ours = pair("full", batch_first=True)
    x, ignore = data(B, L, E), padding("left")
    out = ours(x, x, x, key_padding_mask=ignore, attn_mask=FUTURE, need_weights=False)[0]
    assert out.isfinite().all()
    alone = ours(*[x[1:2, 5:]] * 3, is_causal=True)[0]
    close(out[1:2, 5:], alone)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "tiles", "dense"])
@pytest.mark.parametrize("mask", [None, FUTURE], ids=["two-sided", "causal"])
def test_padding_sees_what_torch_shows_it_and_nothing_else(mask: Tensor | None, kernel: str) -> None:
    """At padding too; where torch has NaN, since there is nothing to see, stands the output of zeros."""
    theirs, ours = pair("full", {"kernel": kernel}, batch_first=True)
    x = data(7, L, E)
    ignore = torch.rand(7, L, generator=torch.Generator().manual_seed(1)) < 0.5
    ignore[0], ignore[1], ignore[2, :9], ignore[3, 9:], ignore[4, :3], ignore[4, 15:] = (
        True,
        False,
        True,
        True,
        True,
        True,
    )
    rest = {"key_padding_mask": ignore, "attn_mask": mask, "need_weights": False}
    want = theirs(x, x, x, **rest)[0]
    close(ours(x, x, x, **rest)[0], torch.where(want.isnan(), theirs.out_proj.bias, want))


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_made_in_inference_mode(name: str) -> None:
    """They have no version that would say whether they were changed: each call looks at them."""
    _, ours = pair(name, batch_first=True)
    x = data(B, L, E)
    want = [ours(x, x, x, attn_mask=mask, need_weights=False)[0] for mask in (FUTURE, torch.zeros_like(FUTURE))]
    with torch.inference_mode():
        for number in (False, True):
            mask = nn.Transformer.generate_square_subsequent_mask(L) if number else FUTURE.clone()
            close(ours(x, x, x, attn_mask=mask, need_weights=False)[0], want[0].detach())
            mask.zero_()
            close(ours(x, x, x, attn_mask=mask, need_weights=False)[0], want[1].detach())
    ours(x, x, x, key_padding_mask=_inferred(padding()), need_weights=False)[0].sum().backward()


def _inferred(mask: Tensor) -> Tensor:
    with torch.inference_mode():
        return mask.clone()


def test_cross_attention_and_widths_of_its_own() -> None:
    for shared in ({}, {"kdim": 10, "vdim": 7}):
        theirs, ours = pair("full", batch_first=True, **shared)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        q, k, v = data(B, 6, E), data(B, L, shared.get("kdim", E)), data(B, L, shared.get("vdim", E))
        want = theirs(q, k, v, key_padding_mask=padding(), need_weights=False)[0]
        got = ours(q, k, v, key_padding_mask=padding())[0]
        close(got, want)
        for one, other in zip(grads(ours, got, q, k, v), grads(theirs, want, q, k, v)):
            close(one, other)


def test_a_value_of_its_own() -> None:
    """As in DETR: positions are added to queries and keys, not to values."""
    for name in OPTIONS:
        _, ours = pair(name, batch_first=True)
        x, v = data(B, L, E), data(B, L, E)
        close(ours(x, x, v)[0] - ours(x, x, torch.zeros_like(v))[0], ours(x, x, 2 * v)[0] - ours(x, x, v)[0])


def test_without_a_batch() -> None:
    theirs, ours = pair("full")
    x, ignore = data(L, E), padding()[1]
    want = theirs(x, x, x, key_padding_mask=ignore, need_weights=False)[0]
    close(ours(x, x, x, key_padding_mask=ignore)[0], want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_a_pattern_is_torch_under_the_mask_of_its_definition(name: str, causal: bool) -> None:
    """torch gets the pattern as an L x L mask of float; ours computes it without one."""
    theirs, ours = pair(name, batch_first=True)
    x = data(B, L, E)
    from attention_zoo import Tokens

    tokens = Tokens.all_valid(B, L)
    bias = ours._pattern(causal, x).full_bias(tokens, tokens).expand(B, H, L, L).double().flatten(0, 1)
    assert bias.isinf().any()
    want = theirs(x, x, x, attn_mask=bias, need_weights=False)[0]
    got = ours(x, x, x, attn_mask=FUTURE if causal else None)[0]
    close(got, want)
    for one, other in zip(grads(ours, got, x), grads(theirs, want, x)):
        close(one, other)


@pytest.mark.parametrize("seed", range(16))
def test_longformer_is_torch_under_a_mask_by_hand(seed: int) -> None:
    """Random windows, lengths, holes and layouts; the window's edges are where a mask of one's own has them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    length, window, first = rng.choice([1, 2, 17, 130, 257]), rng.choice([1, 2, 5, 16, 129]), rng.random() < 0.5
    theirs, ours = pair("longformer", {"window": window}, batch_first=first)
    for one, other in zip(theirs.parameters(), ours.parameters()):
        other.data.copy_(nn.init.normal_(one, std=0.4))
    x = data(B, length, E)
    ignore = torch.rand(B, length) < rng.choice([0.0, 0.2, 0.6])
    gap = torch.arange(length)[:, None] - torch.arange(length)
    causal = rng.random() < 0.5
    hidden = (gap.abs() > window) | (causal & (gap < 0)) | ignore[:, None, :]
    sees = ~hidden.all(-1)
    bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden & sees[..., None], -torch.inf)
    given = x if first else x.transpose(0, 1)
    want = theirs(given, given, given, attn_mask=bias.repeat_interleave(H, 0), need_weights=False)[0]
    got = ours(given, given, given, key_padding_mask=ignore, attn_mask=gap < 0 if causal and length > 1 else None)[0]
    kept = sees & ~ignore if first else (sees & ~ignore).T
    close(got[kept], want[kept])
    for one, other in zip(grads(ours, got[kept], x), grads(theirs, want[kept], x)):
        close(one, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_padded_row_is_the_row_alone(name: str, side: str) -> None:
    _, ours = pair(name, batch_first=True)
    x, ignore = data(B, L, E), padding(side)
    for causal in (False, True):
        together = ours(x, x, x, key_padding_mask=ignore, is_causal=causal)[0]
        for row in range(B):
            kept = x[row : row + 1, ~ignore[row]]
            close(together[row : row + 1, ~ignore[row]], ours(kept, kept, kept, is_causal=causal)[0])


def test_weights_load_across() -> None:
    for shared in ({}, {"bias": False}, {"kdim": 10, "vdim": 7}):
        theirs = nn.MultiheadAttention(E, H, **shared)
        ours = MultiheadAttention(E, H, attention="full", **shared)
        assert [*ours.state_dict()] == [*theirs.state_dict()]
        theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(4)
    theirs = nn.MultiheadAttention(E, H)
    torch.manual_seed(4)
    ours = MultiheadAttention(E, H, attention="longformer", window=3)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(one, other), "the same seed gives the same weights"
    ours._reset_parameters()
    assert copy.deepcopy(ours).load_state_dict(theirs.state_dict()) is not None


@pytest.mark.parametrize("name", list(OPTIONS))
def test_it_works_inside_a_torch_encoder(name: str) -> None:
    """In evaluation torch's layer would take its fused path, which knows nothing of patterns."""
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = MultiheadAttention(
        E, H, batch_first=True, dtype=torch.float64, attention=name, **OPTIONS[name]
    )  # fmt: skip
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, ignore = data(B, L, E), padding()
    trained = encoder.train()(x, src_key_padding_mask=ignore)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=ignore)
    close(evaluated[~ignore], trained[~ignore].detach())
    causal = encoder(x, mask=FUTURE, is_causal=True)
    changed = torch.cat([x[:, :9], data(B, L - 9, E)], 1)
    close(encoder(changed, mask=FUTURE, is_causal=True)[:, :9], causal[:, :9])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["longformer", "bigbird"])
@pytest.mark.parametrize("built", ["with it", "before"])
def test_no_fused_path_of_torch_goes_around_it(name: str, built: str) -> None:
    """Padding, evaluation, no gradients, nested tensors as torch would have them: when it would go around."""

    def ours() -> MultiheadAttention:
        torch.manual_seed(7)
        return MultiheadAttention(E, H, batch_first=True, attention=name, dtype=torch.float64, **OPTIONS[name])

    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    if built == "with it":
        layer.self_attn = ours()
        with pytest.warns(UserWarning, match="enable_nested_tensor is True, but"):
            encoder = nn.TransformerEncoder(layer, 1)
    else:
        encoder = nn.TransformerEncoder(layer, 1)
        encoder.layers[0].self_attn = ours()  # type: ignore[union-attr]
    x, ignore = data(B, L, E), padding()
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=ignore)
    trained = encoder.train()(x, src_key_padding_mask=ignore)
    close(evaluated[~ignore], trained[~ignore].detach())
    full = ours()
    full.attention, full.options = "full", {}
    encoder.layers[0].self_attn = full  # type: ignore[union-attr]
    assert (encoder(x, src_key_padding_mask=ignore)[~ignore] - trained[~ignore]).abs().max() > 1e-3


def test_it_works_inside_a_torch_decoder() -> None:
    """Self-attention is ours; attention to the memory stays torch's, or is ours with attention="full"."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    x, memory, ignore = data(B, L, E), data(B, 9, E), padding()
    rest: dict[str, Any] = {"tgt_mask": FUTURE, "tgt_is_causal": True, "memory_key_padding_mask": ignore[:, :9]}
    want = layer(x, memory, **rest)
    for part, options in (("self_attn", {"attention": "longformer", "window": L}), ("multihead_attn", {})):
        mine = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
        mine.load_state_dict(getattr(layer, part).state_dict())
        setattr(layer, part, mine)
    for module in (layer.train(), layer.eval()):
        close(module(x, memory, **rest), want)


def test_autocast_and_half_precision() -> None:
    ours = MultiheadAttention(E, H, batch_first=True, attention="longformer", window=4)
    x = torch.randn(B, L, E)
    want = ours(x, x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x, x, x)[0]
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())
    halves = ours.bfloat16()(*[x.bfloat16()] * 3)[0]
    for one in (got, halves):
        assert (one.float() - want).abs().max() < 0.03 * want.abs().max()


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is changed in place; and is_causal spares the look."""
    from attention_zoo.integrations import multihead

    looks: list[tuple[int, ...]] = []
    look = multihead._look
    monkeypatch.setattr(multihead, "_look", lambda mask: (looks.append(mask.shape), look(mask))[1])
    _, ours = pair("longformer", batch_first=True)
    x, mask = data(B, L, E), FUTURE.clone()
    ours(x, x, x, attn_mask=FUTURE.clone(), is_causal=True)
    assert looks == []
    first = ours(x, x, x, attn_mask=mask)[0]
    close(ours(x, x, x, attn_mask=mask)[0], first)
    assert len(looks) == 1
    mask[5, 0] = True
    with pytest.raises(Unsupported, match="attn_mask"):
        ours(x, x, x, attn_mask=mask)
    mask.zero_()
    close(ours(x, x, x, attn_mask=mask)[0], ours(x, x, x)[0])
    assert len(looks) == 3


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_the_look_at_a_mask_misses_no_cell(length: int) -> None:
    from attention_zoo.integrations.multihead import _look

    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    for mask in (causal, causal.expand(2, -1, -1), torch.zeros(length, length).masked_fill(causal, -torch.inf)):
        assert _look(mask) == (length > 1, True)
    assert _look(torch.zeros_like(causal)) == (False, True)
    for row, column in {(0, 0), (length - 1, 0), (length - 1, length - 1), (length // 2, length - 1)}:
        for base in (causal, torch.zeros_like(causal)):
            one = base.clone()
            one[row, column] ^= True
            assert _look(one) == ((False, False) if length > 2 else _look(one)), (row, column)
        soft = torch.zeros(length, length)
        soft[row, column] = 0.5
        assert _look(soft) == (False, False)


def test_it_compiles_around_the_kernels() -> None:
    _, ours = pair("longformer", batch_first=True)
    x = data(B, L, E)
    layer = nn.Sequential(nn.Linear(E, E, dtype=torch.float64))

    def model(x: Tensor) -> Tensor:
        y = layer(x)
        return ours(y, y, y, is_causal=True)[0] + y

    with torch.no_grad():
        close(torch.compile(model, backend="eager")(x), model(x))


def test_the_same_tokens_by_another_name() -> None:
    """Views of the same memory are self-attention; a copy may be anything, and is refused."""
    _, ours = pair("longformer")
    x = data(B, L, E)
    y = ours(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0]
    close(y, ours(*[x.transpose(0, 1)] * 3)[0])
    with pytest.raises(Unsupported, match="not the query"):
        ours(x, x.clone(), x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_rows_of_their_own(layout: torch.layout) -> None:
    _, ours = pair("longformer", batch_first=True)
    rows = [data(3, E), data(11, E), data(1, E)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    for causal in (False, True):
        out = ours(nested, nested, nested, is_causal=causal)[0]
        assert out.layout == layout
        for one, row in zip(out.unbind(), rows):
            close(one, ours(row, row, row, is_causal=causal)[0])
    with pytest.raises(ValueError, match="at once"):
        ours(nested, nested, nested + 1)
    _, full = pair("full", batch_first=True)
    with pytest.raises(ValueError, match="need_weights"):
        full(nested, nested, nested)


def test_what_full_leaves_to_torch() -> None:
    theirs, ours = pair("full", batch_first=True, dropout=0.3)
    x, mask = data(B, L, E), torch.rand(L, L) < 0.3
    mask[:, 0] = False
    without: dict[str, Any] = {"need_weights": False}
    for ready, rest in ((True, {}), (True, without | {"attn_mask": mask}), (False, without), (False, {})):
        for module in (theirs, ours):
            module.train(not ready)
        torch.manual_seed(1)
        want = theirs(x, x, x, **rest)
        torch.manual_seed(1)
        close(ours(x, x, x, **rest), want)
    close(ours.eval()(x, x, x, is_causal=True), theirs.eval()(x, x, x, attn_mask=FUTURE))
    theirs, ours = pair("full", batch_first=True, add_bias_kv=True, add_zero_attn=True)
    close(ours(x, x, x)[0], theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("rest", "word"),
    [
        ({"need_weights": True}, "need_weights"),
        ({"attn_mask": FUTURE.tril(3)}, "attn_mask"),
        ({"attn_mask": FUTURE[:-1, :-1]}, "attn_mask must be"),
        ({"attn_mask": FUTURE[:, :-1], "is_causal": True}, "attn_mask must be"),
        ({"attn_mask": torch.rand(L, L, dtype=torch.float64)}, "attn_mask"),
        ({"attn_mask": ~FUTURE}, "attn_mask"),
        ({"key_padding_mask": torch.rand(B, L, dtype=torch.float64)}, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(B, L - 1, dtype=torch.bool)}, "key_padding_mask"),
    ],
)
def test_what_a_pattern_cannot_do_raises(rest: dict[str, Any], word: str) -> None:
    _, ours = pair("longformer", batch_first=True)
    x = data(B, L, E)
    with pytest.raises(ValueError, match=word):
        ours(x, x, x, **rest)


def test_builds_and_calls_that_are_refused() -> None:
    x = data(B, L, E)
    _, ours = pair("longformer", batch_first=True, dropout=0.1)
    assert ours.eval()(x, x, x)[0].isfinite().all()
    with pytest.raises(Unsupported, match="dropout"):
        ours.train()(x, x, x)
    with pytest.raises(Unsupported, match="not the query"):
        ours.eval()(x, x.clone(), x)
    for attention, options, word in (
        ("reformer", {}, "queries are its keys"),
        ("longformer", {"windw": 3}, "did you mean window"),
        ("longformer", {"add_zero_attn": True}, "add_zero_attn"),
        ("longformer", {"global_projections": "separate"}, "second projection"),
        ("bigbird", {"positions": "alibi"}, "the model around it"),
        ("nothing", {}, "must be one of"),
    ):
        with pytest.raises(ValueError, match=word):
            MultiheadAttention(E, H, attention=attention, **options)
