"""Attention weights asked of the very kernel that runs: what a head puts out is linear in its values, so values that
name their tokens put out the weights.

    values v_j = 1 where j is in a set, else 0   ->   what query i puts out = its weight on the set

Each call answers for as many sets as a head is wide, at the cost of a call: O(L) memory for any number of sets.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from attention_zoo.contract import Attention, Unsupported

ROUNDING = 1e-3


class Call:
    """One layer with the hidden states [1, L, E] and tokens that it was called with.

    Raises:
        Unsupported: for a layer that makes something else of values than a weighted mean of the tokens' own.
    """

    def __init__(self, name: str, layer: Attention, x: Tensor, tokens: Any):
        self.name, self.layer, self.x, self.tokens = name, layer, x, tokens
        self.length = x.shape[1]
        self._seen = 0
        if not (hasattr(layer, "to_v") and hasattr(layer, "to_out")) or layer.cross:
            raise self._refused("its heads do not weigh values of the tokens")
        none, every = self.weights(torch.stack([torch.zeros(self.length), torch.ones(self.length)], 1)).unbind(-1)
        if bool((none.abs() > ROUNDING).any()) or bool((every < -ROUNDING).any()) or bool((every > 1 + ROUNDING).any()):
            raise self._refused("it makes keys and values of several tokens, with weights of their own")

    def weights(self, sets: Float[Tensor, "L n"]) -> Float[Tensor, "H L n"]:
        """The weight of each head's queries on each set, given by 1 for its tokens and 0 for the others."""
        width = self.layer.head_width
        found = [self._asked(sets[:, a : a + width]) for a in range(0, sets.shape[1], width)]
        return torch.cat(found, -1)

    @torch.no_grad()
    def _asked(self, sets: Float[Tensor, "L n"]) -> Float[Tensor, "H L n"]:
        layer: Any = self.layer
        heads, width, count = layer.heads, layer.head_width, sets.shape[1]
        named = torch.zeros(self.length, width, dtype=self.x.dtype, device=self.x.device)
        named[:, :count] = sets.to(named)
        put_out: list[Tensor] = []

        def name(module: Any, given: Any, made: Tensor) -> Tensor:
            if made.numel() % (self.length * width) or made.shape[-2] != self.length:
                raise self._refused("it attends to states of several tokens")
            return named.repeat(1, made.shape[-1] // width).expand_as(made).contiguous()

        def keep(module: Any, given: tuple[Tensor, ...]) -> None:
            put_out.append(given[0])

        projections = [layer.to_v, *([layer.to_v_global] if hasattr(layer, "to_v_global") else [])]
        hooks = [each.register_forward_hook(name) for each in projections]
        hooks.append(layer.to_out.register_forward_pre_hook(keep))
        try:
            layer(self.x, self.tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if len(put_out) != 1 or put_out[0].numel() != self.length * heads * width:
            raise self._refused("what its heads put out is not one vector for each token")
        return rearrange(put_out[0].reshape(self.length, heads, width)[..., :count], "l h n -> h l n")

    def _refused(self, reason: str) -> Unsupported:
        return Unsupported(
            self.layer.name, "inspect", reason, "full, longformer, bigbird, adaptive_span, reformer, transformer_xl"
        )


def calls_of(model: Any, ids: Tensor) -> list[Call]:
    """Every attention layer of a model with what it was called with on some ids [1, L]."""
    given: list[tuple[str, Attention, Tensor, Any]] = []
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and layer.wraps:
            raise Unsupported(layer.name, "inspect", "its columns are not the text's tokens", "the mechanism inside")
        if isinstance(layer, Attention):

            def keep(module: Any, args: tuple[Any, ...], words: Any, name: str = name) -> None:
                tokens = args[1] if len(args) > 1 else words.get("tokens")
                given.append((name, module, args[0].detach(), tokens))

            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model.eval()(ids)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer, x, _ in given:
        if x.shape[1] != ids.shape[1]:
            raise Unsupported(layer.name, "inspect", f"{name} sees {x.shape[1]} columns", "a model without shorten")
    # the places of layers in a model's own structure say nothing to a reader
    return [Call(f"layer {number}", *each[1:]) for number, each in enumerate(given)]
