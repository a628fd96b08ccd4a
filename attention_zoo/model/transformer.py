"""The one skeleton: encoder and decoder, any mechanism inside.

    model = Transformer(attention="longformer", vocab=256, dim=512, depth=6, heads=8)
    out = model(ids)                                   # out.logits [B, L, V]
    out = model(ids, state=model.initial_state(B))     # out.state goes into the next call

Components are given by a word, or as a mapping of a name and options: `norm={"name": "rms", "eps": 1e-6}`. The last
norm of a pre-norm stack is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor, nn

from attention_zoo import registry
from attention_zoo.attention.calls import check_ids
from attention_zoo.contract import (
    Layer,
    Source,
    Tokens,
    Unsupported,
    at_least,
    check_place,
    check_tokens,
    is_integers,
    of_tensor,
)
from attention_zoo.layout.layout import Layout
from attention_zoo.model.block import Block, Stack, Taps
from attention_zoo.model.embedding import build_embedding
from attention_zoo.model.feed_forward import with_flat
from attention_zoo.model.global_tokens import GlobalTokens, asked_for
from attention_zoo.model.heads import POOLINGS, build_head, check_answered, last_valid
from attention_zoo.model.mechanisms import (
    brings_global_tokens,
    entries,
    layers,
    mechanisms,
    outer,
    positions_of,
    wrapped,
)  # fmt: skip
from attention_zoo.model.norm import BatchNorm, build_norm, check_last_only
from attention_zoo.model.output import ModelOutput
from attention_zoo.model.parameters import current_names, parameter_count
from attention_zoo.model.placed import stack_of
from attention_zoo.model.reversible import ReversibleStack
from attention_zoo.model.shorten import shape_of
from attention_zoo.model.state import Running
from attention_zoo.model.wrapper import Nested, abilities_of
from attention_zoo.options import Depth, Heads, Named, Positive, Probability, Seed, checked
from attention_zoo.place import place_of
from attention_zoo.positions import added_to_embeddings
from attention_zoo.rules import OneOf, named, shown

ENDS = "false, true or both"


class Transformer(nn.Module):
    """Embeddings, positions, blocks, head.

    Args:
        attention: name of a backend, mapping, partial, or a list of these tiled over depth; see `model.mechanisms`. A
            wrapper's name: what its option `inner` says, with the wrapper around the stack.
        vocab: number of token ids.
        dim: model width E.
        depth: number of blocks; with shorten, what its layout sums to.
        heads: attention heads of each.
        causal: whether a token sees only the past (decoder) or all (encoder).
        cross: whether each block also attends to a `source`, through full attention.
        head: lm | tokens | classify | pretraining | hidden. Options of lm: see `LanguageModel`.
        classes: number of labels, for tokens, classify and pretraining.
        pooling: mean | first, for classify.
        positions: sinusoidal | learned | axial (added to embeddings), rotary | alibi (in each attention), relative
            (Transformer-XL's own), none, or auto: `model.mechanisms.positions_of`. Options: see `positions/`.
        pre_norm: norm before each branch, or after its addition.
        norm: layer | rms | batch (two-sided models alone). Options: eps; momentum of batch.
        feed_forward: gelu | gelu_tanh | relu | silu | swiglu | none. Options: mult, chunks, width, bias: `FeedForward`.
        ff_mult, ff_chunks: the same as mult and chunks in feed_forward, which they are older than.
        short_conv: taps of a short causal convolution before each attention; 0: none; or a gated one, see `Block`.
        output_dropout: probability to drop a channel of what a branch adds.
        embedding: options of `TokenEmbedding`: scale, types, normed, dropout; or, with cutoffs, of `AdaptiveEmbedding`:
            divide, width, scale, dropout.
        tied: whether the lm head's matrix is the embedding table.
        reversible: activations O(1) in depth, at the price of a second forward. True: the two streams end in their
            mean; "both": side by side, so that last norm and head are twice as wide (Reformer).
        around: wrappers around the whole stack, from the outermost on: names or mappings. They stand around those that
            attention names.
        shorten: fewer tokens in the middle of the stack: layers @ factor, such as "2@1 8@3 2@1", or a mapping; see
            `model.shorten`.
        last_norm: whether a pre-norm stack ends with a norm.
        max_length: number of positions that learned and axial tables hold.
        global_tokens: whether calls bring some; False: weights that only those need are not built, unless a wrapper or
            a mechanism puts some in.
        seed: layer i gets seed + i: of all randomness outside of training. Weights come from torch's default generator.
        origin: of converted weights: where they come from, as plain facts that stay with the model. One has a meaning:
            what it holds as `caution`, `train()` warns of.

    Raises:
        Unsupported: for what a mechanism does not declare.
        ValueError: for a value outside its rule.
    """

    answers_some = True  # `forward` takes `answered`

    @checked
    def __init__(
        self,
        *,
        attention: Any,
        vocab: Positive,
        dim: Positive = 128,
        depth: Depth = 2,
        heads: Heads = 4,
        causal: bool = True,
        cross: bool = False,
        head: Named = "lm",
        classes: Positive | None = None,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "mean",
        positions: Named = "auto",
        pre_norm: bool = True,
        norm: Named = "layer",
        feed_forward: Named = "gelu",
        ff_mult: Positive | None = None,
        ff_chunks: Positive | None = None,
        short_conv: Taps = 0,
        output_dropout: Probability = 0.0,
        embedding: Mapping[str, Any] | None = None,
        tied: bool = True,
        reversible: Annotated[bool | str, OneOf(False, True, "both"), Field(description=ENDS)] = False,
        around: Any = (),
        shorten: Named | None = None,
        last_norm: bool = True,
        max_length: Positive = 4096,
        global_tokens: bool = True,
        seed: Seed = 0,
        origin: Mapping[str, Any] | None = None,
    ):
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self._warned = False
        asked = mechanisms(attention, around)
        positions = given["positions"] = positions_of(positions, asked.listed)
        head_name, _ = named("head", head)
        short = None
        if shorten is not None:
            facts = {"causal": causal, "head": head_name, "cross": cross, "pre_norm": pre_norm}
            short = shape_of(shorten, reversible=reversible, **facts)
            depth = short.depth
        self.config = {
            **given,
            "depth": depth,
            "attention": [entry.plain for entry in entries(attention)],
            "around": [entry.plain for entry in outer(around)],
        }
        self.vocab, self.dim, self.causal, self.cross = vocab, dim, causal, cross
        shared = {"dim": dim, "heads": heads, "causal": causal}
        made = layers(
            asked.listed, depth=depth, positions=positions, seed=seed, handed=asked.handed,
            across=frozenset() if short is None else short.across,
            global_tokens=global_tokens or brings_global_tokens(asked.wrappers, asked.listed), **shared,
        )  # fmt: skip
        feed_forward = with_flat(feed_forward, ff_mult=ff_mult, ff_chunks=ff_chunks)
        blocks = [
            Block(
                layer,
                dim=dim,
                cross=registry.build("full", dim=dim, heads=heads, causal=False, cross=True) if cross else None,
                short_conv=short_conv,
                norm=norm,
                pre_norm=pre_norm,
                feed_forward=feed_forward,
                output_dropout=output_dropout,
            )
            for layer in made
        ]
        self.embedding = build_embedding(embedding or {}, vocab=vocab, dim=dim, norm=norm)
        # said here, since an adapter may come to stand in the embedding's place
        self.types = 0 if self.embedding.types is None else self.embedding.types.num_embeddings
        self.positions = added_to_embeddings(positions, dim=dim, max_length=max_length, causal=causal)
        stack: Layer = ReversibleStack(blocks, end=reversible) if reversible else Stack(blocks)
        if short is not None:
            stack = short.build(blocks, norm=norm, **shared)
        if count := asked_for(made):
            stack = GlobalTokens(inner=stack, count=count, **shared)
        self.stack: Any = wrapped(stack, asked.wrappers, seed=seed, **shared)
        self.width = 2 * dim if reversible == "both" else dim
        self.norm = build_norm(norm, self.width) if pre_norm and last_norm else nn.Identity()
        self.norm_over_batch = isinstance(self.norm, BatchNorm)
        self.head = build_head(
            head, self.embedding, dim=self.width, classes=classes, pooling=pooling, causal=causal, tied=tied, norm=norm
        )
        self.head_name = head_name

    def train(self, mode: bool = True) -> Transformer:
        """See `torch.nn.Module.train`. Warns once of what the weights' origin has as `caution`."""
        caution = (self.config["origin"] or {}).get("caution")
        if mode and caution and not self._warned:
            self._warned = True
            warnings.warn(caution, stacklevel=2)
        return super().train(mode)

    @property
    def carries(self) -> bool:
        """Whether every layer keeps a state from call to call."""
        return self.causal and abilities_of(self.stack).carry != "none"

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
        at_least(0, batch_size=batch_size)
        return Running.start(self.stack.initial_state(batch_size), batch_size, place_of(self.embedding)[0])

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        tokens: Tokens | None = None,
        *,
        types: Int[Tensor, "B L"] | None = None,
        state: Running | None = None,
        source: Source | None = None,
        fresh: Bool[Tensor, " B"] | None = None,
        last_only: bool = False,
        answered: Bool[Tensor, "B L"] | None = None,
    ) -> ModelOutput:
        """Run one call.

        Args:
            ids: in [0, vocab); anything at padding.
            tokens: what each column is; default all valid. With a state, positions go on by themselves, and document
                numbers count over the whole stream; see `Running.place`.
            types: token types, for a model whose embedding has some; default 0 everywhere. Anything at padding.
            state: of the call before, or `initial_state`.
            source: for cross=True; with a state only in the first call.
            fresh: rows that start a new stream: they see nothing of their state. Without a state all do.
            last_only: hidden and logits of each row's last valid token alone, L = 1: all that decoding asks for.
            answered: tokens whose logits are asked for, as training asks: those are [n, V] then, in the tokens' order.
                Default all. What is said of a whole row is said as ever.

        Raises:
            ValueError: for ids out of range (on CUDA the embedding's own assertion says so), or a missing source.
        """
        self._check(ids, tokens, types, state, source, fresh, last_only)
        if answered is not None:
            check_answered(answered, ids, last_only)
        said = tokens is not None or state is not None
        new = state
        if not torch.compiler.is_compiling():
            # once for all layers; where a compiler traces, each operator does it
            B, L = ids.shape
            layout = None if tokens is None else Layout.of(tokens)
            if state is not None:
                layout, new = state.place((B, L), layout, fresh)
            tokens = Layout.plain(B, L, ids.device) if layout is None else layout
            source = None if source is None else source._replace(tokens=Layout.of(source.tokens))
        elif state is not None:
            tokens, new = _placed(state, tokens, (ids.shape[0], ids.shape[1]), fresh)
        x = self._embed(ids, tokens, types)
        run = self.stack if getattr(tokens, "placement", None) is None else stack_of(self, last_only=last_only)
        out = run(x, tokens, state=None if state is None else state.layers, source=source)
        hidden, asked = out.hidden, tokens.valid if said and tokens is not None else None
        if last_only:
            hidden, asked = last_valid(hidden, None if _is_dense(tokens) else asked), None
        hidden = self.norm(hidden, asked) if self.norm_over_batch else self.norm(hidden)
        logits = self.head(hidden, asked, answered)
        if new is not None:
            new = new.after(out.state)
        return ModelOutput(logits, hidden, new, dict(out.losses))

    def _embed(self, ids: Tensor, tokens: Tokens | None, types: Tensor | None) -> Tensor:
        valid = None if tokens is None or _is_dense(tokens) else tokens.valid
        if valid is not None:
            ids = ids.masked_fill(~valid, 0)
            types = None if types is None else types.masked_fill(~valid, 0)
        places = None
        if self.positions is not None:
            places = self.positions(self._positions_of(ids, tokens), last=self._last_position(tokens))
        return self.embedding(ids, places, types, valid)

    def _last_position(self, tokens: Tokens | None) -> int | None:
        """The largest position of a valid token, where the host knows it."""
        if not isinstance(tokens, Layout) or getattr(self.positions, "uncounted", None) is not None:
            return None
        if tokens.implied:
            return tokens.valid.shape[1] - 1
        return int(np.where(tokens.host.valid, tokens.host.position, 0).max(initial=0))

    def _positions_of(self, ids: Tensor, tokens: Tokens | None) -> Tensor:
        """[B or 1, L]; -1 at tokens that are not counted."""
        uncounted = getattr(self.positions, "uncounted", None)
        if uncounted is not None:
            if tokens is None:
                tokens = Tokens.all_valid(ids.shape[0], ids.shape[1], ids.device)
            counted = Tokens.of(tokens.valid & (ids != uncounted), document=tokens.document)
            return counted.position.masked_fill(~counted.valid, -1)
        if tokens is None or (isinstance(tokens, Layout) and tokens.implied):
            return torch.arange(ids.shape[1], device=ids.device)[None]
        return tokens.position if _is_dense(tokens) else tokens.position.masked_fill(~tokens.valid, 0)

    def _check(
        self, ids: Any, tokens: Tokens | None, types: Any, state: Any, source: Any, fresh: Any, last_only: bool
    ) -> None:
        traced = not torch.compiler.is_compiling() and torch._C._is_tracing()  # sizes are tensors then
        known = not traced and types is None and type(ids) is Tensor and ids.dtype == torch.int64 and not ids.is_meta
        if not (known and ids.ndim == 2 and ids.shape[1]):
            check_ids(self.embedding, ids, types)
            if not is_integers(ids) or ids.ndim != 2 or ids.shape[1] == 0:
                raise ValueError(f"ids must be integers [batch, length >= 1], got {of_tensor(ids)}")
        if tokens is not None:
            check_tokens(tokens, ids.shape)
            check_place(tokens, ids)
        if source is not None and not isinstance(source, Source):
            raise ValueError(f"source must be a Source(hidden, tokens), got {shown(source)}")
        if state is not None:
            self._check_state(state, len(ids))
        # elsewhere reading a number back would make every call wait, and a graph break
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(ids):
            real = ids if tokens is None else ids.masked_fill(~tokens.valid, 0)
            low, high = torch.stack(real.aminmax()).tolist()
            if low < 0 or high >= self.vocab:
                raise ValueError(f"ids must lie in [0, {self.vocab}), got {low if low < 0 else high}")
        if types is not None:
            if not self.types:
                raise ValueError("types needs a model whose embedding has some: embedding={'types': 2}")
            if not is_integers(types) or types.shape != ids.shape:
                raise ValueError(f"types must be integers of shape {tuple(ids.shape)}, got {of_tensor(types)}")
            if types.device.type == "cpu" and len(types):
                real = types if tokens is None else types.masked_fill(~tokens.valid, 0)
                if int(real.min()) < 0 or int(real.max()) >= self.types:
                    raise ValueError(f"types must lie in [0, {self.types}), got {int(real.min())} to {int(real.max())}")
        if last_only and self.head_name in ("classify", "pretraining"):
            raise ValueError(f"last_only needs a head that answers for each token alone, got head={self.head_name}")
        if last_only:
            check_last_only(self)
        if source is not None and not self.cross:
            raise ValueError("source needs a model built with cross=True")
        if self.cross and source is None and (state is None or (len(ids) and not bool((state.next > 0).any()))):
            raise ValueError("source must be given to a model built with cross=True, in the first call at least")
        if self.cross and fresh is not None:
            raise ValueError("fresh is for one stream of text; with cross=True start a new state instead")
        if fresh is not None and not (
            isinstance(fresh, Tensor) and fresh.dtype == torch.bool and fresh.shape == ids.shape[:1]
        ):
            raise ValueError(f"fresh must be bool of shape {tuple(ids.shape[:1])}, got {of_tensor(fresh)}")

    def _check_state(self, state: Any, batch: int) -> None:
        if not isinstance(state, Running):
            raise ValueError(
                f"state must be of this model, from initial_state or the call before, got {type(state).__name__}"
            )
        if len(state.next) != batch:
            raise ValueError(f"state must have as many rows as ids, {batch}, got {len(state.next)}")
        layers, stack = state.layers, self.stack
        while getattr(stack, "wraps", False):  # also where torch.compile stands in between
            if not isinstance(layers, Nested):
                raise ValueError(f"state must be of a model with {stack.name} around its stack, got one without")
            layers, stack = layers.inner, stack.inner
        blocks = getattr(stack, "layers", None)
        if blocks is not None and isinstance(layers, Nested):
            raise ValueError("state must be of a model with as many wrappers around its stack, got one of more")
        if blocks is not None and len(layers) != len(blocks):
            raise ValueError(f"state must be of a model with {len(blocks)} blocks, got one of {len(layers)}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        renamed = current_names(state_dict, prefix)
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch._disable_dynamo  # as torch.compiler.disable, without loading the compiler
def _placed(state: Running, tokens: Tokens | None, shape: tuple[int, int], fresh: Tensor | None) -> Any:
    """As `Running.place`, where a compiler traces: the clock is the host's."""
    return state.place(shape, None if tokens is None else Layout.of(tokens), fresh)


def _is_dense(tokens: Tokens | None) -> bool:
    """Whether it is known that there is no padding."""
    return isinstance(tokens, Layout) and tokens.dense
