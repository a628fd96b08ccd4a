"""BigBird: its links, the released plans, and the blocks kernel against the definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import attention_zoo as zoo
from attention_zoo import Tokens, Unsupported
from attention_zoo.attention.bigbird import BigBird
from attention_zoo.measure.memory import peak_memory
from attention_zoo.testing.case import Case, ragged

BLOCK, HEADS, WIDTH, DIM = 4, 4, 8, 32
PLANS = [(True, "uniform"), (False, "uniform"), (False, "reference"), (False, "reference_eval")]


def build(causal: bool = True, **options: object) -> BigBird:
    torch.manual_seed(0)
    chosen = {"dim": DIM, "heads": HEADS, "block": BLOCK, "random": 2, **options}
    layer = zoo.build("bigbird", causal=causal, **chosen).double()
    assert isinstance(layer, BigBird)
    layer.tile = 8
    return layer


def operands(batch: int, queries: int, keys: int, kv_heads: int = HEADS) -> list[Tensor]:
    g = torch.Generator().manual_seed(queries + keys)
    shapes = [(batch, HEADS, queries, WIDTH), *[(batch, kv_heads, keys, WIDTH)] * 2]
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


def results(layer: BigBird, kernel: str, qkv: list[Tensor], queries: Tokens, keys: Tokens) -> list[Tensor]:
    """Outputs at valid queries, and the gradients of q, k and v."""
    out = layer.attend(*qkv, queries, keys, kernel=kernel)
    assert bool(out.isfinite().all())
    out = out * queries.valid[:, None, :, None]
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def assert_equal_to_dense(layer: BigBird, tokens: Tokens, kernels: tuple[str, ...], cut: int = 0) -> None:
    queries = tokens.cut(slice(cut, None))
    B, S = tokens.valid.shape
    qkv = operands(B, S - cut, S, layer.kv_heads)
    expected = results(layer, "dense", qkv, queries, tokens)
    for kernel in kernels:
        for name, a, b in zip(("out", "dq", "dk", "dv"), results(layer, kernel, qkv, queries, tokens), expected):
            assert torch.allclose(a, b, rtol=0, atol=1e-12), f"{kernel}: {name} is off by {(a - b).abs().max():.1e}"


def links(layer: BigBird, row: int | Tensor, blocks: int) -> Tensor:
    """[..., H, r]"""
    return layer._plan.picks(torch.as_tensor(row), torch.tensor(blocks))


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "plan"), PLANS)
def test_kernels_equal_the_definition_in_every_layout(causal: bool, plan: str) -> None:
    """Lengths that straddle the borders of blocks; padding on both sides, holes, documents, more global tokens."""
    layer = build(causal, plan=plan)
    for length in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 3, 61):
        for _, tokens in Case.of("bigbird").layouts(length):
            assert_equal_to_dense(layer, tokens, ("blocks", "tiles"))


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2},
        {"kv_heads": 1, "positions": "alibi"},
        {"positions": "alibi", "causal": False},
        {"positions": "alibi", "causal": False, "plan": "reference"},
        {"positions": "alibi", "extra_global_tokens": 2},
        {"window_blocks": 1, "random": 0, "causal": False},
        {"window_blocks": 5, "block": 1},
        {"block": 7, "random": 5, "causal": False},
    ],
    ids=str,
)
def test_every_option_equals_the_definition(options: dict) -> None:
    layer = build(**options)
    for length in (37, 97):  # 97: more blocks than one step takes
        for name, tokens in Case.of("bigbird").layouts(length):
            # 3-token documents leave blocks of 7 mostly empty
            kernels = ("auto",) if "documents" in name and layer.block > 6 else ("blocks",)
            assert_equal_to_dense(layer, tokens, kernels)


@pytest.mark.parametrize("positions", ["none", "alibi"])
def test_later_queries_against_all_keys(positions: str) -> None:
    """Chunked prefill and decoding: queries begin inside a block; a few of them leave the cache in place."""
    layer = build(positions=positions, kv_heads=2)
    for length, cut in ((61, 30), (61, 60), (64, 63), (64, 56), (97, 94)):
        for _, tokens in Case.of("bigbird").layouts(length):
            if dict(layer.explain(*operands(3, length - cut, length, 2), tokens.cut(slice(cut, None)), tokens))[
                "blocks"
            ]:
                assert_equal_to_dense(layer, tokens, ("auto",), cut)
            else:
                assert_equal_to_dense(layer, tokens, ("blocks",), cut)


def test_keys_that_are_missing() -> None:
    """What a cache may have forgotten: a document's first blocks, where another document's stand; some; most."""
    whole = torch.ones(2, 60, dtype=torch.bool)
    two = Tokens.of(whole, document=(torch.arange(60)[None] >= 2 * BLOCK).long().expand(2, -1))
    held = torch.cat([torch.arange(2 * BLOCK), torch.arange(4 * BLOCK, 41), torch.arange(44, 60)])
    for causal in (True, False):
        layer = build(causal)
        assert_equal_to_dense(layer, two.cut(held), ("blocks", "tiles"))
        assert_equal_to_dense(layer, Tokens.of(whole).cut(slice(9, None)), ("blocks", "tiles"))
        assert_equal_to_dense(layer, Tokens.all_valid(1, 600).cut(torch.arange(0, 600, 5)), ("tiles",))


@pytest.mark.parametrize("plan", ["uniform", "reference", "reference_eval"])
@pytest.mark.parametrize("held", [1, BLOCK, 2 * BLOCK + 3])
def test_a_document_s_first_keys_alone(plan: str, held: int) -> None:
    """As a process has them that owns nothing but a global block: links go to blocks that are not there."""
    layer = build(False, plan=plan, random=3)
    tokens = Tokens.all_valid(2, 61).cut(slice(held))
    assert_equal_to_dense(layer, tokens, ("blocks", "covered", "short", "tiles"))


def test_layouts_that_waste_blocks_are_left_to_tiles() -> None:
    layer = build(block=16)
    tokens = Tokens.of(torch.ones(2, 60, dtype=torch.bool), document=torch.arange(60)[None].expand(2, -1) // 2)
    qkv = operands(2, 60, 60)
    reasons = dict(layer.explain(*qkv, tokens, tokens))
    assert reasons["tiles"] is None
    assert "empty" in str(reasons["blocks"])
    with pytest.raises(Unsupported, match="most columns of most blocks would be empty"):
        layer.attend(*qkv, tokens, tokens, kernel="blocks")
    assert_equal_to_dense(layer, tokens, ("auto",))


ALIBI = {"kv_heads": 2, "positions": "alibi"}
SETTINGS = [(False, {}), (True, {}), (False, ALIBI), (True, ALIBI), (False, {"plan": "reference"})]


def weigh_heads(layer: BigBird) -> None:
    """Links that weigh differently in each head, as a plan may make them."""
    links, heads = layer.links, torch.arange(HEADS)[:, None, None]

    def weighed(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, weight = links(*rows)
        return found, weight + heads * (1 + found % 2) / 8

    layer.reach = replace(layer.reach, links=weighed)


@pytest.mark.parametrize(("causal", "options"), SETTINGS)
def test_steps_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, causal: bool, options: dict) -> None:
    """A step may be one head, or the heads that share a key head; gradients too."""
    layer, tokens = build(causal, **options), Tokens.of(ragged(150, [150, 87, 3]))
    qkv = operands(3, 150, 150, layer.kv_heads)

    def run() -> list[torch.Tensor]:
        out = layer.attend(*qkv, tokens, tokens, kernel="blocks")
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    alike = run()
    weigh_heads(layer)
    whole = run()
    assert not torch.allclose(whole[0], alike[0], rtol=0, atol=1e-3)
    for name, size in (
        ("softmax.tiles.SCORES", {"cpu": 1}),
        ("softmax.tiles.SCORES", {"cpu": 5000}),
        ("pattern.blocks.GATHERED", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"attention_zoo.ops.{name}", size)
            for mine, want in zip(run(), whole):
                assert torch.allclose(mine, want, rtol=0, atol=1e-12)


def test_gradients_of_the_blocks_kernel_match_finite_differences() -> None:
    for causal, plan in PLANS:
        layer = build(causal, plan=plan, kernel="blocks", random=1, block=2)
        tokens = Tokens.of(ragged(19, [19, 12]))
        x = torch.randn(2, 19, DIM, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: layer(x, tokens).hidden, x, fast_mode=True)  # noqa: B023


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear(causal: bool) -> None:
    layer = build(causal, block=16).float()

    def peak(length: int) -> int:
        x = torch.randn(1, length, DIM, requires_grad=True)
        return peak_memory(lambda: layer(x).hidden.sum().backward()).peak_bytes

    short, long = peak(2048), peak(4096)
    assert long <= 2.3 * short
    assert long < 4096 * 4096 * 4  # not one L x L matrix of one head


# --- the paper's plan ------------------------------------------------------------------------------------------------


def rows(causal: bool) -> Iterator[tuple[int, int, set[int]]]:
    """(row, blocks, blocks that may be drawn) of a layer with a window of 3 blocks and global ends."""
    for blocks in (1, 2, 3, 4, 5, 6, 9, 30):
        for row in range(blocks):
            allowed = set(range(1, blocks if causal else blocks - 1)) - {row - 1, row, row + 1}
            yield row, blocks, {block for block in allowed if not causal or block < row}


@pytest.mark.parametrize("causal", [True, False])
def test_links_are_valid_and_distinct_and_all_are_used_when_few_are_left(causal: bool) -> None:
    layer = build(causal, random=3)
    for row, blocks, allowed in rows(causal):
        for head in links(layer, row, blocks).tolist():
            drawn = [block for block in head if block >= 0]
            assert len(set(drawn)) == len(drawn) == min(3, len(allowed))
            assert set(drawn) <= allowed


def test_links_do_not_depend_on_the_call() -> None:
    """The same at every call and in every other layer of that seed; causal ones also at every length."""
    layer, twin = build(False), build(False)
    torch.manual_seed(99)
    row = torch.arange(40)
    assert torch.equal(links(layer, row, 40), links(layer, row, 40))
    assert torch.equal(links(layer, row, 40), links(twin, row, 40))
    assert torch.equal(links(layer, row, 40)[7], links(layer, 7, 40))
    assert not torch.equal(links(layer, row, 40), links(layer, row, 39))
    causal = build()
    assert torch.equal(links(causal, row, 40), links(causal, row, 1000))
    tokens = Tokens.all_valid(1, 160)
    assert torch.equal(causal.bias(tokens, tokens), causal.bias(tokens, tokens))


def test_links_differ_between_seeds_heads_rows_and_draws() -> None:
    row = torch.arange(1000, 1040)
    drawn = torch.stack([links(build(seed=seed), row, 0) for seed in (0, 1, -1, 2**40)])
    for dim in (0, 1, 2):
        assert len(drawn.unique(dim=dim).unbind(dim)) == drawn.shape[dim]
    assert (drawn[..., 0] != drawn[..., 1]).all()


def test_links_stay_what_they_were() -> None:
    """Trained weights rely on them: on any device, in any release."""
    assert links(build(heads=2, seed=3), torch.arange(6, 10), 0).tolist() == [
        [[4, 3], [3, 4]], [[3, 1], [5, 2]], [[3, 5], [6, 1]], [[5, 4], [3, 7]],
    ]  # fmt: skip
    assert links(build(False, heads=2, seed=3), torch.arange(1, 5), 12).tolist() == [
        [[4, 10], [10, 5]], [[5, 7], [6, 7]], [[9, 1], [10, 5]], [[7, 1], [10, 7]],
    ]  # fmt: skip


def test_links_are_uniform() -> None:
    """Each of 9 candidate blocks as often as any other in each draw, and each ordered pair; over many seeds."""
    row, blocks = 6, 14  # candidates: 1 .. 4 and 8 .. 12
    candidates = [1, 2, 3, 4, 8, 9, 10, 11, 12]
    drawn = torch.cat([links(build(False, seed=seed, heads=16, dim=16), row, blocks) for seed in range(500)])
    index = torch.tensor([candidates.index(int(block)) for block in drawn.flatten()]).view_as(drawn)
    for draw in index.unbind(1):
        assert chi_squared(draw.bincount(minlength=9)) < 26.1  # 8 degrees of freedom: p = 0.001
    pairs = (index[:, 0] * 9 + index[:, 1]).bincount(minlength=81).view(9, 9)
    assert int(pairs.diagonal().sum()) == 0
    assert chi_squared(pairs[~torch.eye(9, dtype=torch.bool)]) < 112.3  # 71 degrees of freedom: p = 0.001


def chi_squared(counts: Tensor) -> float:
    mean = counts.double().mean()
    return float(((counts - mean) ** 2 / mean).sum())


@pytest.mark.parametrize("causal", [True, False])
def test_the_pattern_by_brute_force(causal: bool) -> None:
    """Every cell, from window, links and global blocks as the paper has them; the last block is cut short."""
    layer, length = build(causal), 11 * BLOCK - 1
    tokens = Tokens.all_valid(1, length)
    seen = (layer.full_bias(tokens, tokens) == 0)[0]
    ends = {0} if causal else {0, 10}
    for head in range(HEADS):
        for i in range(length):
            row = i // BLOCK
            linked = {row - 1, row, row + 1, *ends, *links(layer, row, 11)[head].tolist()}
            for j in range(length):
                expected = (row in ends or j // BLOCK in linked) and (j <= i or not causal)
                assert bool(seen[head, i, j]) == expected, (head, i, j)


# --- global tokens ---------------------------------------------------------------------------------------------------


def test_first_and_last_block_of_every_row_and_document_are_global() -> None:
    tokens = Tokens.of(ragged(30, [30, 17, 0], "left"))
    document = Tokens.of(torch.ones(1, 30, dtype=torch.bool), document=(torch.arange(30) >= 13).long()[None])
    two_sided, causal = build(False), build(True)

    def marked(layer: BigBird, tokens: Tokens) -> list[list[int]]:
        once = layer.mark(tokens)
        assert torch.equal(layer.mark(once).is_global, once.is_global)
        return [row.nonzero().flatten().tolist() for row in once.is_global]

    assert marked(two_sided, tokens) == [[0, 1, 2, 3, 28, 29], [13, 14, 15, 16, 29], []]
    assert marked(causal, tokens) == [[0, 1, 2, 3], [13, 14, 15, 16], []]
    assert marked(two_sided, document) == [[0, 1, 2, 3, 12, 13, 14, 15, 16, 29]]
    assert marked(causal, document) == [[0, 1, 2, 3, 13, 14, 15, 16]]


@pytest.mark.parametrize("causal", [True, False])
def test_extra_global_tokens_replace_global_blocks(causal: bool) -> None:
    """ETC: the tokens in front are flagged by the skeleton; no block is global, and block 0 can be drawn."""
    layer, length = build(causal, extra_global_tokens=2), 15 * BLOCK
    assert layer.extra_global_tokens == 2
    flags = torch.zeros(1, length, dtype=torch.bool)
    flags[:, :2] = True
    tokens = Tokens.of(torch.ones_like(flags), flags)
    assert torch.equal(layer.mark(tokens).is_global, flags)
    seen = layer.full_bias(tokens, tokens)[0] > -torch.inf
    assert bool(seen[:, :, :2].tril().sum() == seen[:, :, :2].sum()) is causal
    assert bool(seen[:, 2:, :2].all())
    assert bool(seen[:, :2].all()) is not causal
    assert not bool(seen[:, -1, 2:BLOCK].all(0).any())
    drawn = torch.cat([links(layer, row, 15).flatten() for row in range(15)])
    assert 0 in drawn.tolist()
    assert_equal_to_dense(layer, tokens, ("blocks", "tiles"))


# --- causality and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["blocks", "tiles", "dense"])
def test_the_future_never_changes_the_past(kernel: str) -> None:
    layer, length = build(kernel=kernel), 70
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    flags = torch.zeros(2, length, dtype=torch.bool)
    flags[:, [9, 40, 66]] = True
    tokens = Tokens.of(torch.ones_like(flags), flags)
    before = layer(x, tokens).hidden
    for start in (1, BLOCK, 33, 69):
        other = x.clone()
        other[:, start:] = torch.randn_like(other[:, start:]) * 100
        after = layer(other, tokens).hidden
        assert torch.equal(after[:, :start], before[:, :start])
        assert not torch.equal(after[:, start:], before[:, start:])


@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
def test_decoding_token_by_token_equals_the_whole(positions: str) -> None:
    """Rows of different lengths, padded on the left; a global token arrives in the middle."""
    layer, length = build(positions=positions), 50
    valid = ragged(length, [50, 31], "left")
    flags = torch.zeros_like(valid)
    flags[:, 37] = True
    tokens = Tokens.of(valid, flags)
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    whole = layer(x, tokens).hidden
    out = layer(x[:, :23], tokens.cut(slice(0, 23)), state=layer.initial_state(2))
    hidden = [out.hidden]
    for i in range(23, length):
        out = layer(x[:, i : i + 1], tokens.cut(slice(i, i + 1)), state=out.state)
        hidden.append(out.hidden)
    assert torch.allclose(torch.cat(hidden, 1)[valid], whole[valid], rtol=0, atol=1e-12)


def test_a_short_row_is_not_changed_by_a_longer_one_beside_it() -> None:
    """Two-sided links and global blocks follow each row's own length, never the padded one."""
    for causal, plan in PLANS:
        layer = build(causal, plan=plan)
        x = torch.randn(2, 90, DIM, dtype=torch.float64)
        together = layer(x, Tokens.of(ragged(90, [90, 53]))).hidden
        alone = layer(x[1:, :53]).hidden
        assert torch.allclose(together[1:, :53], alone, rtol=0, atol=1e-12)


