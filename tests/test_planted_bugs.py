"""Would the suite notice? Bugs that others have shipped are planted, and the checks that must catch each are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import reference_of
from torch import Tensor

from attention_zoo.attention import pattern, segment_plans
from attention_zoo.attention.full import Full
from attention_zoo.attention.longformer import Longformer
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.attention.reformer import Reformer
from attention_zoo.attention.transformer_xl import TransformerXL
from attention_zoo.contract import Abilities, Attention, Output, Tokens
from attention_zoo.layout.layout import Layout
from attention_zoo.layout.ledger import Columns, Horizon
from attention_zoo.layout.reach import Band
from attention_zoo.ops.lsh import chunks, hashing
from attention_zoo.ops.lsh import layout as lsh_layout
from attention_zoo.ops.pattern import call as pattern_call
from attention_zoo.ops.pattern import choose, covered, few, local, short, short_band
from attention_zoo.ops.pattern import globals as globals_
from attention_zoo.ops.pattern.call import PatternCall
from attention_zoo.ops.pattern.mild import mild_rows
from attention_zoo.ops.softmax import tiles
from attention_zoo.ops.softmax.common import Common
from attention_zoo.testing import contract_checks


def caught(backend: str | type[Attention], *names: str, **options: Any) -> None:
    """Demand that each of the named checks fails, with a message."""
    name = backend if isinstance(backend, str) else backend.name
    checks = {check.name: check for check in contract_checks(backend, reference=reference_of(name), **options)}
    for wanted in names:
        assert wanted in checks, f"the suite has no check {wanted} for {name}"
        with pytest.raises(AssertionError, match=name):
            checks[wanted]()


# --- masks -----------------------------------------------------------------------------------------------------------


def see_wrongly(
    monkeypatch: pytest.MonkeyPatch, future: int = 0, padding: bool = False, documents: bool = False
) -> None:
    """Break one of the three conditions of `seen`, for kernels and for the definition alike."""

    def seen(queries: Tokens, keys: Tokens, *, causal: bool, one_document: bool) -> Tensor:
        found = torch.ones(queries.valid.shape[0], queries.valid.shape[1], keys.valid.shape[1], dtype=torch.bool)
        if not padding:
            found = found & keys.valid[:, None, :]
        if not (documents or one_document):
            found = found & (keys.document[:, None, :] == queries.document[:, :, None])
        if causal:
            found = found & (keys.position[:, None, :] <= queries.position[:, :, None] + future)
        return found[:, None]

    for module in (pattern_call, pattern):
        monkeypatch.setattr(module, "seen", seen)


# with kernel=dense fast and slow have the same bug: what they compute must be caught by its consequences alone


def test_a_leak_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    see_wrongly(monkeypatch, future=1)
    names = ("the_future_never_changes_the_past", "no_gradient_comes_from_the_future", "the_future_may_be_absent")
    caught(Full, *names, "any_cut_equals_one_call", kernel="dense")
    caught(Longformer, *names, kernel="dense")


def test_padding_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    see_wrongly(monkeypatch, padding=True)
    caught(Full, "a_row_alone_equals_itself_in_a_batch", "ragged_prompts_decode_like_rows_alone", kernel="dense")


def test_documents_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    see_wrongly(monkeypatch, documents=True)
    caught(Full, "documents_in_one_row_equal_documents_apart", kernel="dense")


def test_padding_that_is_not_zeroed() -> None:
    """Masked by -inf, but 0 · NaN is NaN."""

    class Careless(Full):
        def enter(self, x: Tensor, *call: Any) -> tuple[Tensor, Layout]:
            return x, super().enter(x, *call)[1]

    caught(Careless, "padding_contents_never_matter", kernel="dense")


def test_a_neighbour_in_the_batch_that_matters() -> None:
    class Averaging(Full):
        def forward(self, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
            out = super().forward(x, tokens, **more)
            return out._replace(hidden=out.hidden + 1e-6 * out.hidden.mean(0, keepdim=True))

    caught(Averaging, "a_row_alone_equals_itself_in_a_batch")


# --- executor --------------------------------------------------------------------------------------------------------


class ShortReach(Longformer):
    """The executor believes that the window is one token shorter than the definition says."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.reach = Band(self.window - 1, stride=self.dilation, weights="uniform")


def test_a_window_off_by_one() -> None:
    caught(
        ShortReach, "reach_hides_nothing", "weights_are_what_reach_says", "fast_equals_slow", "any_cut_equals_one_call"
    )


def test_a_global_key_that_only_the_first_tile_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = globals_.GlobalKeys.parts
    monkeypatch.setattr(few, "MOST", 0)  # else all tiles see them together
    monkeypatch.setattr(
        globals_.GlobalKeys, "parts", lambda keys, rows, some: [] if rows.start else parts(keys, rows, some)
    )
    caught(Longformer, "fast_equals_slow_over_many_tiles")


