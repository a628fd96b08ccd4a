"""The skeleton: blocks, stacks, heads, generation, saved models."""

from attention_zoo.model.beam import Beams, beam_search
from attention_zoo.model.encoder_decoder import EncoderDecoder
from attention_zoo.model.generate import generate, stream
from attention_zoo.model.output import ModelOutput
from attention_zoo.model.parameters import parameter_count, unequal
from attention_zoo.model.saved import load, save
from attention_zoo.model.state import Running, detach, reorder, reserve, state_bytes
from attention_zoo.model.transformer import Transformer
from attention_zoo.model.wrapper import Nested, Wrapper

__all__ = [
    "Beams", "EncoderDecoder", "ModelOutput", "Nested", "Running", "Transformer", "Wrapper", "beam_search", "detach",
    "generate", "load", "parameter_count", "reorder", "reserve", "save", "state_bytes", "stream", "unequal",
]  # fmt: skip
