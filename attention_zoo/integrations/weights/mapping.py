"""Where each of our tensors comes from: rules, and how a model is filled by them. No key is left to chance.

Our name -> a rule: the names there, and what makes our tensor of theirs (a copy, unless it says otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from attention_zoo.model.saved import own_tensors
from attention_zoo.model.transformer import Transformer

SHOWN = 20
"""So many keys of a kind are listed in an error."""


class Rule(NamedTuple):
    """One of our tensors.

    Fields:
        sources: names in the checkpoint.
        make: their tensors -> ours.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


Rules = dict[str, Rule]


def copy(ours: str, theirs: str) -> Rules:
    """The same tensor under another name."""
    return {ours: Rule((theirs,), _same)}


def copies(ours: str, theirs: str, *, weight: bool = True, bias: bool = True) -> Rules:
    """Weight and bias of a linear layer or a norm, in the same layout."""
    parts = [name for name, there in (("weight", weight), ("bias", bias)) if there]
    return {f"{ours}.{part}": Rule((f"{theirs}.{part}",), _same) for part in parts}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def attention_at(layer: int) -> str:
    """Our name of a block's attention."""
    return f"stack.layers.{layer}.layers.0.body.layers.0"


def feed_forward_at(layer: int) -> str:
    """Our name of a block's feed-forward."""
    return f"stack.layers.{layer}.layers.1.body.layers.0"


def norm_at(layer: int, branch: int) -> str:
    """Our name of a branch's norm: 0 is the attention's, 1 the feed-forward's."""
    return f"stack.layers.{layer}.layers.{branch}.norm"


def prefix_of(names: Mapping[str, Tensor], prefix: str) -> str:
    """The prefix, if the checkpoint's names have it: models without a head are saved without."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


@torch.no_grad()
def fill(
    model: Transformer, rules: Rules, tensors: Mapping[str, Tensor], *, unused: Sequence[str], where: str
) -> list[str]:
    """Fill every tensor of a model, and account for every key of the checkpoint.

    Args:
        model: is given the checkpoint's values in its own dtype.
        rules: for exactly the model's tensors.
        tensors: of the checkpoint.
        unused: patterns of keys that are known and not converted.
        where: what errors name.

    Returns:
        the keys that were left out because of `unused`.

    Raises:
        ValueError: for missing or unknown keys, all of them listed, and for a wrong shape.
    """
    own = own_tensors(model)
    assert rules.keys() == own.keys(), f"rules and model differ: {sorted(rules.keys() ^ own.keys())}"
    wanted = {source for rule in rules.values() for source in rule.sources}
    left_out = [name for name in tensors if name not in wanted and any(fnmatchcase(name, rule) for rule in unused)]
    missing = sorted(wanted - tensors.keys())
    unknown = sorted(tensors.keys() - wanted - set(left_out))
    if missing or unknown:
        raise ValueError(f"{where}: keys do not fit the config: missing {_listed(missing)}; unknown {_listed(unknown)}")
    for name, rule in rules.items():
        theirs = [tensors[source] for source in rule.sources]
        target = own[name]
        try:
            made = rule.make(*theirs)
        except (RuntimeError, IndexError):
            made = None
        if made is None or made.shape != target.shape:
            shapes = ", ".join(f"{source} {tuple(tensor.shape)}" for source, tensor in zip(rule.sources, theirs))
            raise ValueError(f"{where}: {shapes} does not fit the config, which needs {tuple(target.shape)} for {name}")
        target.copy_(made)
    return sorted(left_out)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def output_matrix(
    tensors: Mapping[str, Tensor], embedding: str, head: str, *, tied: bool
) -> tuple[bool, Rules, list[str]]:
    """What becomes of an output matrix that a config ties to the embedding table, or not.

    As in transformers: tied matrices of which the checkpoint holds two that differ are not tied, and of which it holds
    only one, either name will do.

    Returns:
        whether ours are tied, rules for both, and the keys that are then of no use.
    """
    if tied and embedding in tensors and head in tensors:
        tied = torch.equal(tensors[embedding], tensors[head])
    if not tied:
        return False, {**copy("embedding.weight", embedding), **copy("head.weight", head)}, []
    return True, copy("embedding.weight", embedding if embedding in tensors else head), [head, embedding]
