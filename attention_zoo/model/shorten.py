"""The option `shorten`: fewer tokens in the middle of a stack. An hourglass for any model, a funnel for encoders.

    Transformer(attention="longformer", shorten="2@1 8@3 2@1", ...)                        # an hourglass
    Transformer(attention="full", shorten={"name": "funnel", "layout": "4@1 4@2 4@4 2@1"}, causal=False, ...)

A layout lists layers @ factor against the input (`model.factors`); the model's depth is the sum of its layers, and the
list of mechanisms is tiled over it as ever. What each form is and takes: `model.hourglass`, `model.funnel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attention_zoo.contract import Layer
from attention_zoo.model import funnel, hourglass
from attention_zoo.model.block import Block, Stack
from attention_zoo.model.factors import Part, parts_of
from attention_zoo.rules import Unsupported, known_options, named, one_of, shown

FORMS: dict[str, Any] = {"hourglass": hourglass, "funnel": funnel}


class Shape(NamedTuple):
    """A shortened stack, as the option says it.

    Fields:
        form: the module that builds it.
        parts: from the first block to the last.
        options: of the form, with its defaults.
    """

    form: Any
    parts: Sequence[Part]
    options: Mapping[str, Any]

    @property
    def depth(self) -> int:
        return sum(part.layers for part in self.parts)

    @property
    def across(self) -> frozenset[int]:
        """Blocks, by their place in the stack, whose keys are of the tokens before these were pooled."""
        found: frozenset[int] = self.form.across(self.parts, self.options)
        return found

    def build(self, blocks: Sequence[Block], **shared: Any) -> Layer:
        """The stack of these blocks, `depth` of them; shared: dim, heads, causal, norm."""
        rest: list[Any] = [*Stack(blocks).layers]  # what blocks share over depth, they share over all levels
        stacks = []
        for layers, factor in self.parts:
            stacks.append((factor, Stack(rest[:layers])))
            rest = rest[layers:]
        stack: Layer = self.form.build(stacks, self.options, **shared)
        return stack


def shape_of(shorten: str | Mapping[str, Any], *, reversible: bool | str, **model: Any) -> Shape:
    """What the option says: a layout, which is an hourglass, or a mapping with name, layout and the form's options.

    Args:
        model: what a form wants to know of the model: causal, head, cross, pre_norm.

    Raises:
        Unsupported: for `reversible`, and for what the form is not there for, such as a funnel in a causal model.
        ValueError: for a layout or an option outside its rule.
    """
    name, given = named("shorten", {"name": "hourglass", "layout": shorten} if isinstance(shorten, str) else shorten)
    one_of(tuple(FORMS), shorten=name)
    form = FORMS[name]
    known_options(f"shorten={name}", given, ("layout", *form.DEFAULTS))
    if "layout" not in given:
        raise ValueError(f"shorten={name} needs a layout, as {form.EXAMPLE!r}, got {shown(shorten)}")
    parts = parts_of(given.pop("layout"), form.EXAMPLE)
    options = {**form.DEFAULTS, **given}
    form.check(parts, options, **model)
    if reversible:
        reason = "its stack changes its length, which two streams cannot undo"
        raise Unsupported(f"shorten={name}", f"reversible={reversible}", reason, "reversible=false")
    return Shape(form, parts, options)
