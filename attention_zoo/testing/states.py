"""State in, state out: a call with a state continues the prefix, however it was cut."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch

from attention_zoo.contract import Tokens
from attention_zoo.model.state import reorder
from attention_zoo.testing.case import PRIME, Case, close, feed, gradients, piece, ragged, run, same
from attention_zoo.testing.check import check

CUTS = ([1, 2, 5, 13, 14, 20], [5, 28], list(range(5, PRIME)), list(range(1, PRIME)))


def carries(case: Case) -> bool:
    return case.can.carry != "none"


def carries_exactly(case: Case) -> bool:
    """Whether calls equal one call: what a later token decides must not move earlier outputs."""
    return case.can.carry == "prefix" and case.can.causality == "strict"


def by_segment(case: Case) -> bool:
    return case.can.carry == "segment"


def borders(case: Case, layer: object, length: int) -> list[int]:
    size = getattr(layer, "segment_length", None)
    assert isinstance(size, int), f"{case.name}: what has segments must have an attribute segment_length, got {size!r}"
    return list(range(size, length, size))


def on_grid(tokens: Tokens) -> bool:
    """Whether columns are positions, so that a cut at a column is a cut at a segment border."""
    return not bool((tokens.valid & (tokens.position != torch.arange(PRIME))).any())


def layouts(case: Case, first: int) -> list[tuple[str, Tokens]]:
    """As `Case.layouts`, with global tokens where the declared ability allows them: in the first `first` columns."""
    found = [(name, tokens) for name, tokens in case.layouts(PRIME) if "global" not in name]
    whole = torch.ones(3, PRIME, dtype=torch.bool)
    before = first if case.can.global_tokens == "first_call" else None
    flags = case.globals(whole, before)
    if flags is not None:
        flags[0, 0] = True
        found.append(("global tokens", Tokens.of(whole, flags)))
    return found


@check(carries_exactly)
def any_cut_equals_one_call(case: Case) -> None:
    """Single-token steps, ragged pieces, prefill and steps: concatenated outputs equal those of the whole."""
    for variant in case.variants():
        layer = case.build(causal=True, **variant)
        for cuts in CUTS[-1:] if variant else CUTS:
            for layout, tokens in case.telling(PRIME) if variant else layouts(case, cuts[0]):
                if variant and bool(tokens.is_global.any()):
                    continue  # which may not come late everywhere
                x = case.data(3, PRIME)
                with torch.no_grad():
                    pieces, _ = feed(layer, x, tokens, cuts)
                whole = run(layer, x, tokens).hidden
                where = f"{case.name} {variant} {layout}, cut at {cuts}"
                close(pieces[tokens.valid], whole[tokens.valid], where)


@check(by_segment)
def segments_equal_one_call(case: Case) -> None:
    """Cut at segment borders, concatenated outputs equal those of the whole."""
    layer = case.build(causal=True)
    cuts = borders(case, layer, PRIME)
    for layout, tokens in layouts(case, cuts[0]):
        if not on_grid(tokens):
            continue
        x = case.data(3, PRIME)
        with torch.no_grad():
            pieces, _ = feed(layer, x, tokens, cuts)
        whole = run(layer, x, tokens).hidden
        close(pieces[tokens.valid], whole[tokens.valid], f"{case.name} {layout}, cut at {cuts}")


@check(lambda case: case.can.carry == "prefix")
def every_call_is_the_tail_of_the_whole_prefix(case: Case) -> None:
    """The outputs of each call are the last rows of one call over everything so far."""
    layer = case.build(causal=True)
    cuts = [5, 13, 14, 15, 20]
    for layout, tokens in layouts(case, cuts[0]):
        x = case.data(3, PRIME)
        state = layer.initial_state(3)
        for start, stop in zip([0, *cuts], [*cuts, PRIME]):
            now = piece(tokens, start, stop)
            out = run(layer, x[:, start:stop], now, state=state)
            state = out.state
            whole = run(layer, x[:, :stop], piece(tokens, 0, stop)).hidden[:, start:]
            close(out.hidden[now.valid], whole[now.valid], f"{case.name} {layout}: the call over {start}:{stop}")


@check(lambda case: carries_exactly(case) or by_segment(case))
def calls_have_the_gradients_of_one_call(case: Case) -> None:
    """Through the state, unless gradients are declared truncated: then cut at the borders, where they stop anyway."""
    layer = case.build(causal=True)
    only_borders = case.can.truncated or by_segment(case)
    cuts = borders(case, layer, PRIME) if only_borders else [5, 13, 14, 20]
    for layout, tokens in layouts(case, cuts[0]):
        if only_borders and not on_grid(tokens):
            continue
        x = case.data(3, PRIME).requires_grad_()
        expected = gradients(layer, x, layer(x, tokens).hidden, tokens.valid)
        found = gradients(layer, x, feed(layer, x, tokens, cuts)[0], tokens.valid)
        for name, grad in found.items():
            close(grad, expected[name], f"{case.name} {layout}, cut at {cuts}: gradient of {name}", 1e-11)


@check(carries)
def ragged_prompts_decode_like_rows_alone(case: Case) -> None:
    """A padded batch of prompts, then one token at a time for all: each row as if it had been alone, state and all."""
    prompts, steps = [8, 5, 1], 12
    layer = case.build(causal=True)
    more = case.data(3, steps, seed=9)
    for side in ("right", "left"):
        x, valid = case.data(3, max(prompts)), ragged(max(prompts), prompts, side)
        tokens = Tokens.of(valid)
        state, batch = layer.initial_state(3), tokens.next_position
        state = run(layer, x, tokens, state=state).state
        for step in range(steps):
            now = Tokens.of(torch.ones(3, 1, dtype=torch.bool), start=batch + step)
            out = run(layer, more[:, step : step + 1], now, state=state)
            state = out.state
            for row, prompt in enumerate(prompts):
                if by_segment(case) and (prompt + step + 1) % getattr(layer, "segment_length", 1):
                    continue
                alone = torch.cat([x[row, valid[row]], more[row, : step + 1]])[None]
                where = f"{case.name}: prompts padded {side}, row of {prompt} tokens, step {step}"
                close(out.hidden[row], run(layer, alone).hidden[0, -1:], where)


@check(carries)
def states_reorder_as_beams_do(case: Case) -> None:
    """Rows of a state may be picked, repeated and dropped along the batch axis of every tensor in it."""
    order = torch.tensor([2, 0, 0, 1])
    layer = case.build(causal=True)
    x, tokens = case.data(3, 13), Tokens.of(ragged(8, [8, 5, 2]))
    state = run(layer, x[:, :8], tokens, state=layer.initial_state(3)).state
    beams = reorder(state, order)
    later = Tokens.of(torch.ones(3, 5, dtype=torch.bool), start=tokens.next_position)
    whole = run(layer, x[:, 8:], later, state=state).hidden
    picked = run(layer, x[order, 8:], Tokens(*(field[order] for field in later)), state=beams).hidden
    close(picked, whole[order], f"{case.name}: a reordered state")


@check(carries)
def states_are_stored_and_continue(case: Case) -> None:
    """A state survives pickling and deepcopy bitwise, and a call without a state returns none."""
    layer = case.build(causal=True)
    x, tokens = case.data(3, PRIME), Tokens.all_valid(3, PRIME)
    out = run(layer, x)
    assert out.state is None, f"{case.name}: a call without a state returned one"
    state = run(layer, x[:, :11], piece(tokens, 0, 11), state=layer.initial_state(3)).state
    stored, copied = pickle.dumps(state), copy.deepcopy(state)
    later = piece(tokens, 11, PRIME)
    plain = run(layer, x[:, 11:], later, state=state).hidden
    same(run(layer, x[:, 11:], later, state=pickle.loads(stored)).hidden, plain, f"{case.name}: a pickled state")
    same(run(layer, x[:, 11:], later, state=copied).hidden, plain, f"{case.name}: a copied state")


@check(lambda case: bool(case.can.adjustable))
def adjusted_options_count_from_the_next_call(case: Case) -> None:
    """An adjusted layer is a layer built so; between calls, what follows equals the tail of a whole with the new value.

    Only lowered between calls, and where both values have a border: what has been forgotten does not come back.
    """
    x, tokens = case.data(3, PRIME), Tokens.all_valid(3, PRIME)
    for option in case.can.adjustable:
        layer = case.build(causal=True)
        value = getattr(layer, option, None)
        where = f"{case.name}: adjustable {option}"
        assert isinstance(value, int), f"{where} must be a whole number and an attribute, got {value!r}"
        others = {not value} if isinstance(value, bool) else {max(1, value - 1), value + 1} - {value}
        for other in others:
            changed: dict[str, Any] = {option: other}
            built = case.build(causal=True, **changed)
            adjusted = case.build(causal=True)
            setattr(adjusted, option, other)
            found, expected = run(adjusted, x).hidden, run(built, x).hidden
            close(found, expected, f"{where}, set from {value} to {other}")
            if carries_exactly(case):
                with torch.no_grad():
                    close(feed(adjusted, x, tokens, [5, 6, 13])[0], expected, f"{where}, set to {other}, with a state")
        if value > 1 and carries(case) and not by_segment(case):
            cut = min(20, value * (value - 1))
            state = run(layer, x[:, :cut], piece(tokens, 0, cut), state=layer.initial_state(3)).state
            setattr(layer, option, value - 1)
            out = run(layer, x[:, cut:], piece(tokens, cut, PRIME), state=state)
            expected = run(layer, x).hidden[:, cut:]
            close(out.hidden, expected, f"{where}, lowered from {value} to {value - 1} between calls")
