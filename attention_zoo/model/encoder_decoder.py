"""Encoder and decoder, joined by cross-attention. Vaswani et al. 2017, §3.1.

model = EncoderDecoder(
    encoder=Transformer(attention="bigbird", vocab=256, causal=False, head="hidden"),
    decoder=Transformer(attention="longformer", vocab=256, cross=True),
)
out = model(ids, source=source_ids)
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from attention_zoo.contract import Source, Tokens, add_losses
from attention_zoo.layout.layout import Layout
from attention_zoo.model.output import ModelOutput
from attention_zoo.model.parameters import parameter_count
from attention_zoo.model.state import Running
from attention_zoo.model.transformer import Transformer
from attention_zoo.options import checked
from attention_zoo.rules import shown


class EncoderDecoder(nn.Module):
    """Two skeletons: any two-sided mechanism reads, any causal one writes.

    Args:
        encoder: built with causal=False and head="hidden".
        decoder: built with causal=True and cross=True, of the same dim.
    """

    answers_some = True  # `forward` takes `answered`

    @checked
    def __init__(self, *, encoder: Transformer, decoder: Transformer):
        for name, given in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(given, Transformer):
                raise ValueError(f"{name} must be a Transformer, got {shown(given)}")
        super().__init__()
        if encoder.causal or encoder.head_name != "hidden" or encoder.cross:
            raise ValueError("encoder must be built with causal=False, head=hidden and cross=False")
        if not decoder.causal or not decoder.cross:
            raise ValueError("decoder must be built with causal=True and cross=True")
        if encoder.width != decoder.dim:
            raise ValueError(f"encoder and decoder must have the same dim, got {encoder.width} and {decoder.dim}")
        self.encoder, self.decoder = encoder, decoder
        self.config = {"encoder": encoder.config, "decoder": decoder.config}
        self.vocab, self.dim = decoder.vocab, decoder.dim

    @property
    def carries(self) -> bool:
        """Whether every layer of the decoder keeps a state from call to call."""
        return self.decoder.carries

    @property
    def parameter_count(self) -> int:
        """All parameters, shared ones once. Nothing is excluded."""
        return parameter_count(self)

    def initial_state(self, batch_size: int) -> Running:
        """An empty state of the decoder. It will hold the source's keys and values too."""
        return self.decoder.initial_state(batch_size)

    def encode(
        self, ids: Int[Tensor, "B S"], tokens: Tokens | None = None, seen: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Source, dict[str, Tensor]]:
        """What the decoder attends to, and the encoder's auxiliary losses.

        Args:
            seen: which tokens' hidden states the decoder attends to; the encoder reads all. None: all valid ones.
        """
        if tokens is None:
            out, tokens = self.encoder(ids), Layout.plain(ids.shape[0], ids.shape[1], ids.device)
        else:
            tokens = Layout.of(tokens)
            out = self.encoder(ids, tokens)
        if seen is not None:
            tokens = Layout.of(tokens._replace(valid=tokens.valid & seen, is_global=tokens.is_global & seen))
        return Source(out.hidden, tokens), out.losses

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        tokens: Tokens | None = None,
        *,
        state: Running | None = None,
        source: Int[Tensor, "B S"] | tuple[Any, ...] | Source | None = None,
        fresh: Bool[Tensor, " B"] | None = None,
        last_only: bool = False,
        answered: Bool[Tensor, "B L"] | None = None,
    ) -> ModelOutput:
        """Run one call of the decoder.

        Args:
            ids, tokens, state, fresh, last_only, answered: see `Transformer.forward`.
            source: ids, a tuple of what `encode` takes, or what it gave; with a state only in the first call.
        """
        losses: dict[str, Tensor] = {}
        if source is not None and not isinstance(source, Source):
            source, losses = self.encode(*source) if isinstance(source, tuple) else self.encode(source)
        options: Any = {"fresh": fresh, "last_only": last_only, "answered": answered}
        out = self.decoder(ids, tokens, state=state, source=source, **options)
        return out._replace(losses=add_losses(losses, out.losses))
