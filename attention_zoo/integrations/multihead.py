"""torch.nn.MultiheadAttention with another mechanism inside: the same constructor, call, masks and weights.

    attention = MultiheadAttention(512, 8, batch_first=True, attention="longformer", window=256)
    out, _ = attention(x, x, x, key_padding_mask=padding)         # True = ignore, as torch has it

The mechanism takes the place of softmax(q·k)v alone, so weights load from torch's module and back. Direction comes from
the call, as in torch: causal with torch's square subsequent mask or with is_causal, two-sided without.

Whether a mask is causal costs one look at all of its L x S cells, some rows at a time, the first time that a mask is
given; is_causal=True skips it, and is trusted as torch trusts it. It needs no mask beside it here.

Deviations. Where need_weights is not given, mechanisms without weights return None for them. A row that sees nothing
yields the output of zeros, not NaN. What a mechanism cannot do raises: weights, masks that are neither causal nor
padding, dropout of weights in training, bias_kv and zero_attn, and a key that is not the query; with attention="full"
torch's own code does them.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from attention_zoo.attention.calls import fits, refuse_trace
from attention_zoo.attention.operator import refuse_export
from attention_zoo.attention.pattern import PatternAttention
from attention_zoo.contract import Unsupported
from attention_zoo.integrations.bare import at_columns, at_padding_too, bare_pattern
from attention_zoo.layout.layout import Layout
from attention_zoo.ops.relative.projections import is_plain

ROWS = 256
"""Rows of a mask that are looked at together."""


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention.

    Args:
        embed_dim ... dtype: torch's.
        attention: name of a pattern.
        options: the mechanism's own, and `seed`.

    Raises:
        Unsupported: for what the mechanism cannot do.
        ValueError: for an unknown name or a value outside its rule.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        attention: str = "full",
        **options: Any,
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.attention, self.options = attention, options
        if attention == "full":
            self._pattern(False, self.out_proj.weight)
            return
        for option, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise Unsupported(attention, f"{option}=True", "a key without a position", "attention=full")
        # which of the two directions is wanted shows at the call: one must exist
        try:
            self._pattern(False, self.out_proj.weight)
        except Unsupported:
            self._pattern(True, self.out_proj.weight)
        # nn.TransformerEncoderLayer would otherwise compute full attention from our weights, without calling us
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        flag, self._qkv_same_embed_dim = self._qkv_same_embed_dim, self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = flag

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[L, B, E] ([B, L, E] with batch_first, [L, E] unbatched), and weights or None.

        Args:
            query, key, value: the same tensor for self-attention. key and query must be the same for every mechanism
                that does not cross; value may differ.
            key_padding_mask: [B, S], True at padding, or 0 and -inf.
            need_weights: with attention="full" alone; default True there, as in torch, and False elsewhere.
            attn_mask: [L, S] or [B·H, L, S], True where hidden, or 0 and -inf; causal, or hiding nothing. Any other
                with attention="full" alone.
            average_attn_weights: as in torch.
            is_causal: causal attention; attn_mask may then be left out, and is not looked at.
        """
        if query.is_nested:
            if not (query is key is value) or key_padding_mask is not None or not self.batch_first:
                raise ValueError("nested tensors must be query, key and value at once, with batch_first and no padding")
            return self._nested(query, need_weights, attn_mask, average_attn_weights, is_causal), None
        refuse_trace(self.attention)
        for name, x in (("query", query), ("key", key), ("value", value)):
            fits(self, x, name)
        weighed = self.attention == "full" if need_weights is None else need_weights
        itself = query is key or query.is_set_to(key)
        self._check_shape(attn_mask, query, key)
        causal, plain = (True, True) if is_causal else _direction(attn_mask)
        reason = self._beyond(weighed, plain, itself, causal)
        if reason is None:
            refuse_export(self.attention)
            return self._mechanism(query, key, value, key_padding_mask, causal, itself), None
        if self.attention != "full":
            raise Unsupported(self.attention, *reason)
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(self._cells(query, key), dtype=torch.bool, device=query.device).triu(1)
        given = (query, key, value, key_padding_mask, weighed, attn_mask, average_attn_weights, is_causal)
        if is_plain(self.out_proj):
            return super().forward(*given)
        # torch's own code multiplies by its matrix and does not call it: here it does nothing, and is called after
        unprojected = copy(self)
        unprojected._modules = {**self._modules, "out_proj": _nothing(self.embed_dim, query)}
        mixed, weights = nn.MultiheadAttention.forward(unprojected, *given)
        return self.out_proj(mixed), weights

    def _nested(self, query: Tensor, *rest: Any) -> Tensor:
        """Rows of their own lengths, as nn.TransformerEncoder makes of padding in evaluation."""
        rows = query.unbind()
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        padding = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        out, weights = self(padded, padded, padded, padding, *rest)
        if weights is not None:
            raise ValueError("need_weights must be False with nested tensors")
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths.tolist())], layout=query.layout)

    def _cells(self, query: Tensor, key: Tensor) -> tuple[int, int]:
        axis = 1 if self.batch_first and query.ndim == 3 else 0
        return query.shape[axis], key.shape[axis]

    def _check_shape(self, attn_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
        if attn_mask is None:
            return
        cells = self._cells(query, key)
        batch = 1 if query.ndim == 2 else query.shape[0 if self.batch_first else 1]
        if attn_mask.shape not in (cells, (batch * self.num_heads, *cells)):
            raise ValueError(
                f"attn_mask must be {cells} or {(batch * self.num_heads, *cells)}, got {tuple(attn_mask.shape)}"
            )

    # the kernels decide by what the masks hold: nothing for a compiler to look through
    @torch.compiler.disable
    def _mechanism(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool, itself: bool
    ) -> Tensor:
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            padding = None if padding is None else padding[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        keys = at_columns(_valid(padding, key))
        queries = keys if itself else Layout.plain(query.shape[0], query.shape[1], query.device)
        if self.attention == "full" and itself and padding is not None:  # then equal to torch at padding, too
            queries = at_padding_too(keys)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._project(query, key, value)
        )
        mixed = self._pattern(causal, q, cross=not itself).attend(q, k, v, queries, keys)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out[0]
        return out if self.batch_first else out.transpose(0, 1)

    def _pattern(self, causal: bool, like: Tensor, cross: bool = False) -> PatternAttention:
        return bare_pattern(
            self.attention, self.options, heads=self.num_heads, kv_heads=self.num_heads, head_width=self.head_dim,
            causal=causal, cross=cross, device=like.device, dtype=like.dtype,
        )  # fmt: skip

    def _beyond(self, weighed: bool, plain: bool, itself: bool, causal: bool) -> tuple[str, str, str] | None:
        """What of a call the mechanism cannot do: option, reason and what to use instead."""
        full = "attention=full"
        if weighed:
            return "need_weights=True", "the weights are never materialised", f"need_weights=False or {full}"
        if not plain:
            return "attn_mask", "it is neither causal nor empty, and the mechanism has a pattern of its own", full
        if self.dropout and self.training:
            return f"dropout={self.dropout}", "the weights are never materialised", f"dropout=0 or {full}"
        if not itself and (causal or self.attention != "full"):
            return "a key that is not the query", "their positions have nothing to do with each other", full
        if self.bias_k is not None or self.add_zero_attn:
            return "add_bias_kv or add_zero_attn", "a key without a position", full
        return None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases))