def test_few_global_keys_that_only_the_first_rows_see(monkeypatch: pytest.MonkeyPatch) -> None:
    right = few.with_common_keys

    def wrong(call: PatternCall) -> tuple[PatternCall, Common | None]:
        call, common = right(call)
        if common is not None:
            common.bias[:, :, 7:] = -torch.inf
        return call, common

    monkeypatch.setattr(choose, "with_common_keys", wrong)
    caught(Longformer, "fast_equals_slow_over_many_tiles")


def no_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys are no matter for tiles else."""
    for module in (short, short_band):
        monkeypatch.setattr(module, "KEYS", 0)


def test_a_gradient_that_is_a_little_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    no_short_calls(monkeypatch)
    right = tiles.partial_backward

    def wrong(*operands: Any, into: tuple[Tensor, Tensor, Tensor], **more: Any) -> Tensor:
        found = right(*operands, into=into, **more)
        into[1].mul_(1 + 1e-4)
        return found

    monkeypatch.setattr(tiles, "partial_backward", wrong)
    caught(Longformer, "fast_equals_slow", "gradients_match_finite_differences")


def test_padding_that_is_run_like_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees keys that nobody bounded its scores by, overflows, and poisons gradients: forward all is right."""
    no_short_calls(monkeypatch)
    right = tiles.run_tiles
    for name in ("WORTH", "LITTLE"):
        monkeypatch.setattr(covered, name, 0.0)  # its bias hides padding by itself
    for module in (local, globals_):
        monkeypatch.setattr(module, "run_tiles", lambda *operands, asked, **more: right(*operands, **more))
    names = ("large_scores_are_finite_and_right", "large_scores_of_given_queries_and_keys")
    caught(Full, *names)
    caught("bigbird", *names, "large_scores_through_a_state")


def test_a_bound_on_scores_that_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    def hopeful(call: PatternCall, first: int | None) -> Tensor | None:
        found = mild_rows(call, first)
        return None if found is None else torch.ones_like(found)

    monkeypatch.setattr(local, "mild_rows", hopeful)
    names = ("large_scores_are_finite_and_right", "large_scores_of_given_queries_and_keys")
    caught(Longformer, *names)


def test_a_bias_that_looks_at_its_neighbours() -> None:
    class Counting(Longformer):
        def bias(self, queries: Tokens, keys: Tokens) -> Tensor:
            return super().bias(queries, keys) + 0.1 * keys.position.shape[1]

    caught(Counting, "bias_is_pairwise", "the_future_may_be_absent")


def test_marks_that_depend_on_the_row() -> None:
    class LastIsGlobal(Full):
        def mark(self, tokens: Tokens) -> Tokens:
            last = tokens.position == tokens.position.amax(1, keepdim=True)
            return tokens._replace(is_global=tokens.is_global | last & tokens.valid)

    caught(LastIsGlobal, "marking_looks_at_one_token")


# --- state -----------------------------------------------------------------------------------------------------------


