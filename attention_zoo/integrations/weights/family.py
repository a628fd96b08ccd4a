"""What a family of checkpoints is: a function that reads a config and says which model of ours it is.

    def plan(settings: Settings, tensors: Mapping[str, Tensor], head: str) -> Plan

It stands in a file of its own and in the table of `families.py`. It reads every key of the config that means something
through `settings`, refuses by name what our skeleton cannot do, and maps every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from attention_zoo.integrations.weights.mapping import Rules
from attention_zoo.integrations.weights.settings import Settings


class Plan(NamedTuple):
    """A checkpoint, in our words.

    Fields:
        options: of `Transformer`.
        rules: where each of its tensors comes from.
        unused: patterns (`fnmatch`) of keys that are known and not converted.
        attention_dropout: what the config asks for inside attention.
    """

    options: dict[str, Any]
    rules: Rules
    unused: tuple[str, ...] = ()
    attention_dropout: float = 0.0


class Family(NamedTuple):
    """Checkpoints that one function converts.

    Fields:
        plan: settings, tensors and "lm" or "hidden" -> the plan.
        with_head: architectures whose head is converted.
        without_head: architectures that have none.
    """

    plan: Callable[[Settings, Mapping[str, Tensor], str], Plan]
    with_head: tuple[str, ...]
    without_head: tuple[str, ...]

    def head(self, settings: Settings, architectures: Collection[str] | None, wanted: str | None) -> str:
        """Which head the model gets: the caller's, or that of the checkpoint's architecture."""
        if wanted is not None:
            if wanted not in ("lm", "hidden"):
                raise ValueError(f"head must be lm or hidden, got {wanted!r}")
            return wanted
        named = list(architectures or self.with_head[:1])
        if any(name in self.with_head for name in named):
            return "lm"
        if any(name in self.without_head for name in named):
            return "hidden"
        known = ", ".join((*self.with_head, *self.without_head))
        raise settings.unsupported("architectures", named, f"heads of {known} are converted", "head=hidden")