def _nothing(width: int, like: Tensor) -> nn.Linear:
    """A projection that changes nothing."""
    layer = nn.Linear(width, width, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.eye(width, device=like.device, dtype=like.dtype), requires_grad=False)
    return layer


_directions: Any = WeakTensorKeyDictionary()


def _direction(attn_mask: Tensor | None) -> tuple[bool, bool]:
    """Whether a mask is causal, and whether that, or nothing, is all that it says."""
    if attn_mask is None:
        return False, True
    if attn_mask.is_inference():  # it has no version that would tell whether it is still the mask that was seen
        return _look(attn_mask)
    known = _directions.get(attn_mask)
    if known is None or known[0] != attn_mask._version:
        known = _directions[attn_mask] = (attn_mask._version, *_look(attn_mask))
    return known[1:]


def _look(attn_mask: Tensor) -> tuple[bool, bool]:
    """`_direction` of a mask that has not been seen, by [.., ROWS, S] of it at a time."""
    L, S = attn_mask.shape[-2:]
    column = torch.arange(S, device=attn_mask.device)
    causal, empty = L == S, True
    for start in range(0, L, ROWS):
        rows = attn_mask[..., start : start + ROWS, :]
        hidden = rows if rows.dtype == torch.bool else rows == -torch.inf
        if rows.dtype != torch.bool and bool((~hidden & (rows != 0)).any()):
            return False, False
        empty = empty and not bool(hidden.any())
        if causal:
            future = column > column[start : start + ROWS, None]
            causal = bool((hidden == future).all())
        if not causal and not empty:
            return False, False
    # one token hides nothing in either direction
    return (False, True) if empty else (True, True)


def _valid(padding: Tensor | None, key: Tensor) -> Tensor:
    """Where keys are no padding, bool [B, S]."""
    if padding is None:
        return torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    if padding.shape != key.shape[:2]:
        raise ValueError(f"key_padding_mask must be {tuple(key.shape[:2])}, got {tuple(padding.shape)}")
    if padding.dtype == torch.bool:
        return ~padding
    hidden = padding == -torch.inf
    if not padding.dtype.is_floating_point or bool((~hidden & (padding != 0)).any()):
        raise ValueError("key_padding_mask must be bool, True at padding, or hold only 0 and -inf")
    return ~hidden
