"""On a GPU: every backend, kernel and type against the definition in float64; memory, compilation, speed of growth.

    python -m pytest tests -m cuda

Skips only where there is no CUDA device; the arithmetic of the same kernels is then tested by Triton's interpreter
(test_triton_*.py) and uncompiled (test_flex.py).
"""

from __future__ import annotations

import copy

import pytest
import torch

import attention_zoo as zoo
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.overview import kernel_rows
from attention_zoo.testing.case import ragged

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative to the norm: of outputs; gradients may have twice as much."""
TRUTH = {
    "adaptive_span": "dense", "bigbird": "dense", "full": "dense", "longformer": "dense", "reformer": "dense",
    "transformer_xl": "gather",
}  # fmt: skip
KERNELS = {
    "adaptive_span": ("flex", "banded", "tiles"),
    "bigbird": ("triton", "flex", "blocks", "tiles"),
    "full": ("sdpa", "flex", "tiles"),
    "longformer": ("flex", "xformers", "banded", "tiles"),
    "reformer": ("triton", "chunks"),
    "transformer_xl": ("triton", "shift"),
}
OPTIONS = {
    "adaptive_span": {"limit": 120, "ramp": 16, "start": 10.3},
    "bigbird": {"block": 64},
    "full": {},
    "longformer": {"window": 100},
    "reformer": {"chunk": 64, "rounds": 2, "resample": False},
    "transformer_xl": {"segment_length": 128, "memory_length": 100},
}
MADE_OF_TOKENS = {"h_transformer_1d": {"block": 16}, "memory_compressed": {"compression": 3}}
"""Mechanisms without kernels of their own: FlexAttention runs them, and tiles in float64, which it does not take."""
CASES = [(name, kernel) for name, kernels in KERNELS.items() for kernel in kernels]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = False


def layouts(name: str, length: int) -> dict[str, zoo.Tokens | None]:
    valid = ragged(length, [length, 2 * length // 3], "left")
    document = (torch.arange(length) // (length // 2 + 1)).expand(2, -1)
    found = {"all valid": None, "padded left": zoo.Tokens.of(valid), "documents": zoo.Tokens.of(valid, None, document)}
    if name == "transformer_xl":
        holes = torch.ones_like(valid)
        holes[:, 1::3] = False
        found["holes"] = zoo.Tokens.of(holes)
    if name not in ("adaptive_span", "reformer", "transformer_xl", *MADE_OF_TOKENS):
        flags = torch.zeros_like(valid)
        flags[:, length - 5] = True
        found["global tokens"] = zoo.Tokens.of(valid, flags)
    return {
        layout: None if tokens is None else zoo.Tokens(*(field.cuda() for field in tokens))
        for layout, tokens in found.items()
    }


def run(layer, x, tokens, choices=None):
    """Outputs at valid tokens, and gradients of x and the parameters."""
    out = layer(x, tokens, choices=choices)
    hidden = out.hidden if tokens is None else out.hidden[tokens.valid]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(hidden)
    grads = torch.autograd.grad((hidden * weight).sum(), [x, *layer.parameters()], allow_unused=True)
    return hidden, grads, out.choices


def error(got, want) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-3))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [1, 129, 1009])
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_every_kernel_equals_the_definition(name: str, kernel: str, length: int, dtype: torch.dtype) -> None:
    """Where a kernel refuses a call its reason is the test's; that auto always runs is tested below."""
    torch.manual_seed(0)
    ran, reasons = 0, []
    for causal in (True, False) if name != "transformer_xl" else (True,):
        exact = zoo.build(name, dim=128, heads=2, causal=causal, kernel=TRUTH[name], **OPTIONS[name]).cuda().double()
        fast = copy.deepcopy(exact).to(dtype)
        exact.load_state_dict(fast.state_dict())  # both begin from the rounded weights
        fast.kernel = kernel
        for layout, tokens in layouts(name, length).items():
            if length < 8 and layout == "global tokens":
                continue
            x = torch.randn(2, length, 128, device="cuda").to(dtype)
            wide = x.double().requires_grad_()
            want, wants, choices = run(exact, wide, tokens)
            try:
                got, gots, _ = run(fast, x.requires_grad_(), tokens, choices)
            except zoo.Unsupported as refusal:
                reasons.append(f"{layout}: {refusal}")
                continue
            ran += 1
            where = f"{name} {kernel} causal={causal} {layout} length {length}"
            assert got.isfinite().all(), where
            assert error(got, want) <= TOLERANCE[dtype], f"{where}: output off by {error(got, want):.1e}"
            for number, (a, b) in enumerate(zip(gots, wants)):
                if a is None or float(b.norm()) < 1e-6:
                    continue  # a key bias has no gradient: softmax does not see it
                assert error(a, b) <= 2 * TOLERANCE[dtype], f"{where}: gradient {number} off by {error(a, b):.1e}"
    if not ran:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [1, 129, 1009])