# --- the released plans ----------------------------------------------------------------------------------------------

# drawn by transformers 5.23's BigBirdBlockSparseAttention in training: seed 3, 2 heads, 2 random blocks of 64 tokens
RELEASED_1024 = [
    [[9, 7], [10, 4]], [[7, 15], [12, 6]], [[8, 11], [12, 15]], [[9, 6], [8, 10]], [[7, 13], [13, 8]],
    [[1, 3], [9, 14]], [[2, 15], [10, 12]], [[3, 4], [6, 10]], [[2, 6], [3, 12]], [[4, 3], [8, 12]],
    [[2, 13], [8, 14]], [[5, 10], [6, 15]], [[1, 10], [11, 7]], [[2, 8], [8, 11]],
]  # fmt: skip
RELEASED_896 = [
    [[6, 4], [6, 4]], [[5, 7], [5, 4]], [[7, 5], [5, 6]], [[2, 7], [6, 7]], [[3, 2], [1, 7]], [[2, 4], [3, 2]],
    [[5, 4], [3, 2]], [[1, 5], [1, 2]], [[4, 5], [6, 5]], [[6, 2], [1, 2]], [[7, 6], [5, 3]], [[1, 6], [2, 5]],
]  # fmt: skip

# the same with 1 random block of 512 tokens: the window is not left out in the last two rows
RELEASED_4096 = [[[6], [4]], [[5], [4]], [[6], [5]], [[1], [2]], [[6], [1]], [[3], [4]]]


