"""Every peer by name, and whether it is there."""

from __future__ import annotations

from attention_zoo.measure.peers.adapter import Peer
from attention_zoo.measure.peers.block_recurrent_pytorch import BlockRecurrentPytorch
from attention_zoo.measure.peers.compressive_transformer_pytorch import CompressiveTransformerPytorch
from attention_zoo.measure.peers.dense_xl import DenseXL
from attention_zoo.measure.peers.full import Fused, Materialised
from attention_zoo.measure.peers.hourglass_transformer import HourglassTransformer
from attention_zoo.measure.peers.hugging_face import BigBird, Longformer, OlderBigBird, Reformer
from attention_zoo.measure.peers.local_attention import LocalAttention
from attention_zoo.measure.peers.memory_compressed_attention import MemoryCompressedAttention
from attention_zoo.measure.peers.reformer_pytorch import ReformerPytorch

PEERS: dict[str, type[Peer]] = {
    "sdpa": Fused,
    "materialised": Materialised,
    "hf_longformer": Longformer,
    "local_attention": LocalAttention,
    "hf_bigbird": BigBird,
    "hf_bigbird_4_57": OlderBigBird,
    "hf_reformer": Reformer,
    "reformer_pytorch": ReformerPytorch,
    "xl_dense": DenseXL,
    "compressive_transformer_pytorch": CompressiveTransformerPytorch,
    "memory_compressed_attention": MemoryCompressedAttention,
    "hourglass_transformer": HourglassTransformer,
    "block_recurrent_pytorch": BlockRecurrentPytorch,
}
"""Adapters by the name that options and rows use. Building one imports its library; the table does not."""