@pytest.mark.parametrize("name", MADE_OF_TOKENS)
def test_keys_made_of_tokens_equal_tiles_in_float64(name: str, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for causal in (True, False):
        exact = zoo.build(name, dim=128, heads=2, causal=causal, **MADE_OF_TOKENS[name]).cuda().double()
        for layout, tokens in layouts(name, length).items():
            same(exact, dtype, length, tokens, f"{name} causal={causal} {layout}")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [20, 1009])
def test_heads_that_reach_differently_far_equal_the_definition(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = {"limit": 400, "ramp": 16, "kernel": "dense"}
    exact = zoo.build("adaptive_span", dim=256, heads=4, **options).cuda().double()
    with torch.no_grad():
        exact.span.copy_(torch.tensor([0.0011, 0.1003, 0.2512, 0.753]))  # gradients jump at whole tokens
    for layout, tokens in layouts("adaptive_span", length).items():
        same(exact, dtype, length, tokens, layout, kernel="flex")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [20, 1009])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bigbird", {"positions": "alibi"}),
        ("bigbird", {"causal": False, "sink_logit": True, "kv_heads": 1}),
        ("bigbird", {"causal": False, "plan": "reference", "positions": "alibi"}),
        ("longformer", {"sinks": 4, "sink_positions": "cache", "positions": "rotary", "dilation": [1, 3]}),
        ("longformer", {"sinks": 4, "sink_positions": "cache", "positions": "alibi", "sink_logit": True}),
        ("longformer", {"head_width": 8, "scale": -0.3}),
    ],
    ids=str,
)
def test_options_equal_the_definition(name: str, options: dict, length: int, dtype: torch.dtype) -> None:
    """What FlexAttention is told by tables of links, by copies of first tokens and by further channels."""
    torch.manual_seed(0)
    exact = zoo.build(name, dim=128, heads=2, kernel="dense", **{**OPTIONS[name], **options}).cuda().double()
    for layout, tokens in layouts(name, length).items():
        same(exact, dtype, length, tokens, f"{name} {options} {layout}", kernel="flex")


def same(exact, dtype, length: int, tokens, where: str, kernel: str | None = None) -> None:
    """A layer in that dtype against itself in float64: outputs and gradients."""
    fast = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(fast.state_dict())
    if kernel is not None:
        fast.kernel = kernel
    x = torch.randn(2, length, exact.dim, device=exact.to_q.weight.device).to(dtype)
    want, wants, _ = run(exact, x.double().requires_grad_(), tokens)
    got, gots, _ = run(fast, x.requires_grad_(), tokens)
    assert got.isfinite().all(), where
    assert error(got, want) <= TOLERANCE[dtype], f"{where}: output off by {error(got, want):.1e}"
    for number, (a, b) in enumerate(zip(gots, wants)):
        if a is not None and float(b.norm()) >= 1e-6:
            assert error(a, b) <= 2 * TOLERANCE[dtype], f"{where}: gradient {number} off by {error(a, b):.1e}"


SIZES = [
    ("bigbird", "block"), ("reformer", "chunk"), ("transformer_xl", "segment_length"), ("longformer", "window"),
    ("adaptive_span", "limit"), ("h_transformer_1d", "block"), ("memory_compressed", "compression"),
]  # fmt: skip