def test_released_links_are_replayed() -> None:
    for block, random, recorded in ((64, 2, RELEASED_1024), (64, 2, RELEASED_896), (512, 1, RELEASED_4096)):
        layer, blocks = build(False, plan="reference", block=block, random=random, heads=2, seed=3), len(recorded) + 2
        assert links(layer, torch.arange(1, blocks - 1), blocks).tolist() == recorded
        assert links(layer, torch.tensor([-1, 0, blocks - 1, blocks]), blocks).eq(-1).all()


def test_released_links_stay_near_the_start_whatever_the_length() -> None:
    layer = build(False, plan="reference", block=64, random=3)
    for blocks, reached in ((256, 9), (16, 15), (48, 15), (64, 15)):
        drawn = links(layer, torch.arange(1, blocks - 1), blocks)
        assert 1 <= int(drawn.min()) <= int(drawn.max()) <= reached
    # the old plan hits the last block of 1,024 tokens again, the newer one no window or global block ever
    assert bool((links(layer, torch.arange(1, 15), 16) == 15).any())
    row = torch.arange(1, 99)
    newer = links(layer, row, 100)
    assert not bool(((newer - row[:, None, None]).abs() <= 1).any())


def test_replaying_leaves_the_global_generators_alone() -> None:
    layer = build(False, plan="reference", seed=12345)
    state, kept = np.random.get_state()[1].copy(), torch.get_rng_state()
    links(layer, 3, 20)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), kept)


