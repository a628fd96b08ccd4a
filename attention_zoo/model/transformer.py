"""The one skeleton: encoder and decoder, any mechanism inside.

    model = Transformer(attention="longformer", vocab=256, dim=512, depth=6, heads=8)
    out = model(ids)                                   # out.logits [B, L, V]
    out = model(ids, state=model.initial_state(B))     # out.state goes into the next call

Embeddings are drawn at E^-1/2 and scaled by √E when read (Vaswani et al. 2017, §3.4), so that tied logits start at unit
scale. The last norm of a pre-norm stack is here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attention_zoo import registry
from attention_zoo.contract import Source, Tokens, Unsupported, at_least, check_tokens
from attention_zoo.model.block import NORMS, Block, Stack
from attention_zoo.model.global_tokens import ExtraGlobalTokens
from attention_zoo.model.heads import build_head
from attention_zoo.model.mechanisms import entries, layers
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.reversible import ReversibleStack
from attention_zoo.model.state import Running
from attention_zoo.positions import EMBEDDING_LEVEL


class ModelOutput(NamedTuple):
    """What a model returns.

    Fields:
        logits: [B, L, V] (lm), [B, L, C] (tokens), [B, C] (classify) or None (hidden).
        hidden: [B, L, E], after the last norm; finite at padding.
        state: None in, None out.
        losses: auxiliary losses by name, weighted already.
    """

    logits: Tensor | None
    hidden: Float[Tensor, "B L E"]
    state: Any
    losses: dict[str, Tensor]


class Transformer(nn.Module):
    """Embeddings, positions, blocks, head.

    Args:
        attention: name of a backend, mapping, partial, or a list of these tiled over depth; see `model.mechanisms`.
        vocab: number of token ids.
        dim: model width E.
        depth: number of blocks.
        heads: attention heads of each.
        causal: whether a token sees only the past (decoder) or all (encoder).
        cross: whether each block also attends to a `source`, through full attention.
        head: lm | tokens | classify | hidden.
        classes: number of labels, for tokens and classify.
        pooling: mean | first, for classify.
        positions: sinusoidal | learned | axial (added to embeddings), rotary | alibi (in each attention), relative
            (Transformer-XL's own), none.
        pre_norm: norm before each branch, or after its addition.
        norm: layer | rms.
        feed_forward: gelu | relu | swiglu.
        ff_mult: its width over E.
        ff_chunks: pieces along the length in which it runs; more save memory.
        short_conv: taps of a short causal convolution before each attention; 0: none.
        output_dropout: probability to drop a channel of what a branch adds.
        tied: whether the lm head's matrix is the embedding table.
        reversible: activations O(1) in depth, at the price of a second forward.
        max_length: number of positions that learned and axial tables hold.
        seed: layer i gets seed + i: of all randomness outside of training. Weights come from torch's default generator.

    Raises:
        Unsupported: for what a mechanism does not declare.
        ValueError: for a value outside its rule.
    """

    def __init__(
        self,
        *,
        attention: Any,
        vocab: int,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        causal: bool = True,
        cross: bool = False,
        head: str = "lm",
        classes: int | None = None,
        pooling: str = "mean",
        positions: str = "sinusoidal",
        pre_norm: bool = True,
        norm: str = "layer",
        feed_forward: str = "gelu",
        ff_mult: int = 4,
        ff_chunks: int = 1,
        short_conv: int = 0,
        output_dropout: float = 0.0,
        tied: bool = True,
        reversible: bool = False,
        max_length: int = 4096,
        seed: int = 0,
    ):
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        at_least(1, vocab=vocab, dim=dim, depth=depth, heads=heads, max_length=max_length)
        self.config = {**given, "attention": [entry.plain for entry in entries(attention)]}
        self.vocab, self.dim, self.causal, self.cross = vocab, dim, causal, cross
        shared = {"dim": dim, "heads": heads, "causal": causal}
        mechanisms = layers(attention, depth=depth, positions=positions, seed=seed, **shared)
        blocks = [
            Block(
                layer,
                dim=dim,
                cross=registry.build("full", dim=dim, heads=heads, causal=False, cross=True) if cross else None,
                short_conv=short_conv,
                norm=norm,
                pre_norm=pre_norm,
                feed_forward=feed_forward,
                ff_mult=ff_mult,
                ff_chunks=ff_chunks,
                output_dropout=output_dropout,
            )
            for layer in mechanisms
        ]
        self.embedding = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        scheme = EMBEDDING_LEVEL.get(positions)
        self.positions = None if scheme is None else scheme(dim=dim, max_length=max_length)
        self.extra = ExtraGlobalTokens.asked_for(mechanisms, dim)
        self.stack = (ReversibleStack if reversible else Stack)(blocks)
        self.norm = NORMS[norm](dim) if pre_norm else nn.Identity()
        self.head = build_head(
            head, self.embedding, classes=classes, pooling=pooling, causal=causal, tied=tied
        )  # fmt: skip

    @property
    def carries(self) -> bool:
        """Whether every layer keeps a state from call to call."""
        return self.causal and all(layer.abilities.carry != "none" for layer in self.stack.attentions)

    @property
    def parameter_count(self) -> int:
        """All parameters, shared ones once. Nothing is excluded."""
        return parameter_count(self)

    def initial_state(self, batch_size: int) -> Running:
        """An empty state for `batch_size` rows.

        Raises:
            Unsupported: if some layer keeps none, or the model is two-sided.
        """
        if not self.carries:
            raise Unsupported(
                "this model", "state", "it is two-sided or a mechanism keeps none", "state=None and all tokens at once"
            )
        return Running.start(self.stack.initial_state(batch_size), batch_size, self.embedding.weight.device)

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        tokens: Tokens | None = None,
        *,
        state: Running | None = None,
        source: Source | None = None,
        fresh: Bool[Tensor, " B"] | None = None,
    ) -> ModelOutput:
        """Run one call.

        Args:
            ids: in [0, vocab); anything at padding.
            tokens: what each column is; default all valid. With a state, positions go on by themselves, and document
                numbers count over the whole stream; see `Running.place`.
            state: of the call before, or `initial_state`.
            source: for cross=True; with a state only in the first call.
            fresh: rows that start a new stream: they see nothing of their state. Without a state all do.

        Raises:
            ValueError: for ids out of range (on CUDA the embedding's own assertion says so), or a missing source.
        """
        self._check(ids, tokens, state, source, fresh)
        new = state
        if state is not None:
            valid = torch.ones_like(ids, dtype=torch.bool) if tokens is None else tokens.valid
            tokens, new = state.place(valid, tokens, fresh)
        x = self._embed(ids, tokens)
        inner, columns = tokens, None
        if self.extra is not None:
            x, inner, columns = self.extra.insert(x, tokens)
        out = self.stack(x, inner, state=None if state is None else state.layers, source=source)
        hidden = self.norm(out.hidden if columns is None else ExtraGlobalTokens.strip(out.hidden, columns))
        logits = self.head(hidden, None if tokens is None else tokens.valid)
        if new is not None:
            new = new._replace(layers=out.state)
        return ModelOutput(logits, hidden, new, dict(out.losses))

    def _embed(self, ids: Tensor, tokens: Tokens | None) -> Tensor:
        if tokens is not None:
            ids = ids.masked_fill(~tokens.valid, 0)
        x = self.embedding(ids) * self.dim**0.5
        if self.positions is None:
            return x
        if tokens is None:
            position = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            position = tokens.position.masked_fill(~tokens.valid, 0)
        return x + self.positions(position).to(x.dtype)

    def _check(self, ids, tokens, state, source, fresh) -> None:
        if ids.ndim != 2 or ids.dtype.is_floating_point or ids.shape[1] == 0:
            raise ValueError(f"ids must be integers [batch, length >= 1], got {ids.dtype} of shape {tuple(ids.shape)}")
        if tokens is not None:
            check_tokens(tokens, ids.shape)
        if ids.device.type == "cpu":  # elsewhere reading a number back would make every call wait
            real = ids if tokens is None else ids.masked_fill(~tokens.valid, 0)
            low, high = (int(bound) for bound in real.aminmax())
            if low < 0 or high >= self.vocab:
                raise ValueError(f"ids must lie in [0, {self.vocab}), got {low if low < 0 else high}")
        if source is not None and not self.cross:
            raise ValueError("source needs a model built with cross=True")
        if self.cross and source is None and (state is None or not bool((state.next > 0).any())):
            raise ValueError("source must be given to a model built with cross=True, in the first call at least")
        if self.cross and fresh is not None:
            raise ValueError("fresh is for one stream of text; with cross=True start a new state instead")
        if fresh is not None and fresh.shape != ids.shape[:1]:
            raise ValueError(f"fresh must be of shape {tuple(ids.shape[:1])}, got {tuple(fresh.shape)}")