@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize(("name", "option"), SIZES)
def test_every_size_that_is_taken_runs(name: str, option: str, size: int, width: int) -> None:
    """What `auto` takes starts on this card, in both directions, and equals the definition."""
    torch.manual_seed(0)
    options = {**OPTIONS.get(name, {}), option: size}
    truth = {"kernel": TRUTH[name]} if name in TRUTH else {}
    exact = zoo.build(name, dim=2 * width, heads=2, **truth, **options).cuda().double()
    fast = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(fast.state_dict())
    if truth:
        fast.kernel = "auto"
    x = torch.randn(1, 5 * size + 3, 2 * width, device="cuda").bfloat16()
    want, wants, choices = run(exact, x.double().requires_grad_(), None)
    got, gots, _ = run(fast, x.requires_grad_(), None, choices)
    assert error(got, want) <= TOLERANCE[torch.bfloat16]
    for a, b in zip(gots, wants):
        if a is not None and float(b.norm()) >= 1e-6:
            assert error(a, b) <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("name", ["bigbird", "reformer", "transformer_xl"])
def test_gradients_have_the_same_bits_every_time(name: str) -> None:
    layer = zoo.build(name, dim=128, heads=2, kernel="triton", **OPTIONS[name]).cuda().bfloat16()
    x = torch.randn(2, 1000, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    choices = layer(x).choices
    first, second = (run(layer, x, None, choices)[1] for _ in range(2))
    for a, b in zip(first, second):
        if a is not None:
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "kernel"), [(name, kernels[0]) for name, kernels in KERNELS.items()])
def test_auto_takes_the_gpu_kernel(name: str, kernel: str) -> None:
    """In bfloat16, at the length of the table that `python -m attention_zoo kernels` prints."""
    layer = zoo.build(name, dim=128, heads=2, **OPTIONS[name]).cuda().bfloat16()
    if isinstance(layer, PatternAttention):
        rows = kernel_rows(4096, "cuda", torch.bfloat16)
        (chosen,) = [row[1] for row in rows if row[0] == name and row[2].startswith("runs, chosen")]
        assert chosen in KERNELS[name][:2]
        return
    x = torch.randn(1, 300, 128, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    layer.kernel = kernel
    torch.testing.assert_close(layer(x, choices=want.choices).hidden, want.hidden, atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "full"])
def test_memory_grows_with_the_length_and_not_with_its_square(name: str) -> None:
    peaks = []
    layer = zoo.build(name, dim=512, heads=8, **OPTIONS[name]).cuda().bfloat16()
    for length in (16384, 32768, 65536):
        x = torch.randn(1, length, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):  # the first call compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(x).hidden.sum().backward()
            torch.cuda.synchronize()
            peaks_here = torch.cuda.max_memory_allocated() - before
        peaks.append(peaks_here)
    assert peaks[2] <= 2.3 * peaks[1] <= 2.3 * 2.3 * peaks[0], peaks


@pytest.mark.parametrize("name", zoo.available())
def test_a_compiled_training_step_equals_the_eager_one(name: str) -> None:
    torch._dynamo.reset()
    mechanism = {"name": name, **OPTIONS.get(name, {})}
    model = zoo.Transformer(attention=mechanism, vocab=64, dim=128, depth=2, heads=2).cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (200, 333):
        ids = torch.randint(0, 64, (2, length), device="cuda")
        found = []
        for run_it in (model, compiled):
            logits = run_it(ids).logits
            grads = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
            found.append((logits, grads))
        (want, wants), (got, gots) = found
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        for a, b in zip(gots, wants):
            if b is not None:
                torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_flex_compiles_once_for_lengths_of_one_bucket() -> None:
    from attention_zoo.ops.pattern import flex

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = zoo.build("longformer", dim=128, heads=2, window=100, kernel="flex").cuda().bfloat16()
    counts = []
    for length in (1500, 1400, 1501, 1536):
        assert flex.bucket(length) == flex.bucket(1500)
        x = torch.randn(1, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).hidden.sum().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1, f"graphs after each length: {counts}"


def test_full_attention_never_materialises() -> None:
    layer = zoo.build("full", dim=128, heads=2, kernel="sdpa").cuda()
    with pytest.raises(zoo.Unsupported, match="no fused engine on CUDA takes float64"):
        layer.double()(torch.zeros(1, 16, 128, device="cuda", dtype=torch.float64))
