"""Models of transformers that do not attend through its attention interface: found when built, or at the mask.

transformers takes any registered name for `attn_implementation`, whatever the class does with it. One that adds masks
to scores of its own would add our description of the tokens: at some lengths an error about sizes, at others, silently,
wrong logits.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from typing import Any

from torch import Tensor

from attention_zoo.contract import Unsupported

OWN = "it computes its attention itself, not through transformers' attention interface"
INSTEAD = (
    'attn_implementation="eager" for it, and in a model made of several a dict that names the parts that shall attend '
    'with ours, {"text_config": "zoo_..."}'
)
_HANDED_ON = frozenset(
    {
        "__getitem__", "as_subclass", "clone", "contiguous", "detach", "dim", "element_size", "expand", "is_contiguous",
        "is_floating_point", "index_select", "numel", "pin_memory", "record_stream", "repeat", "repeat_interleave",
        "requires_grad_", "size", "stride", "to", "tolist", "unbind", "untyped_storage", "view", "data_ptr", "__len__",
        "__repr__", "cuda", "cpu", "narrow", "chunk", "split", "cat", "stack", "storage_offset", "is_shared",
        "share_memory_", "__reduce_ex__", "__deepcopy__", "__hash__", "__format__", "type_as",
    }
)  # fmt: skip
"""What may be done with a mask on its way to the attention: looking at it, moving it, taking rows or columns of it."""


_ATTENTION = re.compile(r"^class (\w*Attention)\((?:torch\.)?nn\.Module\):", re.MULTILINE)
_MAKES_BIAS = "if position_bias is None:"
"""In a layer that has one at every call."""
_ADDED = re.compile(r"attention_mask = torch\.ones\(.*\(1(?:\.0)? - \w*attention_mask\) \*", re.DOTALL)
"""How masks to be added are made of masks of padding, and these where there are none."""


class Description(Tensor):
    """What transformers takes for a mask and carries to our attention. Whoever computes with it is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _HANDED_ON and name not in ("__get__", "__set__"):  # attributes: shape, dtype, device, ...
            raise Unsupported("this model", f"an attn_implementation of ours ({name} of its mask)", OWN, INSTEAD)
        return super().__torch_function__(func, types, args, kwargs or {})


def refuse_others(base: type, prefix: str) -> None:
    """Let no model of transformers be built with a name of ours that would not call us.

    Args:
        base: transformers' PreTrainedModel.
        prefix: of our names.
    """
    check: Any = base._check_and_adjust_attn_implementation  # type: ignore[attr-defined]
    if getattr(check, "asks_us", False):
        return

    @functools.wraps(check)
    def checked(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if str(attn_implementation).startswith(prefix):
            reason, own = how_it_attends(type(self), base)
            if reason is not None:
                raise Unsupported(type(self).__name__, f'attn_implementation="{attn_implementation}"', reason, INSTEAD)
            if own:
                warnings.warn(
                    f"{type(self).__name__}: where it uses {' or '.join(own)}, that layer keeps its own attention, "
                    "since it does not attend through transformers' attention interface",
                    stacklevel=3,
                )
        return check(self, attn_implementation, *args, **kwargs)

    checked.asks_us = True  # type: ignore[attr-defined]
    base._check_and_adjust_attn_implementation = checked  # type: ignore[attr-defined]


def how_it_attends(model: type, base: type) -> tuple[str | None, tuple[str, ...]]:
    """Why a model class, or one that it is derived from, cannot leave its attention to ours; None if it can.

    What hangs on options or on the call (softcaps, sinks, chunks, masks of some parts) is refused there, by name.

    Classes whose source cannot be read (written at a prompt) are judged by those that they are derived from.

    Returns:
        that, and which attention layers of its module do not attend through the interface, where others do.
    """
    sources = [_source(each) for each in model.__mro__ if issubclass(each, base) and each is not base]
    known = [source for source in sources if source]
    own = {name for source in known for name in _own_attention(source)}
    if not known or any(map(_attends_itself, known)):
        return OWN, ()
    return next(filter(None, map(_always_beyond, known)), None), tuple(sorted(own))


def _attends_itself(source: str) -> bool:
    """Whether a module with attention of its own asks a table of classes or nobody for it, and not the interface."""
    if re.search(r"_CLASSES\[\s*(self\.)?config\._attn_implementation", source):
        return True
    return bool(re.search(_ATTENTION, source)) and "ALL_ATTENTION_FUNCTIONS.get_interface(" not in source


@functools.cache
def _always_beyond(source: str) -> str | None:
    """What a module gives the interface at every call that no pattern can honour (T5's kind, LayoutLM's kind)."""
    layers = [text for text in _parts(source) if "attention_interface(" in text]
    if layers and all("position_bias=position_bias" in text and _MAKES_BIAS in text for text in layers):
        return "its layers add a bias of their own to the scores (position_bias), which a pattern cannot honour"
    if "masking_utils" not in source and re.search(_ADDED, source):
        return "it makes masks that are added to scores by itself, not by transformers' masks, which say who sees whom"
    return None


@functools.cache
def _own_attention(source: str) -> tuple[str, ...]:
    """Names of the attention layers of a module that turn scores into weights themselves."""
    found = [(re.match(_ATTENTION, text), text) for text in _parts(source)]
    return tuple(
        match.group(1) for match, text in found if match and "softmax(" in text and "ALL_ATTENTION_FUNC" not in text
    )


def _parts(source: str) -> list[str]:
    """Classes and functions of a module."""
    return re.split(r"^(?=class |def |@)", source, flags=re.MULTILINE)


def _source(model: type) -> str:
    try:
        return inspect.getsource(sys.modules[model.__module__])
    except (OSError, TypeError, KeyError):
        return ""
