"""Tiny models of transformers with random weights, on disk, and inputs for them."""

from __future__ import annotations

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
    model = random_model(cls, config(**{**SHAPE, **options}), seed=seed, dtype=dtype)
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
