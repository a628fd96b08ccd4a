"""Text -> ids with a model's own tokeniser, kept beside its weights; a byte is a token where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
"""What tokenisers of transformers are made of: a folder with none of these has none."""


def read_tokeniser(source: str | Path, *, revision: str | None = None) -> Any:
    """The tokeniser of a folder or of a model on the hub, as transformers reads it; None if the folder holds none.

    Raises:
        ValueError: if transformers is not installed, or cannot read it.
    """
    folder = Path(source).expanduser()
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir() and not any((folder / name).exists() for name in FILES):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(f"{source}: its tokeniser needs pip install 'attention-zoo[huggingface]'") from None
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else str(source), revision=revision)
    except Exception as error:  # of many kinds, as tokenisers are
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source}: its tokeniser cannot be read: {reason}") from None


def encode(tokeniser: Any, raw: bytes) -> list[int]:
    """Ids of a text, without special tokens; of its bytes if there is no tokeniser."""
    if tokeniser is None:
        return list(raw)
    found = tokeniser(raw.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
    return list(found)
