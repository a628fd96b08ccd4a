"""The recurrent layer of the package block-recurrent-transformer-pytorch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Core, Shape
from attention_zoo.measure.peers.adapter import Adapter
from attention_zoo.measure.work import Work, layer_work


class BlockRecurrentPytorch(Adapter):
    """Its attention layer with a state, block after block as its model calls it, with gradients through all blocks.

    Its weights are ours, or copies where it orders them otherwise: keys and values are projected together, and what
    the state finds is gathered head by head.
    """

    title = "block-recurrent-transformer-pytorch"
    fair = (
        "Layer beside layer, since the state's projections are part of the recurrence; one head of keys on both sides, "
        "which is all that it has. It gets the mask of our window (its own shows the whole block before, at the same "
        "cost) and goes without its norm of tokens and rotation; its second projection of the gate is the identity."
    )
    needs = "block-recurrent-transformer-pytorch>=0.4.4,<0.5"
    where = " --no-deps (its dependencies want a package for GPUs)"
    module = "block_recurrent_transformer_pytorch"
    backend = "block_recurrent"
    variants = ("layer",)
    small: ClassVar[dict[str, Any]] = {"window": 8, "states": 6, "kv_heads": 1, "bias": False}
    small_length = 43

    def __init__(self, layer: Any, shape: Shape):
        from block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch import AttentionBlock

        for option, asked, why in (
            ("gate", "fixed", "its gate is a fixed share"),
            ("positions", "none", "it rotates in a way of its own"),
            ("kv_heads", 1, "its heads share one head of keys"),
            ("truncate", None, "gradients go through all blocks of a call"),
            ("bias_into", False, "its projections have no bias"),
            ("bias_out", False, "its projections have no bias"),
            ("scale", layer.head_width**-0.5, "it is fixed"),
        ):
            if getattr(layer, option) != asked:
                raise Unsupported(self.title, f"{option}={getattr(layer, option)}", why, f"{option}={asked}")
        super().__init__(layer, shape)
        self.window = layer.window
        released = AttentionBlock(
            layer.dim, block_width=self.window, dim_head=self.width, heads=self.heads, num_state_vectors=layer.states
        ).to(shape.device, shape.dtype)
        state, local = released.state_container, layer.local
        released.norm = nn.Identity()
        released.attn = _Banded(released.attn, self.window)
        released.to_q, released.to_out = local.to_q, layer.to_out
        state.q_to_state, state.q_from_state = layer.to_q_of_state, layer.state_q_of_tokens
        state.state_to_q, state.init_state, state.state_pos_ids = layer.state_q, layer.initial, layer.identity
        with torch.no_grad():
            released.to_kv.weight.copy_(torch.cat([local.to_k.weight, local.to_v.weight]))
            state.state_to_kv.weight.copy_(torch.cat([layer.state_k.weight, layer.state_v.weight]))
            by_head = layer.state_out.weight.view(-1, 2, self.heads, self.width).transpose(1, 2)
            state.to_state_out.weight.copy_(by_head.flatten(1))
            state.state_out_to_gate.weight.copy_(torch.eye(layer.dim))
            state.state_out_to_gate.bias.zero_()
            state.learned_ema_beta.copy_(-layer.keep)  # its gate weighs the new where ours weighs the old
        self.released = released

    def enter(self, x: Tensor) -> Tensor:
        return x

    def call(self, *operands: Tensor) -> Tensor:
        """On hidden states [B, L, E]."""
        (x,) = operands
        memories = states = None
        found = []
        for block in x.split(self.window, 1):
            self.released.state_container.set_next_read_state(states)
            out, memories, states = self.released(block, xl_memories=memories)
            found.append(out)
        return torch.cat(found, 1)

    def leave(self, out: Tensor) -> Tensor:
        return out

    def compared(self) -> Core:
        """Hidden states, and the weights that both sides share."""
        layer, shape = self.layer, (self.shape.batch, self.length, self.layer.dim)
        shared = (
            layer.local.to_q.weight, layer.to_out.weight, layer.to_q_of_state.weight, layer.state_q_of_tokens.weight,
            layer.state_q.weight, layer.initial, layer.identity,
        )  # fmt: skip
        x = torch.randn(shape, device=self.shape.device, dtype=self.shape.dtype)
        return Core((x,), self.ours, shape, self.length, shared)

    def from_ours(self, *given: Tensor) -> Tensor:
        return self.call(*given)

    def ours(self, *given: Tensor) -> Tensor:
        hidden: Tensor = self.layer(*given).hidden
        return hidden

    def work(self, variant: str, phase: str) -> Work:
        """See `Adapter`; of the layer alone."""
        self.check_phase(phase)
        if variant != "layer":
            raise Unsupported(self.title, f"variant={variant}", "projections belong to its recurrence", "variant=layer")
        shape = self.shape.batch, self.length, self.layer.dim
        x = torch.randn(shape, device=self.shape.device, dtype=self.shape.dtype)
        parameters = list(self.released.parameters())
        return layer_work(lambda x: [self.call(x)], x, parameters, backward=phase == "forward_backward")


class _Banded(nn.Module):
    """Attention of theirs under our mask: a token sees so many before itself, of its block and the one before."""

    mask: Tensor

    def __init__(self, attention: nn.Module, window: int):
        super().__init__()
        self.attention, self.window = attention, window
        ahead = torch.arange(2 * window) - torch.arange(window)[:, None]
        self.register_buffer("mask", (ahead >= 0) & (ahead <= window), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        rows, held = q.shape[-2], k.shape[-2] - q.shape[-2]
        seen = self.mask[:rows, self.window - held : self.window + rows].to(q.device)
        out: Tensor = self.attention(q, k, v, **{**others, "mask": seen})
        return out
