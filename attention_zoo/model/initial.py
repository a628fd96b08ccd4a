"""Initial weights that depend on the seed and on a parameter's name alone, so that mechanisms share what they share.

Drawn one after the other from one generator, the weights behind a mechanism's own would differ from mechanism to
mechanism: embedding, feed-forward and projections of two models would then begin apart, and a difference between their
results would in part be that of two draws. Here every tensor is drawn a second time, by the very calls that drew it in
its constructor (hence from the same distribution), each from a seed of its own.

    with keyed(seed) as draws:
        model = Transformer(...)
        draws.again(model)

What is drawn is seen from the outside, so that mechanisms of other packages take part with no word of theirs: a call
that returns a tensor and moves torch's generator is a draw, and calls in place on its storage belong to it. A copy of a
parameter (`deepcopy`) stays a copy. What is computed from other random tensors (`nn.init.orthogonal_`, `trunc_normal_`)
stays as it was drawn the first time: from the run's seed, but not from its name alone. None of ours is drawn so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from attention_zoo.model.block import Block

WITHIN = ("inner", "local")
"""Parts of a name that only say that something stands within something else: its role is what it is without."""
ROLES = {"to_qk": "to_q"}
"""Other words for a role: keys that are queries, too, are drawn as queries are."""


class _Call(NamedTuple):
    function: Any
    given: tuple[Any, ...]
    named: dict[str, Any]


class Draws(TorchFunctionMode):
    """Remembers how each random tensor was made inside the context.

    Args:
        seed: of a run.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self._generator = torch.get_rng_state()
        self._calls: dict[int, list[_Call]] = {}
        self._copies: dict[int, int] = {}
        self._over = False
        self._held: list[Tensor] = []  # else the place of a tensor that is gone could be given to another

    def __torch_function__(self, function: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = named or {}
        found = function(*given, **named)
        if self._over or not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
            return found
        now, place = torch.get_rng_state(), _place(found)
        drawn = not torch.equal(now, self._generator)
        self._generator = now
        inside = any(_place(each) == place for each in tree_leaves((given, named)) if _is_plain(each))
        if drawn and not inside:  # torch.randn and the like
            self._calls[place] = []
        if drawn or (inside and place in self._calls and _changes(function)):
            self._calls.setdefault(place, []).append(_Call(function, given, named))
            self._held.append(found)
        elif getattr(function, "__name__", "") == "clone" and not inside:
            self._copies[place] = _place(given[0])
            self._held.append(found)
        return found

    @torch.no_grad()
    def again(self, model: nn.Module, of: str = "") -> None:
        """Draw what the model holds once more, each parameter and buffer from (seed, its key).

        Args:
            of: which part of a larger model this is, such as "encoder".
        """
        fresh: dict[int, Tensor] = {}
        copies: list[tuple[Tensor, int]] = []
        self._over = True
        known, keys = keys_of(model), set[str]()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta or tensor.layout != torch.strided or (place := _place(tensor)) in fresh:
                continue
            key = known[name] if known[name] not in keys else name  # two of one model must not begin alike
            keys.add(key)
            if calls := self._calls.get(place):
                torch.manual_seed(seed_of(self.seed, f"{of}.{key}" if of else key))
                for call in calls:
                    _repeat(call, tensor)
            elif place in self._copies:
                copies.append((tensor, self._copies[place]))
            fresh[place] = tensor
        for tensor, source in copies:
            if (original := fresh.get(source)) is not None and original.shape == tensor.shape:
                tensor.copy_(original)


@contextmanager
def keyed(seed: int) -> Iterator[Draws]:
    """What is built inside can be drawn `again`; torch's generator ends where it would with any other model.

    Args:
        seed: of the run.
    """
    torch.manual_seed(seed_of(seed, ""))  # of what has no name in the model
    with Draws(seed) as draws:
        yield draws
    torch.manual_seed(seed)


def keys_of(model: nn.Module) -> dict[str, str]:
    """By the name of a parameter or buffer what it is drawn from: the number of its block and its place in there, by
    the word for its role. What stands around the blocks, and in which level of a stack they are, makes no difference.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    found = {}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        number = next((number for number, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        rest = name if number is None else f"blocks.{number}.{name.removeprefix(blocks[number])[1:]}"
        found[name] = ".".join(ROLES.get(part, part) for part in rest.split(".") if part not in WITHIN)
    return found


def seed_of(seed: int, key: str) -> int:
    """A seed of 64 bits for one tensor, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "little")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _changes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _repeat(call: _Call, tensor: Tensor) -> None:
    """The call once more, on this tensor where it was on one of the same storage; what it makes new is copied."""
    place, data = _place(tensor), tensor.data
    hit = False

    def replaced(value: Any) -> Any:
        nonlocal hit
        if _is_plain(value) and _place(value) == place:
            hit = True
            return data.as_strided(value.shape, value.stride(), value.storage_offset())
        return value

    given, named = tree_map(replaced, (call.given, call.named))
    found = call.function(*given, **named)
    if not hit:
        data.copy_(found.reshape(data.shape))
