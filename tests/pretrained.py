"""Tiny models of transformers with random weights, on disk, and inputs for them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20,
    "max_position_embeddings": 40,
}  # fmt: skip


def random_model(cls: Any, config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The model in evaluation mode, with weights and biases at a scale at which an error in any of them shows."""
    torch.manual_seed(seed)
    model = cls(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype) * (0.5 if parameter.ndim == 1 else 0.25))
    return model


def saved(cls: Any, config: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> Any:
    """Build a model at `SHAPE` and the options, and write it as transformers does."""
    shape = {"gpt2": {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40}}
    shape = shape.get(config.model_type, SHAPE)
    if "CausalLM" in cls.__name__ or config.model_type == "gpt2":
        shape = {**shape, "bos_token_id": 1, "eos_token_id": None}  # nothing ends a text before its time
    model = random_model(cls, config(**{**shape, **options}), seed=seed, dtype=dtype)
    model.save_pretrained(folder)
    return model


def ragged_mask(model: Any, counts: list[int], *, side: str = "right", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids without the padding's own among the text, and their attention mask."""
    length, generator = max(counts), torch.Generator().manual_seed(seed)
    padding = model.config.pad_token_id or 0
    ids = torch.randint(model.config.vocab_size - 3, (len(counts), length), generator=generator) + 3
    column, count = torch.arange(length)[None], torch.tensor(counts)[:, None]
    keep = column < count if side == "right" else column >= length - count
    return ids.masked_fill(~keep, padding), keep.long()


EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest difference of logits that the issue allows."""


def difference(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Largest difference at tokens that are not padding."""
    return float((one - other)[mask.bool()].abs().max())


def exactly(monkeypatch: Any, dtype: torch.dtype, model: Any = None) -> None:
    """Lift transformers' detours through float32 (in softmax, RMS norm, rotary angles), so that float64 is float64."""
    if dtype != torch.float64:
        return
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))
    for module in () if model is None else model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = partial(_cos_sin, _frequencies(model.config))


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def _cos_sin(frequencies: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.cat([position_ids[..., None] * frequencies] * 2, -1)
    return angle.cos(), angle.sin()


def _frequencies(config: Any) -> Tensor:
    """Of the rotary pairs, one at a time, from the published rules."""
    rope, width, found = config.rope_parameters, getattr(config, "head_dim", None), []
    width = width or config.hidden_size // config.num_attention_heads
    for pair in range(width // 2):
        frequency = rope["rope_theta"] ** (-2 * pair / width)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        elif rope["rope_type"] == "llama3":
            wavelength, length = 2 * math.pi / frequency, rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > length / low:
                frequency /= rope["factor"]
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)