class Forgetful(Full):
    def forward(self, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
        out = super().forward(x, tokens, **more)
        return out if out.state is None else out._replace(state=self.initial_state(len(x)))


class Hoarding(Longformer):
    @property
    def _horizon(self) -> Horizon:
        return Horizon()


class Mixing(Full):
    """Its state says nothing of the batch: every row continues the first."""

    def forward(self, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
        out = super().forward(x, tokens, **more)
        if out.state is None:
            return out
        first = (buffer[:1].expand_as(buffer).clone() for buffer in out.state.buffers)
        return out._replace(state=out.state._replace(buffers=tuple(first)))


def test_a_state_that_is_dropped() -> None:
    names = ("any_cut_equals_one_call", "every_call_is_the_tail_of_the_whole_prefix")
    caught(Forgetful, *names, "ragged_prompts_decode_like_rows_alone", "calls_have_the_gradients_of_one_call")


def test_a_state_that_never_forgets() -> None:
    caught(Hoarding, "states_grow_as_declared")


def test_a_state_of_the_wrong_row() -> None:
    caught(Mixing, "any_cut_equals_one_call", "ragged_prompts_decode_like_rows_alone")


def test_a_memory_one_token_short() -> None:
    class Short(TransformerXL):
        @property
        def _horizon(self) -> Horizon:
            return super()._horizon._replace(span=self.memory_length - 1)

    caught(Short, "any_cut_equals_one_call", "every_call_is_the_tail_of_the_whole_prefix")


def test_a_memory_that_is_read_one_token_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every call alike, so that only the reference loop can tell."""
    right = segment_plans.Lengths.oldest
    monkeypatch.setattr(segment_plans, "KEPT", 0)  # no plan with the bug may outlive this test
    monkeypatch.setattr(segment_plans.Lengths, "oldest", lambda self, position: right(self, position) + 1)
    # the loop must not share the bug
    caught(TransformerXL, "fast_equals_slow")


def test_a_memory_that_is_not_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    right = segment_plans.segments_of

    def attached(keys: Layout, length: int, lengths: segment_plans.Lengths) -> segment_plans.Segments:
        found = right(keys, length, lengths)
        return found._replace(own=found.first)

    monkeypatch.setattr(segment_plans, "KEPT", 0)
    monkeypatch.setattr(segment_plans, "segments_of", attached)
    caught(TransformerXL, "fast_equals_slow")


# --- hashing ---------------------------------------------------------------------------------------------------------


def test_a_wrap_to_the_chunk_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows and documents in one ring of chunks."""
    right = lsh_layout.lay_out
    monkeypatch.setattr(lsh_layout, "KEPT", 0)  # no layout with the bug may outlive this test
    monkeypatch.setattr(lsh_layout, "lay_out", lambda sizes, **more: right(sizes.sum(keepdims=True), **more))
    names = ("a_row_alone_equals_itself_in_a_batch", "documents_in_one_row_equal_documents_apart")
    caught(Reformer, *names, "fast_equals_slow")


def test_a_value_from_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks.HashedPlan, "causal", False)
    names = ("the_future_never_changes_the_past", "no_gradient_comes_from_the_future")
    caught(Reformer, *names, "fast_equals_slow")


def test_hashing_that_differs_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseeded(seed: int, heads: int, rounds: int, width: int, factors: Any) -> Any:
        return hashing.fresh_rotations(
            heads, rounds, width, factors, torch.zeros((), dtype=torch.float64), hashing.drawn_number()
        )

    monkeypatch.setattr(hashing, "seeded_rotations", unseeded)
    caught(Reformer, "evaluation_is_a_function_of_its_inputs", "copies_compute_the_same")


# --- everything else -------------------------------------------------------------------------------------------------


def test_a_parameter_that_nothing_uses() -> None:
    class Idle(Full):
        def __init__(self, **shared: Any):
            super().__init__(**shared)
            self.idle = torch.nn.Parameter(torch.ones(3, 3))

    caught(Idle, "every_parameter_gets_a_gradient")


def test_scores_in_half_precision() -> None:
    class Coarse(Full):
        def forward(self, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
            out = super().forward(x, tokens, **more)
            return out._replace(hidden=(out.hidden * 8 + 64 - 64) / 8 if x.dtype == torch.bfloat16 else out.hidden)

    caught(Coarse, "bfloat16_loses_no_more_than_dense")


def test_memory_that_grows_faster_than_declared() -> None:
    caught(Longformer, "activations_grow_as_declared", kernel="dense")


def test_weights_outside_of_the_state_dict() -> None:
    class Hidden(Full):
        def __init__(self, **shared: Any):
            super().__init__(**shared)
            self.gain = torch.rand(())

        def forward(self, x: Tensor, tokens: Tokens | None = None, **more: Any) -> Output:
            out = super().forward(x, tokens, **more)
            return out._replace(hidden=out.hidden * self.gain.to(x.dtype))

    # drawn anew by every constructor
    original = Hidden.__init__

    def init(self: Hidden, **shared: Any) -> None:
        original(self, **shared)
        init.count += 1  # type: ignore[attr-defined]
        self.gain = torch.tensor(float(init.count))  # type: ignore[attr-defined]

    init.count = 0  # type: ignore[attr-defined]
    Hidden.__init__ = init  # type: ignore[method-assign]
    caught(Hidden, "copies_compute_the_same")


def test_an_undeclared_ability_that_is_accepted() -> None:
    class Shy(Full):
        declared = Abilities(
            causality="strict",
            carry="none",
            two_sided=True,
            global_tokens="none",
            cross=False,
            compute="quadratic",
            activations="linear",
            state="linear",
        )

        def initial_state(self, batch_size: int) -> Columns:
            return PatternAttention.initial_state(self, batch_size)

    caught(Shy, "undeclared_abilities_are_refused_at_the_call")


def test_a_refusal_without_an_alternative() -> None:
    class Curt(Longformer):
        def __init__(self, *, cross: bool = False, **shared: Any):
            if cross:
                raise ValueError("no")
            super().__init__(**shared)

    caught(Curt, "undeclared_abilities_are_refused_at_build")


def test_an_option_without_a_default() -> None:
    class Needy(Longformer):
        """No `window:` without a value."""

        def __init__(self, *, window: int, **shared: Any):
            super().__init__(window=window, **shared)

    caught(Needy, "options_are_keyword_only_with_defaults")


def test_global_tokens_of_later_calls_are_not_promised_where_keys_are_forgotten() -> None:
    class Forgetful(Full):
        name = "forgetful"
        reach = Band(3)

    caught(Forgetful, "global_tokens_see_what_is_kept")
