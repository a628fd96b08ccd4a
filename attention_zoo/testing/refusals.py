"""What is not declared is refused aloud: the backend, the option and an alternative in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import torch
from omegaconf import OmegaConf

from attention_zoo.contract import Attention, Source, Tokens, Unsupported
from attention_zoo.positions import ATTENTION_LEVEL
from attention_zoo.testing.case import PRIME, Case, piece, run
from attention_zoo.testing.check import check


def refused(case: Case, act: Callable[[], object], option: str, *, kind: type[Exception] = Unsupported) -> None:
    """Demand that `act` raises, and that the message can be acted on."""
    error: Exception | None = None
    try:
        act()
    except Exception as raised:
        error = raised
    assert error is not None, f"{case.name}: {option} must be refused, but was accepted"
    message = str(error)
    assert isinstance(error, kind), (
        f"{case.name}: {option} must be refused with {kind.__name__}, got {type(error).__name__}: {message}"
    )
    assert option in message, f"{case.name}: the refusal must name {option!r}, got: {message}"
    assert "\n" not in message, f"{case.name}: the refusal must be one line, got: {message}"
    if isinstance(error, Unsupported):
        assert case.name in message, f"{case.name}: the refusal must name the backend, got: {message}"
        assert error.instead, f"{case.name}: the refusal must name an alternative, got: {message}"


@check()
def undeclared_abilities_are_refused_at_build(case: Case) -> None:
    can = case.can
    if not can.two_sided:
        refused(case, lambda: case.build(causal=False), "causal=False")
    if can.causality == "none":
        refused(case, lambda: case.build(causal=True), "causal=True")
    if not can.cross:
        refused(case, lambda: case.build(causal=False, cross=True), "cross=True")
    if not can.grouped_heads:
        refused(case, lambda: case.build(causal=case.sides[0], kv_heads=1), "kv_heads=1")
    for scheme in {*ATTENTION_LEVEL, "nonesuch"} - {*can.positions}:
        refused(case, lambda: case.build(causal=case.sides[0], positions=scheme), f"positions={scheme}")  # noqa: B023


@check()
def undeclared_abilities_are_refused_at_the_call(case: Case) -> None:
    can, valid = case.can, torch.ones(3, PRIME, dtype=torch.bool)
    layer = case.build(causal=case.sides[0])
    x = case.data(3, PRIME)
    refused(case, lambda: run(layer, x, source=Source(x, Tokens.of(valid))), "source")
    if can.global_tokens == "none":
        refused(case, lambda: run(layer, x, Tokens.of(valid, valid)), "global")
    if can.global_tokens == "first_call" and can.carry != "none":
        state = run(layer, x, state=layer.initial_state(3), tokens=Tokens.of(valid)).state
        late = Tokens.of(valid, valid, start=PRIME)
        refused(case, lambda: run(layer, x, late, state=state), "global")
    if can.causality == "strict":
        refused(case, lambda: run(layer, x, choices=object()), "choices")
    if can.carry == "none":
        refused(case, lambda: layer.initial_state(3), "state")
    elif can.two_sided:
        two_sided = case.build(causal=False)
        state = layer.initial_state(3)
        refused(case, lambda: run(two_sided, x, Tokens.of(valid), state=state), "state")


@check()
def wrong_calls_are_refused(case: Case) -> None:
    """Shapes that do not fit, no tokens, a state without tokens."""
    layer = case.build(causal=case.sides[0])
    x, tokens = case.data(3, PRIME), Tokens.all_valid(3, PRIME)
    for act, word in (
        (lambda: run(layer, x[0]), "x"),
        (lambda: run(layer, x[..., :-1]), "x"),
        (lambda: run(layer, x[:, :0]), "length 0"),
        (lambda: run(layer, x, piece(tokens, 0, 5)), "tokens"),
        (lambda: Tokens.of(torch.ones(3, 1, PRIME, dtype=torch.bool)), "valid"),
    ):
        refused(case, act, word, kind=ValueError)
    if case.can.carry != "none" and case.can.causality != "none":
        state = layer.initial_state(3)
        refused(case, lambda: run(layer, x, state=state), "tokens", kind=ValueError)


@check()
def wrong_options_are_refused(case: Case) -> None:
    """Widths that do not fit, and each of the mechanism's lengths set to -1: a ValueError that names the option."""
    side = case.sides[0]
    refused(case, lambda: case.build(causal=side, heads=7, dim=64), "heads", kind=ValueError)
    refused(case, lambda: case.build(causal=side, heads=0), "heads", kind=ValueError)
    refused(case, lambda: case.build(causal=side, nonesuch=1), "nonesuch", kind=TypeError)
    for option, value in case.tiny.items():
        if isinstance(value, int) and not isinstance(value, bool):
            wrong: dict[str, Any] = {option: -1}
            refused(case, lambda: case.build(causal=side, **wrong), option, kind=ValueError)  # noqa: B023


@check()
def options_are_keyword_only_with_defaults(case: Case) -> None:
    """Every own option is keyword-only, and has a default in the constructor or in the yaml."""
    for name, parameter in own_options(case.cls).items():
        where = f"{case.name}: option {name}"
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{where} must be keyword-only"
        given = parameter.default is not inspect.Parameter.empty or name in case.defaults
        assert given, f"{where} must have a default"
    unknown = set(case.cls.tiny) - set(own_options(case.cls))
    assert not unknown, f"{case.name}: tiny names options that the constructor does not have: {sorted(unknown)}"


def own_options(cls: type[Attention]) -> dict[str, inspect.Parameter]:
    """What the mechanism's own constructor takes beyond the shared options."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {
        parameter.name: parameter
        for parameter in parameters
        if parameter.name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


@check(lambda case: bool(case.defaults))
def the_yaml_is_the_signature(case: Case) -> None:
    """conf/attention/<name>.yaml has exactly the mechanism's own options, with what defaults the constructor has."""
    file = resources.files("attention_zoo.conf").joinpath("attention", f"{case.name}.yaml")
    shipped = OmegaConf.to_container(OmegaConf.create(file.read_text())) if file.is_file() else case.defaults
    assert isinstance(shipped, Mapping)
    written = {str(key): value for key, value in shipped.items()}
    assert written.pop("_partial_", True) is True, f"{case.name}: its yaml must say `_partial_: true`"
    target = f"{case.cls.__module__}.{case.cls.__qualname__}"
    assert written.pop("_target_", target) == target, f"{case.name}: its yaml must target {target}"
    signature = {name: parameter.default for name, parameter in own_options(case.cls).items()}
    assert set(written) == set(signature), (
        f"{case.name}: its yaml has {sorted(written)}, its constructor has {sorted(signature)}"
    )
    for name, value in written.items():
        default = signature[name]
        if default is inspect.Parameter.empty:
            continue
        default = list(default) if isinstance(default, tuple) else default
        assert value == default, f"{case.name}: {name} is {value!r} in its yaml and {default!r} in its constructor"
