"""Position schemes, one a file. Embedding-level ones add to the input once; attention-level ones enter each layer."""

from collections.abc import Mapping
from typing import Any

from attention_zoo.positions.alibi import Alibi
from attention_zoo.positions.axial import Axial
from attention_zoo.positions.learned import Learned
from attention_zoo.positions.rotary import Rotary
from attention_zoo.positions.scheme import AttentionPositions
from attention_zoo.positions.sinusoidal import Sinusoidal
from attention_zoo.rules import Unsupported, known_options, named

ATTENTION_LEVEL: dict[str, type[AttentionPositions]] = {"none": AttentionPositions, "rotary": Rotary, "alibi": Alibi}
EMBEDDING_LEVEL: dict[str, Any] = {"sinusoidal": Sinusoidal, "learned": Learned, "axial": Axial}

__all__ = [
    "ATTENTION_LEVEL", "EMBEDDING_LEVEL", "Alibi", "AttentionPositions", "Axial", "Learned", "Rotary", "Sinusoidal",
    "added_to_embeddings",
]  # fmt: skip


def added_to_embeddings(positions: str | Mapping[str, Any], *, dim: int, max_length: int, causal: bool) -> Any:
    """The scheme that a model adds to its embeddings; None where the word is another one.

    Raises:
        Unsupported: for tokens that do not count, in a causal model.
    """
    name, options = named("positions", positions)
    scheme = EMBEDDING_LEVEL.get(name)
    if scheme is None:
        return None
    known_options(f"positions={name}", options, scheme.options)
    if causal and options.get("uncounted") is not None:
        raise Unsupported(
            f"positions={name}", "uncounted with causal=True", "a state does not remember which tokens counted",
            "causal=False",
        )  # fmt: skip
    return scheme(dim=dim, max_length=max_length, **options)
