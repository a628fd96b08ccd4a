"""Attention as a recurrence: a sum of keys and values instead of a cache. Katharopoulos et al. 2020, §3. O(L · D).

out_i = φ(q_i) S_i / (φ(q_i) · z_i + ε),    S_i = sum φ(k_j) v_jᵀ,  z_i = sum φ(k_j)  over j <= i of the document
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attention_zoo.attention.operator import one_operator
from attention_zoo.contract import Abilities, Attention, Output, Source, Tokens, Unsupported, at_least
from attention_zoo.options import Positive
from attention_zoo.place import place_of

EPSILON = 1e-6


class Sums(NamedTuple):
    """State: S [B, H, D, D], z [B, H, D, 1] and the document [B] that they are of; -1 before the first."""

    s: Tensor
    z: Tensor
    document: Tensor


class LinearTransformer(Attention):
    """Causal linear attention.

    Args:
        chunk: tokens that are computed at once.
        shared: the options of `Attention`.
    """

    name = "linear_transformer"
    tiny = {"chunk": 4}
    declared = Abilities(
        causality="strict", carry="prefix", two_sided=False, global_tokens="none", cross=False,
        compute="linear", activations="linear", state="constant",
    )  # fmt: skip

    def __init__(self, *, chunk: Positive = 64, **shared: Any):
        super().__init__(**shared)
        self.chunk, width = chunk, self.heads * self.head_width
        self.to_q, self.to_k, self.to_v = (nn.Linear(self.dim, width, bias=self.bias_into) for _ in range(3))
        self.to_out = nn.Linear(width, self.dim, bias=self.bias_out)

    def pairs(self, length: int) -> float:
        return float(length * (self.head_width + self.chunk))

    def initial_state(self, batch_size: int) -> Sums:
        at_least(0, batch_size=batch_size)
        device, dtype = place_of(self)
        s = torch.zeros(batch_size, self.heads, self.head_width, self.head_width, device=device, dtype=dtype)
        return Sums(s, s[..., :1].clone(), torch.full((batch_size,), -1, device=device))

    @one_operator
    def forward(
        self, x: Tensor, tokens: Tokens | None = None, *, state: Sums | None = None, source: Source | None = None,
        choices: Any = None,
    ) -> Output:  # fmt: skip
        if choices is not None:
            raise Unsupported(self.name, "choices", "it makes no discrete decisions", "choices=None")
        x, tokens = self.enter(x, tokens, state, source)
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out, after = self._scan(q, k, v, tokens, state or self.initial_state(len(x)))
        return Output(self.to_out(out.transpose(1, 2).flatten(2)), None if state is None else after)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens | None = None) -> Tensor:
        tokens = Tokens.all_valid(len(q), q.shape[2], q.device) if tokens is None else tokens
        return self._scan(q, k, v, tokens, self.initial_state(len(q)))[0]

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: Sums) -> tuple[Tensor, Sums]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, outs = features(q.to(dtype) * self.scale), features(k.to(dtype)), []
        s, z, held = state.s.to(dtype), state.z.to(dtype), state.document
        for at in range(0, q.shape[2], self.chunk):
            part = slice(at, at + self.chunk)
            qs, ks, vs, now = q[:, :, part], k[:, :, part], v[:, :, part].to(dtype), tokens.cut(part)
            seen = (now.document[:, :, None] == now.document[:, None]) & now.valid[:, None] & now.valid[..., None]
            weights = (qs @ ks.mT * seen[:, None]).tril()
            goes_on = ((now.document == held[:, None]) & now.valid)[:, None, :, None]
            total = weights.sum(-1, keepdim=True) + goes_on * (qs @ z) + EPSILON
            outs.append((weights @ vs + goes_on * (qs @ s)) / total)
            last = torch.cat([held[:, None], torch.where(now.valid, now.document, -1)], 1).amax(1)
            same = (last == held)[:, None, None, None]
            ks = ks * ((now.document == last[:, None]) & now.valid)[:, None, :, None]
            s, z, held = s * same + ks.mT @ vs, z * same + ks.sum(2)[..., None], last
        return torch.cat(outs, 2).to(v.dtype), Sums(s.to(state.s), z.to(state.z), held)

    @staticmethod
    def reference(layer: Any, x: Tensor, tokens: Tokens) -> Tensor:
        """Token by token, head by head."""
        q, k, v = (to(x).unflatten(-1, (layer.heads, -1)) for to in (layer.to_q, layer.to_k, layer.to_v))
        q, k = features(q * layer.scale), features(k)
        rows = []
        for b in range(len(x)):
            out = [x.new_zeros(layer.dim) for _ in range(x.shape[1])]
            for i in range(x.shape[1]):
                before = [
                    j for j in range(i + 1) if tokens.valid[b, j] and tokens.document[b, j] == tokens.document[b, i]
                ]
                if tokens.valid[b, i]:
                    weights = (q[b, i] * k[b, before]).sum(-1)
                    mixed = (weights[..., None] * v[b, before]).sum(0) / (weights.sum(0)[:, None] + EPSILON)
                    out[i] = layer.to_out(mixed.flatten())
            rows.append(torch.stack(out))
        return torch.stack(rows)


def features(x: Tensor) -> Tensor:
    return nn.functional.elu(x) + 1