@pytest.mark.parametrize("plan", ["reference", "reference_eval"])
def test_a_block_that_is_listed_again_counts_again(plan: str) -> None:
    """The layer against one softmax over a written-out list of key blocks, repeated ones repeated."""
    layer, blocks = build(False, plan=plan, block=64, random=2, seed=3, kernel="blocks"), 16
    q, k, v = (x.detach() for x in operands(1, 64 * blocks, 64 * blocks))
    out = layer.attend(q, k, v)
    repeated = 0
    for row in range(blocks):
        drawn = links(layer, row, blocks).tolist()
        for head in range(HEADS):
            listed = [*sorted({0, row - 1, row, row + 1, blocks - 1}), *drawn[head]]
            listed = list(range(blocks)) if row in (0, blocks - 1) else listed
            repeated += len(listed) - len(set(listed))
            keys, values = (torch.cat([x[0, head, 64 * j : 64 * j + 64] for j in listed]) for x in (k, v))
            rows = slice(64 * row, 64 * row + 64)
            weights = (q[0, head, rows] @ keys.T / math.sqrt(WIDTH)).softmax(-1)
            assert torch.allclose(out[0, head, rows], weights @ values, rtol=0, atol=1e-12)
    assert repeated > 0


def test_the_released_model_sees_everything_when_it_is_short() -> None:
    """Up to 2r + 5 blocks."""
    layer = build(False, plan="reference")
    for length, full in ((9 * BLOCK, True), (9 * BLOCK + 1, False)):
        tokens = Tokens.all_valid(1, length)
        assert bool((layer.full_bias(tokens, tokens) == 0).all()) is full


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("block", "random", "length", "seed", "plan"),
    [
        (4, 2, 64, 0, "reference"),
        (4, 3, 48, 1, "reference"),
        (64, 3, 768, 2, "reference"),
        (64, 3, 1024, 3, "reference"),
        (64, 3, 3072, 4, "reference"),
        (64, 3, 4096, 5, "reference"),
        (16, 1, 1024, 6, "reference"),
        (4, 2, 64, 0, "reference_eval"),
        (64, 3, 1024, 0, "reference_eval"),
    ],
)
def test_the_released_plans_equal_hugging_face(block: int, random: int, length: int, seed: int, plan: str) -> None:
    module = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    config = module.BigBirdConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        block_size=block,
        num_random_blocks=random,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=4096,
    )
    theirs = module.BigBirdBlockSparseAttention(config, seed=seed).double().train(plan == "reference")
    ours = build(False, plan=plan, block=block, random=random, seed=seed)
    for mine, other in ((ours.to_q, theirs.query), (ours.to_k, theirs.key), (ours.to_v, theirs.value)):
        mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        ours.to_out.weight.copy_(torch.eye(DIM))
        ours.to_out.bias.zero_()
        x = 3 * torch.randn(2, length, DIM, dtype=torch.float64)
        masks = module.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, length, dtype=x.dtype), block)
        expected = theirs(x, masks[1], masks[2], masks[3], masks[0], masks[0])[0]
        assert torch.allclose(ours(x).hidden, expected, rtol=0, atol=1e-12)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_blocks": 4}, ValueError, "window_blocks must be odd.*got 4"),
        ({"block": 0}, ValueError, "block must be an integer of at least 1, got 0"),
        ({"random": -1}, ValueError, "random must be an integer of at least 0, got -1"),
        ({"plan": "hf"}, ValueError, "plan must be one of uniform, reference, reference_eval, got 'hf'"),
        ({"plan": "reference"}, Unsupported, "plan=reference with causal=True.*use plan=uniform"),
        ({"plan": "reference", "causal": False, "window_blocks": 5}, ValueError, "window_blocks must be 3 .*got 5"),
        ({"plan": "reference", "causal": False, "seed": -1}, ValueError, "seed must be in .*got -1"),
        ({"plan": "reference", "causal": False, "extra_global_tokens": 1}, Unsupported, "have global blocks"),
        (
            {"kernel": "banded"},
            Unsupported,
            "kernel=banded.*linked_row or row or short or triton or covered or flex or blocks or tiles or dense",
        ),
        ({"causal": False, "cross": True}, Unsupported, "bigbird: cross=True is not supported"),
    ],
    ids=str,
)
def test_what_it_refuses(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize("causal", [False, True])
def test_one_token_more_than_whole_blocks_costs_no_copy_of_the_keys(causal: bool) -> None:
    """Biases keep their call until backward: not with the keys that were filled up, beside those that they became."""
    layer = zoo.build("bigbird", dim=256, heads=2, causal=causal)

    def bytes_a_token(length: int) -> float:
        x = torch.randn(1, length, 256, requires_grad=True)

        def step() -> None:
            layer(x).hidden.sum().backward()
            layer.zero_grad()
            x.grad = None

        step()  # plans
        return peak_memory(step).peak_bytes / length

    assert bytes_a_token(2049) < 1.05 * bytes_a_token(2048)
