"""Hugging Face's Longformer, BigBird and Reformer: their attention modules, given what they would have projected.

Everything after the projections is theirs. Masks that their model makes once for all layers are made before the clock
starts.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from attention_zoo.contract import Unsupported
from attention_zoo.measure.core import Shape
from attention_zoo.measure.peers.adapter import Adapter, as_heads, as_rows, nothing, stand_in


class Longformer(Adapter):
    """LongformerSelfAttention without global tokens; its attention_window is twice our window."""

    title = "HF Longformer"
    fair = "attention_window = 2·window, two-sided, no global tokens on either side, no dropout."
    needs = "transformers>=5.2,<6"
    release = "5."
    module = "transformers.models.longformer.modeling_longformer"
    backend = "longformer"
    writes_inputs = True  # it scales queries in place
    small: ClassVar[dict[str, Any]] = {"window": 4}
    small_causal = False
    bound = 1e-6  # its softmax is float32 whatever the dtype

    def __init__(self, layer: Any, shape: Shape):
        from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

        if layer.causal:
            raise Unsupported(self.title, "causal=True", "it has no causal form", "causal=False")
        if layer.dilation != 1:
            raise Unsupported(self.title, "dilation", "its dilation needs a CUDA kernel of its own", "dilation=1")
        self.window = layer.window
        super().__init__(layer, shape)
        config = LongformerConfig(
            hidden_size=self.heads * self.width,
            num_attention_heads=self.heads,
            attention_window=[2 * self.window],
            attention_probs_dropout_prob=0.0,
        )
        self.released = LongformerSelfAttention(config, 0)
        self.given = stand_in(self.released, "query", "key", "value")
        valid = torch.arange(self.length, device=shape.device) < shape.length
        self.mask = torch.where(valid, 0.0, -10_000.0).to(shape.dtype).expand(shape.batch, -1)
        self.masked = ~valid.expand(shape.batch, -1)
        self.none = torch.zeros_like(self.masked)

    @property
    def multiple(self) -> int:
        return 2 * self.window

    def enter(self, x: Tensor) -> Tensor:
        return as_rows(x).transpose(0, 1)  # it transposes hidden states before it projects them

    def call(self, *operands: Tensor) -> Tensor:
        for given, operand in zip(self.given, operands):
            given.tensor = operand
        hidden = nothing(self.shape.batch, self.length, self.heads * self.width, operands[0])
        out: Tensor = self.released(hidden, self.mask, self.masked, self.none, False)[0]
        return out

    def leave(self, out: Tensor) -> Tensor:
        return as_heads(out, self.heads)

    def out_shape(self, operand: Tensor) -> tuple[int, ...]:
        length, batch, width = operand.shape
        return batch, length, width


class BigBird(Adapter):
    """BigBirdBlockSparseAttention in training mode, in which it draws its links at every call."""

    title = "HF BigBird"
    fair = (
        "Same block, three window blocks, as many random blocks, first and last block global, two-sided. Where its "
        "links go differs from our default plan (equal under plan=reference), how many there are does not."
    )
    needs = "transformers>=5.2,<6"
    release = "5."
    module = "transformers.models.big_bird.modeling_big_bird"
    backend = "bigbird"
    small: ClassVar[dict[str, Any]] = {"block": 4, "random": 2, "plan": "reference", "seed": 3}
    small_causal = False
    small_length = 4 * 16 - 3

    def __init__(self, layer: Any, shape: Shape):
        from transformers.models.big_bird import modeling_big_bird as released

        if layer.causal:
            raise Unsupported(self.title, "causal=True", "its block-sparse attention is two-sided", "causal=False")
        if layer.window_blocks != 3 or layer.extra_global_tokens:
            raise Unsupported(
                self.title, "the pattern", "it has three window blocks and two global ones",
                "window_blocks=3 extra_global_tokens=0",
            )  # fmt: skip
        self.block = layer.block
        super().__init__(layer, shape)
        least = (2 * layer.random + 6) * self.block
        if self.length < least:
            raise Unsupported(self.title, f"length={shape.length}", "it takes full attention below", f"length>={least}")
        config = released.BigBirdConfig(
            hidden_size=self.heads * self.width,
            num_attention_heads=self.heads,
            block_size=self.block,
            num_random_blocks=layer.random,
            max_position_embeddings=max(4096, self.length),
            attention_probs_dropout_prob=0.0,
        )
        self.released = released.BigBirdBlockSparseAttention(config, seed=layer.seed)
        self.given = stand_in(self.released, "query", "key", "value")
        valid = (torch.arange(self.length, device=shape.device) < shape.length).to(shape.dtype)
        masks = released.BigBirdModel.create_masks_for_block_sparse_attn
        blocked, band, rows, columns = masks(valid.repeat(shape.batch, 1), self.block)
        self.masks = {
            "band_mask": band, "from_mask": rows, "to_mask": columns,
            "from_blocked_mask": blocked, "to_blocked_mask": blocked,
        }  # fmt: skip

    @property
    def multiple(self) -> int:
        return self.block

    def enter(self, x: Tensor) -> Tensor:
        return as_rows(x)

    def call(self, *operands: Tensor) -> Tensor:
        for given, operand in zip(self.given, operands):
            given.tensor = operand
        hidden = nothing(self.shape.batch, self.length, self.heads * self.width, operands[0])
        out: Tensor = self.released(hidden, **self.masks)[0]
        return out

    def leave(self, out: Tensor) -> Tensor:
        return as_heads(out, self.heads)


class OlderBigBird(BigBird):
    """The same of the last release with its old code, which was faster; it needs an environment of its own."""

    title = "HF BigBird 4.57"
    needs = "transformers==4.57.6"
    release = "4.57."
    where = (
        " in an environment of its own: python -m attention_zoo.measure.peers.environment FOLDER, then "
        "peer_python.hf_bigbird_4_57=FOLDER/bin/python"
    )


class Reformer(Adapter):
    """LSHSelfAttention with our buckets; it hashes anew at every call, as ours does in training."""

    title = "HF Reformer"
    fair = (
        "Same rounds, chunks, neighbours and number of buckets, hashing included on both sides; it has no 1/sqrt(D), "
        "and looks back over the border of rounds (equal under wrap=reference, scale=1)."
    )
    needs = "transformers>=5.2,<6"
    release = "5."
    module = "transformers.models.reformer.modeling_reformer"
    backend = "reformer"
    operands = "qk v"
    small: ClassVar[dict[str, Any]] = {
        "chunk": 4, "rounds": 2, "wrap": "reference", "scale": 1.0, "key_norm_epsilon": 1e-6
    }  # fmt: skip
    bound = 1e-7  # a token that sees only itself: its -1e5 costs digits

    def __init__(self, layer: Any, shape: Shape):
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

        if not layer.attend_across_buckets or layer.correct_duplicates:
            raise Unsupported(
                self.title, "the paper's options", "it attends across buckets and counts repeated pairs each time",
                "attend_across_buckets=true correct_duplicates=false",
            )  # fmt: skip
        self.chunk = layer.chunk
        super().__init__(layer, shape)
        config = ReformerConfig(
            hidden_size=self.heads * self.width,
            attention_head_size=self.width,
            num_attention_heads=self.heads,
            lsh_attn_chunk_length=self.chunk,
            lsh_num_chunks_before=layer.look_back,
            lsh_num_chunks_after=layer.look_ahead,
            num_hashes=layer.rounds,
            num_buckets=list(layer.factors_for(self.length)),
            is_decoder=layer.causal,
            lsh_attention_probs_dropout_prob=0.0,
            hash_seed=None,
        )
        self.released = LSHSelfAttention(config, layer_idx=0).to(shape.device)
        self.given = stand_in(self.released, "query_key", "value")
        self.buckets: Tensor | None = None

    @property
    def multiple(self) -> int:
        return self.chunk

    def enter(self, x: Tensor) -> Tensor:
        return as_rows(x)

    def call(self, *operands: Tensor) -> Tensor:
        for given, operand in zip(self.given, operands):
            given.tensor = operand
        out = self.released(nothing(self.shape.batch, self.length, self.heads * self.width, operands[0]))
        self.buckets = out.buckets  # small, and theirs to return: [B, H, R, L]
        hidden: Tensor = out.hidden_states
        return hidden

    def leave(self, out: Tensor) -> Tensor:
        return as_heads(out, self.heads)

    def ours(self, *given: Tensor) -> Tensor:
        """With the buckets that theirs has just drawn."""
        assert self.buckets is not None
        rounds = torch.arange(self.layer.rounds)[:, None]
        buckets = self.buckets - math.prod(self.layer.factors_for(self.length)) * rounds  # theirs count through
        out: Tensor = self.layer.attend(*given, choices=buckets[..., None].int())
        return out
